"""What is run in every layout: models, training cases, rollouts, prompts. No megatron-core here.

Students and teachers differ in depth and width. `odd` sizes are divided by no tensor-parallel size
that is tested (groups and heads by 3 alone), `even` sizes by 2 and 4.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from itertools import chain, cycle, product
from typing import Literal

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.types import Prompt
from tests.tiny import ARCHITECTURES, LLAMA3_ROPE, model_config


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A world and its axes."""

    world: int
    tp: int = 1
    pp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    recompute_modules: tuple[str, ...] = ()


LAYOUTS = {
    "one": Layout(world=1),
    "tp2": Layout(world=2, tp=2),
    "pp2": Layout(world=2, pp=2),
    "dp2": Layout(world=2),
    "cp2": Layout(world=2, cp=2),
    "tp2sp": Layout(world=2, tp=2, sequence_parallel=True, recompute_modules=("mlp",)),
    "tp3": Layout(world=3, tp=3),
    "tp4": Layout(world=4, tp=4),
    "tp2pp2": Layout(world=4, tp=2, pp=2),
    "tp2pp2sp": Layout(world=4, tp=2, pp=2, sequence_parallel=True),
    "tp2dp2": Layout(world=4, tp=2),
    "pp2dp2": Layout(world=4, pp=2),
    "cp4": Layout(world=4, cp=4),
    "cp2dp2": Layout(world=4, cp=2),
    "cp2pp2": Layout(world=4, cp=2, pp=2),
    "cp2tp2sp": Layout(world=4, cp=2, tp=2, sequence_parallel=True, recompute_modules=("mlp",)),
}
SHARDED = [name for name in LAYOUTS if name != "one"]
# sampling, heads and files know nothing of the split of a stream that trains
UNSPLIT = [name for name, layout in LAYOUTS.items() if layout.cp == 1]

Size = Literal["odd", "even"]
LossName = Literal["reverse_kl", "forward_kl", "jsd", "hard", "top4_drop", "top4_renorm"]
Update = Literal["never", "every_n_steps", "ema", "shared"]

_SHAPES: dict[str, dict[str, int]] = {
    "odd-student": {},
    "odd-teacher": {
        "num_layers": 4,
        "hidden_size": 40,
        "ffn_hidden_size": 53,
        "num_attention_heads": 10,
        "num_query_groups": 5,
    },
    "even-student": {
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": 64,
    },
    "even-teacher": {
        "num_layers": 4,
        "hidden_size": 48,
        "ffn_hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 8,
        "vocab_size": 64,
    },
}

MODELS: dict[str, ModelConfig] = {
    f"{architecture}-{ends}-{shape}": model_config(
        architecture, tied_embeddings=ends == "tied", **_SHAPES[shape]
    )
    for architecture, ends, shape in product(ARCHITECTURES, ("tied", "untied"), _SHAPES)
} | {
    "llama-rope": model_config("llama", rope_scaling=LLAMA3_ROPE, head_dim=8),
    "llama-gguf": model_config("llama", head_dim=8),
    # the last of four ranks holds no vocabulary at all
    "nine-words-student": model_config("llama", vocab_size=9),
    "nine-words-teacher": model_config("llama", vocab_size=9, **_SHAPES["odd-teacher"]),
}
CONVERTED = [name for name in MODELS if "nine" not in name]
KEPT_LAYERS = (0, 3)  # of "qwen3-untied-odd-teacher"


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Hyperparameters of AdamW."""

    lr: float
    eps: float
    weight_decay: float
    clip: float


DEFAULT = Adam(lr=5e-5, eps=1e-8, weight_decay=0.01, clip=1.0)  # conf/optim's
# Large steps that are always clipped, so that a wrong gradient, norm or decay shows. At this rate
# an epsilon of 1e-8 would blow the rounding of gradients near zero up to more than the bar.
FAST = Adam(lr=1e-3, eps=1e-6, weight_decay=0.1, clip=0.05)


@dataclass(frozen=True, kw_only=True)
class TrainCase:
    """Three distillation steps of one student from one teacher."""

    family: str
    size: Size = "odd"
    loss: LossName = "reverse_kl"
    distributed_optimizer: bool = False
    overlap: bool = False
    micro_batch_size: int = 4
    token_mean: bool = False
    on_policy: bool = False
    games: bool = False  # episodes of `TURNS`, else of one turn
    adam: Adam = FAST
    bf16: bool = False
    update: Update = "never"
    sync_every: int | None = None
    decay: float | None = None

    @property
    def student(self) -> str:
        """Name of the student's model."""
        return f"{self.family}-{self.size}-student"

    @property
    def teacher(self) -> str:
        """Name of the teacher's model: one that moves starts as the student."""
        return f"{self.family}-{self.size}-{'teacher' if self.update == 'never' else 'student'}"


