"""Consolidate: training runs take the selected experience into the weights."""

from __future__ import annotations

import gc
import logging

from opcd_nemo.experience.folder import RUN_ANSWERS, RUN_SUMMARY, SELECTED
from opcd_nemo.experience.run_configs import run_config
from opcd_nemo.experience.stages.context import StageContext

logger = logging.getLogger(__name__)


class Consolidate:
    """Does the training runs, one after the other; each is alone in memory."""

    name = "consolidate"
    reads: tuple[str, ...] = (SELECTED,)
    writes: tuple[str, ...] = (RUN_ANSWERS, RUN_SUMMARY)
    needs_ranks = True
    repeats = False

    def run(self, context: StageContext) -> None:
        """Do the run that the settings name, or all, unless done. Collective over the world."""
        # imports NeMo and Lightning, which the pipeline's process would hold beside every run
        from opcd_nemo.trainer.run import train

        folder = context.folder
        folder.open()
        wanted = folder.settings.run
        for run in folder.settings.runs if wanted is None else [wanted]:
            summary = folder.of_run(RUN_SUMMARY, run)
            if summary.is_file():
                logger.info("consolidate: finished before (%s)", summary)
                continue
            logger.info("consolidate: %s", run)
            train(run_config(folder, run))
            gc.collect()  # trainer and model name each other, and hold gigabytes
