"""Evaluate: the test questions that no training run has asked, and the table of all."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from typing import Any

from opcd_nemo.config.train import TrainConfig
from opcd_nemo.context.items import shuffled_words
from opcd_nemo.evaluation.summary import SUMMARY
from opcd_nemo.experience.folder import (
    RUN_ANSWERS,
    RUN_SUMMARY,
    SELECTED,
    TABLE,
    PipelineFolder,
)
from opcd_nemo.experience.run_configs import stage_config
from opcd_nemo.experience.stages.context import Models, StageContext
from opcd_nemo.experience.table import summarise, table_text
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.report.pipeline_page import CONTROLS, RANKED, pipeline_page
from opcd_nemo.report.run_page import PAGE
from opcd_nemo.storage import heartbeat
from opcd_nemo.storage.ranks import on_rank_0

logger = logging.getLogger(__name__)


class Evaluate:
    """Writes the controls' answers, the summary and the table."""

    name = "evaluate"
    reads: tuple[str, ...] = (RANKED, SELECTED, RUN_ANSWERS, RUN_SUMMARY)
    writes: tuple[str, ...] = (CONTROLS, SUMMARY, TABLE)
    needs_ranks = True
    repeats = True  # a control may be added, and the table is worked out anew

    def run(self, context: StageContext) -> None:
        """Do the evaluations that are not done, then show the table. Collective over the world."""
        models = context.open_models(stage_config(context.folder))
        _evaluate(models, context)
        on_rank_0(models.parallel, lambda: _write_table(models, context))


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationJob:
    """A row of the table and a seed: which model answers, with which items in its context."""

    row: str
    seed: int
    path: str
    dtype: str
    items: tuple[str, ...]


def _evaluate(models: Models, context: StageContext) -> None:
    rows: dict[str, Any] = on_rank_0(models.parallel, context.folder.controls)
    engine, held = None, None
    for job in _jobs(context.folder, models.config):
        if str(job.seed) in rows.get(job.row, ()):
            continue
        if engine is None or held != (job.path, job.dtype):
            engine = None  # frees the model before the next model is loaded
            engine = models.engine(open_model(job.path), job.dtype)
            held = (job.path, job.dtype)
        evaluator, with_context = models.evaluator(job.items, job.seed), bool(job.items)
        task = evaluator.task_score(engine, "test", with_context=with_context)
        retention = evaluator.retention(engine, with_context=with_context)
        parts = {"task": task, "retention": retention}
        rows.setdefault(job.row, {})[str(job.seed)] = {
            part: [answer.record() for answer in found.answers] for part, found in parts.items()
        }
        models.write(CONTROLS, json.dumps(rows))
        heartbeat.touch()
        logger.info("evaluate: %s, seed %s: %.3f", job.row, job.seed, task.score)


def _jobs(folder: PipelineFolder, config: TrainConfig) -> list[EvaluationJob]:
    """What the runs have not asked, ordered so that each model is loaded once.

    Contexts that should not help; a larger teacher's experience in the context of the untrained
    student; students with their experience; and the checkpoints chosen on validation.
    """
    student, teacher = config.student, config.teacher
    consolidation, items = folder.settings.experience.consolidation, folder.selected()[0].items
    of_control = {
        "wrong": tuple(folder.ranking()["ranked"][-1]["items"]),
        "shuffled": shuffled_words(items, config.seed),
    }
    untrained = [
        (name, teacher.path or student.path, teacher.dtype, of_control[name])
        for name in folder.settings.experience.controls
    ]
    if teacher.path is not None and student.keep_layers is None:
        untrained.append(("student_in_context", student.path, student.dtype, items))
    jobs = [
        EvaluationJob(row=row, seed=seed, path=path, dtype=dtype, items=context)
        for row, path, dtype, context in untrained
        for seed in consolidation.seeds
    ]
    for method in consolidation.methods:
        for seed in consolidation.seeds:
            run = f"{method}-{seed}"
            rows: list[tuple[str, tuple[str, ...]]] = [(f"{method}_in_context", items)]
            if not folder.is_last(run):
                rows.append((f"{method}_best", ()))
            path = str(folder.student(run))
            jobs += [
                EvaluationJob(row=row, seed=seed, path=path, dtype=student.dtype, items=context)
                for row, context in rows
            ]
    return jobs


def _write_table(models: Models, context: StageContext) -> None:
    """Write and show the table; the last round's table is also in the pipeline's folder."""
    folder, summary = context.folder, summarise(context.folder)
    text = table_text(summary)
    shown = json.dumps(summary, indent=1, ensure_ascii=False)
    for where in ("",) if folder.path == folder.root else ("", "../"):
        models.run_folder.write(f"{where}{SUMMARY}", shown)
        models.run_folder.write(f"{where}{TABLE}", f"{text}\n")
        where_to = folder.path / where
        models.run_folder.write(f"{where}{PAGE}", pipeline_page(where_to))
    logger.info("%s", text)
    logger.info("written: %s; open %s", folder.path, folder.root / PAGE)
