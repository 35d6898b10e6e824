"""A disk that fails in one replica alone ends the step on every rank."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.training import step as module

FAILURE = OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("fails_here", [True, False])
def test_every_replica_hears_of_it(fails_here: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def sampled(*_: Any) -> list[str]:
        if fails_here:
            raise FAILURE
        return ["a rollout"]

    def gathered(outcome: Any) -> list[Any]:
        return [outcome, (None, None)] if fails_here else [outcome, (None, FAILURE)]

    monkeypatch.setattr(module, "_sampled", sampled)
    run: Any = SimpleNamespace(parallel=SimpleNamespace(rank=0, gather_objects=gathered))
    with pytest.raises(OSError, match="Input/output error"):
        module._rollouts(run, "teacher", 0)


def test_what_the_teacher_sampled_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_sampled", lambda *_: ["a rollout"])
    run: Any = SimpleNamespace(parallel=SimpleNamespace(rank=0, gather_objects=lambda each: [each]))
    assert module._rollouts(run, "teacher", 0) == ["a rollout"]
