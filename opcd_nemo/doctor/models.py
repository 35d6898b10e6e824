"""What needs the models, on the layout of the run: gradients, log-probabilities, the context.

One small batch is sampled, scored and differentiated; nothing is updated. Every function is
collective over the world and returns the same row on every rank.

Shape letters: `N` response tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.config.train import TeacherConfig
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.doctor.checks import Check, judge
from opcd_nemo.evaluation.evaluator import EvaluationPlan, Evaluator
from opcd_nemo.formats.sharding import hf_names
from opcd_nemo.formats.stored_model import StoredModel
from opcd_nemo.losses import BAD_TOKENS, CAPTURED_MASS, Loss, TokenTargets
from opcd_nemo.metrics import Stats
from opcd_nemo.model.head import Head
from opcd_nemo.rollout.collect import collect_rollouts
from opcd_nemo.training.batches import DistillBatch
from opcd_nemo.training.inputs import Inputs
from opcd_nemo.training.step import (
    Run,
    accumulate_gradients,
    distill_batches,
    over_ranks,
    teacher_scores,
)
from opcd_nemo.training.teacher import Teacher
from opcd_nemo.types import Rollout

_TOKENS = 4  # of a micro-batch, whose gradient is computed a second time with whole heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """A small batch: what the student sampled, over cp, and both models' streams of it."""

    rollouts: list[Rollout]
    batches: list[DistillBatch]


