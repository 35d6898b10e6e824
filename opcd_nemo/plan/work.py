"""The work of one step: models, layout and token counts; floating-point operations in closed form.

A multiplication and an addition are two operations. Elementwise work is not counted.

Source: the products of a transformer layer as in Kaplan et al. (arXiv 2001.08361, table 1), with
grouped queries, a gated MLP and this project's packed streams in place of their averages.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.sharding import padded_ffn_size, padded_query_groups, padded_vocab_size
from opcd_nemo.plan.parameters import rank_parameters

BYTES = {"bf16": 2, "fp32": 4}  # a number, by its word in conf/


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run lies on its ranks; `recompute_mlp`: in the backward pass, from its input.

    The dp ranks sample each for itself; cp of them share the passes that train and score.
    """

    tp: int
    pp: int
    dp: int
    cp: int
    sequence_parallel: bool
    micro_batch_size: int
    distributed_optimizer: bool
    overlap: bool
    recompute_mlp: bool

    @property
    def num_ranks(self) -> int:
        """All processes."""
        return self.tp * self.pp * self.dp

    def name(self) -> str:
        """As a row of a table shows it."""
        split = f" cp{self.cp}" if self.cp > 1 else ""
        marks = " sp" if self.sequence_parallel else ""
        marks += " recompute" if self.recompute_mlp else ""
        return f"tp{self.tp} pp{self.pp} dp{self.dp}{split} micro {self.micro_batch_size}{marks}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Mean token counts of a sequence.

    `shared` of the student's prompt are alike in all of them; `held` of the teacher's are kept as
    keys and values for the whole run.
    """

    prompt: float
    shared: float
    teacher_prompt: float
    held: float
    response: float
    max_new: int
    retention_max_new: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Servers that sample in place of the ranks."""

    count: int
    gpus: int  # of each
    colocated: bool  # on the ranks' GPUs, where they sleep while these train
    ahead: float  # the share of steps that are sampled while another trains


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Everything the arithmetic needs to know of a run."""

    student: ModelConfig
    teacher: ModelConfig
    student_dtype: str
    teacher_dtype: str
    fp8: bool  # the student's linears in training
    teacher_update: str
    needs_teacher: bool
    samples_from_teacher: bool
    layout: Layout
    tokens: Tokens
    sequences: int  # a step, over all ranks and turns
    turns: float  # of an episode
    max_batch_size: int  # sequences decoded together
    packs_weights: bool
    keeps_turns: bool  # a turn's keys and values, for the next turn
    chunk_tokens: int
    top_k: int  # of the loss; 0: over the whole vocabulary
    transformer_engine: bool
    steps: int
    evaluated: int  # test questions
    retained: int
    validations: int
    controlled: int = 0  # answers of controls, each after reading a context
    trained_controls: int = 0  # further runs
    servers: Servers | None = None  # None: the ranks sample

    @property
    def num_gpus(self) -> int:
        """Those of ranks and servers."""
        servers = self.servers
        if servers is None or servers.colocated:
            return self.layout.num_ranks
        return self.layout.num_ranks + servers.count * servers.gpus

    def sampler(self, *, of_teacher: bool) -> tuple[ModelConfig, str]:
        """The shape and the dtype of the model that answers."""
        if of_teacher:
            return self.teacher, self.teacher_dtype
        return self.student, self.student_dtype

    @property
    def rows(self) -> int:
        """Sequences that one data-parallel rank samples in a step."""
        return max(1, self.sequences // self.layout.dp)

    @property
    def trained_rows(self) -> int:
        """Sequences that one data-parallel rank trains on in a step, alone or with others."""
        return max(1, self.sequences * self.layout.cp // self.layout.dp)

    @property
    def num_microbatches(self) -> int:
        """Micro-batches of one data-parallel rank in a step."""
        return max(1, self.trained_rows // self.layout.micro_batch_size)

    def on(self, layout: Layout) -> Work:
        """The same work on another layout."""
        return replace(self, layout=layout)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Rows packed together: `before` tokens held as keys and values, `shared` stored once."""

    rows: int
    before: float
    shared: float
    unshared: float

    @property
    def tokens(self) -> float:
        """That go through the linears."""
        return self.shared + self.rows * self.unshared


