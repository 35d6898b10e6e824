"""A step is sampled while the step before it trains, and a checkpoint loses none."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.errors import EngineError, MismatchError, UserError
from opcd_nemo.losses import MISMATCH, MISMATCH_K3
from opcd_nemo.metrics import Stats
from opcd_nemo.training import ahead as ahead_module
from opcd_nemo.training.ahead import Ahead
from opcd_nemo.training.step import _behind, _stop_if_other_weights
from opcd_nemo.types import Rollout

ALONE: Any = SimpleNamespace(
    from_first_of_model=lambda value: value, gather_over_dp=lambda values: list(values)
)


def rollout(index: int, version: int = 3) -> Rollout:
    return Rollout(
        uid=f"q{index}",
        episode_index=index,
        turn_index=0,
        question="?",
        prompt_ids=(1, 2),
        teacher_prompt_ids=(3, 1, 2),
        response_ids=(4, 5),
        sampled_logprobs=(-0.1, -1 / 3),
        weights_version=version,
        finish_reason="eos",
    )


def test_the_first_step_and_those_after_a_plan_are_not_sampled_ahead() -> None:
    wanted = Ahead([4, 6], 14).is_wanted
    assert [step for step in range(20) if wanted(step)] == [1, 2, 3, 5, 7, 9, 10, 11, 13]
    assert not Ahead([], 3).is_wanted(0)


def test_the_caller_goes_on_while_the_thread_samples() -> None:
    ahead, trained = Ahead([10], 20), threading.Event()

    def sample() -> list[Rollout]:
        assert trained.wait(10)
        return [rollout(0)]

    ahead.begin(1, sample)
    trained.set()
    assert ahead.take(1, ALONE) == [rollout(0)]
    assert ahead.sampled_s > 0
    assert ahead.take(2, ALONE) is None


def test_a_rank_that_does_not_speak_is_given_the_rollouts() -> None:
    ahead = Ahead([10], 20)
    ahead.begin(1, None)
    second: Any = SimpleNamespace(from_first_of_model=lambda _: (([rollout(0)], 2.0), None))
    assert ahead.take(1, second) == [rollout(0)]


def test_what_fails_in_the_thread_fails_in_the_step_that_needs_it() -> None:
    ahead = Ahead([10], 20)

    def fail() -> list[Rollout]:
        raise EngineError("lost")

    ahead.begin(1, fail)
    with pytest.raises(EngineError, match="lost"):
        ahead.take(1, ALONE)


@pytest.mark.parametrize("share", [range(0, 2), range(1, 2)])
def test_a_checkpoint_between_plans_holds_the_rollouts_that_were_begun(share: range) -> None:
    ahead = Ahead([10], 20)
    ahead.begin(5, lambda: [rollout(0), rollout(1)])
    text = ahead.record(ALONE)
    assert text is not None
    assert ahead.take(5, ALONE) == [rollout(0), rollout(1)]  # the run goes on with them
    continued = Ahead([10], 20)
    continued.restore(text, share)  # of another layout, too
    assert continued.take(5, ALONE) == [rollout(index) for index in share]


def test_a_checkpoint_with_nothing_begun_holds_nothing() -> None:
    assert Ahead([10], 20).record(ALONE) is None


def test_rollouts_that_are_too_long_for_a_checkpoint_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ahead_module, "_MOST_BYTES", 9)
    ahead = Ahead([10], 20)
    ahead.begin(5, lambda: [rollout(0)])
    assert ahead.record(ALONE) is None
    assert "the rollouts of step 5 are not kept" in caplog.text


def test_a_step_whose_rollouts_are_missing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert Ahead([10], 20).take(5, ALONE) is None
    assert "step 5: sampled with the present weights" in caplog.text


@pytest.mark.parametrize(
    "text",
    ["{", '{"step": 1}', '{"step": 1, "rollouts": [3]}', '{"step": 1, "rollouts": [{"uid": "a"}]}'],
)
def test_damaged_rollouts_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="its rollouts cannot be read"):
        Ahead([10], 20).restore(text, range(2))


def test_samples_of_other_weights_end_a_run_but_where_they_were_wanted() -> None:
    parallel: Any = SimpleNamespace(is_last_stage=True)
    far = Stats({MISMATCH_K3: (3.0, 10.0), MISMATCH: (-3.0, 10.0)})
    _stop_if_other_weights(far, None)
    with pytest.raises(MismatchError, match=r"mismatch_k3 is 0.3 nats, above rollout.max_mism"):
        _stop_if_other_weights(far, 0.1)
    far.add(_behind(parallel, [rollout(0)], step=3))  # after a checkpoint
    with pytest.raises(MismatchError):
        _stop_if_other_weights(far, 0.1)
    far.add(_behind(parallel, [rollout(0)], step=4))
    _stop_if_other_weights(far, 0.1)
