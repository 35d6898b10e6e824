"""How a launcher starts ranks and what their end becomes; no rank is started here."""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import signal
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

from opcd_nemo.config.train import ParallelConfig, load_config
from opcd_nemo.distributed.launcher import LAUNCHER_PID_ENV
from opcd_nemo.errors import SaveError, UserError
from opcd_nemo.launch import ranks
from opcd_nemo.launch.compose import compose
from opcd_nemo.storage.attempt import Nodes

SAID_BY_THE_LAUNCHER = "opcd_nemo.training.inputs"


@pytest.fixture(scope="module")
def layout() -> ParallelConfig:
    return load_config(compose("train", ["parallel=dp2"])).parallel


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    with mock.patch.dict(os.environ):
        yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def launched(
    layout: ParallelConfig, monkeypatch: pytest.MonkeyPatch, error: BaseException | None = None
) -> tuple[int, Any, tuple[str, ...]]:
    """The exit code of a launch that ends so, its settings, and the words of a rank."""
    seen: list[Any] = []

    def elastic_launch(settings: Any, program: str) -> Any:
        def start(*words: str) -> None:
            seen.extend((settings, words))
            if error is not None:
                raise error

        return start

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    return ranks.launch_ranks(["train", "seed=1"], layout), *seen


def test_ranks_of_one_machine_are_started_once(
    layout: ParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, settings, words = launched(layout, monkeypatch)
    assert code == 0
    assert (settings.min_nodes, settings.max_nodes, settings.nproc_per_node) == (1, 1, 2)
    assert settings.max_restarts == 0
    assert settings.monitor_interval <= 1  # a second later the others hear of a failure
    elastic = logging.getLogger("torch.distributed.elastic.agent.server.api")
    assert not elastic.isEnabledFor(logging.ERROR)  # the launcher says it in one line
    assert settings.signals_to_handle == "SIGINT,SIGHUP,SIGQUIT"  # `ToRanks` has the others
    assert words == ("-u", "-P", "-m", "opcd_nemo.cli", "train", "seed=1")
    assert os.environ[LAUNCHER_PID_ENV] == str(os.getpid())


def test_a_rank_whose_last_words_did_not_fit_the_disk_is_a_line(
    layout: ParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut_off = json.JSONDecodeError("Unterminated string", '{"mess', 1)
    with pytest.raises(SaveError, match="does not hold what it said"):
        launched(layout, monkeypatch, cut_off)


def test_nodes_are_waited_for(layout: ParallelConfig) -> None:
    node = Nodes(count=2, rank=1, rendezvous="node1:15000")
    settings = ranks._rendezvous(["train"], layout, node)
    assert (settings["min_nodes"], settings["max_nodes"]) == (2, 2)


def test_a_signal_to_the_launcher_is_its_exit_code(
    layout: ParallelConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = SignalException("ended", signal.SIGHUP)
    assert launched(layout, monkeypatch, ended)[0] == 128 + signal.SIGHUP
    assert capsys.readouterr().err == "stopped by SIGHUP\n"
    with pytest.raises(KeyboardInterrupt):
        launched(layout, monkeypatch, SignalException("ended", signal.SIGINT))


def test_a_child_checks_and_hands_the_layout_over(layout: ParallelConfig) -> None:
    parent = os.getpid()

    def check(_: object) -> ParallelConfig:
        assert os.getpid() != parent
        return layout

    def refuse(_: object) -> NoReturn:
        raise UserError("a.key", 1, "another")

    assert ranks._checked([], check, "train") == (0, layout)
    assert ranks._checked([], lambda _: None, "train") == (0, None)
    assert ranks._checked([], refuse, "train") == (2, None)


def test_a_child_that_is_killed_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    def die(_: object) -> NoReturn:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    assert ranks._checked([], die, "train") == (1, None)
    told = capfd.readouterr().err
    assert told.startswith("error: the process that checks the inputs was ended by SIGKILL, as by")
    assert told.count("\n") == 1


@pytest.mark.parametrize("checked", [(2, False), (0, False), (0, True)])
def test_ranks_are_started_when_the_check_gives_a_layout(
    checked: tuple[int, bool], layout: ParallelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code, gives_a_layout), codes, started = checked, [], []
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ranks, "_checked", lambda *_: (code, layout if gives_a_layout else None))
    monkeypatch.setattr(ranks, "launch_ranks", lambda *given: started.append(given) or 7)
    monkeypatch.setattr(ranks, "run_and_exit", lambda run: codes.append(run()))
    ranks.run_in_ranks(["train"], lambda: print, "train")
    assert codes == [7 if gives_a_layout else code]
    assert started == ([(["train"], layout)] if gives_a_layout else [])


class Reached(Exception):
    """A rank has come to its main program."""


@pytest.mark.parametrize(
    ("variables", "is_quiet"),
    [
        ({}, False),
        ({"RANK": "0"}, False),
        ({"RANK": "1"}, True),
        ({"RANK": "0", LAUNCHER_PID_ENV: "1"}, True),
    ],
)
def test_what_the_files_hold_is_said_once(
    variables: dict[str, str], is_quiet: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_main() -> NoReturn:
        raise Reached

    for name in ("RANK", LAUNCHER_PID_ENV):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    followed = []
    monkeypatch.setattr(ranks, "end_with_parent", lambda: followed.append(True))
    monkeypatch.setattr(ranks, "launcher_has_ended", lambda: False)
    before = signal.getsignal(signal.SIGINT)
    logging.getLogger(SAID_BY_THE_LAUNCHER).setLevel(logging.NOTSET)
    try:
        with pytest.raises(Reached):
            ranks.run_rank([], load_main, "train")
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)
        faulthandler.unregister(signal.SIGUSR2)
    assert followed
    assert (logging.getLogger(SAID_BY_THE_LAUNCHER).level == logging.ERROR) == is_quiet


def test_a_rank_whose_launcher_has_ended_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "end_with_parent", lambda: None)
    monkeypatch.setattr(ranks, "launcher_has_ended", lambda: True)
    with pytest.raises(RuntimeError, match="the launcher of this rank has ended"):
        ranks.run_rank([], lambda: print, "train")
