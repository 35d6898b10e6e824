"""Logged turns as questions, without an environment.

Source: Online Experiential Learning (arXiv 2603.16856), consolidation by partial rollouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

from opcd_nemo.config.plugs import build_plug, check_plug, makes
from opcd_nemo.errors import UserError
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.tasks.draws import draw, draw_version, require_enough
from opcd_nemo.tasks.kept import Problem, Source
from opcd_nemo.tasks.questions import Judge, Question, QuestionEpisode
from opcd_nemo.tasks.rows import Row
from opcd_nemo.tasks.splits import MAX_LEFT_OUT, MaxLeftOut, read_file, tell_left_out
from opcd_nemo.types import Split

_TURN = "replay/"  # begins the uid of a logged turn


class ReplayTask:
    """Trains on the turns that were logged while experience was written: a turn is a question.

    Validation, test and anchors come from the task that was played.
    """

    def __init__(
        self,
        *,
        path: str,
        of: Mapping[str, Any],
        seed: int,
        max_left_out: MaxLeftOut = MAX_LEFT_OUT,
    ) -> None:
        """Read the turns.

        Args:
            path: JSONL with the columns `uid` and `text`, one turn a line.
            of: the task that was played, a plug.
            seed: shuffles the turns.
            max_left_out: the share of turns that may be left out: a uid with two texts.

        Raises:
            UserError: a broken file (its line is named), or a plug that is none.
        """
        _check_task(of)
        self._task: Task = build_plug(dict(of))
        self._seed = seed
        self._turns = [
            Question(uid=f"{_TURN}{uid}", text=text, judge=None)
            for uid, text in _read(path, max_left_out)
        ]

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        """Return turns for training, and episodes of the task that was played otherwise."""
        if split != "train":
            return self._task.episodes(split, step, n)
        require_enough("train", n, len(self._turns))
        turns = draw(self._turns, attrgetter("uid"), seed=self._seed, step=step, n=n)
        return [QuestionEpisode(turn, teacher_sees_context=True) for turn in turns]

    def anchors(self, step: int, n: int) -> list[Episode]:
        """Return the task's."""
        return self._task.anchors(step, n)

    @property
    def draw_version(self) -> int:
        """Which draw turns come from."""
        return draw_version(len(self._turns))

    def unit_of(self, uid: str) -> str:
        """Return the uid of a turn; of another episode what the task that was played says."""
        return uid if uid.startswith(_TURN) else self._task.unit_of(uid)

    def report(self) -> dict[str, Any]:
        """Return the task's."""
        return self._task.report()


def _read(path: str, max_left_out: float) -> Iterator[tuple[str, str]]:
    """Read uid and text of every turn."""

    def read(row: Row) -> Problem:
        uid = row.text("task.path", "uid")
        return Problem(uid, (row.text("task.path", "text"), uid))

    def ask(parts: Sequence[str]) -> tuple[str, Judge]:
        raise AssertionError("a turn of a log has no judge", parts)

    source = Source(name="replay", columns=("uid", "text"), read=read, ask=ask)
    file = read_file("task.path", path, source, lambda _: "train")
    tell_left_out(file, max_left_out)
    for index in file.splits["train"]:
        text, uid = file.parts(index)
        yield uid, text


def _check_task(of: object) -> None:
    """Check a plug whose target makes a task, before anything of it is called.

    Raises:
        UserError: it is no mapping, or its target is neither a task of this package nor a class
            with a task's methods, or a function that returns such a class.
    """
    if not isinstance(of, Mapping):
        raise UserError("task.of", of, "a mapping with a _target_")
    check_plug("task.of", dict(of))
    if not makes(of["_target_"], Task):
        raise UserError("task.of._target_", of["_target_"], "a task: opcd list tasks shows them")
