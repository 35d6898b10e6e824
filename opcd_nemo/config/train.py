"""The typed schema of a training run, and the checks that need nothing but the values.

Values live in `conf/`, once; the dataclasses have no defaults. `load_config` turns every misspelt,
missing, wrongly typed or out-of-range key into a one-line `UserError`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig

from opcd_nemo.config.doc import doc
from opcd_nemo.config.limits import MOST_RANKS, MOST_SEED, MOST_SEQUENCES, MOST_STEPS, MOST_TOKENS
from opcd_nemo.config.plugs import check_plug
from opcd_nemo.config.rules import check_rules
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.config.schema import read_schema
from opcd_nemo.config.third_parties import ManagerKeys, TrainerKeys
from opcd_nemo.errors import UserError

MODEL = (
    "a Hugging Face folder, a .gguf or .nemo file, an unpacked .nemo, a training checkpoint, "
    "hf://owner/name"
)
DTYPES = ("bf16", "fp32")
MOST_WAIT_S = 30 * 86_400  # a month; clusters end jobs sooner
MOST_LAYERS = 10_000
_SAMPLERS = ("student", "teacher")
TRAINED_CONTROLS = ("trained_wrong_context", "trained_without_context")
CONTROLS = ("wrong_context", "context_returned", *TRAINED_CONTROLS)


@dataclass(kw_only=True)
class StudentConfig:
    """The model that learns."""

    path: str = doc("the model that learns", takes=MODEL, example="models/Qwen3-0.6B")
    keep_layers: list[int] | None = doc(
        "build the student of these layers of the teacher; null: it has all its layers",
        minimum=0,
        maximum=MOST_LAYERS,
        example="[0,2,4]",
    )
    dtype: str = doc("precision of its parameters", choices=DTYPES)
    chat_template_arguments: dict[str, Any] = doc(
        "variables of the chat template, such as enable_thinking"
    )


@dataclass(kw_only=True)
class TeacherConfig:
    """The model that reads the context."""

    path: str | None = doc("the model that reads the context; null: the student's", takes=MODEL)
    dtype: str = doc("precision of its parameters", choices=DTYPES)
    update: str = doc(
        "how its weights follow the student's: never; copied every n steps; a moving average; "
        "the same weights",
        choices=("never", "every_n_steps", "ema", "shared"),
    )
    sync_every_n_steps: int | None = doc(
        "with update=every_n_steps: steps between two copies",
        minimum=1,
        maximum=MOST_STEPS,
        example="10",
    )
    ema_decay: float | None = doc(
        "with update=ema: share of the average that a step keeps", above=0, below=1, example="0.99"
    )


@dataclass(kw_only=True)
class RolloutConfig:
    """Who writes the answers that the student learns from, and how they are drawn."""

    sampler: str = doc("who writes the answers", choices=_SAMPLERS)
    sampling: Sampling
    teacher_data: str | None = doc(
        "with sampler=teacher: a folder that keeps what a frozen teacher has written",
        takes="the path of a folder",
    )
    anchor_fraction: float = doc(
        "share of the prompts that are general questions, on which the teacher reads no context",
        minimum=0,
        maximum=1,
    )
    ahead: int = doc(
        "1: the student's engine samples a step while the step before it trains, with the weights "
        "of that step's start",
        minimum=0,
        maximum=1,
        default=0,
    )
    max_mismatch: float | None = doc(
        "a run stops where the student's own samples are further than this from what the trainer "
        "says of them (rollout/mismatch_k3, nats a token), but in steps that are sampled ahead; "
        "null: it goes on",
        above=0,
        maximum=100,
        default=0.1,
        example="0.1",
    )


@dataclass(kw_only=True)
class WarmupConfig:
    """First steps with another sampler and loss."""

    steps: int = doc("number of these steps; 0: none", minimum=0, maximum=MOST_STEPS)
    sampler: str = doc("who writes the answers meanwhile", choices=_SAMPLERS)
    loss: Any = doc("the loss meanwhile; null without such steps", plug=True)


@dataclass(kw_only=True)
class BatchingConfig:
    """How answers become batches and weights."""

    global_batch_size: int = doc(
        "answers a step, of all ranks together", minimum=1, maximum=MOST_SEQUENCES
    )
    micro_batch_size: int = doc(
        "answers in one forward pass of a rank", minimum=1, maximum=MOST_SEQUENCES
    )
    aggregation: str = doc(
        "sequence_mean: every answer weighs the same; token_mean: every token does",
        choices=("sequence_mean", "token_mean"),
    )


@dataclass(kw_only=True)
class OptimConfig:
    """Megatron's AdamW and its schedule."""

    lr: float = doc("learning rate after the warm-up", above=0, maximum=10)
    min_lr: float = doc("learning rate at the end of a cosine schedule", minimum=0, maximum=10)
    schedule: str = doc("course of the learning rate", choices=("constant", "cosine"))
    warmup_steps: int = doc(
        "steps in which the learning rate rises from 0", minimum=0, maximum=MOST_STEPS
    )
    betas: list[float] = doc(
        "decays of the two moments",
        minimum=0,
        below=1,
        takes="two numbers >= 0 and < 1",
    )
    eps: float = doc("added to the root of the second moment", above=0, maximum=1)
    weight_decay: float = doc("decoupled weight decay", minimum=0, maximum=10)
    clip_grad: float = doc("largest norm of the gradient", above=0, maximum=1_000_000)
    use_distributed_optimizer: bool = doc("share the optimizer's state among data-parallel ranks")
    overlap_grad_reduce: bool = doc("reduce gradients while the backward pass runs")


