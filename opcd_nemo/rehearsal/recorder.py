"""What a rehearsed rank asks for: launches, collectives, host syncs, live bytes."""

from __future__ import annotations

import sys
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# allocate or rename, and launch nothing
_NO_LAUNCH = {
    "detach", "alias", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    "lift_fresh", "_unsafe_view", "_reshape_alias", "set_", "resize_",
}  # fmt: skip
_BLOCK = 512  # bytes; CUDA's caching allocator rounds up to them
_PACKAGES = ("/opcd_nemo/", "/opcd_kernels/", "/megatron/core/", "/transformer_engine/")


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """A collective, or a send or a receive, as this rank has issued it."""

    phase: str
    name: str
    tensors: str
    """Shapes and types, which must agree over the ranks of the group."""
    ranks: tuple[int, ...]
    group: str
    peer: int | None
    """Of a send or a receive: the other rank."""
    site: str


@dataclass(frozen=True, slots=True)
class _Kind:
    """What an operation is by its schema, which is read once."""

    namespace: str
    name: str
    launches: bool

    @classmethod
    def of(cls, func: Any) -> _Kind:
        name = func._schema.name.split("::")[1]
        returns = func._schema.returns
        is_view = bool(returns) and all(
            each.alias_info is not None and not each.alias_info.is_write for each in returns
        )
        return cls(func.namespace, name, not is_view and name not in _NO_LAUNCH)


class Recorder(TorchDispatchMode):
    """Counts, by phase of a step, while it is entered.

    Launches are operations of aten that are no views: some are several kernels. Bytes are those of
    storages on the GPU that something still refers to, in the allocator's blocks; fragments and
    the libraries' buffers are not among them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.current = "build"
        self.launches: dict[str, Counter[str]] = defaultdict(Counter)
        self.syncs: dict[str, Counter[str]] = defaultdict(Counter)
        self.copies: dict[str, Counter[str]] = defaultdict(Counter)
        self.peaks: dict[str, int] = defaultdict(int)
        self.collectives: list[Collective] = []
        self._going: dict[int, str] = {}
        self._begun = 0
        self._kinds: dict[Any, _Kind] = {}
        self._live = 0
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name what follows; `Run.watch` has the same method."""
        before, self.current = self.current, name
        self.peaks[name] = max(self.peaks[name], self._live)
        yield
        self.current = before

    def result(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "launches": {phase: dict(count) for phase, count in self.launches.items()},
            "syncs": {phase: dict(count) for phase, count in self.syncs.items()},
            "copies": {phase: dict(count) for phase, count in self.copies.items()},
            "peak_bytes": dict(self.peaks),
            "collectives": [asdict(each) for each in self.collectives],
            "never_waited_for": dict(Counter(self._going.values())),
        }

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it is."""
        if (kind := self._kinds.get(func)) is None:
            kind = self._kinds[func] = _Kind.of(func)
        if kind.namespace == "c10d":
            self._note_collective(kind.name, args)
        out = func(*args, **(kwargs or {}))
        outs, ins = list[torch.Tensor](), list[torch.Tensor]()
        _add_tensors(out, outs)
        _add_tensors(args, ins)
        _add_tensors(kwargs, ins)
        for tensor in outs:
            self._track(tensor)
        if kind.namespace not in ("c10d", "prim") and any(map(_on_gpu, (*ins, *outs))):
            self._note_operation(kind, ins, outs)
        return out

    def launch(self, name: str) -> None:
        """Count a kernel of Triton or of Transformer Engine."""
        self.launches[self.current][name] += 1

    def sync(self, name: str) -> None:
        """Count a value that the host has waited for."""
        self.syncs[self.current][f"{name} {site()}"] += 1

    def note(self, name: str, tensors: str = "", group: Any = None) -> None:
        """Note an exchange that is no operation of torch's, as of objects."""
        self._add(name, tensors, group or dist.group.WORLD, None)

    def begin_wait(self, name: str) -> int:
        """Note a collective that goes on in the background; the number is `end_wait`'s."""
        self._begun += 1
        self._going[self._begun] = f"{name} {site()}"
        return self._begun

    def end_wait(self, number: int) -> None:
        """The rank waits for it."""
        self._going.pop(number, None)

    @property
    def held(self) -> int:
        """Bytes that something refers to now."""
        return self._live

    def resized(self, storage: Any, size: int) -> None:
        """Follow `storage.resize_`, by which Megatron frees its gradient buffers."""
        if (key := storage._cdata) in self._sizes:
            reference, before = self._sizes[key]
            self._sizes[key] = reference, size
            self._grow(size - before)

    def _note_operation(
        self, kind: _Kind, ins: list[torch.Tensor], outs: list[torch.Tensor]
    ) -> None:
        from_host = any(not _on_gpu(tensor) and tensor.dim() for tensor in ins)
        if from_host and kind.name in ("copy_", "_to_copy"):
            self.copies[self.current][site()] += 1
        elif any(not _on_gpu(tensor) and tensor.dim() for tensor in outs):
            self.sync(kind.name)
        if kind.launches:
            self.launch(kind.name)

    def _note_collective(self, name: str, args: Any) -> None:
        leaves = tree_leaves(args)
        tensors = [
            f"{tuple(leaf.shape)} {str(leaf.dtype).removeprefix('torch.')}"
            for leaf in leaves
            if isinstance(leaf, torch.Tensor)
        ]
        group: Any = dist.group.WORLD
        for leaf in leaves:
            if isinstance(leaf, torch.ScriptObject):
                with suppress(RuntimeError):  # a script object of another class
                    group = dist.ProcessGroup.unbox(leaf)
                    break
        peer = None
        if name in ("send", "recv_"):  # the rank within the group follows the group
            number = next(leaf for leaf in leaves if isinstance(leaf, int))
            peer = dist.get_global_rank(group, number)
        self._add(name, ", ".join(tensors), group, peer)

    def _add(self, name: str, tensors: str, group: Any, peer: int | None) -> None:
        self.collectives.append(
            Collective(
                phase=self.current,
                name=name,
                tensors=tensors,
                ranks=tuple(dist.get_process_group_ranks(group)),
                group=group.group_name,
                peer=peer,
                site=site(),
            )
        )

    def _track(self, tensor: torch.Tensor) -> None:
        if not _on_gpu(tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = -(-storage.nbytes() // _BLOCK) * _BLOCK
            self._sizes[key] = weakref.ref(storage, partial(self._free, key)), size
            self._grow(size)

    def _grow(self, size: int) -> None:
        self._live += size
        self.peaks[self.current] = max(self.peaks[self.current], self._live)

    def _free(self, key: int, _: object) -> None:
        self._live -= self._sizes.pop(key)[1]


def _add_tensors(value: Any, found: list[torch.Tensor]) -> None:
    """Add the tensors of arguments or results; `tree_leaves` takes several times as long."""
    if isinstance(value, torch.Tensor):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for each in value:
            _add_tensors(each, found)
    elif isinstance(value, dict):
        for each in value.values():
            _add_tensors(each, found)


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cuda"


def site(depth: int = 3) -> str:
    """The innermost lines of the project and of its libraries that lead here."""
    frame, found = sys._getframe(1), list[str]()
    while frame is not None and len(found) < depth:
        file = frame.f_code.co_filename
        mark = next((mark for mark in _PACKAGES if mark in file), None)
        if mark is not None and "/rehearsal/" not in file:
            found.append(f"{file.rpartition(mark)[2]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found)
