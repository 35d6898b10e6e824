"""Hugging Face folders: read their weights lazily, write a folder that transformers loads."""

from __future__ import annotations

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

from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import read_json, write_json
from opcd_nemo.formats.shape import (
    ModelConfig,
    end_tokens,
    hf_config,
    parse_config,
    tensor_shapes,
)

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_FILE_BYTES = 5_000_000_000


class SafetensorsFolder:
    """`model.safetensors`, or the files that `model.safetensors.index.json` names."""

    def __init__(self, folder: Path) -> None:
        self._file_of: dict[str, Any] = {}
        for path in self._files(folder):
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(
                    path,
                    allowed="a complete download",
                    problem=f"not a whole safetensors file ({error})",
                ) from error
            self._file_of |= dict.fromkeys(file.keys(), file)  # type: ignore[no-untyped-call]

    @staticmethod
    def _files(folder: Path) -> list[Path]:
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            return [single]
        if not index.is_file():
            raise UserError(
                folder,
                allowed="model.safetensors or model.safetensors.index.json",
                problem="no weights",
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(index, allowed="tensor name -> file name", problem="no weight_map")
        return [folder / name for name in sorted(set(weight_map.values()))]

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


def read_hf_config(found: Path) -> ModelConfig:
    """The shape in a Hugging Face folder.

    Raises:
        UserError: Missing, incomplete, or a model that is not supported.
    """
    config_file = found / "config.json"
    if not config_file.is_file():
        raise UserError(
            found, allowed="a Hugging Face model folder or a .gguf file", problem="no config.json"
        )
    raw = read_json(config_file)
    generation = found / "generation_config.json"
    if generation.is_file():
        eos = end_tokens(read_json(generation), str(generation))
        raw["eos_token_id"] = list(eos) or raw.get("eos_token_id")
    return parse_config(raw, str(config_file))


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
        UserError: `path` is already there and not an empty folder.
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
