"""Tensors of a torch_dist checkpoint, read one at a time, in place, without a process group.

The index of such a checkpoint is a pickle. It is read with stand-ins for the few classes that an
index has: nothing of torch is called or changed. The pieces of the tensors and the plain part are
read by torch's `weights_only` loader.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.storage.archive import Files, read_whole

INDEX, PLAIN = ".metadata", "common.pt"

_CHECKPOINT = "torch.distributed.checkpoint"
_INDEX_CLASSES = {
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


class _StandIn:
    """An object of the index: its fields, and nothing that runs."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state if isinstance(state, dict) else {"state": state})


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self._stand_in = type("StandIn", (_StandIn,), {})  # of this index: it may spoil the class

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch", "Size"):
            return tuple
        dtype = getattr(torch, name, None) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if name in _INDEX_CLASSES.get(module, ()):
            return self._stand_in
        raise pickle.UnpicklingError(f"it names {module}.{name}")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """Where a rectangle of a tensor is: in the tensor, and in the files."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[_Piece, ...]


class DistributedTensors:
    """What a torch_dist checkpoint holds."""

    def __init__(self, files: Files, folder: str = "") -> None:
        """Read the index; `folder` is where in `files` the checkpoint is, with its `/`.

        Raises:
            UserError: the index is missing, or is no index.
        """
        self._files, self._folder = files, folder
        self.where = f"{files.where}: {folder}"
        raw = read_whole(files, f"{folder}{INDEX}", _longest_index(files))
        try:
            self._tensors = _entries(_IndexUnpickler(raw).load())
        except Exception as error:  # a hostile pickle may raise anything
            raise UserError(
                f"{self.where}{INDEX}",
                allowed="the index of a checkpoint",
                problem=f"refused ({error})",
            ) from error

    def names(self) -> tuple[str, ...]:
        """Names of the tensors."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return self._tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Its type."""
        return self._tensors[name].dtype

    def tensor(self, name: str) -> Tensor:
        """Put a tensor together from the pieces that the ranks wrote.

        Raises:
            UserError: a piece is missing, damaged or of another shape.
        """
        entry = self._tensors[name]
        self._check_pieces(name, entry)
        out = torch.empty(entry.shape, dtype=entry.dtype)
        for piece in entry.pieces:
            place = out
            for dim, (start, size) in enumerate(zip(piece.offsets, piece.sizes, strict=True)):
                place = place.narrow(dim, start, size)
            place.copy_(self._read(name, piece, entry.dtype))
        return out

    def _check_pieces(self, name: str, entry: _Entry) -> None:
        """Before memory is taken: the pieces are there, and are the tensor, each value once."""
        there = self._files.sizes()
        fits = all(
            0 <= piece.length - prod(piece.sizes) * entry.dtype.itemsize <= limits.PIECE_OVERHEAD
            and piece.start + piece.length <= there.get(f"{self._folder}{piece.file}", -1)
            for piece in entry.pieces
        )
        whole = sum(prod(piece.sizes) for piece in entry.pieces) == prod(entry.shape)
        if not (fits and whole and _are_apart(entry.pieces)):
            raise UserError(
                f"{self.where}{name}",
                allowed="a whole checkpoint",
                problem="its pieces are not the whole tensor, each value once, in files that "
                "are there",
            )

    def _read(self, name: str, piece: _Piece, dtype: torch.dtype) -> Tensor:
        try:
            data = self._files.read(f"{self._folder}{piece.file}", piece.start, piece.length)
            tensor = _load_plain(data)
        except Exception as error:  # torch and pickle raise many kinds
            raise UserError(
                f"{self.where}{name}",
                allowed="a whole checkpoint",
                problem=f"cannot be read ({_first_line(error)})",
            ) from error
        is_tensor = isinstance(tensor, Tensor)
        if not is_tensor or (tuple(tensor.shape), tensor.dtype) != (piece.sizes, dtype):
            raise UserError(
                f"{self.where}{name}",
                allowed="what the index says",
                problem=f"a piece is not {piece.sizes} {dtype}",
            )
        assert isinstance(tensor, Tensor)
        return tensor


def _longest_index(files: Files) -> int:
    return max(limits.INDEX_BYTES, sum(files.sizes().values()) // limits.INDEX_SHARE)


def _are_apart(pieces: Sequence[_Piece]) -> bool:
    """Whether no two of the pieces share a value."""
    first = np.array([piece.offsets for piece in pieces])
    end = first + np.array([piece.sizes for piece in pieces])
    return not any(
        ((first[index] < end[index + 1 :]) & (first[index + 1 :] < end[index])).all(1).any()
        for index in range(len(pieces))
    )


def _entries(index: Any) -> dict[str, _Entry]:
    """The tensors of an index of stand-ins; anything odd raises."""
    places = {}
    for key, place in index.storage_data.items():
        offset = getattr(key, "offset", None)  # bytes have none
        if offset is not None:
            places[key.fqn, _numbers(offset)] = place
    tensors = [entry for entry in index.state_dict_metadata.values() if hasattr(entry, "chunks")]
    if sum(len(entry.chunks) for entry in tensors) > len(places) + limits.PIECES:
        raise ValueError("it has more pieces than places")
    return {
        str(name): _entry(str(name), one, places)
        for name, one in index.state_dict_metadata.items()
        if hasattr(one, "chunks")
    }


def _entry(name: str, one: Any, places: dict[Any, Any]) -> _Entry:
    shape, dtype = _numbers(one.size), one.properties.state[0]
    if not isinstance(dtype, torch.dtype) or len(one.chunks) > limits.PIECES:
        raise ValueError(f"{name} is no tensor")
    pieces = []
    for chunk in one.chunks:
        offsets, sizes = _numbers(chunk.offsets), _numbers(chunk.sizes)
        ends = [start + size for start, size in zip(offsets, sizes, strict=True)]
        if any(end > size for end, size in zip(ends, shape, strict=True)):
            raise ValueError(f"a piece of {name} reaches beyond it")
        place = places[name, offsets]
        start, length = _numbers((place.offset, place.length))
        pieces.append(
            _Piece(
                offsets=offsets,
                sizes=sizes,
                file=str(place.relative_path),
                start=start,
                length=length,
            )
        )
    return _Entry(shape=shape, dtype=dtype, pieces=tuple(pieces))


def _numbers(values: Sequence[Any]) -> tuple[int, ...]:
    if any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{values} are no sizes")
    return tuple(values)


def read_plain(files: Files, folder: str = "") -> dict[str, Any]:
    """What a checkpoint holds beside tensors.

    Raises:
        UserError: the file does not exist, or holds more than plain values.
    """
    raw = read_whole(files, f"{folder}{PLAIN}", limits.PLAIN_BYTES)
    try:
        plain: dict[str, Any] = _load_plain(raw)
    except Exception as error:
        raise UserError(
            files.where,
            allowed="plain values and tensors",
            problem=f"{folder}{PLAIN} is refused ({_first_line(error)})",
        ) from error
    return plain


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else repr(error)


def _load_plain(data: bytes) -> Any:
    """What `torch.save` wrote: as large in memory as in the file, and plain values alone."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        members = file.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise ValueError("it is compressed")
        if sum(member.file_size for member in members) > len(data):
            raise ValueError("it is larger unpacked")
        for member in members:
            if member.filename.endswith("data.pkl"):
                _count_operations(file.read(member))
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _count_operations(pickled: bytes) -> None:
    for number, _ in enumerate(pickletools.genops(pickled)):
        if number > limits.PLAIN_OPERATIONS:
            raise ValueError(f"it has more than {limits.PLAIN_OPERATIONS} parts")