TRAIN_CASES = {
    "llama-untied": TrainCase(family="llama-untied"),
    "llama-untied-distributed": TrainCase(family="llama-untied", distributed_optimizer=True),
    "llama-tied-distributed": TrainCase(
        family="llama-tied", distributed_optimizer=True, adam=DEFAULT
    ),
    "qwen2-tied": TrainCase(family="qwen2-tied", adam=DEFAULT),
    "qwen2-untied-distributed": TrainCase(family="qwen2-untied", distributed_optimizer=True),
    "qwen3-untied": TrainCase(family="qwen3-untied", micro_batch_size=2),
    "qwen3-tied-distributed": TrainCase(family="qwen3-tied", distributed_optimizer=True),
    "even-default": TrainCase(family="qwen2-untied", size="even", adam=DEFAULT),
    "even": TrainCase(family="llama-untied", size="even", distributed_optimizer=True),
    "even-overlap": TrainCase(
        family="qwen3-tied",
        size="even",
        distributed_optimizer=True,
        overlap=True,
        micro_batch_size=1,  # so short that some ranks of cp have nothing but padding
    ),
    "forward_kl": TrainCase(family="qwen3-untied", loss="forward_kl"),
    "jsd": TrainCase(family="llama-tied", loss="jsd", distributed_optimizer=True),
    "hard": TrainCase(family="qwen2-untied", loss="hard", token_mean=True),
    "games": TrainCase(family="qwen3-untied", games=True, distributed_optimizer=True, overlap=True),
    "on-policy": TrainCase(family="llama-tied", on_policy=True, distributed_optimizer=True),
}
MICRO_BATCHES = {
    f"{family}-{size}": TrainCase(family=family, micro_batch_size=size)
    for family in ("llama-untied", "qwen3-tied")
    for size in (1, 2, 3, 4, 8)
}
DECAY = 0.7
EMA = TrainCase(family="qwen3-tied", distributed_optimizer=True, update="ema", decay=DECAY)
HARD_SYNC = TrainCase(family="llama-untied", update="every_n_steps", sync_every=2)
TEACHER_CASES = {
    "ema": EMA,
    "ema-bf16": replace(EMA, bf16=True),
    "hard_sync": HARD_SYNC,
    # a teacher copied from the student after every step: what a live one must be equal to
    "copied": replace(HARD_SYNC, sync_every=1, on_policy=True),
    "live": replace(HARD_SYNC, update="shared", sync_every=None, on_policy=True),
    "copied-tied": replace(EMA, update="every_n_steps", decay=None, sync_every=1, on_policy=True),
    "live-tied": replace(EMA, update="shared", decay=None, on_policy=True),
}
TEACHER_STEPS = 4
TEACHER_LAYOUTS = ["one", "tp2", "pp2", "dp2", "tp2sp"]
_WIDE = [
    "llama-untied",
    "qwen2-untied-distributed",
    "qwen3-tied-distributed",
    "even-default",
    "jsd",
    "games",
]
_SPLIT = {
    "cp2": ["llama-untied-distributed", "even-overlap", "hard", "games", "on-policy"],
    "cp4": ["games"],
    "cp2dp2": ["games"],
    "cp2pp2": ["even-overlap"],
    "cp2tp2sp": ["even-overlap", "qwen2-untied-distributed"],
}
BF16 = replace(TRAIN_CASES["llama-untied-distributed"], bf16=True)
BF16_LAYOUTS = ["one", "cp2"]


def train_cases(layout: str) -> list[str]:
    """All cases in worlds of one and two, some in wider ones: four ranks share two cores here."""
    if layout in _SPLIT:
        return _SPLIT[layout]
    return list(TRAIN_CASES) if LAYOUTS[layout].world <= 2 else _WIDE


