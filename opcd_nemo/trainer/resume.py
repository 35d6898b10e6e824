"""What a run finds in its folder: another run of its name, or what it continues from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opcd_nemo.checkpoint.newest import newest, read_common
from opcd_nemo.config.changes import check_unchanged
from opcd_nemo.config.renamed import present_config
from opcd_nemo.config.secrets import without_secrets
from opcd_nemo.config.train import TrainConfig
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import ReadError, UserError
from opcd_nemo.metrics import METRICS
from opcd_nemo.storage.durable import check_folders, clean, describe, set_aside
from opcd_nemo.storage.metrics_file import cut_metrics
from opcd_nemo.storage.ranks import on_every_rank, on_rank_0
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.trainer.boundary import STOP_FILE
from opcd_nemo.training.prepared import PreparedRun

DONE = "DONE"  # in the run's folder when nothing is left to do; holds the digest of the weights
_CHECKPOINTS = "checkpoints"
logger = logging.getLogger(__name__)


def make_way(run_folder: RunFolder, config: TrainConfig, parallel: Parallel) -> None:
    """Keep an earlier run of the same name under the next free number; nothing is lost.

    Collective over the world.

    Raises:
        UserError: the folder has a file that stops the run.
    """
    folder = run_folder.path

    def prepare() -> None:
        if not config.exp_manager["resume_if_exists"]:
            run_folder.set_aside()
        check_folders("name", config.name, (folder, folder / _CHECKPOINTS))
        stop = folder / STOP_FILE
        if stop.exists():
            raise UserError(
                "name", config.name, "a folder without that file", problem=f"{stop} stops this run"
            )

    on_rank_0(parallel, prepare)
    on_every_rank(parallel, lambda: folder.mkdir(parents=True, exist_ok=True))


def continue_from(
    run_folder: RunFolder,
    prepared: PreparedRun,
    parallel: Parallel,
    loops: Mapping[str, Any],
) -> Path | None:
    """The checkpoint to continue from, if the run is to continue. Collective over the world.

    Args:
        run_folder: of the run.
        prepared: the run as configured now.
        parallel: its ranks.
        loops: what this version of Lightning stores of its loop of steps.

    Raises:
        UserError: a key that matters has changed since; no checkpoint is whole; metrics are lost.
        ReadError: a disk does not give what it holds.
    """
    config, folder = prepared.config, run_folder.path
    if not config.exp_manager["resume_if_exists"]:
        return None
    on_rank_0(parallel, lambda: _tidy(folder / _CHECKPOINTS))
    path = newest(folder / _CHECKPOINTS, parallel, from_scratch=config.resume.from_scratch)
    num_steps = 0
    if path is not None:
        common = dict[str, Any]()
        on_every_rank(parallel, lambda: common.update(read_common(path, loops)))
        saved = without_secrets(present_config(common["opcd"]["config"]))
        known = common["opcd"].get("digests")
        check_unchanged(
            saved, prepared.origin, config.resume.allow_changes, (known or {}, prepared.digests)
        )
        if known is None:
            logger.info(
                "%s is of an earlier version: whether models and data have changed in place since "
                "is not known",
                path.name,
            )
        num_steps = common["global_step"]
    _cut(folder, num_steps, parallel)
    if path is not None:
        logger.info("continuing from %s", path)
        if num_steps > (asked := config.trainer["max_steps"]):
            logger.info(
                "trainer.max_steps=%d, but %d steps are done: none is added, none is taken back",
                asked,
                num_steps,
            )
    return path


def _tidy(folder: Path) -> None:
    """Remove what a killed run has begun to write."""
    clean(folder)
    for marker in folder.glob("*-unfinished"):  # NeMo's
        marker.unlink(missing_ok=True)


def _cut(folder: Path, num_steps: int, parallel: Parallel) -> None:
    """Let the record of the run's steps end where the run continues. Collective over the world."""
    metrics = folder / METRICS

    def cut() -> None:
        if num_steps == 0 and metrics.exists() and any((folder / _CHECKPOINTS).glob("*.ckpt*")):
            set_aside(metrics)  # of the steps whose checkpoints are lost
        cut_metrics(metrics, num_steps)
        (folder / DONE).unlink(missing_ok=True)  # last: a refused start changes nothing

    try:
        on_rank_0(parallel, cut)
    except OSError as failure:
        raise ReadError(f"{METRICS} is not continued: {describe(failure)}") from failure
