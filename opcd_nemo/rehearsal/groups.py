"""Stands in for NCCL: every rank is alone, and each collective returns tensors of the right shape.

torch's own `fake` process group does the collectives. What it lacks is answered here: objects, and
collectives that torch coalesces.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch.distributed as dist

from opcd_nemo.rehearsal.names import BEGIN, END
from opcd_nemo.rehearsal.recorder import Recorder


def start_world(rank: int, world_size: int, per_node: int) -> None:
    """Be a rank of a world that has no other process."""
    import torch.distributed._tools.fake_collectives  # noqa: F401  # shapes of collectives
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": str(min(per_node, world_size)),
    }
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())


def install(recorder: Recorder) -> None:
    """Put the stand-ins in place, before megatron-core is imported, which takes their names."""
    real_new_group: Any = dist.new_group
    together: list[bool] = []

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, **keywords: Any
    ) -> Any:
        keywords.pop("pg_options", None)
        return real_new_group(ranks, timeout, "fake", **keywords)

    def all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        recorder.note("all_gather_object", f"of {len(gathered)}", group)
        gathered[:] = [value] * len(gathered)

    @contextlib.contextmanager
    def coalescing(
        group: Any = None, device: Any = None, async_ops: bool = False
    ) -> Iterator[_Works]:
        recorder.note(BEGIN, "", group)
        together.append(True)  # who waits, waits for all of them
        works = _Works()
        yield works
        together.pop()
        recorder.note(END, "", group)
        if async_ops:
            works.go_on(recorder)

    replaced: Any = dist
    _follow_waits(recorder, together)
    replaced.new_group = dist.distributed_c10d.new_group = new_group  # type: ignore[assignment]
    replaced.all_gather_object = all_gather_object
    replaced._coalescing_manager = dist.distributed_c10d._coalescing_manager = coalescing


def _follow_waits(recorder: Recorder, together: list[bool]) -> None:
    """Note what is left to go on in the background, until the rank waits for it.

    Args:
        recorder: is told.
        together: not empty while collectives are coalesced.
    """
    names = ("isend", "irecv", "all_reduce", "all_gather", "all_gather_into_tensor", "broadcast")
    for name in (*names, "reduce_scatter", "reduce_scatter_tensor", "all_to_all_single"):
        setattr(dist, name, _followed(name, getattr(dist, name), recorder, together))


def _followed(name: str, real: Any, recorder: Recorder, together: list[bool]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        work = real(*args, **kwargs)
        goes_on = name in ("isend", "irecv") or kwargs.get("async_op", False)
        if together or not goes_on or work is None:
            return work
        return _Going(work, name, recorder)

    return call


class _Going:
    """What a collective that goes on returns."""

    def __init__(self, work: Any, name: str, recorder: Recorder) -> None:
        self._work, self._recorder = work, recorder
        self._number = recorder.begin_wait(name)

    def wait(self, *args: Any) -> Any:
        self._recorder.end_wait(self._number)
        return self._work.wait(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class _Works(list[Any]):
    """What waits for coalesced collectives."""

    _end_wait: Callable[[], None] = staticmethod(lambda: None)

    def append(self, _: object) -> None: ...

    def go_on(self, recorder: Recorder) -> None:
        """What they are waited for with is this."""
        self._end_wait = partial(recorder.end_wait, recorder.begin_wait("coalesced"))

    def wait(self) -> None:
        self._end_wait()
