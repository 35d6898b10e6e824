"""Consolidate: training runs take the selected experience into the weights."""

from __future__ import annotations

import logging

from opcd_nemo.errors import UserError
from opcd_nemo.experience.folder import RUN_ANSWERS, RUN_SUMMARY, SELECTED
from opcd_nemo.experience.run_configs import run_config
from opcd_nemo.experience.stages.context import StageContext

logger = logging.getLogger(__name__)


class Consolidate:
    """Does a training run: each run has fresh processes, so that no memory is left behind."""

    name = "consolidate"
    reads: tuple[str, ...] = (SELECTED,)
    writes: tuple[str, ...] = (RUN_ANSWERS, RUN_SUMMARY)
    needs_ranks = True
    repeats = False

    def run(self, context: StageContext) -> None:
        """Do the run that the settings name, unless it is done. Collective over the world.

        Raises:
            UserError: the settings name no run.
        """
        # imports NeMo and Lightning, which the pipeline's process would hold beside every run
        from opcd_nemo.trainer.run import train

        folder = context.folder
        run = folder.settings.run
        if run is None:
            raise UserError(
                "run", run, f"{', '.join(folder.settings.runs)}, under torchrun or srun"
            )
        folder.open()
        summary = folder.of_run(RUN_SUMMARY, run)
        if summary.is_file():
            logger.info("consolidate: finished before (%s)", summary)
            return
        train(run_config(folder, run))
