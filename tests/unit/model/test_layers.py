"""The norm equals torch's forward and a float64 closed form backward."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd_nemo.model.layers import RMSNorm
from tests.bars import check, relative_error

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
