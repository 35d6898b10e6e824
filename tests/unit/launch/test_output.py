"""A command goes on when nobody reads what it prints."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
from pathlib import Path
from opcd_nemo.launch.output import keep_output_open
keep_output_open()
for number in range(20000):
    print("line", number, flush=number % 100 == 0)
file = open(sys.argv[1], "w")
assert file.fileno() > 2
file.write("done")
"""


@pytest.mark.parametrize(
    "end", ["| head -n 1", ">&-", ">&- 2>&-", "2>&1 | true", "> /dev/full", "> /dev/full 2>&1"]
)
@pytest.mark.parametrize("option", ["", "-u"])
def test_the_work_is_done_without_a_reader(tmp_path: Path, end: str, option: str) -> None:
    program, file = tmp_path / "program.py", tmp_path / "done"
    program.write_text(PROGRAM)
    command = f"{sys.executable} {option} {program} {file} {end}"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert file.read_text() == "done"
    assert done.stderr == ""