@dataclass(kw_only=True)
class ParallelConfig:
    """Device, processes and layout, and how Megatron computes."""

    device: str = doc("auto: cuda where every rank has a GPU", choices=("auto", "cpu", "cuda"))
    num_ranks: int = doc("processes, of all nodes together", minimum=1, maximum=MOST_RANKS)
    tensor_model_parallel_size: int = doc(
        "ranks that share every layer", minimum=1, maximum=MOST_RANKS
    )
    pipeline_model_parallel_size: int = doc(
        "groups of layers, one a stage", minimum=1, maximum=MOST_RANKS
    )
    sequence_parallel: bool = doc(
        "tensor-parallel ranks also share what they would all compute alike"
    )
    layer_spec: str = doc(
        "Megatron's local layers or Transformer Engine's; auto: te on cuda where it is installed",
        choices=("auto", "local", "te"),
    )
    context_parallel_size: int = doc(
        "ranks that share every sequence", minimum=1, maximum=MOST_RANKS
    )
    recompute_modules: list[str] = doc(
        "what the backward pass computes again instead of keeping it", choices=("mlp",)
    )
    fp8: str | None = doc("with layer_spec=te: 8-bit linear layers", choices=("hybrid", "e4m3"))
    threads_per_rank: int = doc("OpenMP threads of a rank", minimum=1, maximum=1024)
    timeout_s: float = doc(
        "seconds after which a rank that waits for another gives up",
        minimum=1,
        maximum=MOST_WAIT_S,
    )
    port: int = doc(
        "where the ranks of one machine meet; 0: any free port", minimum=0, maximum=65535
    )

    def check(self, prefix: str) -> None:
        """Refuse what has no effect.

        Raises:
            UserError: `prefix` stands before the key.
        """
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            allowed = f"false with {prefix}tensor_model_parallel_size=1"
            raise UserError(f"{prefix}sequence_parallel", True, allowed)
        if self.fp8 is not None and self.layer_spec != "te":
            allowed = f"null with {prefix}layer_spec={self.layer_spec}; te has it"
            raise UserError(f"{prefix}fp8", self.fp8, allowed)


