"""The stages of the pipeline that need a model, on every rank of a launch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from omegaconf import DictConfig

from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.context.items import content_hash, shuffled_words
from opcd_nemo.context.sources import ExperienceContext
from opcd_nemo.distributed.groups import Parallel, environment_world, init_parallel
from opcd_nemo.experience.config import Settings, load_experience
from opcd_nemo.experience.extraction import (
    Candidate,
    Extraction,
    Speaker,
    candidates,
    check_extraction,
)
from opcd_nemo.experience.scoring import ScoreBook, check_scoring, halve
from opcd_nemo.experience.workplace import (
    CANDIDATES,
    CONTROLS,
    EXTRACTION,
    RANKED,
    SCORES,
    TURNS,
    Workplace,
)
from opcd_nemo.formats.locate import read_json
from opcd_nemo.formats.stored_model import StoredModel, open_model
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.storage import heartbeat
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.trainer.run import train
from opcd_nemo.training.build import build_engine, build_evaluator
from opcd_nemo.training.inputs import Inputs, open_inputs, shared_prefix

Say = Callable[[str], None]


def run_stage(raw: DictConfig, say: Say) -> None:
    """Do the stage that the configuration names. Collective over the world.

    Raises:
        ValueError: a key is wrong, or the stage has no ranks to run on.
    """
    settings = load_experience(raw)
    rank, _ = environment_world()
    stages = {"extract": _extract, "score": _score, "consolidate": _consolidate}
    stages["evaluate"] = _evaluate
    if settings.stage not in stages:
        raise ValueError(
            f"stage={settings.stage}: allowed under torchrun or srun: {', '.join(stages)}"
        )
    stages[settings.stage](Workplace(settings), say if rank == 0 else _silent)


def _silent(_: str) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Bench:
    """Models ready to answer."""

    place: Workplace
    config: TrainConfig
    inputs: Inputs
    parallel: Parallel
    run_folder: RunFolder

    @property
    def settings(self) -> Settings:
        return self.place.settings

    def engine(self, checkpoint: StoredModel, dtype: str) -> RolloutEngine:
        """An engine of any model with the inputs' vocabulary."""
        return build_engine(self.config, self.inputs, checkpoint, self.parallel, dtype)

    def teacher(self) -> RolloutEngine:
        """The teacher's engine."""
        return self.engine(self.inputs.teacher, self.config.teacher.dtype)

    def write(self, name: str, text: str) -> None:
        self.run_folder.write(name, text)
        self.parallel.barrier()


def _open(
    place: Workplace, raw: DictConfig, check: Callable[[Inputs], None] = lambda _: None
) -> _Bench:
    place.check_unchanged()
    config = load_config(raw)
    _, world_size = environment_world()
    inputs = open_inputs(config, world_size)
    check(inputs)
    place.open()  # last: a folder that bad input had made would refuse the input that is mended
    parallel = init_parallel(config.parallel, config.seed)
    return _Bench(
        place=place,
        config=config,
        inputs=inputs,
        parallel=parallel,
        run_folder=RunFolder.hold(place.folder, parallel),
    )


def _extract(place: Workplace, say: Say) -> None:
    raw, settings = place.stage_config(), place.settings.experience.extraction
    if settings.model is not None:
        raw.student.path, raw.student.keep_layers, raw.teacher.path = settings.model, None, None

    def check(inputs: Inputs) -> None:
        check_extraction(settings, inputs.task, inputs.conversation, inputs.conversation)
        check_scoring(place.settings.experience.scoring, inputs.task)

    bench = _open(place, raw, check)
    conversation = bench.inputs.conversation
    engine, rollout = bench.teacher(), bench.config.rollout
    play = replace(rollout.sampling, max_new_tokens=settings.problem_max_new_tokens)
    records = Extraction(
        place.folder / EXTRACTION,
        settings,
        bench.inputs.task,
        player=Speaker(engine=engine, conversation=conversation, sampling=play),
        writer=Speaker(engine=engine, conversation=conversation, sampling=settings.sampling),
        parallel=bench.parallel,
        seed=bench.config.seed,
        fence=bench.run_folder.check_held,
    ).run(say)
    encode = conversation.tokenizer.encode
    found = candidates(records, settings.cap_tokens, lambda text: len(encode(text)))
    turns = [
        {"uid": f"{one['chain']}/{one['step']}/{one['uid']}/{number}", "text": text}
        for one in records
        for number, text in enumerate(one["turns"])
    ]
    bench.write(TURNS, "".join(f"{json.dumps(turn)}\n" for turn in turns))
    bench.write(CANDIDATES, json.dumps([asdict(one) for one in found]))
    say(f"extraction: {len(found)} candidates from {len(records)} extractions")


def _score(place: Workplace, say: Say) -> None:
    bench = _open(place, place.stage_config())
    engine = bench.teacher()
    fence = bench.run_folder.check_held
    book = ScoreBook(place.folder / SCORES, fence) if bench.parallel.rank == 0 else None

    def ask(key: str, items: tuple[str, ...], count: int) -> list[float]:
        mine = book.known(key) if book is not None else None
        known: list[float] = bench.parallel.gather_objects(mine)[0]
        if len(known) < count:
            new = _validation_scores(bench, engine, items, range(len(known), count))
            if book is not None:
                book.add(key, new)
            known = known + new
            heartbeat.touch()
        return known[:count]

    def ask_candidate(candidate: Candidate, count: int) -> list[float]:
        return ask(content_hash(candidate.items), candidate.items, count)

    scoring = place.settings.experience.scoring
    pool = read_candidates(place)
    ranked = halve(pool, scoring, ask_candidate, say)
    without = ask("none", (), scoring.num_questions)
    say(f"scoring: {sum(without) / len(without):.3f} without experience")
    ranking = {
        "without": sum(without) / len(without),
        "num_questions": scoring.num_questions,
        "ranked": [
            {
                **asdict(one.candidate),
                "experience": content_hash(one.candidate.items),
                "score": one.score,
                "questions": len(one.scores),
            }
            for one in ranked
        ],
    }
    bench.write(RANKED, json.dumps(ranking))


