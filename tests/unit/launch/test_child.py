"""A child runs a command; its death is a line."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable
from typing import NoReturn

import pytest

from opcd_nemo.launch.child import in_child


def die_of(number: int) -> Callable[[], NoReturn]:
    def run() -> NoReturn:
        faulthandler.disable()  # pytest's, which shows stacks
        os.kill(os.getpid(), number)
        os._exit(0)

    return run


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGBUS, "SIGBUS, as when a file that it reads becomes shorter, or its disk fails"),
        (signal.SIGKILL, "SIGKILL, as by the kernel when memory is short"),
    ],
)
def test_what_kills_a_child_is_a_line(
    number: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert in_child(die_of(number)) == 1
    assert capfd.readouterr().err == f"error: the command was ended by {words}\n"


def test_a_childs_exit_code_is_the_commands(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    assert in_child(lambda: os._exit(7)) == 7
    assert signal.getsignal(signal.SIGINT) == before
    assert capfd.readouterr().err == ""


def test_ctrl_c_of_a_terminal_ends_the_child_alone() -> None:
    def interrupted() -> NoReturn:
        try:
            os.kill(os.getppid(), signal.SIGINT)  # a terminal sends it to both
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            os._exit(130)
        os._exit(0)

    # a shell starts a background job with Ctrl-C ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert in_child(interrupted) == 130
    finally:
        signal.signal(signal.SIGINT, before)
