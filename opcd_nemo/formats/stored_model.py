"""A model on disk, whatever its format, with tensors under their Hugging Face names."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from opcd_nemo.errors import UserError
from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.formats.huggingface import SafetensorsFolder, read_hf_config, stored_ends
from opcd_nemo.formats.locate import model_kind, resolve_model_path
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
    hf_config,
    parse_config,
    tensor_shapes,
)
from opcd_nemo.formats.torch_dist import DistributedTensors

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_DTYPES = torch.float32, torch.bfloat16, torch.float16
_ROWS = 4096  # of a head, compared at once

logger = logging.getLogger(__name__)


class _Weights(Protocol):
    def names(self) -> tuple[str, ...]: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def dtype(self, name: str) -> torch.dtype: ...

    def tensor(self, name: str) -> Tensor: ...


class StoredModel:
    """A model on disk; tensors are read one at a time, under their Hugging Face names.

    Attributes:
        path: The file or folder.
        config: Shape of the model.
    """

    def __init__(self, path: Path, config: ModelConfig, weights: _Weights) -> None:
        """Check that the weights fit the configured model.

        Raises:
            UserError: A tensor is missing, unexpected or of another shape.
        """
        stored = set(weights.names())
        if config.tied_embeddings and _HEAD in stored and not _heads_are_equal(weights):
            logger.warning(
                "%s: tie_word_embeddings is true, but %s is not the embedding: both are "
                "read, as by transformers",
                *(path, _HEAD),
            )
            config = replace(config, tied_embeddings=False)
        self.path = path
        self.config = config
        self._weights = weights
        shapes = tensor_shapes(config)
        if missing := sorted(shapes.keys() - stored):
            raise UserError(
                path,
                allowed=f"every tensor of a {CLASS_NAMES[config.architecture]}",
                problem=f"tensor {missing[0]!r} is missing ({len(missing)} in all)",
            )
        unused = {name for name in stored if name.endswith("rotary_emb.inv_freq")}
        if config.tied_embeddings:
            unused.add(_HEAD)
        if unexpected := sorted(stored - shapes.keys() - unused):
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
            if (dtype := weights.dtype(name)) not in _DTYPES:
                raise UserError(
                    path,
                    allowed=", ".join(map(str, _DTYPES)),
                    problem=f"tensor {name!r} is {dtype}",
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
        """All tensors by name; a tensor is read when it is taken."""
        return _LazyTensors(self)


def _heads_are_equal(weights: _Weights) -> bool:
    if _EMBEDDING not in weights.names() or weights.shape(_HEAD) != weights.shape(_EMBEDDING):
        return False
    head, embedding = weights.tensor(_HEAD), weights.tensor(_EMBEDDING)
    return all(
        torch.equal(row.float(), embedded.float())
        for row, embedded in zip(head.split(_ROWS), embedding.split(_ROWS), strict=True)
    )


class _LazyTensors(Mapping[str, Tensor]):
    def __init__(self, model: StoredModel) -> None:
        self._model = model

    def __getitem__(self, name: str) -> Tensor:
        return self._model.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.names())

    def __len__(self) -> int:
        return len(self._model.names())


def open_model(path: str) -> StoredModel:
    """Open what `locate.model_kind` knows, or the bundled model.

    Raises:
        UserError: Missing, incomplete, or a model that is not supported.
    """
    found = resolve_model_path(path)
    kind = model_kind(found)
    if kind == "gguf":
        gguf = GgufFile(found)
        return StoredModel(found, parse_config(gguf.hf_config(), str(found)), gguf)
    if kind == "hf":
        return StoredModel(found, read_hf_config(found), SafetensorsFolder(found))
    if kind == "checkpoint":
        config, files = _stored_config(found), open_training_checkpoint(found)
        return StoredModel(found, config, MegatronWeights(DistributedTensors(files), config))
    package = open_package(found)
    raw, where = read_record(package, f"{HF}config.json"), f"{found}: {HF}config.json"
    members = package.sizes()
    ends = stored_ends(
        lambda name: read_record(package, f"{HF}{name}") if f"{HF}{name}" in members else {},
        f"{found}: {HF}",
    )
    config = parse_config({**raw, "eos_token_id": list(ends)}, where)
    return StoredModel(found, config, MegatronWeights(DistributedTensors(package, WEIGHTS), config))


def _stored_config(found: Path) -> ModelConfig:
    values = read_checkpoint(found).model
    try:
        scaling = values.get("rope_scaling")
        config = ModelConfig(
            **{
                **values,
                "rope_scaling": RopeScaling(**scaling) if scaling else None,
                "eos_token_ids": tuple(values["eos_token_ids"]),
            }
        )
        # whoever wrote the checkpoint may have written anything: it must be a model's shape
        parsed = parse_config(hf_config(config, torch.float32), f"{found}: model")
        if parsed != config:
            raise ValueError(f"{config} for {parsed}")
    except UserError:
        raise
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise UserError(
            found,
            allowed="one of this version",
            problem=f"its model is of another version ({error})",
        ) from error
    return config
