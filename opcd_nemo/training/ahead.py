"""Sampling a step while the step before it trains.

    step k:   take the rollouts of step k    | the thread of the rank that speaks to the engine:
              send the weights, begin k + 1  |
              teacher, student, optimizer    |   samples step k + 1 with the weights of k's start

The divergence is computed under the present student, whoever wrote the prefix, so the loss has no
ratio to correct (docs/engines.md). Some steps are sampled with the present weights, in every run:
the first, and those after a planned checkpoint or validation. So a continued run finds the weights
that its samples are made of, and a step stays a function of its number. A checkpoint at any other
step, as a signal brings, holds the rollouts that were begun.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from opcd_nemo.config import limits
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import UserError
from opcd_nemo.storage.ranks import on_first_of_model
from opcd_nemo.types import Rollout

logger = logging.getLogger(__name__)

_MOST_BYTES = limits.PLAIN_BYTES * 3 // 4  # of a checkpoint's file that holds them as text
Timed = tuple[list[Rollout], float]
"""What was sampled, and in how many seconds."""


class Ahead:
    """The rollouts of the next step, while a thread samples them and when it has."""

    def __init__(self, on_policy_every: Sequence[int], num_steps: int) -> None:
        """Know the steps that are not sampled ahead.

        Args:
            on_policy_every: a step that one of these divides has the present weights.
            num_steps: of the run.
        """
        self._every, self._num_steps = tuple(on_policy_every), num_steps
        self._pool = ThreadPoolExecutor(1)
        self._step: int | None = None  # that is sampled, the same on every rank
        self._job: Future[Timed] | None = None  # on a rank that speaks
        self._restored: list[Rollout] | None = None
        self.sampled_s = 0.0
        """How long the thread took for what was taken last."""

    def is_wanted(self, step: int) -> bool:
        """Whether a step is sampled while the one before it trains."""
        return 0 < step < self._num_steps and all(step % number for number in self._every)

    def begin(self, step: int, sample: Callable[[], list[Rollout]] | None) -> None:
        """Begin a step; `sample` runs in a thread, on ranks that speak to the engine."""
        assert self._step is None, (step, self._step)

        def timed() -> Timed:
            started = time.perf_counter()
            assert sample is not None
            return sample(), time.perf_counter() - started

        self._step = step
        self._job = None if sample is None else self._pool.submit(timed)

    def take(self, step: int, parallel: Parallel) -> list[Rollout] | None:
        """The rollouts of a step that was begun before; None: it is sampled now.

        Collective over tp and pp.

        Raises:
            EngineError, UserError, OSError: the engine could not sample them.
        """
        if self._step != step:
            assert self._step is None, (step, self._step)
            if self.is_wanted(step):
                logger.info("step %d: sampled with the present weights, as none was begun", step)
            return None
        restored, job = self._restored, self._job
        self._step, self._job, self._restored = None, None, None
        if restored is not None:
            self.sampled_s = 0.0
            return restored
        rollouts, self.sampled_s = on_first_of_model(parallel, None if job is None else job.result)
        return rollouts

    # ------------------------------------------------------------------ checkpoints

    def record(self, parallel: Parallel) -> str | None:
        """What a checkpoint holds of a step that was begun; waits for it. Collective.

        Raises:
            EngineError, UserError, OSError: as of `take`.
        """
        step = self._step
        if step is None:
            return None
        rollouts = self.take(step, parallel)
        assert rollouts is not None
        self._step, self._restored = step, rollouts
        everybodys = parallel.gather_over_dp(rollouts)
        text = json.dumps({"step": step, "rollouts": [asdict(each) for each in everybodys]})
        if len(text) > _MOST_BYTES:
            logger.warning(
                "the rollouts of step %d are not kept, %d bytes: a continued run samples them "
                "with the present weights",
                *(step, len(text)),
            )
            return None
        return text

    def restore(self, text: str, share: range) -> None:
        """Take what `record` gave; `share` are this rank's episodes of the batch.

        Raises:
            UserError: it is damaged.
        """
        try:
            held = json.loads(text)
            rollouts = [Rollout(**_as_tuples(each)) for each in held["rollouts"]]
            self._step = int(held["step"])
        except (
            ValueError,
            LookupError,
            TypeError,
            AttributeError,
            AssertionError,
            RecursionError,
        ) as error:
            problem = f"its rollouts cannot be read ({error!r})"
            raise UserError("exp_manager.resume_if_exists", True, "a checkpoint as it was written",
                            problem=problem) from error  # fmt: skip
        self._restored = [each for each in rollouts if each.episode_index in share]


def _as_tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
