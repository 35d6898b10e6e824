"""`opcd report`: the page of a run or a pipeline anew, or a page that compares several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.evaluation.summary import SUMMARY
from opcd_nemo.report.comparison import comparison_page
from opcd_nemo.report.pipeline_page import is_pipeline, pipeline_page
from opcd_nemo.report.record import read_run
from opcd_nemo.report.run_page import PAGE, run_page
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.storage.plain_file import is_there

_USAGE = "FOLDER [FOLDER ...] [to=FILE]"
_COMPARISON = "comparison.html"


def write_page(words: Sequence[str]) -> Path:
    """Write the page that the words of the command ask for; returns its path.

    Raises:
        UserError: no folder, a folder without a finished run, or a file that cannot be written.
    """
    folders = [Path(word).expanduser() for word in words if not word.startswith("to=")]
    target = _target(words)
    if not folders:
        raise UserError("opcd report", ABSENT, _USAGE, problem="no folder is given")
    if len(set(map(Path.resolve, folders))) != len(folders):
        raise UserError("opcd report", " ".join(words), "each folder once")
    for folder in folders:
        _check_ended(folder)
    if len(folders) == 1:
        (folder,) = folders
        page = pipeline_page(folder) if is_pipeline(folder) else run_page(read_run(folder))
        target = target or folder / PAGE
    else:
        page = _comparison(folders)
        common = os.path.commonpath([folder.resolve().parent for folder in folders])
        target = target or Path(common) / _COMPARISON
    try:
        write_whole(target, page)
    except OSError as error:
        allowed = "a file that can be written, as to=report.html"
        raise UserError("to", target, allowed, problem=str(error.strerror or error)) from error
    return target


def _target(words: Sequence[str]) -> Path | None:
    """The file that `to=` names; None without the word."""
    given = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    if len(given) > 1:
        raise UserError("to", " ".join(given), "a single file", problem=f"{len(given)} are given")
    if given and not given[0]:
        raise UserError("to", "", "a file, as to=report.html", problem="names no file")
    return Path(given[0]).expanduser() if given else None


def _check_ended(folder: Path) -> None:
    """Refuse what is no folder of a run or a pipeline that has ended."""
    if is_there(folder / SUMMARY):
        return
    allowed = "the folder of a run that has ended, or of a pipeline after its stage evaluate"
    below = sorted(file.parent for file in folder.glob(f"*/{SUMMARY}"))
    if below:
        allowed += f", as {below[0]}"
    problem = f"has no {SUMMARY}" if folder.is_dir() else "is no folder"
    raise UserError("opcd report", folder, allowed, problem=problem)


def _comparison(folders: Sequence[Path]) -> str:
    for folder in filter(is_pipeline, folders):
        allowed = f"folders of runs; opcd report {folder} writes the pipeline's page"
        problem = "is a pipeline, which is not compared"
        raise UserError("opcd report", folder, allowed, problem=problem)
    return comparison_page([read_run(folder) for folder in folders])
