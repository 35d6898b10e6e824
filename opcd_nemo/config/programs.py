"""The typed keys of the programs beside training: their files are in `conf/`, as `chat.yaml`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from opcd_nemo.config.doc import doc
from opcd_nemo.config.limits import (
    LAYERS,
    MOST_RANKS,
    MOST_SEED,
    MOST_SEQUENCES,
    MOST_STEPS,
    MOST_TOKENS,
)
from opcd_nemo.config.plugs import check_plug
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.config.schema import read_schema
from opcd_nemo.config.train import DTYPES, MODEL, ParallelConfig
from opcd_nemo.errors import UserError

_CHECKPOINT = "runs/demo_brevity-dp2/checkpoints/step=30.ckpt"
_MOST_PROBED = 4096  # tokens: the doctor compares a few answers, not a run's
_MOST_NATS = 100.0  # a token of probability 0 in fp32


@dataclass(kw_only=True)
class DoctorConfig:
    """What the doctor looks at, and what it allows."""

    environment_only: bool = doc("look at the machine alone, without models or ranks")
    num_prompts: int = doc("prompts of the small batch", minimum=1, maximum=MOST_SEQUENCES)
    num_lengths: int = doc(
        "training prompts whose lengths are measured", minimum=1, maximum=MOST_STEPS
    )
    max_new_tokens: int = doc(
        "the longest answer of the small batch, in tokens; a run's shorter limit wins",
        minimum=1,
        maximum=_MOST_PROBED,
    )
    min_free_disk_gib: float = doc(
        "free disk space besides the checkpoints, in GiB", minimum=0, maximum=1e9
    )
    max_divergence: float = doc(
        "largest divergence of a model from itself, in nats", minimum=0, maximum=_MOST_NATS
    )
    max_gradient_error: float = doc(
        "largest error of the gradient, as a share of its largest entry", minimum=0, maximum=1
    )
    max_logprob_gap: dict[str, float] = doc(
        "largest mean difference between the engine's and the model's log-probabilities, in nats "
        "a token, by student.dtype",
        minimum=0,
        maximum=_MOST_NATS,
    )

    def check(self, prefix: str) -> None:
        """Refuse limits that no run has, or that a run lacks.

        Raises:
            UserError: `prefix` stands before the key.
        """
        if set(self.max_logprob_gap) != set(DTYPES):
            allowed = f"a number for each of {', '.join(DTYPES)}"
            raise UserError(f"{prefix}max_logprob_gap", self.max_logprob_gap, allowed)


@dataclass(kw_only=True)
class ChatConfig:
    """A chat with a model, with and without its context."""

    from_: str = doc("the model to talk to", takes=MODEL, example=_CHECKPOINT)
    system: str | None = doc(
        "a system prompt as the context; null: the context that the model was distilled from"
    )
    dtype: str | None = doc("precision of the model; null: as it is stored", choices=DTYPES)
    sampling: Sampling
    seed: int = doc("of the answers", minimum=0, maximum=MOST_SEED)
    engine: Any = doc("what generates answers", plug=True)
    parallel: ParallelConfig

    def check(self, prefix: str) -> None:
        """Refuse a blank context, and ranks that nobody starts.

        Raises:
            UserError: `prefix` stands before the key.
        """
        if self.system is not None and not self.system.strip():
            raise UserError(f"{prefix}system", self.system, "a text that is not blank, or null")
        _check_ranks(self.parallel, prefix)


@dataclass(kw_only=True)
class ExportConfig:
    """From any kind of model to another."""

    from_: str = doc("the model to convert", takes=MODEL, example=_CHECKPOINT)
    to: str = doc(
        "what is written", takes="a new path, or hf://owner/name[@revision]", example="exported"
    )
    format: str = doc(
        "a Hugging Face folder, a .nemo file, or a folder of what a .nemo file holds",
        choices=("hf", "nemo", "mcore"),
    )
    dtype: str | None = doc("precision of the copy; null: as it is stored", choices=DTYPES)
    max_file_bytes: int = doc("the largest safetensors file", minimum=1, maximum=10**15)
    parallel: ParallelConfig

    def check(self, prefix: str) -> None:
        """Refuse ranks that nobody starts.

        Raises:
            UserError: `prefix` stands before the key.
        """
        _check_ranks(self.parallel, prefix)


def _check_ranks(parallel: ParallelConfig, prefix: str) -> None:
    world_size = os.environ.get("WORLD_SIZE", "1")  # torchrun's, or this process alone
    if parallel.num_ranks != 1 and str(parallel.num_ranks) != world_size:
        allowed = f"{world_size}: the command starts no ranks"
        raise UserError(f"{prefix}parallel.num_ranks", parallel.num_ranks, allowed)


@dataclass(kw_only=True)
class PlanConfig:
    """What the plan shows, and the shapes and lengths that it cannot read from files."""

    sweep: bool = doc("rank all layouts of parallel.num_ranks")
    show: int = doc("rows of that ranking", minimum=1, maximum=10_000)
    student_config: str | None = doc(
        "the student's config.json, where student.path does not exist; null: by the model's name "
        "in conf/shapes.yaml"
    )
    teacher_config: str | None = doc("the same for the teacher")
    prompt_tokens: int | None = doc(
        "mean tokens of a prompt, with the chat template; null: measured on the task's prompts",
        minimum=1,
        maximum=MOST_TOKENS,
    )
    context_tokens: int | None = doc(
        "tokens that the context adds to the teacher's prompt; null: measured",
        minimum=0,
        maximum=MOST_TOKENS,
    )
    response_tokens: int | None = doc(
        "mean tokens of an answer; null: the longest allowed", minimum=1, maximum=MOST_TOKENS
    )
    turns: float = doc(
        "sequences an episode; a game has up to task.rounds", above=0, maximum=MOST_SEQUENCES
    )


@dataclass(kw_only=True)
class RehearseConfig:
    """A rehearsal of a run on GPUs that do not exist."""

    layers: int | None = doc("layers of each model; null: all of them", minimum=1, maximum=LAYERS)
    ranks: list[int] | None = doc(
        "ranks of the world that are played; null: the first and last along tp, pp, dp and cp",
        minimum=0,
        maximum=MOST_RANKS,
    )
    tokens: int = doc("tokens that are sampled of every answer", minimum=1, maximum=MOST_TOKENS)
    prompt_tokens: int = doc(
        "tokens of a prompt, with the chat template", minimum=1, maximum=MOST_TOKENS
    )
    context_tokens: int = doc(
        "tokens that the context adds to the teacher's prompt", minimum=1, maximum=MOST_TOKENS
    )
    response_tokens: int | None = doc(
        "tokens of an answer; null: the longest allowed", minimum=1, maximum=MOST_TOKENS
    )
    megatron_core: str | None = doc(
        "a version of megatron-core, or the folder of its unpacked wheel; null: the installed one"
    )
    transformer_engine: str | None = doc(
        "a version of Transformer Engine, or the folder of its unpacked wheel; null: without it, "
        "with the layers of parallel.layer_spec=local"
    )


def load_chat(raw: DictConfig) -> ChatConfig:
    """Check `conf/chat.yaml` as it was composed and return it typed.

    Raises:
        UserError: a key is wrong.
    """
    config = read_schema(ChatConfig, raw)
    check_plug("engine", config.engine)
    return config
