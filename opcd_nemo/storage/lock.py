"""One job on a folder, also across nodes: a lock, and the proof that it is still ours."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO

from opcd_nemo.errors import UserError
from opcd_nemo.storage.attempt import Attempt, this_attempt
from opcd_nemo.storage.durable import naming


class FolderLock:
    """A folder held by this process, until it closes the lock, ends, or is taken over."""

    def __init__(self, path: Path, file: IO[str], line: str) -> None:
        self._path, self._file, self._line = path, file, line

    def check(self) -> None:
        """Refuse to write once a later attempt of the job has the folder.

        A node that the cluster gave up may still run, and still see the shared disk: the lock file,
        opened anew, is the fence between it and the attempt that replaced it.

        Raises:
            OSError: the lock file names another holder, or cannot be read.
        """
        try:
            holder = self._path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError as error:
            gone = "the lock of the folder was removed"
            raise OSError(errno.ESTALE, gone, self._path) from error
        if holder != self._line:
            raise OSError(errno.ESTALE, f"the folder is now held by {holder.strip()}", self._path)

    def close(self) -> None:
        """Let go of the folder."""
        self._file.close()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def lock_folder(folder: Path) -> FolderLock:
    """Take the folder for this process.

    The kernel lets go of the lock when a process dies. A cluster's job that was started again takes
    the folder over from its own earlier attempt, whose node may be out of reach.

    Raises:
        UserError: another process has it; names its host, pid and start. Or its file system has
            no locks.
    """
    path, attempt = folder.with_name(f".{folder.name}.lock"), this_attempt()
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _open(path)
    file.seek(0)
    holder = file.read().strip()
    before = _attempt_of(holder)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if not isinstance(error, BlockingIOError):
            raise UserError(
                str(folder),
                allowed="one with flock (Lustre: mounted with -o flock)",
                problem=f"its file system gives no lock ({error.strerror})",
            ) from error
        if attempt is None or not attempt.follows(before):
            raise _refusal(folder, holder or "an unknown process") from error
        file = _replace(path)
    if attempt is not None and before is not None and before.follows(attempt):
        file.close()
        raise _refusal(folder, holder)
    line = _line(attempt)
    with naming(path):
        file.truncate(0)
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    return FolderLock(path, file, line)


def _open(path: Path) -> IO[str]:
    """A lock file, made where none is; a link under its name is not followed.

    Who may write beside a run's folder could else let the run write over any file of its user.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = None
    try:
        descriptor = os.open(path, flags, 0o666)
        regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
            raise
        regular = False
    if descriptor is None or not regular:
        if descriptor is not None:
            os.close(descriptor)
        raise UserError(path, allowed="no such file, or the lock of a run", problem="is no file")
    return os.fdopen(descriptor, "a+", encoding="utf-8", errors="replace")


def _replace(path: Path) -> IO[str]:
    """Another file under the lock's name: a lock on the former file no longer counts."""
    fresh = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
    file = _open(fresh)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fresh.replace(path)
    return file


def _refusal(folder: Path, holder: str) -> UserError:
    return UserError(str(folder), allowed="one job at a time", problem=f"in use by {holder}")


def _line(attempt: Attempt | None) -> str:
    start = datetime.now(UTC).isoformat(timespec="microseconds")
    who = f"host {socket.gethostname()}, pid {os.getpid()}, started {start}"
    return f"{who}\n" if attempt is None else f"{who}, attempt {attempt}\n"


def _attempt_of(line: str) -> Attempt | None:
    found = re.search(r", attempt (\w+)\.(\d+)$", line)
    return Attempt(job=found[1], number=int(found[2])) if found else None
