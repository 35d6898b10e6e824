"""What a continued run may not change: the draw of its prompts among it."""

from __future__ import annotations

from typing import Any

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.changes import check_unchanged, run_origin
from opcd_nemo.errors import UserError


def origin(version: int, **task: Any) -> dict[str, Any]:
    config = OmegaConf.create({"optim": {"schedule": "constant"}, "task": {"train": "a", **task}})
    return run_origin(config, "hash", version)


def test_a_run_does_not_go_on_with_another_draw() -> None:
    check_unchanged(origin(2), origin(2), [])
    check_unchanged({k: v for k, v in origin(1).items() if k != "draw"}, origin(1), [])
    for before, now, words in ((1, 2, r"\(absent\), is 2"), (2, 1, r"2, is \(absent\)")):
        with pytest.raises(UserError, match=f"draw was {words}; .*allow_changes=.draw."):
            check_unchanged(origin(before), origin(now), [])
        check_unchanged(origin(before), origin(now), ["draw"])


def test_a_share_that_only_refuses_may_change() -> None:
    check_unchanged(origin(1), origin(1, max_left_out=0.2), [])
    check_unchanged(origin(1), origin(1, draw=1), [])
    with pytest.raises(UserError, match=r"task\.validation was 0\.1, is 0\.2"):
        check_unchanged(origin(1, validation=0.1), origin(1, validation=0.2), [])


@pytest.mark.parametrize(
    "group",
    "seed student teacher task retention context engine loss rollout warmup batching optim".split(),
)
def test_what_a_result_depends_on_may_not_change(group: str) -> None:
    now = origin(1)
    for changed in ({group: 1}, {group: {**now.get(group, {}), "any": {"key": 1}}}):
        saved = {"optim": now["optim"], **now, **changed}
        if group == "optim" and changed[group] == 1:
            continue  # its schedule says what else is compared
        with pytest.raises(UserError, match=rf"{group}(\.any\.key)? was 1, is \(absent\)"):
            check_unchanged(saved, now, [])
        check_unchanged(saved, now, [group])


def test_the_words_of_the_context_may_not_change() -> None:
    with pytest.raises(UserError, match="context_hash was other, is hash"):
        check_unchanged({**origin(1), "context_hash": "other"}, origin(1), [])
