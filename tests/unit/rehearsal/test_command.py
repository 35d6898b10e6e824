"""What `opcd rehearse` refuses before a rank is played, and how it ends."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.rehearsal import command, devices, planned, wheels
from opcd_nemo.rehearsal.report import rehearsal_report

RECIPE = "recipe=math_qwen3_8b_to_4b_2n8g"
PP, TP = "parallel.pipeline_model_parallel_size", "parallel.tensor_model_parallel_size"


RESULT: dict[str, Any] = {
    "rank": 0,
    "place": dict.fromkeys(("tp", "pp", "dp", "cp"), (0, 1)),
    "seconds": 1.0,
    "layer_spec": "local",
    "peak_bytes": {"student": 2**30},
    "launches": {},
    "syncs": {},
    "copies": {},
    "collectives": [],
    "never_waited_for": {},
}


class Stage:
    """Stands where a player stands: a rank's result is what `play` says."""

    def __init__(self, play: Callable[[command.Task], Any]) -> None:
        self.play = play

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture(autouse=True)
def nothing_is_played(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "compiled_guard", lambda: None)
    monkeypatch.setattr(command, "Player", lambda _: pytest.fail("a rank is played"))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["parallel.num_ranks=15"], TP),
        ([f"{TP}=32"], TP),
        (["batching.global_batch_size=10", "batching.micro_batch_size=1"], "batching"),
        ([f"{PP}=4", f"{TP}=2", "rehearse.layers=6"], "rehearse.layers"),
        ([f"{PP}=8", f"{TP}=2", "rehearse.layers=null"], PP),
        (["parallel.layer_spec=te", "parallel.fp8=hybrid"], "parallel.fp8"),
        (["parallel.device=cpu"], "parallel.device"),
        (["rehearse.ranks=[16]"], "rehearse.ranks"),
        (["rehearse.ranks=[]"], "rehearse.ranks"),
        (["rehearse.megatron_core=nowhere"], "rehearse.megatron_core"),
        (["rehearse.prompt_tokens=1000000000000000000"], "rehearse.prompt_tokens"),
        (["rehearse.layers=1000000"], "rehearse.layers"),
        (["engine=vllm", "engine.urls=[http://localhost:1]"], "engine.gpus"),
    ],
)
def test_a_mistake_is_named_before_a_rank_is_played(words: list[str], key: str) -> None:
    with pytest.raises(UserError) as refused:
        command.rehearse([RECIPE, *words])
    assert refused.value.key.startswith(key)


@pytest.mark.parametrize(
    "fill",
    [devices.compiled_guard, lambda: wheels.unpacked("a.key", "megatron-core", "0.0.0")],
)
def test_a_cache_that_is_no_folder_is_named(
    fill: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(shutil, "which", lambda _: "g++")
    told = r"^XDG_CACHE_HOME=.*: Not a directory; allowed: a writable"
    with pytest.raises(UserError, match=told):
        fill()


def test_a_rank_that_fails_ends_the_rehearsal(monkeypatch: pytest.MonkeyPatch) -> None:
    played: list[Any] = []
    monkeypatch.setattr(command, "Player", lambda _: Stage(played.append))
    assert command.rehearse([RECIPE]) == 1
    (task,) = played
    assert (task.rank, task.layers, task.with_te) == (0, 2, False)


def test_with_servers_a_rank_holds_no_cache_and_gathers_a_tensor() -> None:
    beside = ("engine=vllm", "engine.launch=true", "engine.colocated=true")
    samples, pushes = (planned.planned_bytes([RECIPE, *words]) for words in ((), beside))
    embedding = 151936 * 2560 * 2
    assert embedding < pushes["rollout"] < samples["rollout"]
    del samples["rollout"], pushes["rollout"]
    assert samples == pushes


@pytest.mark.parametrize(("gib", "code"), [(79, 0), (81, 1)])
def test_a_rank_that_asks_for_more_than_a_gpu_has_ends_with_1(
    gib: int, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    result = {**RESULT, "peak_bytes": {"student": gib * 2**30}}
    monkeypatch.setattr(command, "Player", lambda _: Stage(lambda _: result))
    given = [RECIPE, "rehearse.ranks=[0]", "accelerator.memory_gib=80"]
    assert command.rehearse(given) == code
    report = caplog.messages[-1]
    assert ("DOES NOT FIT: 1.00 GiB more than a GPU has" in report) == bool(code)
    assert re.search(r"opcd plan +- +[\d.]+ +[\d.]+ +[\d.]+ +[\d.]+ +- +-", report)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"ended": 1}', "rank 3 failed; its traceback is above"),
        ('{"ended": -9}', "rank 3 was ended by SIGKILL"),
        ("", "rank 3 was ended by SIGTERM"),  # the process of all ranks
    ],
)
def test_how_a_rank_has_failed_is_said(
    line: str, words: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.undo()
    process = SimpleNamespace(
        stdin=StringIO(), stdout=StringIO(line), wait=lambda: -signal.SIGTERM, communicate=str
    )
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: process)
    task = command.Task(
        rank=3, world_size=4, words=[], layers=2, lengths={}, tokens=1, gpu="a",
        memory_gib=80.0, per_node=8, with_te=False,
    )  # fmt: skip
    with command.Player([]) as player:
        assert player.play(task) is None
    assert caplog.messages == [words]


def test_a_rank_alone_is_compared_with_none() -> None:
    lines = rehearsal_report([{**RESULT, "collectives": [{}] * 3}], 80, [], {}).splitlines()
    (line,) = (line for line in lines if "collectives" in line)
    assert line == "collectives of rank 0: 3, compared with no other rank"
