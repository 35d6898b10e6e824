"""The commands of README.md, as they stand there, with a tiny model."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from tests.readme import Block, blocks
from tests.recipes.conftest import ROOT, SMOKE, run_python

HERE = Path(__file__).relative_to(ROOT).as_posix()
MINE = [block for block in blocks((ROOT / "README.md").read_text()) if HERE in block.runners]
OPCD = ".venv/bin/opcd "
OF_A_RUN = ("train", "doctor", "plan")
SMALL = """\
import opcd_nemo

whole = opcd_nemo.distill


def distill(student, **arguments):
    small = dict(settings={smoke!r}, folder={runs!r}, steps=2, max_new_tokens=4)
    return whole({tiny!r}, **small, **arguments)


opcd_nemo.distill = distill
opcd_nemo.FinishedRun.report.__kwdefaults__["show"] = False  # no browser
"""


def commands() -> list[str]:
    """The lines that start the command, in their order."""
    lines = [line.strip() for block in MINE for line in block.text.replace("\\\n", " ").split("\n")]
    return [line for line in lines if line.startswith(OPCD)]


def programs() -> list[Block]:
    """The blocks of Python."""
    return [block for block in MINE if block.text.startswith("```python")]


def test_every_command_does_what_it_says(tiny: Path, tmp_path: Path) -> None:
    assert commands()
    small = [*SMOKE, f"student.path={tiny}"]
    for command in commands():
        words = shlex.split(command.replace("step=30", "step=2"))[1:]
        if words[0] in OF_A_RUN and "--help" not in words:
            words += small
        if words[0] == "chat":
            words += ["sampling.max_new_tokens=4"]
        done = run_python("-m", "opcd_nemo.cli", *words, cwd=tmp_path, stdin="What is a bell?\n")
        assert done.returncode == 0, (command, done.stderr)
        assert done.stdout, command


def test_the_python_does_what_it_says(tiny: Path, tmp_path: Path) -> None:
    (block,) = programs()
    kept = [word for word in SMOKE if not re.search("max_steps|max_new|num_questions", word)]
    small = SMALL.format(tiny=str(tiny), smoke=kept, runs=str(tmp_path / "runs"))
    code = block.text.removeprefix("```python\n").removesuffix("```")
    program = tmp_path / "program.py"
    program.write_text(f"{small}\n\n{code}")
    done = run_python(str(program), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "after training" in done.stdout
