"""Hugging Face folders: read their weights lazily, write a folder that transformers loads."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import optional_settings, read_json, write_json
from opcd_nemo.formats.shape import (
    ModelConfig,
    end_tokens,
    hf_config,
    parse_config,
    tensor_shapes,
)
from opcd_nemo.storage.plain_file import is_there, open_plain

logger = logging.getLogger(__name__)
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_FILE_BYTES = 5_000_000_000


_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_UNUSED = "rotary_emb.inv_freq"  # tensors of old folders, which no index needs to name


class SafetensorsFolder:
    """`model.safetensors`, or the files that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path) -> None:
        """Open the files.

        Raises:
            UserError: a file is missing or damaged, or is not as the index says.
        """
        single, index = folder / _SINGLE, folder / _INDEX
        self._file_of: dict[str, Any] = {}
        if is_there(single):
            if is_there(index) and set(_weight_map(index).values()) != {_SINGLE}:
                logger.warning("%s is read; %s beside it names other files", single, index.name)
            file = _open(single)
            self._file_of = dict.fromkeys(file.keys(), file)
        elif is_there(index):
            self._read_indexed(index)
        else:
            raise UserError(folder, allowed=f"{_SINGLE} or {_INDEX}", problem="no weights")

    def _read_indexed(self, index: Path) -> None:
        """Take each tensor from the file that the index names for it."""
        named, unread = _weight_map(index), list[str]()
        for file_name in sorted(set(named.values())):
            file = _open(index.with_name(file_name))
            held = set(file.keys())
            missing = sorted(
                tensor for tensor, name in named.items() if name == file_name and tensor not in held
            )
            if missing:
                raise UserError(
                    index,
                    allowed="for each tensor the file that holds it",
                    problem=f"tensor {missing[0]!r} is not in {file_name}",
                )
            for tensor in sorted(held):
                if named.get(tensor) == file_name:
                    self._file_of[tensor] = file
                elif tensor in named:
                    unread.append(f"{tensor!r} of {file_name}")
                elif not tensor.endswith(_UNUSED):
                    raise UserError(
                        index,
                        allowed="for each tensor the file that holds it",
                        problem=f"names no file for tensor {tensor!r} of {file_name}",
                    )
        if unread:
            logger.warning(
                "%d tensors are not read, the first of them %s: %s names other files for them",
                *(len(unread), unread[0], index),
            )

    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the files."""
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's type, from the file's header."""
        word = self._file_of[name].get_slice(name).get_dtype()
        if word not in _DTYPES:
            raise UserError(f"tensor {name!r} is {word}", allowed=", ".join(_DTYPES))
        return _DTYPES[word]

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor = self._file_of[name].get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor


def _open(path: Path) -> Any:
    with open_plain(path) as file:
        num_bytes = int.from_bytes(file.read(8), "little")  # of the header, which is JSON
    try:
        if num_bytes > limits.SAFETENSORS_HEADER_BYTES:
            raise OSError(f"a header of {num_bytes} bytes")
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(
            path,
            allowed="a complete download",
            problem=f"not a whole safetensors file ({error})",
        ) from error


def _weight_map(index: Path) -> dict[str, str]:
    """Tensor -> name of a file beside the index."""
    named = read_json(index, limits.SETTINGS_BYTES).get("weight_map")
    if not isinstance(named, dict):
        raise UserError(index, allowed="tensor name -> file name", problem="no weight_map")
    for tensor, name in named.items():
        if not isinstance(name, str) or not name or name != Path(name).name:
            raise UserError(tensor, name, "the name of a file beside it", where=str(index))
    return named


def stored_ends(read: Callable[[str], Mapping[str, Any]], where: str) -> tuple[int, ...]:
    """What ends a response: generation_config.json says it, config.json where that has no ids.

    Args:
        read: a file of the model's folder as JSON; nothing if the file does not exist.
        where: the folder, for errors.

    Raises:
        UserError: ids that are none.
    """
    names = "generation_config.json", "config.json"
    generation, model = (end_tokens(read(name), f"{where}/{name}") for name in names)
    return generation or model


def read_hf_config(found: Path) -> ModelConfig:
    """The shape in a Hugging Face folder.

    Raises:
        UserError: Missing, incomplete, or a model that is not supported.
    """
    config_file = found / "config.json"
    if not is_there(config_file):
        raise UserError(
            found, allowed="a Hugging Face model folder or a .gguf file", problem="no config.json"
        )
    raw = read_json(config_file, limits.SETTINGS_BYTES)
    ends = stored_ends(lambda name: optional_settings(found / name), str(found))
    return parse_config({**raw, "eos_token_id": list(ends)}, str(config_file))


def write_hf_folder(
    path: str | Path,
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    max_file_bytes: int = MAX_FILE_BYTES,
    write_others: Callable[[Path], None] | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` loads; all of it or nothing.

    Args:
        path: Folder to create.
        config: Shape of the model.
        tensors: Every tensor of `tensor_shapes(config)`.
        dtype: Floating-point type to store.
        max_file_bytes: Weights go to several files with an index above this size.
        write_others: Puts further files (tokenizer, generation settings) into the folder.

    Raises:
        UserError: `path` exists and is not an empty folder.
    """
    path = Path(path)
    shapes = tensor_shapes(config)
    assert tensors.keys() == shapes.keys()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UserError(path, allowed="a new or empty folder", problem="is already there")
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    unfinished.mkdir()
    try:
        write_json(unfinished / "config.json", hf_config(config, dtype))
        eos = list(config.eos_token_ids)
        write_json(unfinished / "generation_config.json", {"eos_token_id": eos or None})
        if write_others is not None:
            write_others(unfinished)
        _write_weights(unfinished, shapes, tensors, dtype, max_file_bytes)
        unfinished.replace(path)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    max_file_bytes: int,
) -> None:
    files: list[list[str]] = [[]]
    total_bytes = file_bytes = 0
    for name, shape in shapes.items():
        num_bytes = prod(shape) * dtype.itemsize
        if files[-1] and file_bytes + num_bytes > max_file_bytes:
            files.append([])
            file_bytes = 0
        files[-1].append(name)
        file_bytes += num_bytes
        total_bytes += num_bytes
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files, start=1):
        file_name = "model.safetensors"
        if len(files) > 1:
            file_name = f"model-{index:05d}-of-{len(files):05d}.safetensors"
        stored = {name: tensors[name].detach().to("cpu", dtype).contiguous() for name in names}
        assert all(tuple(stored[name].shape) == shapes[name] for name in names)
        path = folder / file_name
        path.touch()
        mode = path.stat().st_mode
        save_file(stored, path, metadata={"format": "pt"})
        path.chmod(mode)  # it leaves a file for the owner alone
        weight_map |= dict.fromkeys(names, file_name)
    if len(files) > 1:
        index_file = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index_file)
