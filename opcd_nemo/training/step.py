"""One step of on-policy context distillation.

The objective: the student, who does not see the context, answers like the teacher, who does. For
every token that the student sampled, minimise KL(student || teacher) over the vocabulary.

1. rollout    the student answers prompts without the context
2. teacher    the teacher reads context + prompt and scores those answers
3. student    the divergence of every response token, averaged; its gradient
4. optimizer  one update of the student; a teacher that is updated follows

Off-policy distillation and supervised fine-tuning are the same step with another sampler in phase 1
or another loss in phase 3: see `Phase`.

Try it: `opcd train recipe=demo_brevity trainer.max_steps=3`. Paper: arXiv
2602.12275; docs/method.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import MismatchError, NonFiniteError
from opcd_nemo.losses import BAD_TOKENS, MISMATCH, MISMATCH_K3, Loss, TokenTargets, mismatch
from opcd_nemo.metrics import Stats, Stopwatch
from opcd_nemo.model.context_parallel import Indices
from opcd_nemo.model.head import Head
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.rollout.collect import SamplerName, collect_rollouts
from opcd_nemo.rollout.conversation import Conversation
from opcd_nemo.rollout.engine import RolloutEngine, ThreadedEngine
from opcd_nemo.storage.ranks import on_every_rank
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.training.ahead import Ahead
from opcd_nemo.training.batches import Aggregation, DistillBatch, make_distill_batches
from opcd_nemo.training.optim import StudentOptimizer
from opcd_nemo.training.teacher import Teacher
from opcd_nemo.types import Rollout

_BEHIND = "rollout/steps_behind"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """Who samples and which loss; OPCD, off-policy and SFT differ in nothing else."""

    sampler: SamplerName
    loss: Loss


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything a step needs."""

    parallel: Parallel
    task: Task
    conversation: Conversation
    student: LanguageModel
    teacher: Teacher
    engines: dict[SamplerName, RolloutEngine]
    optimizer: StudentOptimizer
    sampling: Sampling
    phase: Phase
    warmup: Phase
    warmup_steps: int
    seed: int
    prompts_per_step: int
    anchors_per_step: int
    micro_batch_size: int
    aggregation: Aggregation
    max_mismatch: float | None = None
    ahead: Ahead | None = None
    watch: Stopwatch = field(default_factory=Stopwatch)

    def phase_of(self, step: int) -> Phase:
        """The phase that `step` (from 0) belongs to."""
        return self.warmup if step < self.warmup_steps else self.phase


def distill_step(run: Run, step: int, kept: list[Rollout] | None = None) -> Stats:
    """Update the student once and return the global statistics. Collective over the world.

    This rank's rollouts are added to `kept`, for who wants to look at them afterwards.

    Raises:
        NonFiniteError, MismatchError: on every rank, before any parameter changes.
        EngineError, UserError: on ranks whose engine cannot sample.
        UserError, OSError: on every rank, where samples of the teacher cannot be read or kept.
    """
    with run.watch.phase("rollout"):
        rollouts = None if run.ahead is None else run.ahead.take(step, run.parallel)
        if rollouts is None:
            rollouts = _rollouts(run, run.phase_of(step).sampler, step)
        if run.ahead is not None:
            _begin_next(run, run.ahead, step)
    if kept is not None:
        kept += rollouts
    return learn(run, rollouts, step)


def learn(run: Run, rollouts: Sequence[Rollout], step: int) -> Stats:
    """Phases 2 to 4 with this rank's rollouts, as `distill_step`. Collective over the world."""
    phase = run.phase_of(step)
    with run.watch.phase("teacher"):
        everybodys = sorted(run.parallel.gather_over_cp(rollouts), key=_game_by_game)
        batches = distill_batches(run, everybodys, phase.loss, phase.sampler)
        scores = teacher_scores(run, batches, phase.loss)
    with run.watch.phase("student"):
        run.parallel.give_back_memory()
        run.optimizer.zero_grad()
        stats = accumulate_gradients(run, batches, scores, phase.loss)
        run.parallel.flush()  # what the teacher's stages sent has been received by now
    stats.add(_rollout_stats(run.parallel, rollouts))
    if run.ahead is not None:
        stats.add(_behind(run.parallel, rollouts, step))
    stats = over_ranks(run.parallel, stats)
    _stop_if_other_weights(stats, run.max_mismatch)
    _stop_if_not_finite(stats)  # before the optimizer: the weights stay those of the last good step
    with run.watch.phase("optimizer"):
        stats.add(run.optimizer.step())
        run.teacher.after_step(step + 1, run.student)
        run.optimizer.release_gradients()  # sampling and evaluation need the memory
        run.parallel.give_back_memory()
    return stats


