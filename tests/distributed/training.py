"""Training runs of fixed prompts and responses: gradients, moved checkpoints, failures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from opcd_nemo.checkpoint import save_load as checkpoint
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.engines.megatron import MegatronEngine
from opcd_nemo.losses import DivergenceLoss, HardLabelLoss, Loss, TopKLoss
from opcd_nemo.metrics import Stats
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.rollout.conversation import TurnPrompts
from opcd_nemo.training.optim import NonFiniteError, StudentOptimizer
from opcd_nemo.training.step import Phase, Run, distill_step
from opcd_nemo.training.teacher import Teacher
from opcd_nemo.types import Prompt, Sample
from tests.distributed import cases
from tests.distributed.cases import TrainCase
from tests.distributed.shards import (
    Tensors,
    build,
    full_tensors,
    gather_gradient_shards,
    largest_padding,
    start,
)


class Recorder(StudentOptimizer):
    """Megatron's optimizer, which keeps the first step's full gradients."""

    gradients: Tensors | None = None
    unequal: list[str]
    padding: float
    model: LanguageModel

    def step(self) -> Stats:
        """Record, then clip and update."""
        if self.gradients is None:
            if self.ddp.ddp_config.use_distributed_optimizer:
                gather_gradient_shards(self, self.model.parallel)
            self.gradients, self.unequal = full_tensors(self.model, lambda p: p.main_grad)
            self.padding = largest_padding(self.model, lambda p: p.main_grad)
        return super().step()


@dataclass
class FixedEpisode:
    """The turns of one place in a step."""

    step: int
    place: int
    turns: int
    turn: int = 0

    @property
    def uid(self) -> str:
        """The place."""
        return f"{self.step}/{self.place}"

    @property
    def prompt(self) -> tuple[int, ...]:
        """Of this turn."""
        return cases.training_turn(self.step, self.place, self.turn)[0]

    @property
    def done(self) -> bool:
        """After the last turn."""
        return self.turn == self.turns

    def reply(self, _: str) -> None:
        """Go on to the next turn."""
        self.turn += 1


@dataclass
class FixedTask:
    """The prompts of `cases.training_turn`."""

    games: bool

    def episodes(self, _: str, step: int, n: int) -> list[FixedEpisode]:
        """The first n."""
        return self._at(step, range(n))

    def anchors(self, step: int, n: int) -> list[FixedEpisode]:
        """The last n."""
        return self._at(step, range(cases.NUM_PROMPTS - n, cases.NUM_PROMPTS))

    def _at(self, step: int, places: range) -> list[FixedEpisode]:
        return [
            FixedEpisode(step, place, cases.TURNS[step][place] if self.games else 1)
            for place in places
        ]


class FixedConversation:
    """The teacher reads a context before the student's prompt."""

    tokenizer = SimpleNamespace(reply=lambda *_: "")

    def prompts(
        self, episode: FixedEpisode, step: int, *, with_context: bool = True
    ) -> TurnPrompts:
        """Student's and teacher's."""
        context = cases.teacher_context(episode.prompt) if with_context else ()
        return TurnPrompts("", episode.prompt, (*context, *episode.prompt))

    def check_fits(self, *_: object) -> None:
        """Everything fits."""


@dataclass
class FixedEngine:
    """Answers with the responses of `cases.training_turn`."""

    weights_version: int = 0

    def load_weights(self, version: int) -> None:
        """Remember the version."""
        self.weights_version = version

    def release_weights(self) -> None:
        """Nothing is held."""

    def generate(self, prompts: Sequence[Prompt], *_: object, step: int, **__: object) -> Any:
        """The response of each prompt's place."""
        answers = []
        for prompt in prompts:
            turn, place = divmod(prompt.index, 1_000_000)
            expected, answer = cases.training_turn(step, place, turn)
            assert expected == prompt.token_ids
            answers.append(answer)
        return [
            Sample(response_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="length")
            for ids in answers
        ]


