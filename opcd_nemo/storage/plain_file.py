"""Files that a stranger may have written: only plain files are read, up to a limit."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from opcd_nemo.errors import UserError


def is_there(path: Path) -> bool:
    """Whether something has this name: also what can be no file of a model, as a pipe."""
    return os.path.lexists(path)


@contextmanager
def open_plain(path: Path) -> Iterator[BinaryIO]:
    """Open a file to read; a pipe or a device, which may never end, is refused at once.

    Raises:
        UserError: the file is missing, no plain file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # a name may be none that the system knows
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise UserError(path, allowed="a plain file", problem="is a pipe, a device or a folder")
    try:
        with os.fdopen(descriptor, "rb") as file:
            yield file
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = error.strerror if isinstance(error, OSError) else error
    return UserError(path, allowed="a file that can be read", problem=f"cannot be read ({reason})")


def read_bounded(path: Path, max_bytes: int) -> bytes:
    """A whole file.

    Raises:
        UserError: as of `open_plain`, or the file has more bytes.
    """
    with open_plain(path) as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise UserError(path, allowed=f"at most {max_bytes} bytes", problem="is too large")
    return data