TRAINED = [(layout, case) for layout in SHARDED for case in train_cases(layout)]
STEPS = 3
BETAS = (0.9, 0.999)

CONTEXT, OTHER_CONTEXT = (5, 9, 13, 17, 21, 8, 3), (5, 9, 2)
NUM_PROMPTS, NUM_ANCHORS = 8, 2
TURNS = (  # of each step: ranks get different numbers of samples, and steps fewer or more
    (1, 2, 1, 1, 5, 3, 1, 2),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (3, 5, 2, 1, 4, 1, 6, 2),
)
_LEAD = (4, 6, 11)


def training_pairs(step: int) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Prompt and response of every place in the global batch of a step; the last are anchors."""
    draw = random.Random(step)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 64) for _ in range(draw.randint(low, high)))

    return [((*_LEAD, *tokens(1, 8)), tokens(1, 6)) for _ in range(NUM_PROMPTS)]


def training_turn(step: int, place: int, turn: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prompt and response of a turn: later prompts begin with what was said before.

    The first two prompts of a game end with a token that the prompt after them has not: these turns
    are branches of the game, all others are in its longest turn.
    """
    prompt, response = training_pairs(step)[place]
    for later in range(1, turn + 1):
        told = prompt if later > 2 else prompt[:-1]
        prompt, response = (*told, *response), training_pairs(step + 1000 * later)[place][1]
    return prompt, response


def teacher_context(prompt: tuple[int, ...]) -> tuple[int, ...]:
    """The held context for two prompts in three, another that is not held for the rest."""
    return CONTEXT if sum(prompt) % 3 else OTHER_CONTEXT


PREFIX, IN_STREAM = (7, 30, 12, 41), (19, 23)


def generation_prompts(*, led: bool) -> list[Prompt]:
    """32 prompts of 1 to 20 tokens; `led` ones start with PREFIX + IN_STREAM."""
    draw = random.Random(led)
    lead = (*PREFIX, *IN_STREAM) if led else ()
    return [
        Prompt(
            token_ids=(*lead, *(draw.randrange(64) for _ in range(1 + index * 7 % 20))),
            index=index,
        )
        for index in range(32)
    ]


def first_turns(prompts: list[Prompt]) -> list[Prompt]:
    """The prompts before a few tokens were added, which their answers need not start with."""
    return [
        replace(prompt, token_ids=prompt.token_ids[: -1 - prompt.index % 3] or (1,), goes_on=True)
        for prompt in prompts
    ]


GENERATORS = ["llama-untied-odd-student", "qwen2-tied-odd-student", "qwen3-untied-even-student"]
SAMPLED_FROM = GENERATORS[0]
NEW_TOKENS = 10
PADDING_WINS = "padding-wins"  # every real logit is far below the 0 of padded vocabulary

SEQUENCES = [prompt.token_ids for prompt in generation_prompts(led=True)[:6]]

CHECKPOINTS = {  # saved under the first layout, loaded under the second
    2: [("tp2", "cp2"), ("pp2", "tp2"), ("dp2", "tp2sp"), ("cp2", "pp2")],
    4: [("tp2pp2", "tp4"), ("tp4", "tp2dp2")],
}
CHECKPOINT_CASES = ["llama-untied", "qwen3-tied-distributed", "ema", "hard_sync"]
CHAT = "chat"  # a model with a tokenizer
PACKAGED = {  # the model of each move
    move: f"{name}-odd-student"
    for move, name in zip(
        chain(*CHECKPOINTS.values()),
        cycle(("llama-untied", "qwen2-tied", "qwen3-tied")),
        strict=False,
    )
}
FAILING = ["tp2", "pp2", "dp2", "tp2pp2"]

HEAD_LOSSES: list[tuple[LossName, float, float]] = [  # kind, beta, temperature
    ("reverse_kl", 0.5, 1.0),
    ("reverse_kl", 0.5, 0.7),
    ("forward_kl", 0.5, 1.3),
    ("jsd", 0.3, 1.0),
    ("hard", 0.5, 0.7),
    ("top4_drop", 0.5, 0.7),
    ("top4_renorm", 0.5, 1.0),
]
HEAD_MODELS = ["qwen2-untied-odd", "llama-untied-even", "nine-words"]
HEAD_TOKENS, HEAD_CHUNK = 17, 5
