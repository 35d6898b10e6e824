"""What every test session does: print the worst measured number of each bar."""

from __future__ import annotations

import pytest

from tests.bars import WORST


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if WORST:
        terminalreporter.section("worst errors")
    for bar, (error, limit, where) in sorted(WORST.items()):
        terminalreporter.write_line(f"{bar}: {error:.2e} (bar {limit:.0e}) {where}")
