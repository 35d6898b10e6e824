"""Runs programs in forks of one process, which pays for the imports once.

Nine tenths of a smoke run are imports, in the launcher and in every rank. `forked_python.py` stands
for the interpreter and hands its arguments, environment and files to `python -m tests.fork_server
<socket>`; as the fork's `sys.executable` it also starts what that starts, ranks and stages.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import resource
import runpy
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

FORKED_PYTHON = Path(__file__).with_name("forked_python.py")
SOCKET_ENV = "OPCD_TEST_FORK_SOCKET"
IMPORTED = ("opcd_nemo.trainer.run", "opcd_nemo.experience.stages", "opcd_nemo.experience.pipeline")


def choose_python() -> str:
    """What runs a program: a fork where a server is, the interpreter elsewhere."""
    return str(FORKED_PYTHON) if SOCKET_ENV in os.environ else sys.executable


def main() -> None:
    """Serve until killed."""
    for module in IMPORTED:
        importlib.import_module(module)
    gc.freeze()  # forks do not search what was imported, nor copy its pages: a fifth of their time
    selector = selectors.DefaultSelector()
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    server.bind(sys.argv[1])
    server.listen(64)
    selector.register(server, selectors.EVENT_READ, lambda: _start(server, selector))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        for key, _ in selector.select():
            key.data()


def _start(server: socket.socket, selector: selectors.BaseSelector) -> None:
    connection, _ = server.accept()
    message, files, *_ = socket.recv_fds(connection, 1 << 20, 3)
    pid = os.fork()
    if pid == 0:
        _become(json.loads(message), files)
    for file in files:
        os.close(file)
    connection.send(str(pid).encode())
    process = os.pidfd_open(pid)
    handlers: dict[Any, Callable[[], None]] = {
        process: lambda: _end(pid, process, connection, selector),
        connection: lambda: _kill(pid),  # the client is gone
    }
    for file, handler in handlers.items():
        selector.register(file, selectors.EVENT_READ, handler)


def _end(
    pid: int, process: int, connection: socket.socket, selector: selectors.BaseSelector
) -> None:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    for file in (process, connection):
        selector.unregister(file)
    with suppress(BrokenPipeError):
        connection.send(str(code).encode())
    connection.close()
    os.close(process)


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _become(request: dict[str, Any], files: list[int]) -> None:
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.executable = str(FORKED_PYTHON)
    resource.setrlimit(resource.RLIMIT_FSIZE, request["largest_file"])
    code = 1
    try:
        _run([word for word in request["arguments"] if word not in ("-u", "-P", "-I", "-S")])
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _run(arguments: list[str]) -> None:
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path[0] = str(Path(first).resolve().parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    main()
