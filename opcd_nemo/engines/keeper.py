"""A process that ends a server and removes its folder when the rank that wanted them has ended.

    python -m opcd_nemo.engines.keeper FOLDER [LOG COMMAND ...]

A rank may be killed at any moment, by the kernel too; this process then reads the end of its
standard input, which the rank holds. A server's workers outlive it, so the whole group is ended.
What the server says goes into LOG, of which the last few MiB are kept: a vLLM that dies writes
every request that waits into it. Standard library alone: it must not cost memory.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

ENDED = "ended"  # a file in FOLDER, once the server has ended: its exit code
LOG_BYTES = 4 << 20  # of the log, and of `LOG.1`, the part before it
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
_ENDS_S = 30.0  # a server has so long to end by itself


def start_keeper(
    folder: Path, words: Sequence[str] = (), environment: Mapping[str, str] | None = None
) -> int:
    """Start a keeper of this process's folder; returns its process id.

    Args:
        folder: is removed when this process ends.
        words: the log and the command, if a server is to be started.
        environment: of the server; None: this process's.
    """
    reader, _writer = os.pipe()  # its end is this process's: nobody closes it before
    process = subprocess.Popen(
        [sys.executable, "-I", __file__, str(folder), *words],
        stdin=reader,
        env=environment,
        start_new_session=True,
    )
    os.close(reader)
    return process.pid


def keep(folder: Path, log: Path | None, command: list[str]) -> None:
    """Run the command, if there is any, until standard input ends; then remove the folder.

    SIGTERM ends the server and leaves the folder: another is about to be started in it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C: the rank ends, and that is enough
    signal.signal(signal.SIGTERM, _leave)
    server: subprocess.Popen[bytes] | None = None
    logging: threading.Thread | None = None
    try:
        if log is not None:
            server, logging = _start(command, folder, log)
        sys.stdin.buffer.read()
    except _Leaves:
        if server is not None:
            end_group(server)
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    failed = (folder / ENDED).exists()
    if server is not None and logging is not None:
        end_group(server)
        logging.join()  # it writes into the folder
    shutil.rmtree(folder, ignore_errors=True)
    if log is not None and not failed:  # nobody will ask
        for file in (log, _before(log)):
            file.unlink(missing_ok=True)


class _Leaves(BaseException):
    """SIGTERM came."""


def _leave(*_: object) -> None:
    raise _Leaves


def _start(
    command: list[str], folder: Path, log: Path
) -> tuple[subprocess.Popen[bytes], threading.Thread]:
    (folder / ENDED).unlink(missing_ok=True)
    server = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        cwd=folder,
        preexec_fn=_end_with_keeper,
    )
    logging = threading.Thread(target=_log, args=(server, folder, log), daemon=True)
    logging.start()
    return server, logging


def _end_with_keeper() -> None:
    """In the server's process: have the kernel send SIGTERM when the keeper was killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _before(log: Path) -> Path:
    return log.with_name(f"{log.name}.1")


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads a session, with all that it has started.

    The leader is told first and alone: its workers then give back shared memory, which has names
    and outlives them.
    """
    with suppress(ProcessLookupError, subprocess.TimeoutExpired):
        process.terminate()
        process.wait(_ENDS_S)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(server: subprocess.Popen[bytes], folder: Path, log: Path) -> None:
    assert server.stdout is not None
    written = 0
    if log.exists():  # of the server before, which may say why it died
        log.replace(_before(log))
    opened: BinaryIO = log.open("wb")
    while block := os.read(server.stdout.fileno(), 1 << 16):
        if written + len(block) > LOG_BYTES:
            opened.close()
            log.replace(_before(log))
            opened, written = log.open("wb"), 0
        opened.write(block)
        opened.flush()
        written += len(block)
    opened.close()
    with suppress(FileNotFoundError):  # the folder may be gone by now
        (folder / ENDED).write_text(f"exit code {server.wait()}")


def main() -> None:
    """See the module."""
    folder, *rest = sys.argv[1:]
    keep(Path(folder), Path(rest[0]) if rest else None, rest[1:])


if __name__ == "__main__":
    main()
