"""Hugging Face tensors out of a torch_dist checkpoint of the student, whatever layout wrote it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from opcd_nemo.errors import UserError
from opcd_nemo.formats.shape import ModelConfig, tensor_shapes
from opcd_nemo.formats.sharding import hf_names, hf_tensors, parameter_names
from opcd_nemo.formats.torch_dist import DistributedTensors
from opcd_nemo.types import LayerSpec

_SPEC: LayerSpec = "te"  # Megatron stores every layer spec under the names of Transformer Engine's
_HEAD, _EMBEDDING = "output_layer.weight", "embedding.word_embeddings.weight"
_GATE_UP = "mlp.linear_fc1.weight"
_HALVES = ("_w", "_v")  # a gated layer is stored as gate and up
_OTHER_STATE = ("optimizer.", "teacher.")  # of a training checkpoint


class MegatronWeights:
    """The tensors of a model under their Hugging Face names; padding of the layout is cut off."""

    def __init__(self, tensors: DistributedTensors, config: ModelConfig) -> None:
        """Find out which stored tensors make which of the model's.

        Raises:
            UserError: a tensor is missing, unexpected, or too small for the model.
        """
        self._tensors, self._config = tensors, config
        if config.num_layers > len(tensors.names()):
            raise UserError(
                f"{tensors.where} holds {len(tensors.names())} tensors",
                allowed=f"those of {config.num_layers} layers",
            )
        self._source: dict[str, tuple[str, int | None]] = {}
        present = set(tensors.names())
        used: set[str] = set()
        for name in parameter_names(config, _SPEC):
            layer = int(name.split(".")[2]) if name.startswith("decoder.layers.") else None
            stored = self._stored(name)
            if missing := [part for part in stored if part not in present]:
                raise UserError(
                    f"{tensors.where}{missing[0]} is missing", allowed="every tensor of the model"
                )
            used.update(stored)
            made = hf_names(config, name, layer=layer, spec=_SPEC)
            self._check_size(name, made)
            self._source |= dict.fromkeys(made, (name, layer))
        if config.tied_embeddings and _HEAD in present:
            self._check_tied_head()
            used.add(_HEAD)
        unexpected = sorted(name for name in present - used if not name.startswith(_OTHER_STATE))
        if unexpected:
            raise UserError(
                f"{tensors.where}{unexpected[0]} is unexpected", allowed="only the model's tensors"
            )
        self._last: tuple[str, dict[str, Tensor]] = ("", {})

    @staticmethod
    def _stored(name: str) -> tuple[str, ...]:
        return tuple(name + half for half in _HALVES) if name.endswith(_GATE_UP) else (name,)

    def _check_tied_head(self) -> None:
        head, embedding = self._tensors.tensor(_HEAD), self._tensors.tensor(_EMBEDDING)
        if head.dtype != embedding.dtype or not torch.equal(head, embedding):
            raise UserError(
                f"{self._tensors.where}{_HEAD}",
                allowed="the embedding, as tie_word_embeddings says",
                problem="is another tensor",
            )

    def _check_size(self, name: str, made: tuple[str, ...]) -> None:
        shapes = tensor_shapes(self._config)
        wanted = list(shapes[made[0]])
        if len(made) > len(self._stored(name)) == 1:  # query, key and value rows in one tensor
            wanted[0] = sum(shapes[part][0] for part in made)
        for part in self._stored(name):
            found = self._tensors.shape(part)
            if len(found) != len(wanted) or any(a < b for a, b in zip(found, wanted, strict=True)):
                raise UserError(
                    f"{self._tensors.where}{part} has shape {found}",
                    allowed=f"{tuple(wanted)}, and padding",
                )

    def names(self) -> tuple[str, ...]:
        """Hugging Face names."""
        return tuple(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape without padding."""
        return tensor_shapes(self._config)[name]

    def dtype(self, name: str) -> torch.dtype:
        """What a tensor is stored in."""
        return self._tensors.dtype(self._stored(self._source[name][0])[0])

    def tensor(self, name: str) -> Tensor:
        """Read one tensor; the others of the same Megatron parameter are kept for the next call.

        Raises:
            UserError: it is damaged, or larger than the model's.
        """
        megatron_name, layer = self._source[name]
        if self._last[0] != megatron_name:
            parts = [self._tensors.tensor(part) for part in self._stored(megatron_name)]
            found = hf_tensors(
                [torch.cat(parts) if len(parts) > 1 else parts[0]],
                self._config,
                megatron_name,
                layer=layer,
                spec=_SPEC,
            )
            if _num_nonzero(found.values()) != _num_nonzero(parts):
                raise UserError(
                    f"{self._tensors.where}{megatron_name}",
                    allowed="zeros",
                    problem="has values beyond the shape of the model, "
                    f"{self.shape(name)} for {name}",
                )
            self._last = megatron_name, found
        return self._last[1][name]


def _num_nonzero(tensors: Iterable[Tensor]) -> int:
    return sum(int(tensor.count_nonzero()) for tensor in tensors)
