"""Tensors of a torch_dist checkpoint, read one at a time, in place, without a process group.

The index of such a checkpoint is a pickle. Only the classes of an index are let through; the pieces
of the tensors and the plain part are read by torch's `weights_only` loader.
"""

from __future__ import annotations

import io
import pickle
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from opcd_nemo.archive import Files, read_whole

INDEX, PLAIN = ".metadata", "common.pt"

_CHECKPOINT = "torch.distributed.checkpoint"
_INDEX_CLASSES = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_CHECKPOINT}.filesystem": {"_StorageInfo"},
    f"{_CHECKPOINT}.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_CHECKPOINT}.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
}


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _INDEX_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


class DistributedTensors:
    """What one torch_dist checkpoint holds."""

    def __init__(self, files: Files, folder: str = "") -> None:
        """Read the index; `folder` is where in `files` the checkpoint is, with its `/`.

        Raises:
            ValueError: there is no index, or it is not one.
        """
        self._files, self._folder = files, folder
        self.where = f"{files.where}: {folder}"
        raw = read_whole(files, f"{folder}{INDEX}")
        try:
            index = _IndexUnpickler(io.BytesIO(raw)).load()
            self._tensors: dict[str, TensorStorageMetadata] = {
                name: one
                for name, one in index.state_dict_metadata.items()
                if isinstance(one, TensorStorageMetadata)
            }
            self._places: dict[MetadataIndex, Any] = dict(index.storage_data)
        except Exception as error:  # a hostile pickle may raise anything
            raise ValueError(
                f"{self.where}{INDEX}: refused ({error}); allowed: the index of a checkpoint"
            ) from error

    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> torch.dtype:
        """Its type."""
        return self._tensors[name].properties.dtype

    def tensor(self, name: str) -> Tensor:
        """Put a tensor together from the pieces that the ranks wrote.

        Raises:
            ValueError: a piece is missing, damaged or of another shape.
        """
        about = self._tensors[name]
        self._check_claim(name)
        out = torch.empty(about.size, dtype=about.properties.dtype)
        covered = 0
        for chunk in about.chunks:
            piece = self._piece(name, tuple(chunk.offsets))
            wanted = (tuple(chunk.sizes), about.properties.dtype)
            if (tuple(piece.shape), piece.dtype) != wanted:
                raise ValueError(
                    f"{self.where}{name}: a piece is {tuple(piece.shape)} {piece.dtype}; "
                    f"allowed: {wanted[0]} {wanted[1]}"
                )
            place = out
            for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                place = place.narrow(dim, start, size)
            place.copy_(piece)
            covered += prod(chunk.sizes)
        if covered != out.numel():
            raise ValueError(f"{self.where}{name}: {covered} of {out.numel()} values are there")
        return out

    def _check_claim(self, name: str) -> None:
        """Refuse a size that the stored pieces cannot have, before memory is taken for it."""
        about = self._tensors[name]
        places = (
            self._places.get(MetadataIndex(name, torch.Size(chunk.offsets)))
            for chunk in about.chunks
        )
        stored = sum(place.length for place in places if place is not None)
        claimed = prod(about.size) * about.properties.dtype.itemsize
        if claimed > stored:
            raise ValueError(f"{self.where}{name}: claims {claimed} bytes; {stored} are there")

    def _piece(self, name: str, offset: tuple[int, ...]) -> Tensor:
        try:
            place = self._places[MetadataIndex(name, torch.Size(offset))]
            data = self._files.read(
                f"{self._folder}{place.relative_path}", place.offset, place.length
            )
            piece = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # torch and pickle raise many kinds
            first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            raise ValueError(
                f"{self.where}{name}: cannot be read ({first}); allowed: a whole checkpoint"
            ) from error
        if not isinstance(piece, Tensor):
            raise ValueError(f"{self.where}{name}: is a {type(piece).__name__}; allowed: a tensor")
        return piece


def read_plain(files: Files, folder: str = "") -> dict[str, Any]:
    """What a checkpoint holds beside tensors.

    Raises:
        ValueError: it is not there, or holds more than plain values.
    """
    raw = read_whole(files, f"{folder}{PLAIN}")
    try:
        plain: dict[str, Any] = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{files.where}: {folder}{PLAIN} is refused; allowed: plain values and tensors"
        ) from error
    return plain
