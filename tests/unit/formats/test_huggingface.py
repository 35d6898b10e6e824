"""Checkpoints: what is read equals transformers, what is written loads there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from opcd_nemo.config import limits
from opcd_nemo.formats.huggingface import write_hf_folder
from opcd_nemo.formats.locate import read_json
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.stored_model import open_model
from tests.tiny import (
    LLAMA3_ROPE,
    model_config,
    random_tensors,
    refusal,
    write_transformers_folder,
)


@pytest.mark.parametrize(
    "config",
    [
        model_config("llama", rope_scaling=LLAMA3_ROPE),
        model_config("llama", tied_embeddings=True),
        model_config("qwen2"),
        model_config("qwen3", tied_embeddings=True, eos_token_ids=(2, 5)),
    ],
    ids=["llama3", "llama-tied", "qwen2", "qwen3-tied"],
)
def test_transformers_folder_is_read_and_rewritten_unchanged(
    config: ModelConfig, tmp_path: Path
) -> None:
    import transformers

    model = write_transformers_folder(tmp_path / "in", config, max_shard_size="20KB")
    assert (tmp_path / "in" / "model.safetensors.index.json").is_file()
    checkpoint = open_model(str(tmp_path / "in"))
    assert checkpoint.config == config
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    for name, tensor in random_tensors(config).items():
        assert torch.equal(tensors[name], tensor), name

    write_hf_folder(tmp_path / "out", config, tensors, torch.float32)
    again: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again.eval()
    assert again.dtype == torch.float32
    assert list(again.generation_config.eos_token_id) == list(config.eos_token_ids)
    ids = torch.arange(50)[None]  # past the original positions of the scaled rope
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert open_model(str(tmp_path / "out")).config == config


def test_large_models_are_written_in_several_files(tmp_path: Path) -> None:
    config = model_config("qwen2")
    tensors = random_tensors(config)
    write_hf_folder(tmp_path / "out", config, tensors, torch.bfloat16, max_file_bytes=5000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert index["metadata"]["total_size"] == 2 * sum(x.numel() for x in tensors.values())
    checkpoint = open_model(str(tmp_path / "out"))
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.tensor(name), tensor.bfloat16()), name


def test_weights_are_for_the_same_eyes_as_the_other_files(tmp_path: Path) -> None:
    config = model_config()
    write_hf_folder(tmp_path / "out", config, random_tensors(config), torch.bfloat16)
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


def test_failed_export_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("opcd_nemo.formats.huggingface.save_file", fail)
    config = model_config()
    with pytest.raises(OSError, match="disk full"):
        write_hf_folder(tmp_path / "out", config, random_tensors(config), torch.float32)
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_a_folder_with_files(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    config = model_config()
    with pytest.raises(ValueError, match="already there; allowed"):
        write_hf_folder(tmp_path, config, random_tensors(config), torch.float32)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def write_folder(folder: Path, **changes: Any) -> ModelConfig:
    config = model_config("llama")
    tensors = random_tensors(config)
    write_hf_folder(folder, config, tensors, torch.float32)
    if changes:
        raw = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(raw))
    return config


def test_missing_or_incomplete_folders_are_named(tmp_path: Path) -> None:
    assert "no/such" in refusal(open_model, "no/such")
    assert "config.json" in refusal(open_model, tmp_path)
    write_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "no weights" in refusal(open_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text("{")
    assert "config.json" in refusal(open_model, tmp_path / "model")


def test_missing_weight_file_is_named(tmp_path: Path) -> None:
    config = model_config("llama")
    write_hf_folder(
        tmp_path / "model", config, random_tensors(config), torch.float32, max_file_bytes=9000
    )
    next((tmp_path / "model").glob("model-00002-*")).unlink()
    assert "model-00002-" in refusal(open_model, tmp_path / "model")


def test_import_is_cheap() -> None:
    code = (
        "import sys, opcd_nemo.formats.huggingface, opcd_nemo.formats.tokenizer\n"
        "assert not {'transformers', 'megatron', 'gguf'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_truncated_safetensors_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "model.safetensors" in refusal(open_model, tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"num_hidden_layers": 3}, "model.layers.2"),
        ({"num_hidden_layers": 10**9}, "at most 4096"),
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"vocab_size": 68}, "(67, 24)"),
        ({"model_type": "qwen2"}, "bias"),
        ({"model_type": "mistral"}, "mistral"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(
    tmp_path: Path, changes: dict[str, object], word: str
) -> None:
    write_folder(tmp_path / "model", **changes)
    assert word in refusal(open_model, tmp_path / "model")


def test_stored_copy_of_a_tied_head_is_not_used(tmp_path: Path) -> None:
    config = model_config("llama", tied_embeddings=True)
    tensors = random_tensors(config)
    write_hf_folder(tmp_path / "model", config, tensors, torch.float32)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(tensors | copy, tmp_path / "model" / "model.safetensors")
    assert "lm_head.weight" not in open_model(str(tmp_path / "model")).names()


def test_a_tied_model_with_another_head_keeps_it_as_transformers_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import transformers

    config = model_config("llama")
    write_folder(tmp_path / "model", tie_word_embeddings=True)
    model = open_model(str(tmp_path / "model"))
    assert "tie_word_embeddings is true, but lm_head.weight is not the embedding" in caplog.text
    assert not model.config.tied_embeddings
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model.tensor("lm_head.weight"), theirs.lm_head.weight)
    assert torch.equal(model.tensor("lm_head.weight"), random_tensors(config)["lm_head.weight"])


def indexed(folder: Path, **moved: str) -> dict[str, torch.Tensor]:
    """A model in `a.safetensors` and `b.safetensors`, whose index says where each tensor is.

    `b` also holds the norm of `a`, plus one. `moved`: what the index says instead.
    """
    config = model_config("llama")
    tensors = random_tensors(config)
    write_hf_folder(folder, config, tensors, torch.float32)
    (folder / "model.safetensors").unlink()
    first, norm = list(tensors)[:9], "model.norm.weight"
    a = {name: tensors[name] for name in (*first, norm)}
    b = {name: tensor for name, tensor in tensors.items() if name not in a}
    save_file(a, folder / "a.safetensors")
    save_file({**b, norm: tensors[norm] + 1}, folder / "b.safetensors")
    named = dict.fromkeys(a, "a.safetensors") | dict.fromkeys(b, "b.safetensors")
    index = {"weight_map": {k: v for k, v in {**named, **moved}.items() if v}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def test_a_tensor_comes_from_the_file_that_the_index_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = indexed(tmp_path / "model")
    norm = open_model(str(tmp_path / "model")).tensor("model.norm.weight")
    assert torch.equal(norm, tensors["model.norm.weight"])
    assert "1 tensors are not read, the first of them 'model.norm.weight' of b.saf" in caplog.text
    indexed(tmp_path / "other", **{"model.norm.weight": "b.safetensors"})
    norm = open_model(str(tmp_path / "other")).tensor("model.norm.weight")
    assert torch.equal(norm, tensors["model.norm.weight"] + 1)


@pytest.mark.parametrize(
    ("moved", "word"),
    [
        ({"ghost": "a.safetensors"}, "tensor 'ghost' is not in a.safetensors"),
        ({"model.embed_tokens.weight": "b.safetensors"}, "is not in b.safetensors"),
        ({"model.norm.weight": ""}, "names no file for tensor 'model.norm.weight'"),
        ({"model.norm.weight": "c.safetensors"}, "c.safetensors: cannot be read"),
        ({"model.norm.weight": "../model/a.safetensors"}, "the name of a file beside it"),
        ({"model.norm.weight": "/etc/passwd"}, "the name of a file beside it"),
        ({"model.norm.weight": "\ud83d"}, "cannot be read"),
        ({"model.norm.weight": "a\0"}, "cannot be read"),
        ({"model.norm.weight": ".."}, "is a pipe, a device or a folder"),
        ({"model.norm.weight": 5}, "the name of a file beside it"),
        ({"model.norm.weight": ["a"]}, "the name of a file beside it"),
    ],
    ids=str,
)
def test_an_index_unlike_its_files_is_refused(
    tmp_path: Path, moved: dict[str, Any], word: str
) -> None:
    indexed(tmp_path / "model", **moved)
    assert word in refusal(open_model, tmp_path / "model")


def test_an_index_that_is_not_used_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = write_folder(tmp_path / "model")
    index = {"weight_map": {"model.norm.weight": "a.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_model(str(tmp_path / "model")).config == config
    assert "beside it names other files" in caplog.text


def test_a_header_of_gigabytes_and_files_that_never_end_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes((90_000_000).to_bytes(8, "little") + b"{")
    assert "a header of 90000000 bytes" in refusal(open_model, tmp_path / "model")
    for name in ("model.safetensors", "config.json", "generation_config.json"):
        write_folder(tmp_path / name)
        (tmp_path / name / name).unlink()
        os.mkfifo(tmp_path / name / name)
        assert f"{name}: is a pipe" in refusal(open_model, tmp_path / name)


@pytest.mark.parametrize("item", [b"[],", b".1,", b"{},", b"0,"])
def test_a_record_of_millions_of_items_is_not_parsed(tmp_path: Path, item: bytes) -> None:
    path = tmp_path / "summary.json"
    path.write_bytes(b'{"a":[' + item * limits.JSON_ITEMS + b"0]}")
    assert f"at most {limits.JSON_ITEMS} items" in refusal(lambda p: read_json(Path(p)), path)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8])
def test_weights_of_another_type_are_refused_before_they_load(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    config = write_folder(tmp_path / "model")
    tensors = random_tensors(config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    assert "tensor 'model.norm.weight' is" in refusal(open_model, tmp_path / "model")


def test_settings_of_many_megabytes_are_not_read(tmp_path: Path) -> None:
    write_folder(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(b"[" * 5_000_000)
    assert "is too large" in refusal(open_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(b"[" * 1_000_000)
    assert "config.json: cannot be read" in refusal(open_model, tmp_path / "model")
    (tmp_path / "model" / "config.json").write_bytes(b"\xff")
    assert "config.json: cannot be read" in refusal(open_model, tmp_path / "model")


def test_generation_config_decides_the_end_tokens(tmp_path: Path) -> None:
    write_folder(tmp_path / "model", eos_token_id=7)
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert open_model(str(tmp_path / "model")).config.eos_token_ids == (2, 9)
    generation.unlink()
    assert open_model(str(tmp_path / "model")).config.eos_token_ids == (7,)
