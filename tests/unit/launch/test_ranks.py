"""Which failure has the last word, and what a run's end looks like on screen."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest
from hydra.errors import ConfigCompositionException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

from opcd_nemo.config.train import load_config
from opcd_nemo.errors import CheckFailed, NonFiniteError, StoppedByFile, StoppedBySignal
from opcd_nemo.launch import ranks as launch
from opcd_nemo.storage.attempt import ATTEMPT_ENV, Nodes


def failure(folder: Path, rank: int, message: str | None, nanoseconds: int = 0) -> ProcessFailure:
    file = folder / f"{rank}.json"
    if message is not None:
        extra = {"timestamp": "5"}
        file.write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
        os.utime(file, ns=(nanoseconds, nanoseconds))
    return ProcessFailure(local_rank=rank, pid=rank, exitcode=1, error_file=str(file))


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


def test_only_messages_that_say_what_is_allowed_blame_the_user() -> None:
    assert launch._one_line(ValueError("a=1:\n allowed: 2"), "train") == "a=1: allowed: 2"
    assert launch._one_line(ValueError("shapes differ"), "train") is None
    assert launch._one_line(RuntimeError("allowed"), "train") is None


@pytest.mark.parametrize(
    ("error", "code", "screen"),
    [
        (ValueError("a=1: allowed: 2"), 2, "error: a=1: allowed: 2\n"),
        (NonFiniteError("loss is nan"), 1, "error: loss is nan\n"),
        (StoppedBySignal("stopped"), 75, "stopped\n"),
        (StoppedByFile("stopped"), 93, "stopped\n"),
        (CheckFailed("1 of 2 checks failed"), 1, "error: 1 of 2 checks failed\n"),
    ],
)
@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_rank_0_alone_prints(
    error: Exception,
    code: int,
    screen: str,
    rank: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv(launch.LAUNCHER_PID_ENV, raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert launch.report_error(error, "train") == code
    assert capsys.readouterr().err == ("" if rank == "1" else screen)


def test_rank_of_our_launcher_leaves_the_line_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(launch.LAUNCHER_PID_ENV, "1")
    assert launch.report_error(ValueError("a=1: allowed: 2"), "train") == 2
    assert capsys.readouterr().err == ""


def test_program_error_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.report_error(ValueError("shapes differ"), "train") == 1
    assert capsys.readouterr().err.startswith("ValueError: shapes differ")


@pytest.mark.parametrize(
    ("override", "kind", "line"),
    [
        ("optimm.lr=1", ConfigCompositionException, "optimm.lr=1: no such key; allowed: student,"),
        (
            "exp_manager.checkpoint_callback_params.save=1",
            ConfigCompositionException,
            "exp_manager.checkpoint_callback_params.save=1: no such key; allowed in "
            "exp_manager.checkpoint_callback_params: every_n_train_steps,",
        ),
        ("loss=kl", ValueError, "loss=kl: no such file in conf/loss; allowed: forward_kl"),
        ("optim=3", ValueError, "optim=3: no such file in conf/optim; allowed: adamw"),
    ],
)
def test_hydra_is_explained(
    override: str, kind: type[Exception], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", override])
    with pytest.raises(kind) as caught:
        launch.compose("train", [override])
    explained = launch._one_line(caught.value, "train")
    assert explained is not None
    assert explained.startswith(line)
    assert "\n" not in explained


def test_one_hardware_queue_is_for_layouts_that_overlap_communication() -> None:
    layout = load_config(launch.compose("train", ["parallel=dp2"])).parallel
    assert not launch.needs_one_connection(layout)
    assert launch.needs_one_connection(dataclasses.replace(layout, tensor_model_parallel_size=2))
    assert launch.needs_one_connection(dataclasses.replace(layout, context_parallel_size=2))


def test_ranks_of_one_machine_meet_without_its_name() -> None:
    layout = load_config(launch.compose("train", ["parallel=dp2"])).parallel
    settings = launch._rendezvous(layout, None)
    assert settings["local_addr"] == settings["rdzv_endpoint"].split(":")[0] == "127.0.0.1"


def test_nodes_meet_at_the_first_and_no_two_runs_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = load_config(launch.compose("train", ["parallel=dp2"])).parallel
    node = Nodes(count=2, rank=1, rendezvous="node1:15000")
    names = set()
    for attempt, argument in (("7.0", "a"), ("7.1", "a"), ("7.1", "b")):
        monkeypatch.setenv(ATTEMPT_ENV, attempt)
        monkeypatch.setattr("sys.argv", ["train.py", argument])
        settings = launch._rendezvous(layout, node)
        names.add(settings["run_id"])
        assert settings["rdzv_endpoint"] == "node1:15000"
        assert settings["nproc_per_node"] == 1
        assert settings["rdzv_configs"]["rank"] == 1
    assert len(names) == 3
