"""Select: the experience to distil goes into the registry."""

from __future__ import annotations

import json
import logging
from typing import Any

from opcd_nemo.context.registry import Entry
from opcd_nemo.experience.candidates import Candidate
from opcd_nemo.experience.folder import SELECTED, PipelineFolder
from opcd_nemo.experience.run_configs import stage_config
from opcd_nemo.experience.scoring import Scored, select
from opcd_nemo.experience.stages.context import StageContext
from opcd_nemo.report.pipeline_page import RANKED
from opcd_nemo.storage.run_folder import RunFolder

logger = logging.getLogger(__name__)


class Select:
    """Writes which entries of the registry this round distils."""

    name = "select"
    reads: tuple[str, ...] = (RANKED,)
    writes: tuple[str, ...] = (SELECTED,)
    needs_ranks = False
    repeats = False

    def run(self, context: StageContext) -> None:
        """Put the candidates of the settings' choice into the registry.

        Raises:
            UserError: fewer candidates exist than wanted, or another job has the folder.
        """
        folder = context.folder
        settings, seed = folder.settings.experience.selection, folder.settings.train.seed
        ranking = folder.ranking()
        records = {record["experience"]: record for record in ranking["ranked"]}
        ranked = [
            Scored(candidate=Candidate.from_record(record), scores=(record["score"],))
            for record in ranking["ranked"]
        ]
        with RunFolder.hold(folder.path) as run_folder:
            hashes = []
            for scored in select(ranked, settings, seed):
                record = records[scored.candidate.hash]
                entry = _entry(folder, scored, record["questions"], ranking["without"])
                folder.registry.add(entry)
                hashes.append(entry.hash)
                logger.info("%s", _about(entry, scored))
            reason = f"{settings.rule}, round {folder.settings.round}"
            folder.registry.select(hashes[0], reason)
            run_folder.write(SELECTED, json.dumps({"experience": hashes}))


def _entry(folder: PipelineFolder, scored: Scored, num_questions: int, without: float) -> Entry:
    return Entry(
        items=scored.candidate.items,
        num_tokens=scored.candidate.num_tokens,
        lineage=_lineage(folder, scored.candidate),
        scores={
            "validation": scored.score,
            "validation_questions": num_questions,
            "validation_without": without,
        },
    )


def _lineage(folder: PipelineFolder, candidate: Candidate) -> dict[str, Any]:
    train, extraction = stage_config(folder), folder.settings.experience.extraction
    return {
        "written_by": "a model",
        "model": extraction.model or train.teacher.path or train.student.path,
        "round": folder.settings.round,
        "seed": train.seed,
        "chain": candidate.chain,
        "step": candidate.step,
        "prompt_version": extraction.prompt_version,
        "problems": list(candidate.problems),
        "kept": extraction.keep,
    }


def _about(entry: Entry, scored: Scored) -> str:
    candidate = scored.candidate
    return (
        f"select: {entry.hash[:12]}, chain {candidate.chain} step {candidate.step}, "
        f"{len(entry.items)} items, validation {scored.score:.3f} "
        f"({entry.scores['validation_without']:.3f} without)"
    )
