"""Which rank's failure has the last word, and where ranks meet."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.launch import ranks as launch
from opcd_nemo.launch.compose import compose
from opcd_nemo.storage.attempt import ATTEMPT_ENV, Nodes


def failure(
    folder: Path, rank: int, message: str | None, nanoseconds: int = 0, code: int = 1
) -> ProcessFailure:
    file = folder / f"{rank}.json"
    if message is not None:
        extra = {"timestamp": "5"}
        file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        os.utime(file, ns=(nanoseconds, nanoseconds))
    return ProcessFailure(local_rank=rank, pid=rank, exitcode=code, error_file=str(file))


def test_earliest_exception_has_the_last_word_within_one_second(tmp_path: Path) -> None:
    failures = {
        0: failure(tmp_path, 0, "RuntimeError: peer is gone", 7_000),
        1: failure(tmp_path, 1, "\nKeyError: 'x'\nmore", 5_000),
    }
    rank, first = launch._first_failure(failures)
    assert rank == 1
    assert launch._first_line(first) == "KeyError: 'x'"


def test_rank_that_ended_silently_is_to_blame(tmp_path: Path) -> None:
    failures = {
        0: failure(tmp_path, 0, "RuntimeError: peer is gone"),
        1: failure(tmp_path, 1, None),
    }
    rank, first = launch._first_failure(failures)
    assert rank == 1
    assert launch._first_line(first) == "it ended without an exception, exit code 1"


def test_of_two_silent_deaths_the_first_is_to_blame(tmp_path: Path) -> None:
    failures = {rank: failure(tmp_path, rank, None, code=rank) for rank in (1, 2, 3)}
    for rank, second in ((1, 30), (2, 10), (3, 20)):
        failures[rank].timestamp = second
    assert launch._first_failure(failures)[0] == 2


@pytest.mark.parametrize("late", ["UserError: in use by another", None])
def test_who_was_ended_by_the_launcher_is_not_to_blame(tmp_path: Path, late: str | None) -> None:
    """The launcher ends the other ranks with SIGTERM, in the middle of their imports too."""
    failures = {
        0: failure(tmp_path, 0, late, 5_000, code=2 if late else -9),
        1: failure(tmp_path, 1, None, code=-signal.SIGTERM),
        2: failure(tmp_path, 2, "StoppedBySignal: stopped by SIGTERM", 9_000, code=75),
    }
    failures[0].timestamp = failures[1].timestamp + 9
    assert launch._first_failure(failures)[0] == 0


def test_a_signal_that_met_ranks_too_early_is_no_failure(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = {0: failure(tmp_path, 0, None, code=-signal.SIGTERM)}
    assert launch._report_failure(ended, signal.SIGTERM, None) == 75
    assert capsys.readouterr().err.startswith("stopped by SIGTERM")
    assert launch._report_failure(ended, 0, None) == 1
    assert capsys.readouterr().err.startswith("error: rank 0 failed first: it was ended by SIGTERM")


def test_the_launcher_prints_what_stopped_the_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = {1: failure(tmp_path, 1, "StoppedBySignal: stopped by X; saved Y: Z", code=75)}
    assert launch._report_failure(ended, signal.SIGTERM, None) == 75
    assert capsys.readouterr().err == "stopped by X; saved Y: Z\n"


def test_one_hardware_queue_is_for_layouts_that_overlap_communication() -> None:
    layout = load_config(compose("train", ["parallel=dp2"])).parallel
    assert not launch.needs_one_connection(layout)
    assert launch.needs_one_connection(dataclasses.replace(layout, tensor_model_parallel_size=2))
    assert launch.needs_one_connection(dataclasses.replace(layout, context_parallel_size=2))


def test_ranks_of_one_machine_meet_without_its_name() -> None:
    layout = load_config(compose("train", ["parallel=dp2"])).parallel
    settings = launch._rendezvous(["train"], layout, None)
    assert settings["local_addr"] == settings["rdzv_endpoint"].split(":")[0] == "127.0.0.1"
    assert settings["rdzv_configs"]["rank"] == 0


def test_nodes_meet_at_the_first_and_no_two_runs_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = load_config(compose("train", ["parallel=dp2"])).parallel
    node = Nodes(count=2, rank=1, rendezvous="node1:15000")
    names = set()
    for attempt, word in (("7.0", "a"), ("7.1", "a"), ("7.1", "b")):
        monkeypatch.setenv(ATTEMPT_ENV, attempt)
        settings = launch._rendezvous(["train", word], layout, node)
        names.add(settings["run_id"])
        assert settings["rdzv_endpoint"] == "node1:15000"
        assert settings["nproc_per_node"] == 1
        assert settings["rdzv_configs"]["rank"] == 1
    assert len(names) == 3
    following = launch._rendezvous(["train"], layout, node, number=1)
    assert following["rdzv_endpoint"] == "node1:15001"


@pytest.mark.parametrize(
    ("world", "local_rank", "refused"),
    [("1", None, True), ("2", None, False), ("1", "0", False), ("4", "1", False)],
)
def test_a_pods_variables_do_not_make_a_rank_of_another_world(
    world: str, local_rank: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    if not refused:
        launch._check_world(2)
        return
    with pytest.raises(UserError) as error:
        launch._check_world(2)
    assert (error.value.key, error.value.value) == ("WORLD_SIZE", world)
