"""Memory of the fullest rank, phase by phase, in bytes.

Sources: sizes of Megatron's buffers by its DistributedDataParallel (fp32 gradients) and
DistributedOptimizer (fp32 master weights and two moments, sharded over dp; arXiv 1910.02054);
activations of a layer as in Korthikanti et al. (arXiv 2205.05198, section 4), counted for this
project's layers: gated MLP, grouped queries, RMSNorm that keeps its input, no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.sharding import padded_ffn_size, padded_vocab_size
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.work import (
    BYTES,
    Stream,
    Work,
    key_value_width,
    largest_stage,
    prompt_stream,
    query_width,
    student_stream,
    teacher_stream,
)

GIB = 2**30
_SAMPLING_BYTES = 28  # a vocabulary entry: fp32 logits, kept ones, probabilities; fp64 sum, copies
_TRANSIENT = ("activations", "logits chunk", "sampling", "teacher's hidden states")


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank by what they hold, in a phase."""

    phase: str
    parts: dict[str, float]

    @property
    def total(self) -> float:
        """All of them."""
        return sum(self.parts.values())


def memory_by_phase(work: Work, accelerator: Accelerator) -> list[Memory]:
    """The phases of a run after its first step, on the fullest rank."""
    return [
        Memory(phase=name, parts=_scaled(parts, accelerator))
        for name, parts in _phases(work, accelerator).items()
    ]


def peak_memory(work: Work, accelerator: Accelerator) -> Memory:
    """The fullest phase."""
    return max(memory_by_phase(work, accelerator), key=lambda phase: phase.total)


def total_gib(work: Work, accelerator: Accelerator) -> float:
    """Memory over all ranks and the launcher, as a run's `peak_rss_gib` counts it."""
    ranks = work.layout.num_ranks * peak_memory(work, accelerator).total / GIB
    return ranks + accelerator.launcher_gib


def fits(work: Work, accelerator: Accelerator) -> bool:
    """Whether the fullest rank has room."""
    room = accelerator.memory_gib * accelerator.usable_share
    if accelerator.memory_is_shared:
        return total_gib(work, accelerator) <= room
    return peak_memory(work, accelerator).total / GIB <= room


def _scaled(parts: dict[str, float], accelerator: Accelerator) -> dict[str, float]:
    scaled = {
        name: size * (accelerator.transient_share if name in _TRANSIENT else 1.0)
        for name, size in parts.items()
        if size
    }
    return {"base": accelerator.base_gib * GIB, **scaled}


