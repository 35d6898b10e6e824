"""Weights of Hugging Face folders and GGUF files give transformers' logits in every layout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.distributed.cases import CONVERTED, KEPT_LAYERS, SEQUENCES, UNSPLIT
from tests.error_limits import check, relative_error

Results = Callable[[str], Any]
BAR = "logits: transformers"


@torch.no_grad()
def expected_logits(model: Any) -> torch.Tensor:
    return torch.cat([model(torch.tensor([ids])).logits[0] for ids in SEQUENCES])


@pytest.mark.parametrize("layout", UNSPLIT)
def test_logits_equal_transformers(
    layout: str, results: Results, transformers_models: dict[str, Any]
) -> None:
    for name in CONVERTED:
        expected = expected_logits(transformers_models[name])
        error = relative_error(results(layout)["logits"][name], expected)
        check(BAR, error, 1e-4, f"{layout} {name}")


@pytest.mark.parametrize("layout", UNSPLIT)
def test_logits_of_a_gguf_file_equal_transformers(
    layout: str, results: Results, transformers_models: dict[str, Any]
) -> None:
    # a GGUF file carries llama3's frequency factors as a tensor, which this one is without
    model = transformers_models["llama-gguf"]
    check(BAR, relative_error(results(layout)["gguf_logits"], expected_logits(model)), 1e-4)


@pytest.mark.parametrize("layout", UNSPLIT)
def test_logits_of_kept_layers_equal_transformers(
    layout: str, results: Results, transformers_models: dict[str, Any]
) -> None:
    model = copy.deepcopy(transformers_models["qwen3-untied-odd-teacher"])
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[index] for index in KEPT_LAYERS)
    model.config.num_hidden_layers = len(KEPT_LAYERS)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index  # its place in transformers' key-value cache
    check(BAR, relative_error(results(layout)["kept_logits"], expected_logits(model)), 1e-4)


def test_rope_scaling_changes_the_logits(transformers_models: dict[str, Any]) -> None:
    scaled, plain = (
        expected_logits(transformers_models[name]) for name in ("llama-rope", "llama-gguf")
    )
    assert relative_error(scaled, plain) > 1e-2
