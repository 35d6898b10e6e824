"""The folder of a run: one process holds it, and that process alone writes into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.storage import durable
from opcd_nemo.storage.lock import FolderLock, lock_folder
from opcd_nemo.storage.ranks import Ranks, on_every_rank, on_rank_0


class RunFolder:
    """A folder that rank 0 holds and writes into; on every other rank a write does nothing.

    A node that the cluster has given up may still run and still reach the shared disk, while a
    later attempt of the same job continues the run. Therefore every write first asks the lock file
    whether this attempt still holds the folder.

    What fails, fails on rank 0 alone: `storage.ranks` lets the others hear of it.
    """

    def __init__(self, path: Path, *, lock: FolderLock | None = None, writes: bool = True) -> None:
        """Without a lock nothing is checked: no other process can compete for the folder.

        Args:
            path: the folder, which may not exist yet.
            lock: of the process that holds the folder.
            writes: False on the ranks that leave writing to rank 0.
        """
        self.path, self.writes = path, writes
        self._lock = lock
        self._appended: set[str] = set()  # files whose last lines may not be on the disk yet

    @classmethod
    def hold(cls, path: Path, ranks: Ranks | None = None) -> RunFolder:
        """Take the folder for this process, or for rank 0 of a run. Collective over the ranks.

        Raises:
            UserError: on every rank, when another job works on the folder, or when the ranks mean
                folders of other names.
            OSError: on every rank, when the disk refuses the lock.
        """
        taken: list[FolderLock] = []

        def take() -> str:
            taken.append(lock_folder(path))
            return path.name

        try:
            if ranks is None:
                take()
            else:
                held = on_rank_0(ranks, take)
                on_every_rank(ranks, lambda: _check_same(path, held))
        except UserError as refusal:
            raise UserError(
                refusal.key, refusal.value, refusal.allowed, problem=refusal.problem, where="name"
            ) from refusal
        return cls(path, lock=taken[0] if taken else None, writes=bool(taken))

    def check_held(self) -> None:
        """Refuse to write when a later attempt of the job has taken the folder.

        Raises:
            OSError: the lock file names another holder, or cannot be read.
        """
        if self._lock is not None:
            self._lock.check()

    def write(self, name: str, text: str) -> None:
        """Write a file that is whole or does not exist.

        Raises:
            OSError: the disk refuses, or another attempt holds the folder.
        """
        if self.writes:
            self.check_held()
            durable.write_whole(self.path / name, text)

    def append(self, name: str, text: str) -> None:
        """Add whole lines to a file.

        Raises:
            OSError: as of `write`.
        """
        if self.writes:
            self.check_held()
            file = self.path / name
            with durable.naming(file), file.open("a", encoding="utf-8") as opened:
                opened.write(text)
            self._appended.add(name)

    def publish(self, temporary: Path, final: Path, entries: Mapping[str, durable.Entry]) -> None:
        """Give a finished folder its manifest and, at once, its name.

        A checkpoint of so many steps must find the lines of these steps after a power cut: what was
        appended is forced to the disk before.

        Raises:
            OSError: as of `write`; then nothing that has a name was touched.
        """
        for name in self._appended:
            durable.sync(self.path / name)
        self._appended.clear()
        durable.seal(temporary, entries)
        self.check_held()  # last: between sealing gigabytes and here another attempt may have begun
        durable.replace_folder(temporary, final)

    def publish_file(self, temporary: Path, final: Path) -> None:
        """Give a finished file its name; a file that had the name is replaced.

        Raises:
            OSError: as of `write`.
        """
        self.check_held()
        temporary.replace(final)

    def set_aside(self) -> None:
        """Rename what lies under the folder's name to the first free `<name>.<number>`.

        Raises:
            OSError: as of `write`.
        """
        if self.writes and self.path.exists():
            self.check_held()
            durable.set_aside(self.path)

    def close(self) -> None:
        """Let another job have the folder."""
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _check_same(path: Path, held: str) -> None:
    """Refuse a name that each process makes anew, as `${now:%S}`: each would have a folder."""
    if path.name != held:
        allowed = "a name that is the same on every rank"
        raise UserError(str(path), ABSENT, allowed, problem=f"rank 0 has {held}")