def make_loss(kind: str, beta: float = 0.5, temperature: float = 1.0, chunk: int = 5) -> Loss:
    """The loss of a case."""
    if kind == "hard":
        return HardLabelLoss(temperature, chunk)
    if kind == "top4_drop":
        return TopKLoss("reverse_kl", 4, "drop", temperature, chunk)
    if kind == "top4_renorm":
        return TopKLoss("reverse_kl", 4, "renorm", temperature, chunk)
    assert kind in ("reverse_kl", "forward_kl", "jsd")
    return DivergenceLoss(kind, beta, temperature, chunk)


def build_run(parallel: Parallel, models: Path, case: TrainCase) -> Run:
    """Student, teacher and optimizer of a case, around fixed rollouts."""
    dtype = torch.bfloat16 if case.bf16 else torch.float32
    student = build(parallel, models / case.student, dtype=dtype)
    settings = SimpleNamespace(
        lr=case.adam.lr,
        min_lr=0.0,
        schedule="constant",
        warmup_steps=0,
        betas=list(cases.BETAS),
        eps=case.adam.eps,
        weight_decay=case.adam.weight_decay,
        clip_grad=case.adam.clip,
        use_distributed_optimizer=case.distributed_optimizer,
        overlap_grad_reduce=case.overlap,
    )
    optimizer = Recorder(student, settings, max_steps=cases.STEPS)
    optimizer.model = student
    teacher = student
    if case.update != "shared":
        teacher = build(parallel, models / case.teacher, dtype=dtype)
    settings_of_teacher: Any = SimpleNamespace(
        update=case.update, sync_every_n_steps=case.sync_every, ema_decay=case.decay
    )
    engines: Any = dict.fromkeys(("student", "teacher"), FixedEngine())
    if case.on_policy:
        engines = {"student": _engine(student)}
        engines["teacher"] = engines["student"] if teacher is student else _engine(teacher)
    phase = Phase(sampler="student", loss=make_loss(case.loss))
    fixed: Any = (FixedTask(case.games), FixedConversation())
    return Run(
        parallel=parallel,
        task=fixed[0],
        conversation=fixed[1],
        student=student,
        teacher=Teacher(teacher, cases.CONTEXT, settings_of_teacher),
        engines=engines,
        optimizer=optimizer,
        sampling=Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=5),
        phase=phase,
        warmup=phase,
        warmup_steps=0,
        seed=0,
        prompts_per_step=cases.NUM_PROMPTS,
        anchors_per_step=cases.NUM_ANCHORS,
        micro_batch_size=case.micro_batch_size,
        aggregation="token_mean" if case.token_mean else "sequence_mean",
    )


def _engine(model: LanguageModel) -> MegatronEngine:
    return MegatronEngine(model, (2, 3, 4), max_batch_size=32, pack=True)


def train(parallel: Parallel, models: Path, case: TrainCase, steps: int) -> dict[str, Any]:
    """Distil for some steps; losses, norms, first gradients and last parameters."""
    run = build_run(parallel, models, case)
    teacher = run.teacher.model.module
    before = [parameter.clone() for parameter in teacher.parameters()]
    stats = [distill_step(run, step) for step in range(steps)]
    parameters, unequal = full_tensors(run.student, lambda p: p.data)
    recorder: Any = run.optimizer
    return {
        "stats": [s.means() for s in stats],
        "gradients": recorder.gradients,
        "parameters": parameters,
        "unequal": recorder.unequal + unequal,
        "padding": _worst_padding(run),
        "teacher_unchanged": all(map(torch.equal, before, teacher.parameters())),
        "teacher_without_gradient": all(
            p.grad is None and not p.requires_grad and not hasattr(p, "main_grad")
            for p in teacher.parameters()
        ),
    }


def teacher_state(run: Run) -> Tensors:
    """Full tensors of what a checkpoint holds of the teacher, if anything."""
    held = run.teacher.state()
    if not held:
        return {}
    by_parameter = {p: held[name] for name, p in run.teacher.model.module.named_parameters()}
    return full_tensors(run.teacher.model, lambda p: by_parameter[p])[0]