def _phases(work: Work, accelerator: Accelerator) -> dict[str, dict[str, float]]:
    held = _held(work)
    weights = held["student weights"] if work.packs_weights else 0.0
    head = _head_weight(work) if work.packs_weights else 0.0
    return {
        "rollout": {
            **held,
            **_decoding(work, accelerator, work.rows),
            "packed weights": weights + head,
        },
        "evaluation": {
            **held,
            **_decoding(work, accelerator, -(-work.evaluated // work.layout.dp)),
            "packed weights": weights + head,
        },
        "student": {**held, **_training(work, accelerator)},
    }


def _held(work: Work) -> dict[str, float]:
    """What a rank holds all the time, after the first step."""
    layout = work.layout
    student, teacher = largest_stage(work.student, layout), largest_stage(work.teacher, layout)
    shards = layout.dp if layout.distributed_optimizer else 1
    master = 4 if work.student_dtype == "bf16" else 0
    own_teacher = work.teacher_update != "shared"
    average = 4 if work.teacher_update == "ema" and work.teacher_dtype == "bf16" else 0
    return {
        "student weights": student * BYTES[work.student_dtype],
        "teacher weights": own_teacher * teacher * (BYTES[work.teacher_dtype] + average),
        "optimizer": student * (master + 8) / shards,
        "context": _key_values(work, work.tokens.held, of_teacher=True),
    }


def _key_values(work: Work, tokens: float, *, of_teacher: bool) -> float:
    """Keys and values of some tokens in this stage's layers."""
    model = work.teacher if of_teacher else work.student
    dtype = work.teacher_dtype if of_teacher else work.student_dtype
    layers = model.num_layers / work.layout.pp
    return tokens * layers * key_value_width(model, work.layout.tp) * BYTES[dtype]


def _decoding(work: Work, accelerator: Accelerator, rows: int) -> dict[str, float]:
    """Cache and sampling of the sequences that decode together, over all pipeline groups."""
    layout, tokens = work.layout, work.tokens
    together = min(rows, work.max_batch_size * layout.pp)
    length = max(tokens.prompt, tokens.teacher_prompt) + max(
        tokens.max_new, tokens.retention_max_new
    )
    cache = max(
        _key_values(work, together * length, of_teacher=of_teacher) for of_teacher in (False, True)
    )
    group = -(-together // layout.pp)
    sampling = group * work.student.vocab_size * _SAMPLING_BYTES
    return {
        "KV cache": cache,
        "sampling": sampling,
        "activations": _prefill(work, accelerator, group),
    }


def _prefill(work: Work, accelerator: Accelerator, rows: int) -> float:
    """What one layer holds at a time without gradient: its widest tensors."""
    layout = work.layout
    sides = (
        (work.student, work.student_dtype, prompt_stream(work, rows, with_context=False)),
        (work.teacher, work.teacher_dtype, prompt_stream(work, rows, with_context=True)),
    )
    sizes = []
    for model, dtype, stream in sides:
        ffn = padded_ffn_size(model, layout.tp) / layout.tp
        size = stream.tokens * (2 * model.hidden_size + 3 * ffn) * BYTES[dtype]
        scores = 0.0 if accelerator.fused_attention else 2 * _scores(model, stream, layout.tp) * 4
        sizes.append(max(size, scores))
    return max(sizes)


def _scores(model: ModelConfig, stream: Stream, tp: int) -> float:
    """Attention scores of one layer on this rank."""
    heads = query_width(model, tp) / model.head_dim
    pairs = stream.shared * (stream.before + stream.shared)
    pairs += stream.rows * stream.unshared * (stream.before + stream.shared + stream.unshared)
    return heads * pairs


def _training(work: Work, accelerator: Accelerator) -> dict[str, float]:
    """Gradients, what backward needs of the micro-batches in flight, and the loss."""
    layout = work.layout
    stream = student_stream(work, work.tokens.max_new)
    predicted = stream.rows * work.tokens.max_new / layout.cp
    in_flight = min(layout.pp, work.num_microbatches)
    kept = work.student.num_layers / layout.pp * layer_activations(work, stream, accelerator)
    if layout.recompute_mlp:  # of one layer at a time
        kept += _mlp_channels(work) * stream.tokens / layout.cp * BYTES[work.student_dtype]
    whole = layout.cp if layout.cp > 1 else 0  # of one micro-batch, before this rank takes its own
    scores = (work.num_microbatches + whole) * predicted * work.teacher.hidden_size
    return {
        "gradients": 4.0 * largest_stage(work.student, layout),
        "activations": in_flight * kept,
        "teacher's hidden states": work.needs_teacher * scores * BYTES[work.teacher_dtype],
        "logits chunk": _loss(work, predicted) + _teacher_pass(work),
    }


def layer_activations(work: Work, stream: Stream, accelerator: Accelerator) -> float:
    """Bytes that one layer keeps of a stream for its backward pass, on this rank.

    Inputs of both norms and of the first linears (whole, or a tp share of the norms' under sequence
    parallelism), queries, keys, values, the attention's output, and four times the gated channels.
    Without a fused kernel the fp32 softmax, its copy in the model's dtype and a mask, too. Of all
    but keys and values a rank of cp has its share.
    """
    model, layout, size = work.student, work.layout, BYTES[work.student_dtype]
    queries = query_width(model, layout.tp)
    hidden = 4 * model.hidden_size / _sequence_shards(work)
    mlp = 0.0 if layout.recompute_mlp else _mlp_channels(work)
    keys = key_value_width(model, layout.tp)
    repeated = stream.rows * (stream.before + stream.shared + stream.unshared)
    kept = stream.tokens / layout.cp * (hidden + 2 * queries + mlp + keys) * size
    if not accelerator.fused_attention or layout.cp > 1:
        kept += repeated * keys * size  # rows see the shared start
    if accelerator.fused_attention:
        return kept
    return kept + _scores(model, stream, layout.tp) / layout.cp * (4 + size + 1)


def _mlp_channels(work: Work) -> float:
    """Gate and value, the activated gate, their product."""
    tp = work.layout.tp
    return 4 * padded_ffn_size(work.student, tp) / tp


def _sequence_shards(work: Work) -> int:
    return work.layout.tp if work.layout.sequence_parallel else 1


def _head_weight(work: Work) -> float:
    columns = padded_vocab_size(work.student.vocab_size, work.layout.tp) / work.layout.tp
    return columns * work.student.hidden_size * BYTES[work.student_dtype]


def _loss(work: Work, predicted: float) -> float:
    """Logits of both models in chunks, the head's gradient, and the embedding's beside it."""
    layout, size = work.layout, BYTES[work.student_dtype]
    columns = padded_vocab_size(work.student.vocab_size, layout.tp) / layout.tp
    chunk = min(predicted, work.chunk_tokens)
    logits = chunk * columns * (size + work.needs_teacher * BYTES[work.teacher_dtype])
    summed = 4 if predicted > work.chunk_tokens else size
    gradient = columns * work.student.hidden_size * summed
    tied = work.student.tied_embeddings and layout.pp == 1
    return logits + gradient + tied * columns * work.student.hidden_size * size


def _teacher_pass(work: Work) -> float:
    """Nothing of the teacher's forward is left but its hidden states; its stream is as wide."""
    stream = teacher_stream(work, work.tokens.max_new)
    tokens = stream.tokens / work.layout.cp
    return tokens * work.teacher.hidden_size * BYTES[work.teacher_dtype]
