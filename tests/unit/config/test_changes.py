"""What a continued run may not change: the draw of its prompts among it."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.changes import check_unchanged, run_origin
from opcd_nemo.errors import UserError


def origin(draw: int, **task: Any) -> dict[str, Any]:
    config = OmegaConf.create({"optim": {"schedule": "constant"}, "task": {"train": "a", **task}})
    return run_origin(config, "hash", draw)


def test_a_run_does_not_go_on_with_another_draw() -> None:
    check_unchanged(origin(2), origin(2), [])
    check_unchanged({k: v for k, v in origin(1).items() if k != "draw"}, origin(1), [])
    for before, now, words in ((1, 2, r"\(absent\), is 2"), (2, 1, r"2, is \(absent\)")):
        with pytest.raises(UserError, match=f"draw was {words}; .*allow_changes=.draw."):
            check_unchanged(origin(before), origin(now), [])
        check_unchanged(origin(before), origin(now), ["draw"])


def test_a_share_that_only_refuses_may_change() -> None:
    check_unchanged(origin(1), origin(1, max_left_out=0.2), [])
    with pytest.raises(UserError, match=r"task\.validation was 0\.1, is 0\.2"):
        check_unchanged(origin(1, validation=0.1), origin(1, validation=0.2), [])
