"""Groups of ranks, without the ranks."""

from __future__ import annotations

import datetime
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from opcd_nemo.distributed import groups


class Reached(Exception):
    """What is looked at has come."""


def test_megatrons_groups_give_up_when_the_configuration_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: dict[str, Any] = {}

    def initialize(**keywords: Any) -> None:
        given.update(keywords)
        raise Reached

    monkeypatch.setattr(parallel_state, "initialize_model_parallel", initialize)
    settings: Any = SimpleNamespace(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        context_parallel_size=1,
        timeout_s=90.0,
    )
    with pytest.raises(Reached):
        groups._create_groups(settings, torch.device("cpu"), "", "local", 0)
    assert datetime.timedelta(minutes=given["distributed_timeout_minutes"]).total_seconds() == 90


def test_the_pipelines_second_group_gives_up_likewise(monkeypatch: pytest.MonkeyPatch) -> None:
    def gather(gathered: list[Any], value: Any) -> None:
        gathered[:] = [value, value, (2, 3), (2, 3)]

    given: list[Any] = []
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 4 if group is None else 2)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0, 1])
    monkeypatch.setattr(dist, "all_gather_object", gather)
    monkeypatch.setattr(
        dist, "new_subgroups_by_enumeration", lambda *words: (given.extend(words), None)
    )
    groups._second_group("pp", 90.0)
    assert given == [[[0, 1], [2, 3]], datetime.timedelta(seconds=90)]