def read_candidates(place: Workplace) -> list[Candidate]:
    """The candidates that extraction has written.

    Raises:
        ValueError: it has not.
    """
    file = place.folder / CANDIDATES
    if not file.is_file():
        raise ValueError(f"stage={place.settings.stage}: no {file}; allowed: after stage=extract")
    return [
        Candidate(
            chain=one["chain"],
            step=one["step"],
            items=tuple(one["items"]),
            num_tokens=one["num_tokens"],
            problems=tuple(one["problems"]),
        )
        for one in json.loads(file.read_text(encoding="utf-8"))
    ]


def _validation_scores(
    bench: _Bench, engine: RolloutEngine, items: tuple[str, ...], questions: range
) -> list[float]:
    inputs = _with_experience(bench, items)
    evaluator = build_evaluator(bench.config, inputs, bench.parallel)
    found = evaluator.task_score(
        engine, "validation", with_context=bool(items), questions=questions
    )
    return [
        sum(answer.score for answer in samples) / len(samples)
        for samples in found.by_question.values()
    ]


def _with_experience(bench: _Bench, items: tuple[str, ...]) -> Inputs:
    """The inputs whose teacher reads these items."""
    if not items:
        return bench.inputs
    source: ExperienceContext = bench.place.experience(items)
    conversation = replace(bench.inputs.conversation, source=source)
    count = bench.config.evaluation.num_questions
    prefix_ids = shared_prefix(bench.inputs.task, conversation, count)
    return replace(bench.inputs, conversation=conversation, prefix_ids=prefix_ids)


def _consolidate(place: Workplace, say: Say) -> None:
    assert place.settings.run is not None
    place.open()
    if place.finished(place.settings.run):
        say(f"finished before: {place.folder / place.settings.run}")
        return
    train(place.run_config(place.settings.run), say)


def _evaluate(place: Workplace, say: Say) -> None:
    """Ask the test questions of whom the runs have not asked: see `_jobs`."""
    bench = _open(place, place.stage_config())
    rows: dict[str, Any] = {}
    if bench.parallel.rank == 0 and (place.folder / CONTROLS).is_file():
        rows = read_json(place.folder / CONTROLS)
    rows = bench.parallel.gather_objects(rows)[0]
    engine, held = None, None
    for job in _jobs(place, bench.config):
        if str(job.seed) in rows.get(job.row, ()):
            continue
        if engine is None or held != (job.path, job.dtype):
            engine = None  # one model in memory
            engine, held = bench.engine(open_model(job.path), job.dtype), (job.path, job.dtype)
        inputs = _with_experience(bench, job.items)
        evaluator = build_evaluator(replace(bench.config, seed=job.seed), inputs, bench.parallel)
        asked = bool(job.items)
        task = evaluator.task_score(engine, "test", with_context=asked)
        retention = evaluator.retention(engine, with_context=asked)
        parts = {"task": task, "retention": retention}
        rows.setdefault(job.row, {})[str(job.seed)] = {
            part: [asdict(answer) for answer in found.answers] for part, found in parts.items()
        }
        bench.write(CONTROLS, json.dumps(rows))
        heartbeat.touch()
        say(f"evaluate: {job.row}, seed {job.seed}: {task.score:.3f}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """Who is asked, with which items in the context."""

    row: str
    seed: int
    path: str
    dtype: str
    items: tuple[str, ...]


def _jobs(place: Workplace, config: TrainConfig) -> list[_Job]:
    """Those of one model follow each other.

    Contexts that should not help; a larger teacher's experience in the context of the untrained
    student; students with their experience; and the checkpoints chosen on validation.
    """
    student, teacher = config.student, config.teacher
    plan, selected = place.settings.experience.consolidation, place.selected()[0].items
    known = {
        "wrong": tuple(read_json(place.folder / RANKED)["ranked"][-1]["items"]),
        "shuffled": shuffled_words(selected, config.seed),
    }
    asked = [
        (name, teacher.path or student.path, teacher.dtype, known[name])
        for name in place.settings.experience.controls
    ]
    if teacher.path is not None and student.keep_layers is None:
        asked.append(("student_in_context", student.path, student.dtype, selected))
    jobs = [
        _Job(row=row, seed=seed, path=path, dtype=dtype, items=items)
        for row, path, dtype, items in asked
        for seed in plan.seeds
    ]
    for method in plan.methods:
        for seed in plan.seeds:
            run = f"{method}-{seed}"
            path = str(place.student(run))
            own: list[tuple[str, tuple[str, ...]]] = [(f"{method}_in_context", selected)]
            if not place.is_last(run):
                own.append((f"{method}_best", ()))
            jobs += [
                _Job(row=row, seed=seed, path=path, dtype=student.dtype, items=items)
                for row, items in own
            ]
    return jobs
