"""This rank's files of a checkpoint in Megatron's torch_dist format, written now or by a thread.

megatron-core's own asynchronous save forks a process for every file; here a thread of the lowest
priority writes a copy of the tensors, so that a step loses only the time nobody else wants.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.storage.durable import Entry, describe

__all__ = [
    "CheckpointException",
    "Index",
    "Piece",
    "ShardWriter",
    "Written",
    "plan",
    "write_index",
]

_LOWEST_PRIORITY = 19
_SHARE = 0.1  # of a core, for the thread: the thread uses caches and memory that training needs
_WRITE_BYTES = 1 << 23  # written at once, forced to the disk, and dropped from memory
Index = Metadata  # which pieces the whole has, and where they lie
Piece = tuple[WriteItem, Any]  # its name in the checkpoint, and its tensor or bytes


def plan(state: dict[str, Any], parallel: Parallel) -> tuple[list[Piece], Index]:
    """What this rank writes of a sharded state, and what the whole holds. Collective."""
    flat, _, _ = _replace_state_dict_keys_with_sharded_keys(state, True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(flat, False), is_coordinator=parallel.rank == 0)
    mine = planner.create_local_plan()
    _, index = planner.create_global_plan(parallel.gather_objects(mine))
    items = planner.finish_plan(mine).items
    return [(item, planner.resolve_data(item)) for item in items], index


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What became of a rank's files."""

    entries: Mapping[str, Entry] = field(default_factory=dict)
    results: tuple[WriteResult, ...] = ()
    error: str | None = None


def write_index(folder: Path, index: Index, parts: Sequence[Written]) -> None:
    """Add the file that tells readers where the pieces of every rank lie."""
    index.storage_data = {
        written.index: written.storage_data for part in parts for written in part.results
    }
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(index, file)


class ShardWriter:
    """Writes pieces to `<folder>/<name>`, and whole files of bytes beside them, and syncs all."""

    def __init__(
        self, folder: Path, name: str, pieces: list[Piece], files: Mapping[str, bytes]
    ) -> None:
        self._folder, self._name, self._pieces, self._files = folder, name, pieces, files
        self._thread: threading.Thread | None = None
        self._is_awaited = threading.Event()
        self._written = Written()
        self.started_s = self.ended_s = 0.0

    def start(self) -> None:
        """Copy the tensors, which may then change, and write in a thread."""
        self._pieces = [(item, _to_memory(data, copy=True)) for item, data in self._pieces]
        self._thread = threading.Thread(target=self._run_in_background, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread is still writing."""
        return self._thread is not None and self._thread.is_alive()

    def finish(self) -> Written:
        """Write, or wait for the thread."""
        if self._thread is None:
            self._run()
        else:
            self._is_awaited.set()
            self._thread.join()
        return self._written

    def _run_in_background(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
        self._run()

    def _rest(self) -> None:
        """Let the thread fall back to its share."""
        if self._thread is not None:
            ahead_s = time.thread_time() / _SHARE - (time.monotonic() - self.started_s)
            self._is_awaited.wait(max(0.0, ahead_s))

    def _run(self) -> None:
        self.started_s = time.monotonic()
        entries: dict[str, Entry] = {}
        results: list[WriteResult] = []
        error = None
        try:
            for name, content in self._files.items():
                with _HashingFile(self._folder / name, self._rest) as file:
                    file.write(content)
                entries[name] = file.entry()
            with _HashingFile(self._folder / self._name, self._rest) as file:
                while self._pieces:
                    results.append(self._write(file, *self._pieces.pop(0)))
            entries[self._name] = file.entry()
        except OSError as failure:
            error = describe(failure)
        except Exception as failure:  # the main thread reports it, on every rank
            error = f"{self._folder / self._name}: {failure!r}"
        self._pieces.clear()
        self._written = Written(entries=entries, results=tuple(results), error=error)
        self.ended_s = time.monotonic()

    def _write(self, file: _HashingFile, item: WriteItem, data: Any) -> WriteResult:
        start = file.num_bytes
        if isinstance(data, io.BytesIO):
            file.write(data.getbuffer())
        else:
            file.write_tensor(_to_memory(data, copy=False))
        length = file.num_bytes - start
        return WriteResult(item.index, length, _StorageInfo(self._name, start, length))


def _to_memory(data: Any, *, copy: bool) -> Any:
    if isinstance(data, io.BytesIO):
        return data
    is_view = data.untyped_storage().nbytes() != data.nbytes  # `torch.save` writes the storage
    return data.detach().to("cpu", copy=copy or is_view)


class _HashingFile:
    """A file that is hashed while it is written, and forced to the disk at its end."""

    def __init__(self, path: Path, rest: Callable[[], None]) -> None:
        self._rest = rest
        self._path, self._digest = path, hashlib.sha256()
        self._error: OSError | None = None
        self.num_bytes = self._dropped = 0
        self._file = path.open("wb")

    def write(self, data: Any) -> int:
        """Append bytes; few of them are ever in the system's cache.

        A cache filled with gigabytes makes the pages that training touches next cold.
        """
        data = memoryview(data).cast("B")
        try:
            for start in range(0, len(data), _WRITE_BYTES):
                block = data[start : start + _WRITE_BYTES]
                self._file.write(block)
                self._digest.update(block)
                self.num_bytes += len(block)
                if self.num_bytes - self._dropped >= _WRITE_BYTES:
                    self._drop()
        except OSError as error:
            error.filename = self._path
            self._error = error  # torch hides it behind another error
            raise
        return len(data)

    def _drop(self) -> None:
        self._file.flush()
        os.fdatasync(self._file.fileno())
        size = self.num_bytes - self._dropped
        os.posix_fadvise(self._file.fileno(), self._dropped, size, os.POSIX_FADV_DONTNEED)
        self._dropped = self.num_bytes
        self._rest()

    def flush(self) -> None:
        """Torch calls it after every tensor; closing does it once."""

    def write_tensor(self, tensor: torch.Tensor) -> None:
        """Append what `torch.save` makes of a tensor."""
        try:
            torch.save(tensor, self)  # type: ignore[arg-type]  # it writes and flushes, no more
        except Exception:
            if self._error is not None:
                raise self._error from None
            raise

    def entry(self) -> Entry:
        """Size and digest of what was written."""
        return Entry(num_bytes=self.num_bytes, sha256=self._digest.hexdigest())

    def __enter__(self) -> _HashingFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            if kind is None:
                error.filename = self._path
                raise