def _worst_padding(run: Run) -> dict[str, float]:
    """Largest padded weight, gradient and Adam moment over all ranks."""
    recorder: Any = run.optimizer
    worst = {
        "weight": largest_padding(run.student, lambda p: p.data),
        "gradient": recorder.padding,
    }
    adam = recorder.optimizer.chained_optimizers[0].optimizer.state
    for key in ("exp_avg", "exp_avg_sq"):
        worst[key] = largest_padding(run.student, lambda p, key=key: adam.get(p, {}).get(key))
    parts = run.parallel.gather_objects(worst)
    return {key: max(part[key] for part in parts) for key in worst}


def move_checkpoint(
    models: Path, results: Path, case: TrainCase, source: str, target: str
) -> dict[str, Any]:
    """Two steps under one layout, save, load under another, and the third step under both."""
    path = results / f"{source}-{target}-{case.student}"
    parallel = start(source)
    run = build_run(parallel, models, case)
    for step in range(2):
        distill_step(run, step)
    plain = {"optimizer_states": [], "epoch": 7}
    checkpoint.save(path, plain, run.student, run.optimizer, run.teacher, parallel)
    saved, _ = full_tensors(run.student, lambda p: p.data)
    saved_teacher = teacher_state(run)
    expected = distill_step(run, 2).means()
    continued, _ = full_tensors(run.student, lambda p: p.data)

    parallel = start(target)
    run = build_run(parallel, models, case)
    common = checkpoint.load(path, run.student, run.optimizer, run.teacher)
    loaded_teacher = teacher_state(run), full_tensors(run.teacher.model, lambda p: p.data)[0]
    loaded, _ = full_tensors(run.student, lambda p: p.data)
    refused = (
        _refusal_of_another_update(parallel, models, case, path) if case.update == "ema" else ""
    )
    stats = distill_step(run, 2).means()
    resumed, unequal = full_tensors(run.student, lambda p: p.data)
    return {
        "saved": saved,
        "loaded": loaded,
        "saved_teacher": saved_teacher,
        "loaded_teacher": loaded_teacher,
        "continued": continued,
        "resumed": resumed,
        "stats": (expected, stats),
        "epoch": common["epoch"],
        "unequal": unequal,
        "refused": refused,
    }


def _refusal_of_another_update(
    parallel: Parallel, models: Path, case: TrainCase, path: Path
) -> str:
    """What a run says whose teacher is another than the checkpoint's."""
    other = build_run(
        parallel, models, replace(case, update="every_n_steps", decay=None, sync_every=1)
    )
    try:
        checkpoint.load(path, other.student, other.optimizer, other.teacher)
    except ValueError as error:
        return str(error)
    return "nothing"


def failures(parallel: Parallel, models: Path) -> dict[str, list[dict[str, Any]]]:
    """What every rank reports when one rank meets a NaN."""

    def poison_weight(parameter: torch.nn.Parameter) -> None:
        parameter.data.view(-1)[0] = math.nan

    def poison_gradient(parameter: torch.nn.Parameter) -> None:
        parameter.register_hook(lambda gradient: gradient * math.nan)

    found = {}
    for name, poison in {"weight": poison_weight, "gradient": poison_gradient}.items():
        for case in ("llama-untied", "llama-untied-distributed"):
            run = build_run(parallel, models, cases.TRAIN_CASES[case])
            distill_step(run, 0)
            if parallel.rank == parallel.world_size - 1:
                poison(run.student.module.decoder.layers[-1].mlp.linear_fc2.weight)
            before = [p.detach().clone() for p in run.student.module.parameters()]
            raised = "nothing"
            try:
                distill_step(run, 1)
            except NonFiniteError as error:
                raised = str(error)
            found[f"{name}, {case}"] = parallel.gather_objects(
                {
                    "raised": raised,
                    "unchanged": all(
                        torch.equal(a.nan_to_num(1.5), p.detach().nan_to_num(1.5))
                        for a, p in zip(before, run.student.module.parameters(), strict=True)
                    ),
                }
            )
    return found
