"""Tasks and losses for `task._target_` and `loss._target_`; most misbehave in one way each."""

from __future__ import annotations

import math
import os
import signal
import time
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import torch

from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV
from opcd_nemo.losses import DivergenceLoss
from opcd_nemo.metrics import Stats
from opcd_nemo.tasks import Episode
from opcd_nemo.tasks.questions import Question, QuestionEpisode
from opcd_nemo.tasks.system_prompt import StyleTask
from opcd_nemo.types import Split

LAST_RANK = os.environ.get("RANK") == "1"


class EmptyTask(StyleTask):
    """A task without prompts."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        return []


class RaisingTask(StyleTask):
    """Raises on one rank in the second step."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        if LAST_RANK and split == "train" and step == 1:
            raise RuntimeError("this rank's task broke")
        return super().episodes(split, step, n)


class BuggyTask(StyleTask):
    """Makes a mistake of programming in the second step; Python's words for it say `allowed`."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        if split == "train" and step == 1:
            make_dataclass("Broken", [("x", list, field(default=[]))])
        return super().episodes(split, step, n)


class ExitingTask(StyleTask):
    """Ends the process of one rank in the second step, as the kernel's memory killer would."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        if LAST_RANK and split == "train" and step == 1:
            os._exit(7)
        return super().episodes(split, step, n)


class StoppedTask(StyleTask):
    """Asks the launcher to stop, when a file that the environment names has so many lines."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        file = Path(os.environ.get("STOP_FILE", ""))
        if split == "test" and os.environ.get("RANK") == "0" and "STOP_LINES" in os.environ:
            lines = file.read_bytes().count(b"\n") if file.is_file() else 0
            if lines == int(os.environ["STOP_LINES"]):
                os.kill(int(os.environ[LAUNCHER_PID_ENV]), signal.SIGTERM)
                time.sleep(60)
        return super().episodes(split, step, n)


class ServedTask(StyleTask):
    """Needs a key, as a task does whose questions are on a server."""

    def __init__(self, *, verifier: str, seed: int, server: dict[str, Any], url: str) -> None:
        assert server["api_KEY"] in url
        super().__init__(verifier=verifier, seed=seed)


class PeakedTask(StyleTask):
    """Of two validation questions both are right after three steps, fewer before and after."""

    step = 0

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        if split == "train":
            PeakedTask.step = step
        if split != "validation":
            return super().episodes(split, step, n)
        return _judged_by_place(split, n, max(0, 2 - abs(self.step - 2)))


class FadingTask(StyleTask):
    """Of four questions all are right until `PeakedTask` has trained a step, then one less each."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        return _judged_by_place(split, n, 4 - PeakedTask.step)


def _judged_by_place(split: Split, n: int, num_right: int) -> list[Episode]:
    return [
        QuestionEpisode(
            Question(
                uid=f"{split}/{place}",
                text="What is a violin?",
                judge=lambda _, right=place < num_right: float(right),
            ),
            teacher_sees_context=True,
        )
        for place in range(n)
    ]


class NanLoss(DivergenceLoss):
    """Not a number on one rank in the second step (one micro-batch a step)."""

    calls = 0

    def __call__(self, *heads: Any, **arguments: Any) -> tuple[torch.Tensor, Stats]:
        self.calls += 1
        total, stats = super().__call__(*heads, **arguments)
        if LAST_RANK and self.calls == 2:
            total = total * math.nan
            stats = Stats({name: (math.nan, count) for name, (_, count) in stats.sums.items()})
        return total, stats
