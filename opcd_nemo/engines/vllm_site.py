"""A server of a run, with what brings it back: its folder, its weights, how often it was lost."""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines.vllm_launch import Launched
from opcd_nemo.engines.vllm_server import Served, Server, ServerLost
from opcd_nemo.errors import EngineError, UserError
from opcd_nemo.types import Sample

logger = logging.getLogger(__name__)

_MACHINE = "machine"  # a file in a run's folder: the machine's name


class Site:
    """A server, as every rank that speaks to it sees it.

    Ranks that share a server meet its death at different moments, and none may wait for another in
    a collective then. So the first that has the lock of the site's folder brings the server back,
    with the weights of the last push, whose files stay until the next; the others find that the
    count of restarts has changed, and ask again.
    """

    def __init__(
        self,
        server: Server,
        served: Served,
        folder: Path,
        launched: Launched | None,
        *,
        max_restarts: int,
        start_s: float,
    ) -> None:
        """The folder is there; `start_s` seconds a server may take until it can be asked."""
        self.server, self._served = server, served
        self._folder, self._launched = folder, launched
        self._max_restarts, self._start_s = max_restarts, start_s
        self._seen = self._count()
        self.weights: tuple[Path, str] | None = None
        """What the server was given last: the files, and the version."""

    @property
    def version(self) -> str:
        """Of the weights that were given last."""
        assert self.weights is not None
        return self.weights[1]

    @property
    def is_held(self) -> bool:
        """Whether the server has these weights still: the engine of another model may share it."""
        if self.weights is None or self._noted() != self.version:
            return False
        try:
            return self.server.held in (None, self.version)
        except ServerLost:
            return False

    def push(self) -> None:
        """Give the server the weights; `EngineError` where it cannot be brought to take them."""
        try:
            self._give()
        except ServerLost as lost:
            self.bring_back(lost)

    def _give(self) -> None:
        assert self.weights is not None
        (self._folder / "holds").write_text("")
        self.server.take(*self.weights)
        (self._folder / "holds").write_text(self.version)

    def _noted(self) -> str | None:
        with suppress(FileNotFoundError):
            return (self._folder / "holds").read_text()
        return None

    def answer(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, seed: int, eos_ids: Sequence[int]
    ) -> Sample:
        """As `Server.answer`."""
        return self.server.answer(self._served, prompt_ids, sampling, seed=seed, eos_ids=eos_ids)

    def check_length(self, longest_prompt: int, sampling: Sampling) -> None:
        """As `Served.check_length`, with the longest answer."""
        self._served.check_length(self.server.url, longest_prompt + sampling.max_new_tokens)

    def check_awake(self) -> None:
        """Refuse a server that would let a request wait for ever.

        Raises:
            EngineError: it sleeps; `ServerLost` as of any call.
        """
        if self.server.is_asleep:
            raise EngineError(
                f"{self.server.url}: sleeps, though this run has not sent it to sleep: another "
                "program did; wake it with POST /wake_up and start the same command again"
            )

    def check_alive(self, silent_s: float, timeout_s: float) -> None:
        """Look after a server that has finished no answer for a while.

        Raises:
            ServerLost: it has died, or is silent for longer than `timeout_s`.
            EngineError: it sleeps.
        """
        url = self.server.url
        self.server.ask("/health")
        self.check_awake()
        if silent_s > timeout_s:
            words = f"no answer for {silent_s:.0f} s (engine.timeout_s={timeout_s:g})"
            raise ServerLost(url, words)

    def bring_back(self, lost: ServerLost) -> None:
        """Start the server again, or wait until somebody has; give it the weights.

        Raises:
            EngineError: it was lost more than `max_restarts` times.
        """
        with self._lock():
            if self._count() != self._seen:  # another rank has done it
                self._seen = self._count()
                return
            while True:
                if self._seen >= self._max_restarts:
                    raise EngineError(self._given_up(lost))
                self._seen += 1
                (self._folder / "restarts").write_text(str(self._seen))
                logger.warning("%s; restart %d of %d", lost, self._seen, self._max_restarts)
                try:
                    if self._launched is not None:
                        self._launched.start(self._start_s)
                    else:
                        self.server.wait_until_ready(self._start_s)
                    self._give()
                    return
                except ServerLost as again:
                    lost = again

    def _given_up(self, lost: ServerLost) -> str:
        count = f"lost {self._seen + 1} times, engine.max_restarts={self._max_restarts}"
        if self._launched is not None:
            return f"{lost} ({count}); see {self._launched.log}, then start the same command again"
        return f"{lost} ({count}); start the server again, then the same command"

    def _count(self) -> int:
        with suppress(FileNotFoundError):
            return int((self._folder / "restarts").read_text() or 0)
        return 0

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self._folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


@cache
def process_name() -> str:
    """Of this process: containers that share /dev/shm may each have a process of its number."""
    return f"{os.getpid()}-{secrets.token_hex(2)}"


def claim(folder: Path) -> bool:
    """Make the folder of this process, if it has none yet, and remove those that killed runs left.

    Returns:
        Whether the folder is new.
    """
    for other in folder.parent.glob("opcd-*/"):
        _remove_if_left(other)
    if folder.exists():
        return False
    made = folder.with_name(f".{folder.name}")  # not seen by others before it is locked
    made.mkdir(mode=0o700)
    (made / _MACHINE).write_text(socket.gethostname())
    with suppress(OSError):  # a file system without locks: nobody else gets a lock either
        fcntl.flock(os.open(made, os.O_RDONLY), fcntl.LOCK_EX)
    made.rename(folder)
    return True


def _remove_if_left(folder: Path) -> None:
    """Remove the folder of a process of this machine that has ended, and its keeper with it."""
    with suppress(OSError):  # another user's, or gone by now
        if (folder / _MACHINE).read_text() != socket.gethostname():
            return  # the locks of some file systems are a single machine's
        file = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
            logger.info("%s: removed, a killed run had left it", folder)
        finally:
            os.close(file)


def hold(url: str, folder: Path) -> None:
    """Take a server for this process; the kernel lets go of it when the process ends.

    Raises:
        UserError: another run on this machine has it, or another user the file that says so.
    """
    # a bare number: an object of Python's would let go when an engine is forgotten
    path = folder / f"opcd-{re.sub(r'[^0-9A-Za-z]+', '-', url)}.lock"
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:  # the file of another user, whose run used this address
        allowed = "a folder for this user alone; or a server for this run alone"
        problem = f"{path}: {error.strerror}"
        raise UserError("engine.folder", folder, allowed, problem=problem) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(file, 32).decode(errors="replace").strip()
        os.close(file)
        if holder == str(os.getpid()):  # the engine of another model of this run
            return
        problem, allowed = f"another run uses it, process {holder}", "a server for this run alone"
        raise UserError("engine.urls", url, allowed, problem=problem) from None
    os.ftruncate(file, 0)
    os.write(file, f"{os.getpid()}".encode())


def users_of(num_servers: int, dp: int) -> list[list[int]]:
    """The data-parallel ranks that use each server: blocks of both, as nodes have them."""
    return [
        [r for r in range(dp) if i * dp < (r + 1) * num_servers and r * num_servers < (i + 1) * dp]
        for i in range(num_servers)
    ]
