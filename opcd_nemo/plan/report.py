"""A plan in words: tables of memory, time and cost, the bottleneck, a ranking of layouts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product

from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.duration import run_duration
from opcd_nemo.plan.memory import GIB, Memory, fits, memory_by_phase, peak_memory, total_gib
from opcd_nemo.plan.servers import cache_tokens, has_room, longest_seconds, sampled
from opcd_nemo.plan.work import Layout, Work, largest_stage


def plan_report(work: Work, accelerator: Accelerator, origin: str) -> str:
    """The layout of the configuration: does it fit, how long, what is slow, what does it cost."""
    memory, duration = peak_memory(work, accelerator), run_duration(work, accelerator)
    layout, tokens = work.layout, work.tokens
    slowest = max(duration.step, key=duration.step.__getitem__)
    room = "fits" if _fits(work, accelerator) else "DOES NOT FIT"
    hours = work.num_gpus * duration.run_s / 3600
    share = 100 * duration.step[slowest] / duration.step_s
    return "\n".join(
        [
            f"{layout.name()} on {layout.num_ranks} x {accelerator.name}; {origin}",
            f"parameters of the fullest rank: student {largest_stage(work.student, layout):,}, "
            f"teacher {largest_stage(work.teacher, layout):,}",
            f"tokens of a sequence: student {tokens.prompt:.0f} + {tokens.response:.0f}, teacher "
            f"{tokens.teacher_prompt:.0f} ({tokens.held:.0f} held) + {tokens.response:.0f}; "
            f"{work.sequences} sequences a step",
            "",
            *_phase_table(memory_by_phase(work, accelerator), memory.phase),
            f"{room}: {memory.total / GIB:.2f} of {accelerator.memory_gib:.1f} GiB"
            f"{' over all ranks' if accelerator.memory_is_shared else ''}, of which "
            f"{100 * accelerator.usable_share:.0f} % are used; all ranks and launcher "
            f"{total_gib(work, accelerator):.2f} GiB",
            "",
            *_servers(work, accelerator),
            *_table("time of a step, s", duration.step),
            f"bottleneck: {slowest} ({share:.0f} % of the step); {_advice(slowest)}",
            f"run: {duration.start:.0f} s to start, {duration.steps} steps of "
            f"{duration.step_s:.2f} s, {duration.evaluations:.0f} s of evaluations: "
            f"{duration.run_s / 3600:.2f} h, {hours:.2f} GPU-hours",
        ]
    )


def _fits(work: Work, accelerator: Accelerator) -> bool:
    """Whether the fullest rank has room, and the servers for the longest answer."""
    return fits(work, accelerator) and (work.servers is None or has_room(work, accelerator))


def _servers(work: Work, accelerator: Accelerator) -> list[str]:
    servers, of_teacher = work.servers, work.samples_from_teacher
    if servers is None:
        return []
    response = work.tokens.response
    found = sampled(work, accelerator, work.rows, response, with_context=of_teacher)
    place = "of the ranks" if servers.colocated else "beside the ranks"
    return [
        f"servers: {servers.count} of {servers.gpus} processors {place}, {found.together:.0f} "
        f"answers together, {1000 * found.step:.2f} ms a token of each; room for "
        f"{cache_tokens(work, accelerator, of_teacher=of_teacher):,.0f} tokens; an answer of "
        f"{work.tokens.max_new} tokens takes {longest_seconds(work, accelerator):.1f} s or more",
        "",
    ]


def _phase_table(phases: Sequence[Memory], fullest: str) -> list[str]:
    """What a rank holds, a column a phase."""
    names = list(dict.fromkeys(name for phase in phases for name in phase.parts))
    width = max(map(len, names))
    heads = [f"{phase.phase}{'*' * (phase.phase == fullest)}" for phase in phases]
    rows = [("", heads)]
    rows += [(name, [_gib(phase.parts.get(name, 0.0)) for phase in phases]) for name in names]
    rows += [("sum", [_gib(phase.total) for phase in phases])]
    lines = [f"  {name:{width}}{''.join(f' {cell:>11}' for cell in row)}" for name, row in rows]
    return [f"memory of the fullest rank by phase, GiB; *{fullest} is the fullest", *lines]


def _gib(size: float) -> str:
    return f"{size / GIB:.3f}" if size else "-"


def _table(title: str, values: Mapping[str, float]) -> list[str]:
    width = max(map(len, values))
    rows = [f"  {name:{width}} {value:10.3f}" for name, value in values.items()]
    return [title, *rows, f"  {'sum':{width}} {sum(values.values()):10.3f}"]


_ADVICE = {
    "rollout prefill": "hold the shared start of prompts, or raise data parallelism",
    "rollout decode": "raise engine.max_batch_size, or tp, which reads the weights in parallel",
    "teacher": "a smaller teacher, or a context held once (teacher.update=never)",
    "student": "raise data parallelism, or lower pp, whose bubble grows with few micro-batches",
    "optimizer": "optim.use_distributed_optimizer=true shards it over data-parallel ranks",
    "weight push": "fewer steps, or tp of the servers: each GPU reads its part",
    "communication": "lower tp, keep it inside a node, or overlap gradients",
}


def _advice(slowest: str) -> str:
    return _ADVICE[slowest]


def layouts(work: Work) -> Iterator[Layout]:
    """Every layout of the same number of ranks that the models and the batch allow.

    tp up to 8 that pads no KV group, with sequence parallelism; pp that divides all layers; cp.
    """
    given, sizes = work.layout, (1, 2, 4, 8)
    for tp, pp, cp, micro in product(sizes, sizes, sizes, (*sizes, 16)):
        dp = given.num_ranks // (tp * pp)
        models = work.student, work.teacher
        good = (
            given.num_ranks % (tp * pp * cp) == 0
            and work.sequences % (micro * dp // cp) == 0
            and work.sequences % dp == 0
            and not any(model.num_query_groups % tp for model in models)
            and not any(model.num_layers % pp for model in models)
        )
        if good:
            yield replace(
                given,
                tp=tp,
                pp=pp,
                dp=dp,
                cp=cp,
                micro_batch_size=micro,
                sequence_parallel=tp > 1,
            )


def sweep_report(work: Work, accelerator: Accelerator, show: int) -> str:
    """The best layouts first: layouts that fit by the time of a step, then the rest by memory."""
    rows = []
    for layout in layouts(work):
        placed = work.on(layout)
        memory, duration = peak_memory(placed, accelerator), run_duration(placed, accelerator)
        room = _fits(placed, accelerator)
        slowest = max(duration.step, key=duration.step.__getitem__)
        rank = (not room, duration.step_s if room else memory.total)
        hours = work.num_gpus * duration.run_s / 3600
        line = (
            f"{placed.layout.name():39} {'yes' if room else 'no':>4} {memory.total / GIB:9.2f} "
            f"{duration.step_s:10.2f} {hours:10.2f}  {slowest}"
        )
        rows.append((rank, line))
    title = (
        f"{'layout':39} {'fits':>4} {'GiB/rank':>9} {'s/step':>10} {'GPU-hours':>10}  bottleneck"
    )
    ranked = [line for _, line in sorted(rows, key=lambda row: row[0])]
    left = f"{len(ranked) - show} more: plan.show={len(ranked)}" if len(ranked) > show else ""
    return "\n".join([title, *ranked[:show], *([left] if left else [])])
