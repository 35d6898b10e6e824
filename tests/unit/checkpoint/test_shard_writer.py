"""A rank's files are as the tensors were when the save began, and a full disk is named."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd_nemo.checkpoint.shard_writer import ShardWriter, Written
from opcd_nemo.storage import durable


def pieces(*tensors: torch.Tensor) -> list[Any]:
    return [(SimpleNamespace(index=place), tensor) for place, tensor in enumerate(tensors)]


def read(folder: Path, written: Written) -> list[torch.Tensor]:
    data = (folder / "shard").read_bytes()
    places = [result.storage_data for result in written.results]
    return [torch.load(io.BytesIO(data[p.offset : p.offset + p.length])) for p in places]


def test_a_background_writer_keeps_what_the_tensors_were(tmp_path: Path) -> None:
    tensors = [torch.randn(1 << 22), torch.randn(30, 20).t(), torch.randn(8)[2:4]]
    before = [tensor.clone() for tensor in tensors]
    writer = ShardWriter(tmp_path, "shard", pieces(*tensors), {"plain": b"plain"})
    writer.start()
    for tensor in tensors:
        tensor.zero_()
    written = writer.finish()
    assert not writer.is_running
    assert written.error is None
    assert all(map(torch.equal, read(tmp_path, written), before))
    assert (tmp_path / "plain").read_bytes() == b"plain"
    assert written.entries == {
        name: durable.measure(tmp_path / name) for name in ("plain", "shard")
    }


def test_views_are_written_without_their_storage(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "shard", pieces(torch.randn(1 << 20)[:3]), {})
    assert writer.finish().entries["shard"].num_bytes < 1 << 12


@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("full", ["plain", "shard"])
def test_a_full_disk_is_named(tmp_path: Path, full: str, background: bool) -> None:
    (tmp_path / full).symlink_to("/dev/full")
    writer = ShardWriter(tmp_path, "shard", pieces(torch.randn(1 << 22)), {"plain": b"plain"})
    if background:
        writer.start()
    assert writer.finish().error == f"{tmp_path / full}: No space left on device (errno 28)"
