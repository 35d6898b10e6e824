"""`opcd report`: the page of a run or a pipeline anew, or a page that compares several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.report.comparison import comparison_page
from opcd_nemo.report.pipeline_page import is_pipeline, pipeline_page
from opcd_nemo.report.record import read_run
from opcd_nemo.report.run_page import PAGE, run_page
from opcd_nemo.storage.durable import write_whole

_USAGE = "FOLDER [FOLDER ...] [to=FILE]"
_COMPARISON = "comparison.html"


def write_page(words: Sequence[str]) -> Path:
    """Write the page that the words of the command ask for; returns its path.

    Raises:
        UserError: no folder, a folder without a finished run, or a file that cannot be written.
    """
    targets = [word.removeprefix("to=") for word in words if word.startswith("to=")]
    folders = [Path(word).expanduser() for word in words if not word.startswith("to=")]
    if not folders or len(targets) > 1 or not all(targets):
        raise UserError("opcd report", ABSENT, _USAGE, problem=f"{len(folders)} folders are given")
    if len(set(map(Path.resolve, folders))) != len(folders):
        raise UserError("opcd report", " ".join(words), "each folder once")
    if len(folders) == 1:
        (folder,) = folders
        page = pipeline_page(folder) if is_pipeline(folder) else run_page(read_run(folder))
        target = folder / PAGE
    else:
        page = comparison_page([read_run(folder) for folder in folders])
        common = os.path.commonpath([folder.resolve().parent for folder in folders])
        target = Path(common) / _COMPARISON
    if targets:
        target = Path(targets[0]).expanduser()
    try:
        write_whole(target, page)
    except OSError as error:
        allowed = "a file that can be written, as to=report.html"
        raise UserError("to", target, allowed, problem=str(error.strerror or error)) from error
    return target
