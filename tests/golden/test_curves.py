"""Training reproduces the recorded curves: to the bit on the machine that recorded them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.golden.curves import RECORD, RUNS, machine, train


@pytest.mark.usefixtures("fork_server")
@pytest.mark.parametrize("name", RUNS)
def test_curves_are_the_recorded_ones(name: str, tmp_path: Path) -> None:
    record = json.loads(RECORD.read_text())
    expected, found = record["runs"][name], train(name, tmp_path)
    assert found.keys() == expected.keys()
    if record["machine"] == machine():
        assert found == expected
    for metric, curve in expected.items():  # elsewhere fp32 sums round in another order
        assert found[metric] == pytest.approx(curve, rel=1e-4, abs=1e-7), metric
