"""Controls that are trained: the same run, whose teacher reads a wrong context or none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config.stored import escaped
from opcd_nemo.config.train import TRAINED_CONTROLS, TrainConfig
from opcd_nemo.evaluation.answers_file import ANSWERS, read_answers
from opcd_nemo.evaluation.intervals import Unit, paired
from opcd_nemo.evaluation.summary import SUMMARY
from opcd_nemo.formats.locate import read_json
from opcd_nemo.report.run_page import write_run_page
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.training.prepared import PreparedRun, prepare_run

_NO_CONTEXT = {"_target_": "opcd_nemo.context.NoContext"}
_REMEDY = "the same command again, with exp_manager=resumable"


def prepare_controls(
    raw: DictConfig, config: TrainConfig, world_size: int
) -> dict[str, PreparedRun]:
    """The runs of `evaluation.controls` that train, checked before the first model loads.

    Each has its folder in that of the run.

    Raises:
        UserError: the wrong context does not fit.
    """
    prepared = {}
    for name in config.evaluation.controls:
        if name in TRAINED_CONTROLS:
            changed = raw.copy()
            with open_dict(changed):
                changed.name = f"{config.name}/{name}"
                changed.context = _context(raw, name)
                changed.evaluation.controls, changed.evaluation.wrong_context = [], None
                changed.evaluation.min_gap = None  # what a control should not have
            prepared[name] = prepare_run(changed, world_size)
    return prepared


def _context(raw: DictConfig, name: str) -> dict[str, Any]:
    if name == "trained_without_context":
        return _NO_CONTEXT
    wrong: dict[str, Any] = escaped(
        OmegaConf.to_container(raw.evaluation.wrong_context, resolve=True)
    )
    return wrong


def add_controls(run_folder: RunFolder, controls: Mapping[str, PreparedRun], unit: Unit) -> None:
    """Put the students of trained controls beside the run's, on rank 0: summary and page.

    Raises:
        UserError: a file of theirs is not as it was written.
    """
    summary = read_json(run_folder.path / SUMMARY)
    student = read_answers(run_folder.path / ANSWERS, _REMEDY)["student", "task"]
    summary["trained_controls"] = {}
    for name in controls:
        folder = run_folder.path / name
        answers = read_answers(folder / ANSWERS, _REMEDY)["student", "task"]
        summary["trained_controls"][name] = {
            **read_json(folder / SUMMARY)["evaluation"]["student"],
            "difference": paired(answers, student, unit),
        }
    run_folder.write(SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False))
    write_run_page(run_folder)
