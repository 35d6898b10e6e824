"""The command `opcd`: `opcd --help` lists what it does."""

import sys
from collections.abc import Sequence

_STOPPABLE = ("train", "doctor", "experience")  # the same command goes on after a signal


def main(words: Sequence[str] | None = None) -> int:
    """Do what the words say; returns the exit code, where the command does not end the process.

    A cluster may stop a job that has only just begun: what a signal does is settled before anything
    else is imported.
    """
    from opcd_nemo.launch.signals import stop_on_signals

    given = list(sys.argv[1:] if words is None else words)
    if given[:1] and given[0] in _STOPPABLE:
        stop_on_signals()
    from opcd_nemo.cli import commands

    return commands.main(given)


__all__ = ["main"]
