"""Teachers that move do so as their formula says, on every layout, and a checkpoint holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.cases import CHECKPOINTS, DECAY, HARD_SYNC, TEACHER_LAYOUTS, TEACHER_STEPS
from tests.error_limits import check, check_tensors

Results = Callable[[str], Any]
layouts = pytest.mark.parametrize("layout", TEACHER_LAYOUTS)
MOVES = [f"{source}-to-{target}" for moves in CHECKPOINTS.values() for source, target in moves]


@pytest.mark.parametrize("case", ["ema", "ema-bf16"])
@layouts
def test_ema_is_the_average_of_the_students(layout: str, case: str, results: Results) -> None:
    found = results(f"teachers-{layout}")["followed"][case]
    students = found["student"]
    for k in range(TEACHER_STEPS + 1):
        for name, average in found["state"][k].items():
            expected = DECAY**k * students[0][name].double()
            for i in range(1, k + 1):
                expected += (1 - DECAY) * DECAY ** (k - i) * students[i][name].double()
            error = float((average.double() - expected).abs().max() / expected.abs().max())
            check("teacher: ema against float64", error, 3e-7, f"{layout} {case} {name}")
            assert average.dtype == torch.float32
            assert torch.equal(found["teacher"][k][name], average.to(students[0][name].dtype)), name
    assert found["version"] == list(range(TEACHER_STEPS + 1))
    assert found["state"][0].keys() == students[0].keys()
    assert not torch.equal(students[0]["model.norm.weight"], students[-1]["model.norm.weight"])
    assert found["unequal"] == []


@layouts
def test_hard_sync_is_the_student_of_the_last_sync(layout: str, results: Results) -> None:
    found = results(f"teachers-{layout}")["followed"]["hard_sync"]
    every = HARD_SYNC.sync_every
    assert every == 2
    assert found["version"] == [0, 0, 2, 2, 4]
    for k in range(TEACHER_STEPS + 1):
        last = found["student"][k - k % every]
        assert all(torch.equal(found["teacher"][k][name], last[name]) for name in last), k
        assert k % every == 0 or not torch.equal(
            found["student"][k]["lm_head.weight"], last["lm_head.weight"]
        )


@pytest.mark.parametrize("ends", ["", "-tied"])
@layouts
def test_live_is_a_copy_made_at_each_step(layout: str, ends: str, results: Results) -> None:
    followed = results(f"teachers-{layout}")["followed"]
    live, copied = followed[f"live{ends}"], followed[f"copied{ends}"]
    # not always to the bit: Megatron multiplies weights without gradient in another function
    for mine, other in zip(live["stats"], copied["stats"], strict=True):
        for key in ("loss/reverse_kl", "optim/grad_norm"):
            error = abs(mine[key] / other[key] - 1)
            check(f"teacher: live {key} against a copy", error, 1e-5, f"{layout}{ends}")
    assert len({step["loss/reverse_kl"] for step in live["stats"]}) == TEACHER_STEPS
    check_tensors("teacher: live gradient", live["gradients"], copied["gradients"], 1e-5)
    check_tensors("teacher: live student", live["student"][-1], copied["student"][-1], 1e-5)
    assert all(part["models"] == 1 and part["trained"] for part in live["ranks"])
    assert all(part["models"] == 2 and part["trained"] for part in copied["ranks"])
    assert not any(part["teacher_gradient"] for part in copied["ranks"])
    assert not any(part["head_gradient"] for part in live["ranks"])
    assert live["state"][-1] == {}


@pytest.mark.parametrize("case", ["ema", "copied", "live-tied"])
@layouts
def test_nothing_old_is_used_of_a_teacher_that_moved(
    layout: str, case: str, results: Results
) -> None:
    found = results(f"teachers-{layout}")["stale"][case]
    assert {what for what, _ in found} == {"score", "generate"}
    for what, error in found:
        check(f"teacher: {what} of present weights", error, 2e-6, f"{layout} {case}")


@pytest.mark.parametrize("case", ["ema", "ema-bf16", "hard_sync"])
@pytest.mark.parametrize("move", MOVES)
def test_a_checkpoint_holds_the_teacher(move: str, case: str, results: Results) -> None:
    found = results(move)[case]
    saved, (loaded, weights) = found["saved_teacher"], found["loaded_teacher"]
    assert saved.keys() == found["saved"].keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor), name
        assert torch.equal(weights[name], tensor.to(weights[name].dtype)), name


@pytest.mark.parametrize("move", MOVES)
def test_a_checkpoint_of_another_update_is_refused(move: str, results: Results) -> None:
    assert results(move)["ema"]["refused"].endswith(
        "holds no weights of a teacher with teacher.update=every_n_steps; "
        "allowed: the checkpoint's teacher.update=ema"
    )