@dataclass(kw_only=True)
class EvaluationConfig:
    """Questions, sampling and lengths of the tables, and what ends a run."""

    num_questions: int = doc("questions of the task", minimum=1, maximum=MOST_STEPS)
    num_retention: int = doc("questions of the retention task", minimum=1, maximum=MOST_STEPS)
    sampling: Sampling
    retention_max_new_tokens: int = doc(
        "the longest answer to the retention task, in tokens", minimum=1, maximum=MOST_TOKENS
    )
    samples_per_question: int = doc(
        "answers to every question of the task", minimum=1, maximum=MOST_SEQUENCES
    )
    leakage_phrases: list[str] = doc(
        "words that betray a context which the student has not read, in any case",
        takes="a list of one phrase or more, each with a word in it",
    )
    every_n_steps: int = doc(
        "validate after every n steps and keep the best checkpoint; 0: only test, before and "
        "after training",
        minimum=0,
        maximum=MOST_STEPS,
    )
    min_retention: float | None = doc(
        "training ends when less than this share of the retention before it is left; null: never",
        above=0,
        maximum=1,
        example="0.8",
    )
    min_gap: float | None = doc(
        "the run ends before its first step when the context lifts the score by less than this; "
        "null: it goes on, and says so where the questions show no lift",
        minimum=0,
        maximum=1,
        example="0.1",
        default=None,
    )
    controls: list[str] = doc(
        "rows that show what did it: the teacher with a wrong context; the trained student with "
        "the context given back; and, each for the price of another run, students of a teacher "
        "with a wrong context, or with none",
        choices=CONTROLS,
        default_factory=list,
    )
    num_control_questions: int = doc(
        "questions of the task for each control: the first ones, at most num_questions",
        minimum=1,
        maximum=MOST_STEPS,
        default=20,
    )
    token_statistics_every_n_steps: int = doc(
        "after every n steps the entropies of student and teacher, the overlap of their likeliest "
        "tokens and the tokens with most divergence, on a few answers of the step; 0: only before "
        "and after training",
        minimum=0,
        maximum=MOST_STEPS,
        default=0,
    )
    wrong_context: Any = doc(
        "the wrong context of the controls, another task's; null: the context with its words in "
        "random places",
        plug=True,
        default=None,
    )


@dataclass(kw_only=True)
class ResumeConfig:
    """Continuing a run."""

    allow_changes: list[str] = doc(
        "keys, or groups of them, that a continued run may change although its result depends on "
        "them"
    )
    from_scratch: bool = doc(
        "begin again at step 0 where every checkpoint of the run is damaged; else the run stops",
        default=False,
    )


@dataclass(kw_only=True)
class TrainConfig:
    """A training run."""

    name: str = doc("name of the run, and of its folder", takes="the name of a folder")
    seed: int = doc("of everything random", minimum=0, maximum=MOST_SEED)
    student: StudentConfig
    teacher: TeacherConfig
    task: Any = doc("questions to learn from, and how answers to them are scored", plug=True)
    retention: Any = doc("a task that shows what the student forgets", plug=True)
    context: Any = doc("what the teacher reads before every question", plug=True)
    engine: Any = doc("what generates answers", plug=True)
    loss: Any = doc("what the student minimises", plug=True)
    rollout: RolloutConfig
    warmup: WarmupConfig
    batching: BatchingConfig
    optim: OptimConfig
    parallel: ParallelConfig
    evaluation: EvaluationConfig
    trainer: Any = doc("Lightning's Trainer, of whose keys a run follows these", keys=TrainerKeys)
    exp_manager: Any = doc(
        "NeMo's exp_manager, of whose keys a run follows these", keys=ManagerKeys
    )
    resume: ResumeConfig


_PLUGS = ("task", "retention", "context", "engine", "loss")


def load_config(raw: DictConfig) -> TrainConfig:
    """Check a composed configuration and return it typed.

    Raises:
        UserError: a key is wrong by itself, or beside another.
    """
    config = read_schema(TrainConfig, raw)
    for key in _PLUGS:
        check_plug(key, getattr(config, key))
    if config.warmup.steps:
        check_plug("warmup.loss", config.warmup.loss)
    if config.evaluation.wrong_context is not None:
        check_plug("evaluation.wrong_context", config.evaluation.wrong_context)
    check_rules(config)
    return config
