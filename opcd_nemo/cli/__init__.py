"""The command `opcd`: `opcd --help` lists what it does."""

from opcd_nemo.cli.commands import main

__all__ = ["main"]
