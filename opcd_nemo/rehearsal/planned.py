"""What `opcd plan` says of a rehearsal: the same layers, lengths and micro-batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from opcd_nemo.config.programs import PlanConfig
from opcd_nemo.plan.memory import memory_by_phase
from opcd_nemo.plan.outline import work_of
from opcd_nemo.plan.servers import servers_of
from opcd_nemo.plan.work import Tokens
from opcd_nemo.rehearsal.names import MICRO_BATCHES, SHARED
from opcd_nemo.rehearsal.shapes import lengths_of, read_rehearsal, shapes_of

_PHASES = ("rollout", "teacher", "student", "optimizer")  # both the plan's and the rehearsal's


def planned_bytes(words: Sequence[str]) -> dict[str, float]:
    """Planned peaks of the fullest rank, by phase.

    Without what no operation asks for: the base of a process, and what the allocator adds.

    Raises:
        UserError: a key is wrong.
    """
    config, settings, accelerator = read_rehearsal(words)
    lengths, longest = lengths_of(config, settings), config.rollout.sampling.max_new_tokens
    prompt = lengths["prompt"]
    tokens = Tokens(
        prompt=prompt,
        shared=min(SHARED, prompt - 1),
        teacher_prompt=prompt + lengths["context"],
        held=lengths["context"],
        response=lengths["response"],
        max_new=longest,
        retention_max_new=config.evaluation.retention_max_new_tokens,
    )
    nothing = PlanConfig(
        sweep=False, show=1, student_config=None, teacher_config=None, prompt_tokens=None,
        context_tokens=None, response_tokens=None, turns=1.0,
    )  # fmt: skip
    servers = servers_of(config, accelerator)
    sampled = replace(
        work_of(config, nothing, shapes_of(config, settings.layers), tokens),
        servers=servers and replace(servers, colocated=False),  # a rank's memory alone
    )
    trained = replace(
        sampled,
        sequences=MICRO_BATCHES * sampled.layout.micro_batch_size * sampled.layout.dp,
        tokens=replace(tokens, max_new=lengths["response"]),
    )
    plain = replace(accelerator, base_gib=0.0, transient_share=1.0)
    rollout, others = (
        {memory.phase: memory.total for memory in memory_by_phase(work, plain)}
        for work in (sampled, trained)
    )
    found = {**others, "rollout": rollout["rollout"]}
    return {phase: found[phase] for phase in _PHASES if phase in found}


def error_words(planned: float, measured: float) -> str:
    """How far the plan is off, in percent."""
    return f"{100 * (planned / measured - 1):+.0f} %"
