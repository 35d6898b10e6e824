"""A run's metrics.jsonl when the run is continued: a line for every step before, and none after."""

from __future__ import annotations

import json
from pathlib import Path

from opcd_nemo.errors import UserError
from opcd_nemo.storage import durable

DAMAGED = ".damaged"  # a file of this ending, beside, keeps what was cut off and is no line


def cut_metrics(file: Path, num_steps: int) -> None:
    """Let the file end where the run continues, with the line of step `num_steps - 1`.

    Later lines go, for their steps are done again, and so does the part of a line that a crash
    left at the end. Anything else behind the good lines is damage, and is set aside.

    Raises:
        UserError: the line of an earlier step is missing or damaged; nothing has changed.
        OSError: the disk refuses.
    """
    if file.exists() and not file.is_file():
        raise UserError(file, allowed="a plain file", problem="is a pipe, a device or a folder")
    data = file.read_bytes() if file.exists() else b""
    lines = data.splitlines(keepends=True)
    good = 0
    while good < len(lines) and _is_line_of(good, lines[good]):
        good += 1
    if good < num_steps:
        raise UserError(
            file,
            allowed=f"a line for each of the {num_steps} steps of the checkpoint, from a copy of "
            f"the file; or no checkpoint of more than {good} steps",
            problem=f"line {good + 1} is not that of step {good}",
        )
    rest = lines[good:]
    if rest and (len(rest) > 1 or rest[0].endswith(b"\n")):
        kept = file.with_name(f"{file.name}{DAMAGED}")
        if kept.exists():
            durable.set_aside(kept)
        durable.write_whole(kept, b"".join(rest))
    if len(lines) > num_steps:
        durable.write_whole(file, b"".join(lines[:num_steps]))


def _is_line_of(step: int, line: bytes) -> bool:
    """Whether a line is whole and says this step."""
    if not line.endswith(b"\n"):
        return False
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return False
    found = values.get("step") if isinstance(values, dict) else None
    return type(found) is int and found == step
