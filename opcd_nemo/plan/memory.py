"""Memory of the fullest rank, phase by phase, in bytes.

Sources: sizes of Megatron's buffers by its DistributedDataParallel (fp32 gradients) and
DistributedOptimizer (fp32 master weights and two moments, sharded over dp; arXiv 1910.02054);
activations of a layer as in Korthikanti et al. (arXiv 2205.05198, section 4), counted for this
project's layers: gated MLP, grouped queries, RMSNorm that keeps its input, no dropout.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

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
    server_weights,
    student_stream,
    teacher_stream,
)

GIB = 2**30
_SAMPLING_BYTES = 28  # a vocabulary entry: fp32 logits (twice), probabilities; fp64 sum, copies
_TOP_K_SCRATCH = 1 << 25  # entries of a whole vocabulary's rows at once, on a GPU
_TOP_K_BYTES = 120  # a chosen entry: values, indices and gradients of both models
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
        for name, parts in _beside_servers(work, accelerator).items()
    ]


def _beside_servers(work: Work, accelerator: Accelerator) -> dict[str, dict[str, float]]:
    """The phases; where servers sample, ranks have no cache, and a server's part if it is there."""
    phases, servers = _phases(work, accelerator), work.servers
    if servers is None:
        return phases
    found = {}
    for name, parts in phases.items():
        samples = name in ("rollout", "evaluation")
        found[name] = {**_held(work), "pushed tensor": _embedding(work)} if samples else dict(parts)
        if servers.colocated and samples:
            sizes = [server_weights(work, of_teacher=teacher) for teacher in (False, True)]
            found[name]["server awake"] = max(sizes) + accelerator.engine_base_gib * GIB
        elif servers.colocated:
            found[name]["server asleep"] = accelerator.engine_asleep_gib * GIB
    return found


def _embedding(work: Work) -> float:
    """What a push gathers at once on a rank, at most."""
    return work.student.vocab_size * work.student.hidden_size * BYTES[work.student_dtype]


def held_beside_server(work: Work, accelerator: Accelerator) -> float:
    """Bytes of a rank that waits for a server's answers."""
    return accelerator.base_gib * GIB + sum(_held(work).values())


def peak_memory(work: Work, accelerator: Accelerator) -> Memory:
    """The fullest phase."""
    return max(memory_by_phase(work, accelerator), key=lambda phase: phase.total)


