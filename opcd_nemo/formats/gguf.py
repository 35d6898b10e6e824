"""GGUF files: their metadata, and their tensors under Hugging Face names.

The header is parsed here: the gguf package builds a numpy view for every vocabulary entry, which
takes seconds where plain `struct` takes a tenth of one. Dequantisation is the gguf package's.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.storage.plain_file import open_plain

ENDS = ("eos", "eot", "eom")  # of a text, a turn, a message
_STRING, _ARRAY = 8, 9
_SCALAR_FORMATS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip

_NOT_COMPUTED = (
    *(
        "attention.scale",
        "attention.clamp_kqv",
        "attention.max_alibi_bias",
        "attn_logit_softcapping",
    ),
    *("embedding_scale", "expert_count", "final_logit_softcapping", "logit_scale"),
    *("residual_scale", "rope.scaling.attn_factor"),
)
"""Settings of llama.cpp under which this project's layers would compute something else."""

_HF_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_HF_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class _Header:
    """A cursor over the little-endian header of a GGUF file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._items = 0
        self.offset = 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self._data, self.offset)
        self.offset += struct.calcsize("<" + layout)
        return values

    def count(self, layout: str, most: int, what: str) -> int:
        """A number that says how much follows."""
        (number,) = self.unpack(layout)
        if number > most:
            raise ValueError(f"{number} {what}, more than {most}")
        return int(number)

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self._data, self.offset)
        start = self.offset + 8
        if start + length > min(len(self._data), limits.GGUF_METADATA_BYTES):
            raise ValueError(f"a text of {length} bytes")
        self.offset = start + length
        return self._data[start : self.offset].decode()

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.unpack(_SCALAR_FORMATS[kind])[0]
        (item,) = self.unpack("I")
        length = self.count("Q", limits.GGUF_ITEMS - self._items, "items of arrays")
        self._items += length
        if item == _STRING:
            return [self.string() for _ in range(length)]
        if item == _ARRAY:
            raise ValueError("an array of arrays")
        return list(self.unpack(f"{length}{_SCALAR_FORMATS[item]}"))


@dataclass(frozen=True, slots=True, kw_only=True)
class _TensorInfo:
    shape: tuple[int, ...]  # torch's order: rows first
    quantization: int
    start: int  # bytes from the start of the file
    num_bytes: int


class GgufFile:
    """An open GGUF file; tensors are read and dequantised one at a time.

    Attributes:
        path: The file.
        metadata: Its key-value pairs, as Python values.
    """

    def __init__(self, path: Path) -> None:
        """Read the header.

        Raises:
            UserError: Not a GGUF file of version 2 or 3, or cut short.
        """
        self.path = path
        self.metadata: dict[str, Any] = {}
        self._tensors: dict[str, _TensorInfo] = {}
        try:
            with open_plain(path) as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._read_header(_Header(self._data))
        except UserError:
            raise
        except (struct.error, ValueError, KeyError, MemoryError, OverflowError) as error:
            raise UserError(
                path, allowed="GGUF version 2 or 3", problem=f"not a whole GGUF file ({error})"
            ) from error

    def _read_header(self, header: _Header) -> None:
        magic, version = header.unpack("4sI")
        if magic != b"GGUF" or version not in (2, 3):
            raise ValueError(f"it starts with {magic!r}, version {version}")
        num_tensors = header.count("Q", limits.GGUF_TENSORS, "tensors")
        for _ in range(header.count("Q", limits.GGUF_VALUES, "values")):
            key = header.string()
            (kind,) = header.unpack("I")
            if key in self.metadata:
                raise ValueError(f"{key} is there twice")
            self.metadata[key] = header.value(kind)
        self._refuse_parts()
        infos = [self._tensor_info(header) for _ in range(num_tensors)]
        alignment = self.metadata.get("general.alignment", 32)
        if (
            not _are_counts(alignment)
            or alignment > limits.GGUF_ALIGNMENT
            or alignment.bit_count() > 1
        ):
            raise ValueError(f"general.alignment is {alignment!r}")
        base = -(-header.offset // alignment) * alignment
        for name, info in infos:
            info = replace(info, start=base + info.start)
            if info.start + info.num_bytes > len(self._data):
                raise ValueError(f"tensor {name} ends after the end of the file")
            if (hf_name := hf_tensor_name(name)) in self._tensors:
                raise ValueError(f"tensor {name} is there twice")
            self._tensors[hf_name] = info
        if "rope_freqs.weight" in self._tensors:
            raise UserError(
                self.path,
                allowed="the Hugging Face folder of the model",
                problem="has Llama 3.1's factors of rotary frequencies (tensor rope_freqs.weight), "
                "which are not read from a GGUF file",
            )

    @staticmethod
    def _tensor_info(header: _Header) -> tuple[str, _TensorInfo]:
        """A tensor's name, and where it is after the start of all tensors."""
        from gguf.constants import GGML_QUANT_SIZES

        name = header.string()
        num_dims = header.count("I", limits.GGUF_DIMENSIONS, "dimensions")
        reversed_shape = header.unpack(f"{num_dims}Q")
        quantization, offset = header.unpack("IQ")
        block_size, block_bytes = GGML_QUANT_SIZES[quantization]
        if not reversed_shape or reversed_shape[0] % block_size:
            raise ValueError(f"tensor {name} has rows of {reversed_shape[:1]}")
        return name, _TensorInfo(
            shape=reversed_shape[::-1],
            quantization=quantization,
            start=offset,
            num_bytes=prod(reversed_shape) // block_size * block_bytes,
        )

    def _refuse_parts(self) -> None:
        parts = self.metadata.get("split.count", 1)
        if parts != 1:
            number = self.metadata.get("split.no")
            raise UserError(
                self.path,
                allowed="one file: `llama-gguf-split --merge` makes it, or the Hugging Face folder",
                problem=f"is part {number} (of 0 to {parts!r} less 1) of a GGUF file in parts",
            )

    def names(self) -> tuple[str, ...]:
        """Hugging Face tensor names; a tensor without such a name keeps its GGUF name."""
        return tuple(self._tensors)

    def shape(self, hf_name: str) -> tuple[int, ...]:
        """Shape of one tensor, rows first."""
        return self._tensors[hf_name].shape

    def dtype(self, name: str) -> torch.dtype:
        """What `tensor` gives, whatever the file's quantisation."""
        return torch.float32

    def tensor(self, hf_name: str) -> Tensor:
        """Read one tensor in fp32, its rows in Hugging Face order."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        info = self._tensors[hf_name]
        raw = np.frombuffer(self._data, np.uint8, info.num_bytes, info.start)
        rows = raw.reshape(*info.shape[:-1], -1)
        values = dequantize(rows, GGMLQuantizationType(info.quantization))
        tensor = torch.from_numpy(np.array(values, np.float32)).reshape(info.shape)
        config = self.hf_config()
        if config["model_type"] == "llama" and "self_attn.q_proj" in hf_name:
            return _half_rotation_rows(tensor, config["num_attention_heads"])
        if config["model_type"] == "llama" and "self_attn.k_proj" in hf_name:
            return _half_rotation_rows(tensor, config["num_key_value_heads"])
        return tensor

    @property
    def num_rows(self) -> int | None:
        """Rows of the embedding: the ids that the model knows."""
        embedding = self._tensors.get("model.embed_tokens.weight")
        return None if embedding is None else embedding.shape[0]

    def hf_config(self) -> dict[str, Any]:
        """The metadata under the keys of a Hugging Face `config.json`; absent values are None."""
        architecture = self.metadata.get("general.architecture")

        def get(key: str) -> Any:
            return self.metadata.get(f"{architecture}.{key}")

        if other := [key for key in _NOT_COMPUTED if get(key)]:
            key, value = f"{architecture}.{other[0]}", get(other[0])
            raise UserError(key, value, "a model without", where=str(self.path))
        heads, hidden = get("attention.head_count"), get("embedding_length")
        rotated = get("rope.dimension_count")
        head_dim = get("attention.key_length") or rotated
        if head_dim is None and _are_counts(heads, hidden):
            head_dim = hidden // heads
        partial = rotated / head_dim if _are_counts(rotated, head_dim) else rotated
        eos = (self.metadata.get(f"tokenizer.ggml.{kind}_token_id") for kind in ENDS)
        return {
            "model_type": architecture,
            "num_hidden_layers": get("block_count"),
            "hidden_size": hidden,
            "intermediate_size": get("feed_forward_length"),
            "num_attention_heads": heads,
            "num_key_value_heads": get("attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "vocab_size": self.num_rows,
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon") or 0,  # it has no default
            "rope_theta": get("rope.freq_base"),
            "rope_scaling": self._rope_scaling(get),
            "partial_rotary_factor": partial,
            "use_sliding_window": bool(get("attention.sliding_window")),
            "sliding_window": get("attention.sliding_window"),
            "max_window_layers": 0,
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "eos_token_id": list(dict.fromkeys(token for token in eos if token is not None)),
        }

    @staticmethod
    def _rope_scaling(get: Callable[[str], Any]) -> dict[str, Any]:
        """As llama.cpp reads it: a factor without a type is a linear one, under either name."""
        kind, factor = get("rope.scaling.type"), get("rope.scaling.factor")
        if factor is None:
            factor = get("rope.scale_linear")
        if kind is None:
            kind = "default" if factor in (None, 0, 1) else "linear"
        return {"rope_type": kind}


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and value > 0 for value in values)


def hf_tensor_name(gguf_name: str) -> str:
    """Hugging Face name of a GGUF tensor, or the name unchanged when it has none."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", gguf_name)
    if layer and layer[2] in _HF_LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_HF_LAYER_NAMES[layer[2]]}.{layer[3]}"
    return _HF_NAMES.get(gguf_name, gguf_name)


def _half_rotation_rows(tensor: Tensor, num_heads: int) -> Tensor:
    """Undo llama.cpp's order of query and key rows.

    llama.cpp rotates neighbouring pairs (2i, 2i+1) of a head; Hugging Face rotates (i, i + dim/2).
    """
    half = tensor.shape[0] // num_heads // 2
    pairs = tensor.reshape(num_heads, half, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)