def _game_by_game(rollout: Rollout) -> tuple[int, int]:
    """The order in which the turns of a game are neighbours, to be computed together."""
    return rollout.episode_index, rollout.turn_index


def _episodes(run: Run, step: int) -> tuple[list[Episode], int]:
    """This rank's episodes, and how many of them, at the end, are anchors.

    Every rank draws all of them and keeps its share: what is asked in a step then depends on the
    seed and the step alone, and a continued run on another layout asks the same.
    """
    plain = run.prompts_per_step - run.anchors_per_step
    episodes = run.task.episodes("train", step, plain) if plain else []
    if run.anchors_per_step:
        episodes = [*episodes, *run.task.anchors(step, run.anchors_per_step)]
    mine = run.parallel.share(run.prompts_per_step)
    return [episodes[index] for index in mine], sum(index >= plain for index in mine)


def _collector(
    run: Run, sampler: SamplerName, step: int
) -> Callable[[RolloutEngine], list[Rollout]]:
    """What an engine does for a step: the episodes are drawn now, the rollouts by the caller."""
    episodes, num_anchors = _episodes(run, step)
    return lambda engine: collect_rollouts(
        engine,
        sampler,
        episodes,
        run.conversation,
        run.sampling,
        seed=run.seed,
        step=step,
        first_index=run.parallel.share(run.prompts_per_step).start,
        num_anchors=num_anchors,
        prefix_ids=run.teacher.prefix_ids if sampler == "teacher" else (),
    )


def _rollouts(run: Run, sampler: SamplerName, step: int) -> list[Rollout]:
    """This rank's rollouts. Collective over the world where the teacher samples."""
    if sampler == "student":
        return _sampled(run, sampler, step)
    found: list[Rollout] = []
    # a teacher's samples may be on a disk, which can fail in one replica alone
    on_every_rank(run.parallel, lambda: found.extend(_sampled(run, sampler, step)))
    return found


def _sampled(run: Run, sampler: SamplerName, step: int) -> list[Rollout]:
    engine, collect = run.engines[sampler], _collector(run, sampler, step)
    engine.load_weights(step if sampler == "student" else run.teacher.version)
    rollouts = collect(engine)
    if run.ahead is None and (sampler == "student" or run.teacher.is_updated):
        engine.release_weights()  # backward needs the memory; packed weights would go stale
    return rollouts


def _begin_next(run: Run, ahead: Ahead, step: int) -> None:
    """Let the engine sample the next step with this step's weights, while this step trains."""
    engine, next_step = run.engines["student"], step + 1
    if not ahead.is_wanted(next_step) or run.phase_of(next_step).sampler != "student":
        return
    assert isinstance(engine, ThreadedEngine)
    engine.load_weights(step)
    speaker, collect = engine.speaker(), _collector(run, "student", next_step)
    ahead.begin(next_step, None if speaker is None else partial(collect, speaker))


def distill_batches(
    run: Run, rollouts: Sequence[Rollout], loss: Loss, sampler: SamplerName = "student"
) -> list[DistillBatch]:
    """The micro-batches of these rollouts, which all ranks of cp have. Collective over dp."""
    parallel = run.parallel
    return make_distill_batches(
        rollouts,
        micro_batch_size=run.micro_batch_size,
        aggregation=run.aggregation,
        sum_over_ranks=lambda counts: parallel.sum_over_dp(counts) / parallel.cp,
        device=parallel.device,
        teacher_prefix=run.teacher.prefix_ids if loss.needs_teacher else None,
        stream_multiple=run.student.split_multiple,
        equal_streams=parallel.pp > 1,
        of_student=sampler == "student",
    )


