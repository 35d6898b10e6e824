"""A run that has ended, as an object that reads the run's files."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_nemo.checkpoint.newest import of_step
from opcd_nemo.config.limits import SAMPLES_BYTES
from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.summary import SUMMARY, table_of
from opcd_nemo.formats.locate import read_json
from opcd_nemo.metrics import METRICS
from opcd_nemo.report.run_page import PAGE
from opcd_nemo.storage.records import check_record, read_lines

_REMEDY = "a copy of the file as it was; or the same run again, which writes it anew"
# what values of other kinds and sizes come to
_ODD = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


@dataclass(frozen=True, slots=True)
class FinishedRun:
    """What a training run has left in `folder`; also of a run that `opcd train` has done."""

    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        """The values of summary.json: scores, costs, layout, versions.

        Raises:
            UserError: the folder has no such file, as before the end of a run.
        """
        return read_json(self.folder / SUMMARY)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The measurements of every training step, by name.

        Raises:
            UserError: the folder has no such file, as before the first step of a run, or a line of
                the file is damaged.
        """
        if not (self.folder / METRICS).is_file():
            allowed = "the folder of a run that has trained"
            raise UserError("folder", self.folder, allowed, problem=f"has no {METRICS}")
        return read_lines(self.folder / METRICS, {"step": int}, _REMEDY, SAMPLES_BYTES)

    @property
    def table(self) -> str:
        """The scores before training, with the context, and after training, as text.

        Raises:
            UserError: as of `summary`, or a score is not as the run wrote it.
        """
        summary = self.summary
        try:
            return table_of(summary)
        except _ODD as error:
            problem = f"the scores are not as the run wrote them ({error!r})"
            raise UserError(self.folder / SUMMARY, allowed=_REMEDY, problem=problem) from error

    @property
    def student(self) -> Path:
        """The checkpoint of the trained student, which `load_model` and `opcd` commands take.

        Raises:
            UserError: as of `summary`, or the number of steps is not as the run wrote it.
        """
        summary = self.summary
        check_record(summary, {"steps": int}, self.folder / SUMMARY, _REMEDY)
        return of_step(self.folder / "checkpoints", summary["steps"])

    def report(self, *, show: bool = True) -> Path:
        """Open the run's page in a browser, if the machine has a browser; returns the page.

        Args:
            show: False: return the page alone.

        Raises:
            UserError: the run has not written a page.
        """
        page = self.folder / PAGE
        if not page.is_file():
            allowed = "the folder of a run that has ended"
            raise UserError("folder", self.folder, allowed, problem=f"has no {PAGE}")
        if show:
            webbrowser.open(page.resolve().as_uri())
        return page
