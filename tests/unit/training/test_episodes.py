"""Which episodes of a step a rank plays, and how many of them are anchors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.training.step import Run, _episodes


class Prompts:
    """Names of what is drawn."""

    def episodes(self, split: str, step: int, n: int) -> list[Any]:
        return [f"{split} {step} {index}" for index in range(n)]

    def anchors(self, step: int, n: int) -> list[Any]:
        return [f"anchor {step} {index}" for index in range(n)]


def played(rank: int, dp: int, prompts: int, anchors: int) -> tuple[list[Any], int]:
    ranks = SimpleNamespace(dp_rank=rank, dp=dp)
    parallel = SimpleNamespace(share=lambda count: Parallel.share(cast(Parallel, ranks), count))
    run = SimpleNamespace(
        task=Prompts(), parallel=parallel, prompts_per_step=prompts, anchors_per_step=anchors
    )
    return _episodes(cast(Run, run), 7)


@pytest.mark.parametrize("dp", [1, 2, 4, 8])
@pytest.mark.parametrize("anchors", [0, 1, 2, 3, 5, 8])
def test_every_anchor_is_counted_by_the_rank_that_plays_it(dp: int, anchors: int) -> None:
    whole: list[Any] = []
    for rank in range(dp):
        episodes, num_anchors = played(rank, dp, 8, anchors)
        assert num_anchors == sum(name.startswith("anchor") for name in episodes)
        assert all(name.startswith("anchor") for name in episodes[len(episodes) - num_anchors :])
        whole += episodes
    task = Prompts()
    assert whole == task.episodes("train", 7, 8 - anchors) + task.anchors(7, anchors)