def teacher_scores(run: Run, batches: Sequence[DistillBatch], loss: Loss) -> list[torch.Tensor]:
    """The teacher's scores of the response tokens that this rank trains on, over cp.

    Empty on every stage but the last, or when the loss needs no teacher. Collective.
    """
    if not loss.needs_teacher:
        return []
    return [
        hidden_NH[run.student.local_response_indices(batch.student)]
        for batch in batches
        for hidden_NH in run.teacher.score([batch])
    ]


def accumulate_gradients(
    run: Run, batches: Sequence[DistillBatch], scores: Sequence[torch.Tensor], loss: Loss
) -> Stats:
    """This rank's part of the loss of the micro-batches, its gradient in the buffers. Collective.

    `scores` are as `teacher_scores` gives them.
    """

    def weighted(head: Head, responses: Indices, index: int) -> tuple[torch.Tensor, Stats]:
        batch = batches[index]
        targets = batch.target_ids_N[responses]
        value, stats = loss(
            head,
            run.teacher.head(scores[index]) if scores else None,
            TokenTargets(target_ids_N=targets, weight_N=batch.weight_N[responses]),
        )
        if batch.sampled_logprob_N is not None:
            sampled = batch.sampled_logprob_N[responses]
            stats.add(mismatch(head, targets, sampled, run.sampling.temperature))
        return value, stats

    return run.student.forward_backward(
        run.optimizer.ddp, [batch.student for batch in batches], weighted
    )


def _rollout_stats(parallel: Parallel, rollouts: Sequence[Rollout]) -> Stats:
    """Counted once a data-parallel rank."""
    if not parallel.is_last_stage:
        return Stats()
    count = float(len(rollouts))
    tokens = float(sum(len(rollout.response_ids) for rollout in rollouts))
    logprob = sum(sum(rollout.sampled_logprobs) for rollout in rollouts)
    ended = float(sum(rollout.finish_reason == "eos" for rollout in rollouts))
    return Stats(
        {
            "rollout/response_tokens": (tokens, count),
            "rollout/eos_rate": (ended, count),
            "rollout/logprob": (logprob, tokens),
        },
        {"length": [float(len(rollout.response_ids)) for rollout in rollouts]},
    )


def _behind(parallel: Parallel, rollouts: Sequence[Rollout], step: int) -> Stats:
    """How many steps the weights were behind that sampled; counted as `_rollout_stats`."""
    if not parallel.is_last_stage:
        return Stats()
    behind = float(sum(step - rollout.weights_version for rollout in rollouts))
    return Stats({_BEHIND: (behind, float(len(rollouts)))})


def over_ranks(parallel: Parallel, stats: Stats) -> Stats:
    """The sum over data-parallel ranks, known on every rank. Collective over the world."""
    counted = parallel.is_last_stage and parallel.tp_rank == 0
    total = Stats()
    for each in parallel.gather_objects((stats.sums, stats.samples) if counted else ({}, {})):
        total.add(Stats(*each))
    return total


def _stop_if_other_weights(stats: Stats, limit: float | None) -> None:
    """Stop every rank when what was sampled is not the student's, before the optimizer."""
    if limit is None or MISMATCH_K3 not in stats.sums:
        return
    if stats.sums.get(_BEHIND, (0.0, 0.0))[0]:  # older weights were wanted, and are as far away
        return
    k3 = stats.mean(MISMATCH_K3)
    if k3 > limit:
        raise MismatchError(
            f"{MISMATCH_K3} is {k3:.3g} nats, above rollout.max_mismatch={limit:g}, and "
            f"{MISMATCH} {stats.mean(MISMATCH):.3g}: the engine samples with other weights or "
            "another temperature than the student's; stopped before the optimizer step"
        )


def _stop_if_not_finite(stats: Stats) -> None:
    for name, (value, _) in stats.sums.items():
        if not math.isfinite(value):
            counts = {key: stats.sums[key][0] for key in BAD_TOKENS if key in stats.sums}
            counted = "".join(f", {key} {count:.0f}" for key, count in counts.items())
            raise NonFiniteError(f"{name} is {value}{counted}: stopped before the optimizer step")
