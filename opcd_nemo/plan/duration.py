"""Seconds of a step and of a run, by phase: the slower of arithmetic and memory, plus exchanges.

Sources: roofline (Williams et al. 2009); a ring all-reduce sends 2 (n-1)/n of its bytes over every
link (Patarasuk and Yuan 2009); two all-reduces a layer and direction of tensor parallelism (arXiv
1909.08053, section 3); keys and values gathered over cp (arXiv 2407.21783, section 3.3.2); the
pipeline's bubble (pp-1)/m of 1F1B (arXiv 2104.04473, section 2.2).
"""

from __future__ import annotations

from dataclasses import dataclass

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.servers import push_seconds, sampled
from opcd_nemo.plan.work import (
    BYTES,
    Stream,
    Work,
    attention_flops,
    backward_flops,
    forward_flops,
    head_flops,
    key_value_width,
    largest_stage,
    loss_flops,
    prompt_stream,
    student_stream,
    teacher_stream,
)

_OPTIMIZER_BYTES = 30  # a parameter: gradient read, master and moments read and written, weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Duration:
    """Seconds by phase of a step, and of the work before and after the steps."""

    step: dict[str, float]
    evaluations: float
    start: float
    steps: int
    runs: int = 1

    @property
    def step_s(self) -> float:
        """One step."""
        return sum(self.step.values())

    @property
    def run_s(self) -> float:
        """The whole run."""
        return self.start + self.runs * (self.steps * self.step_s + self.evaluations)


def run_duration(work: Work, accelerator: Accelerator) -> Duration:
    """Mean times of a run."""
    teacher = teacher_seconds(work, accelerator) if work.needs_teacher else (0.0, 0.0)
    student = student_seconds(work, accelerator)
    prefill, decode, exchange = sampling_seconds(
        work, accelerator, work.rows, work.tokens.response, with_context=work.samples_from_teacher
    )
    trained = {
        "teacher": teacher[0],
        "student": student[0],
        "optimizer": optimizer_seconds(work, accelerator),
        "communication": exchange + teacher[1] + student[1] + data_seconds(work, accelerator),
    }
    step = {"rollout prefill": prefill, "rollout decode": decode, **trained}
    if work.servers is not None:
        step["weight push"] = push_seconds(work, accelerator)
        if work.servers.ahead:
            hidden = min(prefill + decode, sum(trained.values()))
            step["hidden by rollout.ahead"] = -work.servers.ahead * hidden
    return Duration(
        step=step,
        evaluations=evaluation_seconds(work, accelerator),
        start=accelerator.start_s,
        steps=work.steps,
        runs=1 + work.trained_controls,
    )


def sampling_seconds(
    work: Work, accelerator: Accelerator, rows: int, response: float, *, with_context: bool
) -> tuple[float, float, float]:
    """Prefill, decoding and exchanges, by the ranks or by servers, whose exchanges are decoding."""
    if work.servers is None:
        return rollout_seconds(work, accelerator, rows, response, with_context=with_context)
    found = sampled(work, accelerator, rows, response, with_context=with_context)
    return found.prefill, found.decode, 0.0