def total_gib(work: Work, accelerator: Accelerator) -> float:
    """Memory over all ranks and the launcher, as a run's `peak_rss_gib` counts it."""
    total = work.layout.num_ranks * peak_memory(work, accelerator).total / GIB
    if work.servers is not None and accelerator.memory_is_shared:
        total += accelerator.engine_base_gib + server_weights(work, of_teacher=False) / GIB
    return total + accelerator.launcher_gib


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
    held, scores = _held(work), _scores_held(work)
    packed = {}
    if work.packs_weights:
        packed = {"packed weights": held["student weights"] + _head_weight(work)}
    gradients = {"gradients": 4.0 * largest_stage(work.student, work.layout)}
    return {
        "rollout": {**held, **_rollout(work, accelerator), **packed},
        "evaluation": {**held, **_evaluation(work, accelerator), **packed},
        "teacher": {**held, **scores, **_scoring(work, accelerator)},
        "student": {**held, **gradients, **scores, **_training(work, accelerator)},
        "optimizer": {**held, **gradients, **scores, "scaled gradient": _scaled_gradient(work)},
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


def _scaled_gradient(work: Work) -> float:
    """Clipping without Transformer Engine's kernel: a copy of a gradient in this rank's share.

    The embedding's is the largest; a share may end within it.
    """
    if work.transformer_engine:
        return 0.0
    layout = work.layout
    shards = layout.dp if layout.distributed_optimizer else 1
    columns = padded_vocab_size(work.student.vocab_size, layout.tp) / layout.tp
    share = largest_stage(work.student, layout) / shards
    return 4 * min(share, columns * work.student.hidden_size)


def _key_values(work: Work, tokens: float, *, of_teacher: bool) -> float:
    """Keys and values of some tokens in this stage's layers."""
    model = work.teacher if of_teacher else work.student
    dtype = work.teacher_dtype if of_teacher else work.student_dtype
    layers = model.num_layers / work.layout.pp
    return tokens * layers * key_value_width(model, work.layout.tp) * BYTES[dtype]


def _rollout(work: Work, accelerator: Accelerator) -> dict[str, float]:
    """Who samples for training, as many sequences as a step has."""
    return _decoding(
        work,
        accelerator,
        work.rows,
        work.tokens.max_new,
        games=work.rows / work.turns,
        of_teacher=work.samples_from_teacher,
    )


def _evaluation(work: Work, accelerator: Accelerator) -> dict[str, float]:
    """The fuller of student without and teacher with context, for the longest answers."""
    rows = -(-work.evaluated // work.layout.dp)
    longest = max(work.tokens.max_new, work.tokens.retention_max_new)
    both = (
        _decoding(work, accelerator, rows, longest, games=rows, of_teacher=of_teacher)
        for of_teacher in (False, True)
    )
    return max(both, key=lambda parts: sum(parts.values()))


def _decoding(
    work: Work,
    accelerator: Accelerator,
    rows: int,
    longest: int,
    *,
    games: float,
    of_teacher: bool,
) -> dict[str, float]:
    """Cache, prompts and sampling of the sequences that decode together, over pipeline groups.

    A row that ends makes its group's cache anew, a layer at a time; where turns are kept, each game
    has its last turn's.
    """
    layout, tokens = work.layout, work.tokens
    together = min(rows, work.max_batch_size * layout.pp)
    group = -(-together // layout.pp)
    length = (tokens.teacher_prompt if of_teacher else tokens.prompt) + longest
    cache = _key_values(work, together * length, of_teacher=of_teacher)
    model = work.teacher if of_teacher else work.student
    stream = prompt_stream(work, group, with_context=of_teacher)
    return {
        "KV cache": cache,
        "held turns": work.keeps_turns * _key_values(work, games * length, of_teacher=of_teacher),
        "sampling": group * model.vocab_size * _SAMPLING_BYTES,
        "activations": max(
            _pass(work, stream, accelerator, of_teacher=of_teacher),
            cache / model.num_layers,
        ),
    }


def _pass(work: Work, stream: Stream, accelerator: Accelerator, *, of_teacher: bool) -> float:
    """What a pass without gradient holds at its widest, in a layer's feed-forward part.

    Gate and value, the activated gate, a copy of value and their product: five times the channels;
    beside them the embedding, two residuals and a norm's output. Without a fused kernel the scores
    of attention may be wider.
    """
    layout = work.layout
    model = work.teacher if of_teacher else work.student
    size = BYTES[work.teacher_dtype if of_teacher else work.student_dtype]
    ffn = padded_ffn_size(model, layout.tp) / layout.tp
    hidden = 4 * model.hidden_size / _sequence_shards(work)
    widest = stream.tokens * (5 * ffn + hidden) * size
    if accelerator.fused_attention:
        return widest
    return max(widest, 2 * _scores(model, stream, layout.tp) * 4)


def _scores(model: ModelConfig, stream: Stream, tp: int) -> float:
    """Attention scores of one layer on this rank."""
    heads = query_width(model, tp) / model.head_dim
    pairs = stream.shared * (stream.before + stream.shared)
    pairs += stream.rows * stream.unshared * (stream.before + stream.shared + stream.unshared)
    return heads * pairs


def _scores_held(work: Work) -> dict[str, float]:
    """The teacher's scores of all response tokens, which wait for the student."""
    predicted = _predicted(work)
    whole = work.layout.cp if work.layout.cp > 1 else 0  # of a micro-batch, before a rank's part
    tokens = (work.num_microbatches + whole) * predicted
    size = tokens * work.teacher.hidden_size * BYTES[work.teacher_dtype]
    return {"teacher's hidden states": work.needs_teacher * size}


def _predicted(work: Work) -> float:
    """Response tokens of a micro-batch that this rank predicts."""
    rows = min(work.layout.micro_batch_size, work.trained_rows)
    return rows * work.tokens.max_new / work.layout.cp


def _scoring(work: Work, accelerator: Accelerator) -> dict[str, float]:
    """The teacher's pass over a micro-batch."""
    if not work.needs_teacher:
        return {}
    stream = teacher_stream(work, work.tokens.max_new)
    share = replace(stream, unshared=stream.unshared / work.layout.cp)
    return {"activations": _pass(work, share, accelerator, of_teacher=True)}


def _training(work: Work, accelerator: Accelerator) -> dict[str, float]:
    """What backward needs of the micro-batches in flight, and the loss or a layer's backward."""
    layout, size = work.layout, BYTES[work.student_dtype]
    stream = student_stream(work, work.tokens.max_new)
    tokens = stream.tokens / layout.cp
    in_flight = min(layout.pp, work.num_microbatches)
    kept = work.student.num_layers / layout.pp * layer_activations(work, stream, accelerator)
    # the embedding and the last norm's output
    kept += 2 * tokens * work.student.hidden_size / _sequence_shards(work) * size
    loss = _loss(work, _predicted(work))
    # a layer's MLP that is computed again, with its gradients; at last the embedding's gradient
    again = 2 * _mlp_channels(work) * tokens * size + in_flight * kept
    last = max(again, _tied_gradients(work, _predicted(work)))
    return {
        "activations": in_flight * kept,
        "logits chunk": max(loss, last - in_flight * kept),
    }


def layer_activations(work: Work, stream: Stream, accelerator: Accelerator) -> float:
    """Bytes that one layer keeps of a stream for its backward pass, on this rank.

    | what | times |
    |---|---|
    | inputs and outputs of norms; under sequence parallelism over tp | 4 H, see below |
    | rotated queries, the attention's output; queries before their norm | 2 or 3 A D |
    | rotated keys, values; keys before their norm | 2 or 3 G D |
    | gate and value, the activated gate, their product | 4 F; 0 where computed again |

    With Transformer Engine a norm is part of the linears after it: where the MLP is computed again,
    so is the output of its norm, and 3 H are left.

    Without a fused kernel the fp32 softmax, its copy in the model's dtype and a mask, too. Rows
    that see a start before them have copies of its keys and values, in place of the stream's; so
    have the two stretches of a rank of cp, of all keys before them. Of all else it has its share.
    """
    model, layout, size = work.student, work.layout, BYTES[work.student_dtype]
    queries = query_width(model, layout.tp) * (2 + model.qk_norm)
    own_norm = layout.recompute_mlp and work.transformer_engine
    hidden = (3 if own_norm else 4) * model.hidden_size / _sequence_shards(work)
    mlp = 0.0 if layout.recompute_mlp else _mlp_channels(work)
    keys = key_value_width(model, layout.tp)
    seen = stream.rows * (stream.before + stream.shared + stream.unshared)
    tokens = stream.tokens / layout.cp
    kept = tokens * (hidden + queries + mlp + keys * model.qk_norm / 2) * size
    if accelerator.fused_attention:
        if layout.cp > 1:  # an early and a late chunk of 2 cp
            seen *= (2 * layout.cp + 1) / (2 * layout.cp)
        return kept + (seen if layout.cp > 1 else max(seen, tokens)) * keys * size
    kept += (tokens + seen) * keys * size
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
    """Logits of both models in chunks, hidden states and the head with their gradients.

    A loss over the top k has besides the logits two copies in the model's dtype and two in fp32: of
    all rows where tp shards the vocabulary, else of a few at once.
    """
    layout, size = work.layout, BYTES[work.student_dtype]
    columns = padded_vocab_size(work.student.vocab_size, layout.tp) / layout.tp
    chunk = min(predicted, work.chunk_tokens)
    logits = chunk * columns * (size + work.needs_teacher * BYTES[work.teacher_dtype])
    if work.top_k:
        at_once = chunk * columns if layout.tp > 1 else min(chunk * columns, _TOP_K_SCRATCH)
        logits += at_once * (2 * size + 2 * 4) + chunk * work.top_k * _TOP_K_BYTES
    states = 2 * predicted * work.student.hidden_size * size
    return states + _head_gradient(work, predicted) + logits


def _head_gradient(work: Work, predicted: float) -> float:
    """The head's, whose sum over several chunks is in fp32."""
    columns = padded_vocab_size(work.student.vocab_size, work.layout.tp) / work.layout.tp
    size = 4 if predicted > work.chunk_tokens else BYTES[work.student_dtype]
    return columns * work.student.hidden_size * size


def _tied_gradients(work: Work, predicted: float) -> float:
    """At the end of backward: a tied head's gradient, the embedding's and their sum."""
    if not work.student.tied_embeddings or work.layout.pp > 1:
        return 0.0
    return _head_gradient(work, predicted) + 2 * _head_weight(work)
