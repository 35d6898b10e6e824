#!/usr/bin/env -S python3 -S -E
"""Stands for the interpreter: what it is asked to run, `warm.py` runs in a fork of its own.

Signals are passed on and the exit is the fork's. When this process is killed, so is the fork.
"""

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as server:
    server.connect(os.environ["OPCD_TEST_FORK_SOCKET"])
    request = {
        "arguments": sys.argv[1:],
        "environment": dict(os.environ),
        "folder": str(Path.cwd()),
        "largest_file": resource.getrlimit(resource.RLIMIT_FSIZE),
    }
    socket.send_fds(server, [json.dumps(request).encode()], [0, 1, 2])
    pid = int(server.recv(64))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, lambda received, _: os.kill(pid, received))
    code = int(server.recv(64) or 1)
if code < 0:
    with suppress(OSError):  # SIGKILL's is always the default
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
sys.exit(code)