def rollout_seconds(
    work: Work, accelerator: Accelerator, rows: int, response: float, *, with_context: bool
) -> tuple[float, float, float]:
    """Prefill, decoding and exchanges of one data-parallel rank's sequences.

    With pp > 1 as many groups of sequences follow each other through the stages: a round takes
    every stage's time once for each group.
    """
    layout = work.layout
    model = work.teacher if with_context else work.student
    dtype = work.teacher_dtype if with_context else work.student_dtype
    group = min(-(-rows // layout.pp), work.max_batch_size)
    waves = -(-rows // (group * layout.pp))
    stream = prompt_stream(work, group, with_context=with_context)
    flops = forward_flops(model, stream, layout.tp, layout.pp)
    prefill = flops / accelerator.flops(dtype, accelerator.prefill_share)
    prompt = work.tokens.teacher_prompt if with_context else work.tokens.prompt
    decode = _decode_step(work, accelerator, model, dtype, group, prompt + response / 2)
    hidden = model.hidden_size * BYTES[dtype]
    exchange = _tensor_exchange(work, accelerator, stream.tokens * hidden, model, passes=1)
    exchange += response * _tensor_exchange(work, accelerator, group * hidden, model, passes=1)
    turns = waves * layout.pp
    return turns * prefill, turns * response * decode, turns * exchange


def _decode_step(
    work: Work,
    accelerator: Accelerator,
    model: ModelConfig,
    dtype: str,
    rows: int,
    length: float,
) -> float:
    """One token a row on one stage: weights and cache are read once."""
    layout = work.layout
    layers = model.num_layers / layout.pp
    cache = rows * length * layers * key_value_width(model, layout.tp) * BYTES[dtype]
    read = largest_stage(model, layout) * BYTES[dtype] + cache
    stream = Stream(rows=rows, before=length, shared=0, unshared=1)
    flops = forward_flops(model, stream, layout.tp, layout.pp) + head_flops(model, rows, layout.tp)
    return layers * accelerator.layer_latency_s + max(
        read / (1e9 * accelerator.memory_gb_per_s * accelerator.bandwidth_share),
        flops / accelerator.flops(dtype, accelerator.decode_share),
    )


def teacher_seconds(work: Work, accelerator: Accelerator) -> tuple[float, float]:
    """Arithmetic and exchanges of scoring; a teacher that moves reads its context anew."""
    layout = work.layout
    stream = teacher_stream(work, work.tokens.response)
    flops = work.num_microbatches * forward_flops(work.teacher, stream, layout.tp, layout.pp)
    flops /= layout.cp
    if work.teacher_update != "never":
        context = Stream(rows=1, before=0, shared=0, unshared=work.tokens.held)
        flops += forward_flops(work.teacher, context, layout.tp, layout.pp)
    width = work.teacher.hidden_size * BYTES[work.teacher_dtype]
    hidden = stream.tokens / layout.cp * width
    exchange = _tensor_exchange(work, accelerator, hidden, work.teacher, passes=1)
    exchange += _context_exchange(work, accelerator, stream, of_teacher=True)
    scores = stream.rows * work.tokens.response * width
    exchange += 2 * (layout.cp - 1) / layout.cp * scores / accelerator.link(layout.tp * layout.cp)
    seconds = flops / accelerator.flops(work.teacher_dtype, accelerator.prefill_share)
    # every micro-batch goes through all stages before the next micro-batch starts
    return layout.pp * seconds, work.num_microbatches * layout.pp * exchange


def student_seconds(work: Work, accelerator: Accelerator) -> tuple[float, float]:
    """Arithmetic, with the pipeline's bubble, and exchanges of forward, backward and loss.

    FP8 speeds up the linears alone.
    """
    layout, count = work.layout, work.num_microbatches
    stream = student_stream(work, work.tokens.response)
    passes = forward_flops(work.student, stream, layout.tp, layout.pp)
    passes += backward_flops(work.student, stream, layout)
    attention = attention_flops(work.student, stream, layout.tp)
    others = 3 * work.student.num_layers / layout.pp * attention
    dtype, share = work.student_dtype, accelerator.training_share
    pass_s = (passes - others) / accelerator.flops("fp8" if work.fp8 else dtype, share)
    others += loss_flops(work, stream.rows * work.tokens.response)
    pass_s = (pass_s + others / accelerator.flops(dtype, share)) / layout.cp
    bubble = 1 + (layout.pp - 1) / count
    seconds = count * bubble * pass_s
    hidden = stream.tokens / layout.cp * work.student.hidden_size * BYTES[work.student_dtype]
    exchange = _tensor_exchange(work, accelerator, hidden, work.student, passes=2)
    exchange += 2 * _context_exchange(work, accelerator, stream, of_teacher=False)
    if layout.pp > 1:
        exchange += 2 * hidden / accelerator.link(layout.num_ranks)
    return seconds, count * bubble * exchange


def _tensor_exchange(
    work: Work, accelerator: Accelerator, size: float, model: ModelConfig, *, passes: int
) -> float:
    """Two all-reduces of `size` bytes a layer and pass over tp (sequence parallelism: the same)."""
    tp = work.layout.tp
    if tp == 1:
        return 0.0
    sent = 2 * (tp - 1) / tp * size / accelerator.link(tp)
    calls = 2 * passes * model.num_layers / work.layout.pp
    return calls * (accelerator.collective_latency_s + sent)


def _context_exchange(
    work: Work, accelerator: Accelerator, stream: Stream, *, of_teacher: bool
) -> float:
    """One all-gather of keys and values a layer over cp; in backward a reduce-scatter."""
    layout = work.layout
    if layout.cp == 1:
        return 0.0
    model = work.teacher if of_teacher else work.student
    dtype = work.teacher_dtype if of_teacher else work.student_dtype
    size = stream.tokens * key_value_width(model, layout.tp) * BYTES[dtype]
    sent = (layout.cp - 1) / layout.cp * size / accelerator.link(layout.tp * layout.cp)
    return model.num_layers / layout.pp * (accelerator.collective_latency_s + sent)


def optimizer_seconds(work: Work, accelerator: Accelerator) -> float:
    """One pass over this rank's share of parameters, gradients and moments."""
    layout = work.layout
    shards = layout.dp if layout.distributed_optimizer else 1
    size = largest_stage(work.student, layout) / shards * _OPTIMIZER_BYTES
    return size / (1e9 * accelerator.memory_gb_per_s * accelerator.bandwidth_share)


def data_seconds(work: Work, accelerator: Accelerator) -> float:
    """Gradients summed over dp in fp32, and weights gathered, less what overlap hides."""
    layout = work.layout
    if layout.dp == 1:
        return 0.0
    parameters = largest_stage(work.student, layout)
    share = (layout.dp - 1) / layout.dp
    gathered = BYTES[work.student_dtype] if layout.distributed_optimizer else 4
    seconds = share * parameters * (4 + gathered) / accelerator.link(layout.num_ranks)
    return seconds * (1 - accelerator.overlap_share * layout.overlap)


def evaluation_seconds(work: Work, accelerator: Accelerator) -> float:
    """The tables before and after (student, teacher, student again), validations and controls."""
    response, retention = work.tokens.response, float(work.tokens.retention_max_new)
    total = 0.0
    for with_context, times, count, length in (
        (False, 2 + work.validations, work.evaluated, response),
        (False, 2 + work.validations, work.retained, retention),
        (True, 1, work.evaluated, response),
        (True, 1, work.retained, retention),
        (True, 1, work.controlled, response),
    ):
        if count:
            rows = max(1, -(-count // work.layout.dp))
            seconds = sampling_seconds(work, accelerator, rows, length, with_context=with_context)
            total += times * sum(seconds)
            if work.servers is not None:
                total += times * push_seconds(work, accelerator)
    return total
