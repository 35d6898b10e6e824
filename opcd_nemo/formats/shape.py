"""The shape of a dense Llama, Qwen2 or Qwen3 model, read from a Hugging Face `config.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import Any, Literal

import torch

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError

Architecture = Literal["llama", "qwen2", "qwen3"]

CLASS_NAMES: dict[Architecture, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary embeddings."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Everything about a checkpoint that shapes the model."""

    architecture: Architecture
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rope_theta: float
    rope_scaling: RopeScaling | None
    norm_eps: float
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one key and value."""
        return self.num_attention_heads // self.num_query_groups


def keep_layers(config: ModelConfig, layers: Sequence[int]) -> ModelConfig:
    """Shape of a model that keeps only `layers` (0-based) of a checkpoint.

    Raises:
        UserError: Empty, out of range or not strictly increasing.
    """
    increasing = all(left < right for left, right in pairwise(layers))
    if not layers or not increasing or layers[0] < 0 or layers[-1] >= config.num_layers:
        raise UserError(
            "student.keep_layers",
            list(layers),
            f"strictly increasing numbers from 0 to {config.num_layers - 1}",
        )
    return replace(config, num_layers=len(layers))


def parse_config(raw: Mapping[str, Any], where: str) -> ModelConfig:
    """Read a `config.json` of transformers 4 or 5.

    Raises:
        UserError: A setting that megatron-core would not compute as transformers does.
    """
    architecture: Any = raw.get("model_type")
    if not isinstance(architecture, str) or architecture not in CLASS_NAMES:
        raise _bad_value(where, "model_type", architecture, ", ".join(CLASS_NAMES))
    num_layers = _positive_int(raw, "num_hidden_layers", where, most=limits.LAYERS)
    _refuse_unsupported(raw, where, architecture, num_layers)
    heads = _positive_int(raw, "num_attention_heads", where)
    groups = _positive_int(raw, "num_key_value_heads", where, heads)
    if heads % groups:
        raise _bad_value(where, "num_key_value_heads", groups, f"a divisor of {heads} heads")
    hidden = _positive_int(raw, "hidden_size", where)
    theta, scaling = _rope(raw, where)
    vocab_size, ends = _positive_int(raw, "vocab_size", where), end_tokens(raw, where)
    if any(token >= vocab_size for token in ends):  # it would end nothing
        allowed = f"ids below vocab_size={vocab_size}, also in generation_config.json"
        raise _bad_value(where, "eos_token_id", list(ends), allowed)
    return ModelConfig(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden,
        ffn_hidden_size=_positive_int(raw, "intermediate_size", where),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_positive_int(
            raw, "head_dim", where, 128 if architecture == "qwen3" else hidden // heads
        ),
        vocab_size=vocab_size,
        max_positions=_positive_int(raw, "max_position_embeddings", where),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=_positive_float(raw, "rms_norm_eps", where, 1e-6),
        tied_embeddings=_flag(raw, "tie_word_embeddings", where),
        qkv_bias=architecture == "qwen2",
        qk_norm=architecture == "qwen3",
        eos_token_ids=ends,
    )


def end_tokens(raw: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """The `eos_token_id` of a config: absent, one id or several.

    Raises:
        UserError: Something else.
    """
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(type(token) is not int or token < 0 for token in ids):
        raise _bad_value(where, "eos_token_id", value, "a token id or a list of them")
    return tuple(ids)


def _bad_value(where: str, key: str, value: object, allowed: str) -> UserError:
    return UserError(key, value, allowed, where=where)


def _positive_int(
    raw: Mapping[str, Any],
    key: str,
    where: str,
    default: int | None = None,
    *,
    most: int = limits.SIZE,
) -> int:
    value = default if raw.get(key) is None else raw[key]
    if type(value) is not int or value < 1:
        raise _bad_value(where, key, value, "a positive whole number")
    if value > most:
        raise _bad_value(where, key, value, f"a positive whole number, at most {most}")
    return value


def _flag(raw: Mapping[str, Any], key: str, where: str) -> bool:
    """True or false; absent means false, and no other value means either."""
    value = raw.get(key)
    if value is not None and type(value) is not bool:
        raise _bad_value(where, key, value, "true or false")
    return bool(value)


def _positive_float(
    raw: Mapping[str, Any], key: str, where: str, default: float | None = None
) -> float:
    value: Any = default if raw.get(key) is None else raw[key]
    if type(value) not in (int, float) or not 0 < value < inf:
        raise _bad_value(where, key, value, "a positive number")
    return float(value)


def _refuse_unsupported(
    raw: Mapping[str, Any], where: str, architecture: Architecture, num_layers: int
) -> None:
    only = {"hidden_act": "silu", "mlp_bias": False, "partial_rotary_factor": 1.0}
    if (
        architecture != "qwen2"
    ):  # transformers ignores the key here: q, k, v have a bias, o has none
        only["attention_bias"] = False
    for key, allowed in only.items():
        if raw.get(key) not in (None, allowed):
            raise _bad_value(where, key, raw[key], repr(allowed))
    if raw.get("quantization_config"):
        raise _bad_value(where, "quantization_config", raw["quantization_config"], "none")
    layer_types = raw.get("layer_types")
    if layer_types is None:
        window = _flag(raw, "use_sliding_window", where) and raw.get("sliding_window")
        num_full = raw.get("max_window_layers") or 0
        if window and (type(num_full) is not int or num_full < num_layers):
            raise _bad_value(where, "use_sliding_window", True, "false")
    elif not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise _bad_value(where, "layer_types", layer_types, "a list of full_attention")


def _rope(raw: Mapping[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise _bad_value(where, "rope_scaling", rope, "a mapping")
    kind = _rope_type(rope, where)
    if any(isinstance(value, dict) for value in rope.values()):
        raise _bad_value(where, "rope_parameters", rope, "one setting for all layers")
    if rope.get("partial_rotary_factor") not in (None, 1.0):
        raise _bad_value(where, "partial_rotary_factor", rope["partial_rotary_factor"], "1.0")
    theta = _positive_float({**raw, **rope}, "rope_theta", where, 10000.0)
    if kind in ("default", "none"):
        if rope.get("factor") not in (None, 1.0):
            allowed = "default without a factor, llama3 with a factor"
            raise _bad_value(where, "rope_type", kind, allowed)
        return theta, None
    if kind != "llama3":
        raise _bad_value(where, "rope_type", kind, "default, llama3")
    return theta, RopeScaling(
        factor=_positive_float(rope, "factor", where),
        low_freq_factor=_positive_float(rope, "low_freq_factor", where),
        high_freq_factor=_positive_float(rope, "high_freq_factor", where),
        original_max_positions=_positive_int(rope, "original_max_position_embeddings", where),
    )


def _rope_type(rope: Mapping[str, Any], where: str) -> str:
    """The kind of scaling under its new or old name; the two must not contradict each other."""
    new, old = rope.get("rope_type"), rope.get("type")
    if new is not None and old is not None and new != old:
        raise _bad_value(where, "rope_type", new, f"{old}, as type says")
    kind = old if new is None else new
    if kind is not None and not isinstance(kind, str):
        raise _bad_value(where, "rope_type", kind, "default, llama3")
    return kind or "default"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face checkpoint of this model."""
    hidden, ffn = config.hidden_size, config.ffn_hidden_size
    q = config.num_attention_heads * config.head_dim
    kv = config.num_query_groups * config.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q, hidden),
        "self_attn.k_proj.weight": (kv, hidden),
        "self_attn.v_proj.weight": (kv, hidden),
        "self_attn.o_proj.weight": (hidden, q),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
    }
    if config.qkv_bias:
        layer |= {f"self_attn.{x}_proj.bias": (q if x == "q" else kv,) for x in "qkv"}
    if config.qk_norm:
        layer |= {f"self_attn.{x}_norm.weight": (config.head_dim,) for x in "qk"}
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for index in range(config.num_layers):
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config.tied_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def hf_config(config: ModelConfig, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of this model; the inverse of `parse_config`, for transformers 4 and 5."""
    eos = config.eos_token_ids
    raw: dict[str, Any] = {
        "architectures": [CLASS_NAMES[config.architecture]],
        "model_type": config.architecture,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": config.tied_embeddings,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos[0] if len(eos) == 1 else list(eos) or None,
    }
    if config.rope_scaling:
        raw["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    return raw