def sample_probe(run: Run, num_prompts: int, max_new_tokens: int) -> Probe:
    """Let the student answer the first training prompts, without the context."""
    parallel = run.parallel
    count = min(-(-num_prompts // parallel.dp) * parallel.dp, run.prompts_per_step)
    episodes = run.task.episodes("train", 0, count)
    mine, engine = parallel.share(count), run.engines["student"]
    engine.load_weights(0)
    rollouts = collect_rollouts(
        engine,
        "student",
        [episodes[index] for index in mine],
        run.conversation,
        replace(run.sampling, max_new_tokens=max_new_tokens),
        seed=run.seed,
        step=0,
        first_index=mine.start,
    )
    engine.release_weights()
    rollouts = parallel.gather_over_cp(rollouts)
    return Probe(rollouts=rollouts, batches=distill_batches(run, rollouts, run.phase.loss))


def worst_over_ranks(parallel: Parallel, value: float) -> float:
    """The largest value of any rank; infinite if a value is not a number."""
    values = parallel.gather_objects(value)
    return max(math.inf if math.isnan(one) else one for one in values)


def logprob_gap(run: Run, probe: Probe, limit: float) -> Check:
    """How far the engine's log-probabilities are from the training forward's, in nats."""
    student, parallel = run.student, run.parallel
    hidden = student.score([batch.student for batch in probe.batches], [None] * len(probe.batches))
    gaps = [0.0]
    for batch, part in zip(probe.batches, hidden, strict=False):  # nothing on earlier stages
        logits_NV = student.logits(part).float() / (run.sampling.temperature or 1.0)
        logprob_N = logits_NV.log_softmax(-1).gather(-1, batch.target_ids_N[:, None])[:, 0]
        gaps += logprob_N.tolist()
    sampled = [one for rollout in probe.rollouts for one in rollout.sampled_logprobs]
    gaps = [abs(a - b) for a, b in zip(gaps[1:], sampled, strict=False)] or [0.0]
    worst = worst_over_ranks(parallel, max(gaps))
    mean = worst_over_ranks(parallel, sum(gaps) / len(gaps))
    found = f"mean {mean:.1e}, largest {worst:.1e} nats a token (allowed mean {limit:.2g})"
    mend = "the engine samples from another model than the one trained: try engine.pack=false"
    return judge("rollout against trainer", mean <= limit, found, mend)


def same_model(run: Run, probe: Probe, limit: float) -> Check:
    """Whether a teacher that is the student and reads no context is at distance 0."""
    name, loss = "divergence from itself", run.phase.loss
    if not loss.needs_teacher:
        return Check(name=name, status="skip", found="the loss has no teacher")
    itself = TeacherConfig(
        path=None, dtype="", update="shared", sync_every_n_steps=None, ema_decay=None
    )
    alone = replace(run, teacher=Teacher(run.student, (), itself))
    rollouts = [replace(one, teacher_prompt_ids=one.prompt_ids) for one in probe.rollouts]
    value = abs(_loss(alone, distill_batches(alone, rollouts, loss), loss))
    mend = "the teacher's scores do not belong to the student's tokens: report this layout"
    return judge(name, value <= limit, f"{value:.1e} nats a token (allowed {limit:.2g})", mend)


def _loss(run: Run, batches: Sequence[DistillBatch], loss: Loss) -> float:
    """The mean loss over all ranks; its gradient stays in the buffers."""
    scores = teacher_scores(run, batches, loss)
    run.optimizer.zero_grad()
    stats = over_ranks(run.parallel, accumulate_gradients(run, batches, scores, loss))
    others = {*BAD_TOKENS, CAPTURED_MASS}
    (name,) = (one for one in stats.sums if one.startswith("loss/") and one not in others)
    return Stats(stats.sums).mean(name)


def head_gradient(run: Run, inputs: Inputs, probe: Probe, limit: float) -> Check:
    """Whether the gradient through sharded heads is that of the files' whole heads, in fp32."""
    loss, batch = run.phase.loss, probe.batches[0]
    hidden = run.student.score([batch.student], [None])
    taught = run.teacher.score([batch]) if loss.needs_teacher else []
    error = 0.0
    if hidden:
        tokens = slice(0, _TOKENS)
        targets = TokenTargets(
            target_ids_N=batch.target_ids_N[tokens], weight_N=batch.weight_N[tokens]
        )
        shard = run.student.head(hidden[0][tokens])
        heads = [run.teacher.head(part[tokens]) for part in taught]
        parts = _gradients(loss, _wide(shard), [_wide(head) for head in heads], targets)
        rows = inputs.student_config.vocab_size
        whole = [_whole_head(inputs.teacher, one, rows) for one in heads]
        student = _whole_head(inputs.student, shard, rows)
        expected = _gradients(loss, student, whole, targets)
        start = run.parallel.tp_rank * len(shard.weight_VH)
        mine = slice(start, start + shard.num_valid_columns)
        error = max(
            _error(parts[0], expected[0]),
            _error(parts[1][: shard.num_valid_columns], expected[1][mine]),
        )
    worst = worst_over_ranks(run.parallel, error)
    found = f"error {worst:.1e} of the largest entry at tp {run.parallel.tp} (allowed {limit:.2g})"
    mend = "the head's shards or their collectives are wrong: report it; another tp may do"
    return judge("gradient of the head", worst <= limit, found, mend)


def _wide(head: Head) -> Head:
    return replace(head, hidden_NH=head.hidden_NH.float(), weight_VH=head.weight_VH.float())


def _whole_head(checkpoint: StoredModel, shard: Head, num_rows: int) -> Head:
    """The head of the files over the same hidden states, rounded like the shard."""
    (name,) = hf_names(checkpoint.config, "output_layer.weight", layer=None, spec="local")
    weight = checkpoint.tensor(name)[:num_rows].to(shard.hidden_NH.device, shard.weight_VH.dtype)
    return _wide(Head(hidden_NH=shard.hidden_NH, weight_VH=weight, num_valid_columns=len(weight)))


def _gradients(
    loss: Loss, student: Head, teachers: Sequence[Head], targets: TokenTargets
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = student.hidden_NH.detach().clone().requires_grad_()
    weight = student.weight_VH.detach().clone().requires_grad_()
    head = replace(student, hidden_NH=hidden, weight_VH=weight)
    value, _ = loss(head, teachers[0] if teachers else None, targets)
    value.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return hidden.grad, weight.grad


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    largest = expected.abs().max().item() if expected.numel() else 0.0
    difference = (found - expected).abs().max().item() if found.numel() else 0.0
    return difference / largest if largest else difference


def context_and_gradients(run: Run, probe: Probe, noise: float, limit: float) -> list[Check]:
    """Whether the context changes what the teacher says, and tp ranks get one gradient of it."""
    value = _loss(run, probe.batches, run.phase.loss)
    rows = [replicated_gradients(run, limit)]
    if run.phase.loss.needs_teacher:
        mend = "the teacher says the same with the context as the student without: nothing to learn"
        found = f"{value:.3g} nats a token between the student and the teacher with context"
        rows.append(judge("context", value > noise, found, mend))
    return rows


def replicated_gradients(run: Run, limit: float) -> Check:
    """Whether tensor-parallel ranks have the same gradient of what they all hold."""
    name, parallel = "gradients over tp", run.parallel
    worst, largest = 0.0, 0.0
    for parameter_name, parameter in run.student.module.named_parameters():
        gradient = parameter.main_grad
        largest = max(largest, gradient.abs().max().item())
        if "norm" in parameter_name:
            first, *others = parallel.gather_tp_shards(gradient) if parallel.tp > 1 else [gradient]
            worst = max(worst, *(_error(other, first) for other in others), 0.0)
    worst = worst_over_ranks(parallel, worst)
    if not 0 < worst_over_ranks(parallel, largest) < math.inf:
        return judge(name, False, f"the largest gradient is {largest}", "look at the loss and data")
    found = f"norms differ by {worst:.1e} of the largest entry at tp {parallel.tp}"
    mend = "a collective is missing in backward: report it; another tp may do"
    return judge(name, worst <= limit, f"{found} (allowed {limit:.2g})", mend)


def context_scores(run: Run, inputs: Inputs, num_prompts: int, max_new_tokens: int) -> Check:
    """Whether the teacher's greedy answers are better with the context, on validation prompts."""
    greedy = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=max_new_tokens)
    plan = EvaluationPlan(
        num_questions=num_prompts,
        num_retention=1,
        sampling=greedy,
        retention_sampling=greedy,
        samples_per_question=1,
        leakage_phrases=(),
        seed=run.seed,
    )
    evaluator = Evaluator(
        inputs.task, inputs.retention, inputs.conversation, plan, run.parallel, inputs.prefix_ids
    )
    engine = run.engines["teacher"]
    engine.load_weights(0)
    without, given = (
        evaluator.task_score(engine, "validation", with_context=context).score
        for context in (False, True)
    )
    engine.release_weights()
    found = (
        f"the teacher scores {without:.2f} without, {given:.2f} with the context "
        f"({num_prompts} prompts, {max_new_tokens} tokens)"
    )
    mend = (
        "try another context, or more doctor.num_prompts and doctor.max_new_tokens: the student "
        "cannot gain what the teacher does not"
    )
    return judge("in-context gap", given > without, found, mend, otherwise="warn")
