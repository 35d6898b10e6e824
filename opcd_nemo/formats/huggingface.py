"""Hugging Face weights: open a checkpoint lazily, write a folder that transformers loads.

The shape of a model is `model_config`'s, the megatron-core names and shards are `sharding`'s; both
are offered here too, so that callers need one import.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import reduce
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from opcd_nemo.errors import UserError
from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.formats.locate import model_kind, read_json, resolve_model_path, write_json
from opcd_nemo.formats.megatron_names import MegatronWeights
from opcd_nemo.formats.nemo import (
    HF,
    WEIGHTS,
    open_package,
    open_training_checkpoint,
    read_checkpoint,
    read_record,
)
from opcd_nemo.formats.shape import (
    CLASS_NAMES,
    ModelConfig,
    RopeScaling,
    end_tokens,
    hf_config,
    keep_layers,
    parse_config,
    tensor_shapes,
)
from opcd_nemo.formats.sharding import (
    hf_tensors,
    megatron_shard,
    padded_ffn_size,
    padded_query_groups,
    padded_vocab_size,
    parameter_names,
)
from opcd_nemo.formats.torch_dist import DistributedTensors

__all__ = [
    "Checkpoint",
    "ModelConfig",
    "RopeScaling",
    "hf_tensors",
    "keep_layers",
    "megatron_shard",
    "open_checkpoint",
    "padded_ffn_size",
    "padded_query_groups",
    "padded_vocab_size",
    "parameter_names",
    "write_hf_folder",
]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MAX_FILE_BYTES = 5_000_000_000


class _Weights(Protocol):
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor: ...


class _SafetensorsFolder:
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
        return tuple(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        word = self._file_of[name].get_slice(name).get_dtype()
        if word not in _DTYPES:
            raise UserError(f"tensor {name!r} is {word}", allowed=", ".join(_DTYPES))
        return _DTYPES[word]

    def tensor(self, name: str) -> Tensor:
        tensor = self._file_of[name].get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor


class Checkpoint:
    """A model on disk; tensors are read one at a time, under their Hugging Face names.

    Attributes:
        path: The file or folder.
        config: Shape of the model.
    """

    def __init__(self, path: Path, config: ModelConfig, weights: _Weights) -> None:
        """Check that the weights are those of the configured model.

        Raises:
            ValueError: A tensor is missing, unexpected or of another shape.
        """
        self.path = path
        self.config = config
        self._weights = weights
        shapes = tensor_shapes(config)
        there = set(weights.names())
        if missing := sorted(shapes.keys() - there):
            raise UserError(
                path,
                allowed=f"every tensor of a {CLASS_NAMES[config.architecture]}",
                problem=f"tensor {missing[0]!r} is missing ({len(missing)} in all)",
            )
        unused = {name for name in there if name.endswith("rotary_emb.inv_freq")}
        if config.tied_embeddings:
            unused.add("lm_head.weight")
        if unexpected := sorted(there - shapes.keys() - unused):
            raise UserError(
                path,
                allowed=f"only tensors of a dense {CLASS_NAMES[config.architecture]}",
                problem=f"tensor {unexpected[0]!r} is unexpected ({len(unexpected)} in all)",
            )
        for name, shape in shapes.items():
            if weights.shape(name) != shape:
                raise UserError(
                    path,
                    allowed=f"{shape}",
                    problem=f"tensor {name!r} has shape {weights.shape(name)}",
                )

    def names(self) -> tuple[str, ...]:
        """Names of the tensors that the model uses, embedding first."""
        return tuple(tensor_shapes(self.config))

    def tensor(self, hf_name: str) -> Tensor:
        """Read one tensor, in the dtype it is stored in (fp32 from a quantised file)."""
        return self._weights.tensor(hf_name)

    @property
    def dtype(self) -> torch.dtype:
        """The type that holds what all tensors are stored in."""
        return reduce(torch.promote_types, map(self._weights.dtype, self.names()))

    def tensors(self) -> Mapping[str, Tensor]:
        """All tensors by name; each is read when it is asked for."""
        return _LazyTensors(self)


class _LazyTensors(Mapping[str, Tensor]):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> Tensor:
        return self._checkpoint.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.names())

    def __len__(self) -> int:
        return len(self._checkpoint.names())


def open_checkpoint(path: str) -> Checkpoint:
    """Open what `model_files.model_kind` knows, or the bundled model.

    Raises:
        ValueError: Missing, incomplete, or a model that is not supported.
    """
    found = resolve_model_path(path)
    kind = model_kind(found)
    if kind == "gguf":
        gguf = GgufFile(found)
        return Checkpoint(found, parse_config(gguf.hf_config(), str(found)), gguf)
    if kind == "hf":
        return _open_hf_folder(found)
    if kind == "checkpoint":
        config, files = _stored_config(found), open_training_checkpoint(found)
        return Checkpoint(found, config, MegatronWeights(DistributedTensors(files), config))
    package = open_package(found)
    raw, where = read_record(package, f"{HF}config.json"), f"{found}: {HF}config.json"
    config = parse_config(raw, where)
    return Checkpoint(found, config, MegatronWeights(DistributedTensors(package, WEIGHTS), config))


def _stored_config(found: Path) -> ModelConfig:
    values = read_checkpoint(found).model
    scaling = values.get("rope_scaling")
    try:
        return ModelConfig(
            **{
                **values,
                "rope_scaling": RopeScaling(**scaling) if scaling else None,
                "eos_token_ids": tuple(values["eos_token_ids"]),
            }
        )
    except (TypeError, LookupError) as error:
        raise UserError(
            found,
            allowed="one of this version",
            problem=f"its model is of another version ({error})",
        ) from error


def _open_hf_folder(found: Path) -> Checkpoint:
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
    return Checkpoint(found, parse_config(raw, str(config_file)), _SafetensorsFolder(found))


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
        ValueError: `path` is already there and not an empty folder.
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
