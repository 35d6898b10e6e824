"""Stands in for NCCL: every rank is alone, and each collective returns tensors of the right shape.

torch's own `fake` process group does the collectives. What it lacks is answered here: objects, and
collectives that torch coalesces.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from opcd_nemo.rehearsal.names import BEGIN, END
from opcd_nemo.rehearsal.recorder import Recorder


def start_world(rank: int, world_size: int, per_node: int, recorder: Recorder) -> None:
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
    real_new_group: Any = dist.new_group

    def new_group(
        ranks: Any = None, timeout: Any = None, backend: Any = None, **keywords: Any
    ) -> Any:
        keywords.pop("pg_options", None)
        return real_new_group(ranks, timeout, "fake", **keywords)

    def all_gather_object(gathered: list[Any], value: Any, group: Any = None) -> None:
        recorder.note("all_gather_object", f"of {len(gathered)}", group)
        gathered[:] = [value] * len(gathered)

    @contextlib.contextmanager
    def coalescing(group: Any = None, *_: object, **__: object) -> Iterator[_Works]:
        recorder.note(BEGIN, "", group)
        yield _Works()
        recorder.note(END, "", group)

    replaced: Any = dist
    replaced.new_group = dist.distributed_c10d.new_group = new_group  # type: ignore[assignment]
    replaced.all_gather_object = all_gather_object
    replaced._coalescing_manager = dist.distributed_c10d._coalescing_manager = coalescing


class _Works(list[Any]):
    """What waits for coalesced collectives."""

    def append(self, _: object) -> None: ...

    def wait(self) -> None: ...