def student_stream(work: Work, response: float) -> Stream:
    """One micro-batch as the student reads it; the last response token predicts nothing.

    The ranks of cp have a cp-th of its tokens each, and of their pairs.
    """
    tokens, rows = work.tokens, min(work.layout.micro_batch_size, work.trained_rows)
    shared = tokens.shared if rows > 1 else 0
    return Stream(
        rows=rows, before=0, shared=shared, unshared=tokens.prompt - shared + response - 1
    )


def teacher_stream(work: Work, response: float) -> Stream:
    """The same micro-batch as the teacher reads it, its context held."""
    tokens, rows = work.tokens, min(work.layout.micro_batch_size, work.trained_rows)
    unshared = tokens.teacher_prompt - tokens.held + response - 1
    return Stream(rows=rows, before=tokens.held, shared=0, unshared=unshared)


def prompt_stream(work: Work, rows: int, *, with_context: bool) -> Stream:
    """Prompts whose keys and values fill a cache."""
    tokens = work.tokens
    if with_context:
        unshared = tokens.teacher_prompt - tokens.held
        return Stream(rows=rows, before=tokens.held, shared=0, unshared=unshared)
    shared = tokens.shared if rows > 1 else 0
    return Stream(rows=rows, before=0, shared=shared, unshared=tokens.prompt - shared)


def linear_parameters(model: ModelConfig, tp: int) -> int:
    """Weights of the linears of one layer on one tensor-parallel rank, with their padding."""
    groups = padded_query_groups(model, tp) // tp
    queries = groups * model.heads_per_group * model.head_dim
    qkv = queries + 2 * groups * model.head_dim
    ffn = padded_ffn_size(model, tp) // tp
    return model.hidden_size * (qkv + queries + 3 * ffn)


def query_width(model: ModelConfig, tp: int) -> int:
    """Channels of the query heads of one tensor-parallel rank."""
    return padded_query_groups(model, tp) // tp * model.heads_per_group * model.head_dim


def key_value_width(model: ModelConfig, tp: int) -> int:
    """Channels of keys and values together, of one tensor-parallel rank and layer."""
    return 2 * padded_query_groups(model, tp) // tp * model.head_dim


def attention_flops(model: ModelConfig, stream: Stream, tp: int) -> float:
    """Two products of one layer's core attention: whole rectangles, masked halves included."""
    pairs = stream.shared * (stream.before + stream.shared)
    pairs += stream.rows * stream.unshared * (stream.before + stream.shared + stream.unshared)
    return 4 * query_width(model, tp) * pairs


def forward_flops(model: ModelConfig, stream: Stream, tp: int = 1, pp: int = 1) -> float:
    """Hidden states of a stream, on one rank of one stage; without the head."""
    layer = 2 * stream.tokens * linear_parameters(model, tp) + attention_flops(model, stream, tp)
    return model.num_layers / pp * layer


def backward_flops(model: ModelConfig, stream: Stream, layout: Layout) -> float:
    """Gradients of inputs and weights: twice the forward, and the MLP where it is done again."""
    flops = 2 * forward_flops(model, stream, layout.tp, layout.pp)
    if layout.recompute_mlp:
        ffn = padded_ffn_size(model, layout.tp) / layout.tp
        again = 2 * stream.tokens * 3 * ffn * model.hidden_size
        flops += model.num_layers / layout.pp * again
    return flops


def head_flops(model: ModelConfig, tokens: float, tp: int = 1) -> float:
    """One product of hidden states with this rank's shard of the output head."""
    return 2 * tokens * model.hidden_size * padded_vocab_size(model.vocab_size, tp) / tp


def loss_flops(work: Work, predicted: float) -> float:
    """The loss of some tokens from both heads: logits, and two products of the gradient."""
    tp = work.layout.tp
    teacher = head_flops(work.teacher, predicted, tp) if work.needs_teacher else 0.0
    return 3 * head_flops(work.student, predicted, tp) + teacher


def server_weights(work: Work, *, of_teacher: bool) -> float:
    """Bytes of the weights on each GPU of a server."""
    assert work.servers is not None
    model, dtype = work.sampler(of_teacher=of_teacher)
    return rank_parameters(model, tp=1, pp=1, pp_rank=0) / work.servers.gpus * BYTES[dtype]


def largest_stage(model: ModelConfig, layout: Layout) -> int:
    """Parameters of the rank that holds most."""
    return max(
        rank_parameters(model, tp=layout.tp, pp=layout.pp, pp_rank=stage)
        for stage in range(layout.pp)
    )
