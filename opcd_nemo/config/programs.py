"""The typed keys of the programs beside training: `conf/{doctor,plan}.yaml`."""

from __future__ import annotations

from dataclasses import dataclass

from opcd_nemo.config.doc import doc


@dataclass(kw_only=True)
class DoctorConfig:
    """What the doctor looks at, and what it allows."""

    environment_only: bool = doc("look at the machine alone, without models or ranks")
    num_prompts: int = doc("prompts of the small batch", minimum=1)
    num_lengths: int = doc("training prompts whose lengths are measured", minimum=1)
    max_new_tokens: int = doc(
        "the longest answer of the small batch, in tokens; a run's shorter limit wins", minimum=1
    )
    min_free_disk_gib: float = doc("free disk space besides the checkpoints, in GiB", minimum=0)
    max_divergence: float = doc("largest divergence of a model from itself, in nats", minimum=0)
    max_gradient_error: float = doc(
        "largest error of the gradient, as a share of its largest entry", minimum=0
    )
    max_logprob_gap: dict[str, float] = doc(
        "largest mean difference between the engine's and the model's log-probabilities, in nats "
        "a token, by student.dtype",
        minimum=0,
    )


@dataclass(kw_only=True)
class PlanConfig:
    """What the plan shows, and the shapes and lengths that it cannot read from files."""

    sweep: bool = doc("rank all layouts of parallel.num_ranks")
    show: int = doc("rows of that ranking", minimum=1)
    student_config: str | None = doc(
        "the student's config.json, where student.path does not exist; null: conf/shapes by name"
    )
    teacher_config: str | None = doc("the same for the teacher")
    prompt_tokens: int | None = doc(
        "mean tokens of a prompt, with the chat template; null: measured on the task's prompts",
        minimum=1,
    )
    context_tokens: int | None = doc(
        "tokens that the context adds to the teacher's prompt; null: measured", minimum=0
    )
    response_tokens: int | None = doc(
        "mean tokens of an answer; null: the longest allowed", minimum=1
    )
    turns: float = doc("sequences an episode; a game has up to task.rounds", above=0)
