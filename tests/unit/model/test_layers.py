"""The norm equals torch's and a float64 closed form; the local layer has the linears that pack."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from opcd_nemo.model import layers
from opcd_nemo.model.layers import ColumnLinear, PackedWeight, RMSNorm, RowLinear
from tests.error_limits import check, relative_error

LIMITS = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 8e-3}
EPS = 1e-5


def norm(size: int, dtype: torch.dtype) -> RMSNorm:
    config: Any = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    made = RMSNorm(config, size, EPS)
    with torch.no_grad():
        made.weight.normal_()
    return made


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("shape", [(1, 1, 8), (7, 1, 576), (5, 3, 2, 64)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_norm_equals_torch_and_the_closed_form(
    dtype: torch.dtype, shape: tuple[int, ...], scale: float
) -> None:
    torch.manual_seed(0)
    layer = norm(shape[-1], dtype)
    x = (scale * torch.randn(shape, dtype=torch.float64)).to(dtype).requires_grad_()
    upstream = torch.randn(shape, dtype=torch.float64).to(dtype)
    out = layer(x)
    with torch.no_grad():
        assert torch.equal(out, layer(x)), "with and without gradient, the same bits"
    out.backward(upstream)

    x64, weight, g = x.detach().double(), layer.weight.detach().double(), upstream.double()
    scale_ = (x64.square().mean(-1, keepdim=True) + EPS).rsqrt()
    normed = x64 * scale_
    expected = scale_ * (g * weight - normed * (g * weight * normed).mean(-1, keepdim=True))
    assert x.grad is not None
    assert layer.weight.grad is not None
    check(f"norm, {dtype}", relative_error(out, normed * weight), LIMITS[dtype])
    check(f"norm's input gradient, {dtype}", relative_error(x.grad, expected), LIMITS[dtype])
    weight_gradient = (g * normed).flatten(0, -2).sum(0)
    error = relative_error(layer.weight.grad, weight_gradient)
    check(f"norm's weight gradient, {dtype}", error, LIMITS[dtype])


@pytest.mark.parametrize(
    "form",
    [
        pytest.param(ModuleSpec, id="megatron-core before 0.18"),
        pytest.param(functools.partial, id="megatron-core since 0.18"),
    ],
)
def test_the_local_layer_takes_our_linears(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = MLPSubmodules(linear_fc1=torch.nn.Linear, linear_fc2=torch.nn.Linear)
    megatrons = get_gpt_layer_local_spec(normalization="RMSNorm")
    megatrons.submodules.mlp = form(MLP, submodules=parts)
    monkeypatch.setattr(layers, "get_gpt_layer_local_spec", lambda **_: megatrons)

    config: Any = SimpleNamespace(qk_layernorm=False)
    mlp = layers._local_layer(config).submodules.mlp
    made = mlp.keywords["submodules"] if form is functools.partial else mlp.submodules
    assert (made.linear_fc1, made.linear_fc2) == (ColumnLinear, RowLinear)
    assert parts.linear_fc1 is torch.nn.Linear, "megatron-core's spec stays as it was"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 33])
def test_a_packed_weight_multiplies_on_every_processor(dtype: torch.dtype, rows: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(24, 40, dtype=dtype)
    x, bias = torch.randn(rows, 40, dtype=dtype), torch.randn(24, dtype=dtype)
    out = PackedWeight(weight).linear(x, bias)
    exact = x.double() @ weight.double().T + bias.double()
    assert out.dtype == dtype
    torch.testing.assert_close(
        out.double(),
        exact,
        rtol=2**-7 if dtype != torch.float32 else 1e-5,
        atol=1e-2 if dtype != torch.float32 else 1e-5,
    )
    alone = PackedWeight(weight).linear(x[:1], bias)
    assert alone.equal(out[:1])  # a row does not depend on the number of rows
