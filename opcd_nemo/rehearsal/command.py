"""`opcd rehearse`: ranks are played one after another, then come the comparison and the table."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import product
from typing import Any

from opcd_nemo.config.programs import RehearseConfig
from opcd_nemo.config.train import ParallelConfig, TrainConfig
from opcd_nemo.errors import UserError
from opcd_nemo.launch.exits import EXIT_FAILURE
from opcd_nemo.plan.outline import layout_of
from opcd_nemo.rehearsal.compare import mismatches
from opcd_nemo.rehearsal.devices import compiled_guard
from opcd_nemo.rehearsal.planned import planned_bytes
from opcd_nemo.rehearsal.rank import Task
from opcd_nemo.rehearsal.report import fullest_gib, rehearsal_report
from opcd_nemo.rehearsal.shapes import lengths_of, read_rehearsal, shapes_of
from opcd_nemo.rehearsal.wheels import unpacked
from opcd_nemo.training.inputs import check_stages

logger = logging.getLogger(__name__)


def rehearse(words: Sequence[str]) -> int:
    """Play ranks of a run on GPUs that do not exist; returns the exit code.

    Raises:
        UserError: a key is wrong, or g++ or a package is missing.
    """
    tasks, path = tasks_of(words)
    memory_gib, planned = tasks[0].memory_gib, planned_bytes(words)
    results = []
    with Player(path) as player:
        for task in tasks:
            logger.info("rank %s, of %s", task.rank, ", ".join(str(each.rank) for each in tasks))
            result = player.play(task)
            if result is None:
                return EXIT_FAILURE
            results.append(result)
    found = mismatches(results)
    logger.info("%s", rehearsal_report(results, memory_gib, found, planned))
    return EXIT_FAILURE if found or fullest_gib(results) > memory_gib else 0


def tasks_of(words: Sequence[str]) -> tuple[list[Task], list[str]]:
    """What the ranks that are played are told, and the folders before their installed packages.

    Raises:
        UserError: a key is wrong, or g++ or a package is missing.
    """
    config, settings, accelerator = read_rehearsal(words)
    _check_run(config, settings)
    ranks = _ranks(settings, config.parallel)
    path = _path(settings)
    compiled_guard()
    tasks = [
        Task(
            rank=rank,
            world_size=config.parallel.num_ranks,
            words=list(words),
            layers=settings.layers,
            lengths=lengths_of(config, settings),
            tokens=settings.tokens,
            gpu=accelerator.name,
            memory_gib=accelerator.memory_gib,
            per_node=accelerator.ranks_per_node,
            with_te=settings.transformer_engine is not None,
        )
        for rank in ranks
    ]
    return tasks, path


def _check_run(config: TrainConfig, settings: RehearseConfig) -> None:
    """Refuse what a run would refuse before its models load, and what has no stand-in.

    Raises:
        UserError: the key that is wrong.
    """
    layout_of(config)
    student, teacher = shapes_of(config, settings.layers)  # each rank finds them again
    pp = config.parallel.pipeline_model_parallel_size
    if settings.layers is not None and settings.layers % pp:
        allowed = f"a multiple of parallel.pipeline_model_parallel_size={pp}"
        raise UserError("rehearse.layers", settings.layers, allowed)
    check_stages(config, {"student": student, "teacher": teacher})
    if config.parallel.device == "cpu":
        raise UserError("parallel.device", "cpu", "auto or cuda: GPUs are rehearsed")
    if config.parallel.fp8 is not None:
        allowed = "null: the kernels of FP8 are C++, and have no stand-in"
        raise UserError("parallel.fp8", config.parallel.fp8, allowed)


def _ranks(settings: RehearseConfig, parallel: ParallelConfig) -> list[int]:
    """The ranks to play, in order."""
    if settings.ranks is None:
        return corners(parallel)
    for rank in settings.ranks:
        if rank >= parallel.num_ranks:
            allowed = f"0 to {parallel.num_ranks - 1}, of parallel.num_ranks"
            raise UserError("rehearse.ranks", settings.ranks, allowed)
    if not settings.ranks:
        raise UserError("rehearse.ranks", settings.ranks, "one rank or more, or null")
    return sorted(set(settings.ranks))


def corners(parallel: ParallelConfig) -> list[int]:
    """First and last rank along each axis; Megatron counts along tp first, then cp, dp and pp."""
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    dp = parallel.num_ranks // (tp * pp * cp)
    ends = [{0, size - 1} for size in (tp, cp, dp, pp)]
    return sorted(t + tp * (c + cp * (d + dp * p)) for t, c, d, p in product(*ends))


def _path(settings: RehearseConfig) -> list[str]:
    """Folders that come before the installed packages."""
    folders = []
    for project, word in (
        ("megatron-core", settings.megatron_core),
        ("transformer_engine", settings.transformer_engine),
    ):
        if word is not None:
            key = f"rehearse.{project.replace('-', '_')}"
            folders.append(str(unpacked(key, project, word)))
    return folders


class Player:
    """A process that has imported what ranks need, and is forked for each of them.

    Args:
        path: folders before the installed packages.
    """

    def __init__(self, path: Sequence[str]) -> None:
        inherited = os.environ.get("PYTHONPATH", "")
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, (*path, inherited))),
            "OMP_NUM_THREADS": "1",
        }
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "opcd_nemo.rehearsal.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )

    def __enter__(self) -> Player:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def play(self, task: Task) -> dict[str, Any] | None:
        """What a rank did; None after a failure, which is shown.

        The tasks of a player are of the same GPU, with or without Transformer Engine.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):  # it has ended, and says why
            self._process.stdin.write(f"{json.dumps(asdict(task))}\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        result: dict[str, Any] = json.loads(line) if line else {"ended": self._process.wait()}
        if (code := result.get("ended")) is None:
            return result
        how = "failed; its traceback is above"
        if code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        logger.warning("rank %s %s", task.rank, how)
        return None
