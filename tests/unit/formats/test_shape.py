"""Shapes: config.json of transformers 4 and 5, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from opcd_nemo.formats.shape import Architecture, RopeScaling, hf_config, keep_layers, parse_config
from tests.tiny import ARCHITECTURES, LLAMA3_ROPE, model_config


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("rope_scaling", [None, LLAMA3_ROPE])
def test_written_config_is_read_back(
    architecture: Architecture, rope_scaling: RopeScaling | None
) -> None:
    config = model_config(architecture, rope_scaling=rope_scaling, eos_token_ids=(2, 5))
    assert parse_config(hf_config(config, torch.bfloat16), "config.json") == config


def test_transformers_4_and_5_styles_mean_the_same() -> None:
    old = hf_config(model_config("llama", rope_scaling=LLAMA3_ROPE), torch.float32)
    new = dict(old)
    new["rope_parameters"] = {**new.pop("rope_scaling"), "rope_theta": new.pop("rope_theta")}
    new["dtype"] = new.pop("torch_dtype")
    assert parse_config(new, "new") == parse_config(old, "old")
    old["rope_scaling"]["type"] = old["rope_scaling"].pop("rope_type")
    assert parse_config(old, "older").rope_scaling == LLAMA3_ROPE


def test_absent_keys_take_the_defaults_of_the_architecture() -> None:
    raw = hf_config(model_config("llama"), torch.float32)
    for key in ("num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "eos_token_id"):
        del raw[key]
    config = parse_config(raw, "config.json")
    assert (config.num_query_groups, config.head_dim, config.rope_theta) == (6, 4, 10000.0)
    assert config.eos_token_ids == ()


@pytest.mark.parametrize(
    ("architecture", "key", "value", "allowed"),
    [
        ("llama", "model_type", "gpt2", "llama, qwen2, qwen3"),
        ("llama", "model_type", None, "llama, qwen2, qwen3"),
        ("llama", "hidden_act", "gelu", "silu"),
        ("llama", "mlp_bias", True, "False"),
        ("llama", "attention_bias", True, "False"),
        ("qwen3", "attention_bias", True, "False"),
        ("llama", "partial_rotary_factor", 0.5, "1.0"),
        ("llama", "quantization_config", {"bits": 4}, "none"),
        ("llama", "rope_scaling", {"rope_type": "yarn", "factor": 4.0}, "llama3"),
        ("llama", "rms_norm_eps", float("nan"), "positive number"),
        ("llama", "rope_theta", -1.0, "positive number"),
        ("llama", "rope_theta", "1e4", "positive number"),
        ("llama", "eos_token_id", "</s>", "token id"),
        ("llama", "eos_token_id", -1, "token id"),
        ("llama", "eos_token_id", [2, 10**9], "ids below vocab_size"),
        ("llama", "num_key_value_heads", 4, "divisor of 6"),
        ("llama", "num_hidden_layers", None, "positive whole number"),
        ("llama", "hidden_size", "24", "positive whole number"),
        ("llama", "vocab_size", 0, "positive whole number"),
        ("qwen2", "layer_types", ["full_attention", "sliding_attention"], "full_attention"),
        ("qwen2", "layer_types", 5, "full_attention"),
        ("qwen2", "layer_types", [["full_attention"], {}], "full_attention"),
        ("llama", "model_type", ["llama"], "llama, qwen2, qwen3"),
        ("llama", "num_hidden_layers", 10**9, "at most 4096"),
        ("llama", "vocab_size", 10**4000, "at most 2147483648"),
        ("llama", "tie_word_embeddings", "false", "true or false"),
        ("qwen2", "use_sliding_window", "no", "true or false"),
        ("llama", "rope_scaling", [1, 2], "a mapping"),
        ("llama", "rope_scaling", "llama3", "a mapping"),
        ("llama", "rope_scaling", {"rope_type": None, "type": "yarn"}, "llama3"),
        ("llama", "rope_scaling", {"rope_type": "default", "type": "linear"}, "linear, as type"),
        ("llama", "rope_scaling", {"rope_type": {}, "factor": 2.0}, "llama3"),
        ("llama", "rope_scaling", {"factor": 4.0}, "llama3 with a factor"),
    ],
)
def test_setting_that_would_be_wrong_is_refused(
    architecture: Architecture, key: str, value: object, allowed: str
) -> None:
    raw = hf_config(model_config(architecture), torch.float32) | {key: value}
    with pytest.raises(ValueError, match=allowed) as caught:
        parse_config(raw, "some/config.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("some/config.json: ")
    assert (key if key != "rope_scaling" else "rope") in message


@pytest.mark.parametrize(
    "missing",
    ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
)
def test_llama3_rope_needs_all_its_numbers(missing: str) -> None:
    raw = hf_config(model_config("llama", rope_scaling=LLAMA3_ROPE), torch.float32)
    del raw["rope_scaling"][missing]
    with pytest.raises(ValueError, match=f"{missing}=null; allowed"):
        parse_config(raw, "config.json")


def test_rope_by_layer_type_is_refused() -> None:
    raw = hf_config(model_config("llama"), torch.float32)
    raw["rope_parameters"] = {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}
    with pytest.raises(ValueError, match="one setting for all layers"):
        parse_config(raw, "config.json")


def test_sliding_window_is_refused_only_when_a_layer_uses_it() -> None:
    raw = hf_config(model_config("qwen2"), torch.float32)
    raw |= {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    with pytest.raises(ValueError, match="use_sliding_window"):
        parse_config(raw, "config.json")
    parse_config(raw | {"max_window_layers": 2}, "config.json")
    parse_config(raw | {"use_sliding_window": False}, "config.json")


@pytest.mark.parametrize("layers", [[], [1, 0], [0, 0], [-1, 0], [0, 2]])
def test_keep_layers_refuses_what_is_not_a_subset_in_order(layers: list[int]) -> None:
    with pytest.raises(ValueError, match="from 0 to 1"):
        keep_layers(model_config(), layers)


def test_keep_layers_changes_only_the_depth() -> None:
    config = model_config(num_layers=5)
    assert keep_layers(config, [0, 4]) == dataclasses.replace(config, num_layers=2)
