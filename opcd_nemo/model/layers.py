"""Layer specs: which modules Megatron-core builds a transformer of.

`te` takes Transformer Engine's linears and norms and needs a GPU. `local` runs anywhere. Both use
`CoreAttention`, so rollout, scoring and training share the same attention on every device.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from opcd_nemo.model.attention import CoreAttention
from opcd_nemo.types import LayerSpec


class _RMSNorm(torch.autograd.Function):
    """RMSNorm that keeps its input for backward; torch's keeps two fp32 copies of it on a CPU.

    Forward is torch's to the bit; forward and backward take two thirds of its time (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, x_XH: torch.Tensor, weight_H: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x_XH.to(torch.promote_types(x_XH.dtype, torch.float32))
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x_XH, weight_H, scale)
        return (wide * scale).mul_(weight_H).to(x_XH.dtype)

    @staticmethod
    def backward(ctx: Any, upstream_XH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x_XH, weight_H, scale = ctx.saved_tensors
        normed = x_XH.to(scale.dtype) * scale
        upstream = upstream_XH.to(scale.dtype)
        weight_gradient = (upstream * normed).flatten(0, -2).sum(0)
        upstream = upstream * weight_H
        along = (upstream * normed).mean(-1, keepdim=True)
        gradient = upstream.addcmul_(normed, along, value=-1).mul_(scale)
        return gradient.to(x_XH.dtype), weight_gradient.to(weight_H.dtype), None


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm that carries Megatron's sequence-parallel mark, which its torch norm refuses."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float, **_: object
    ) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension, in fp32."""
        if not torch.is_grad_enabled():
            return super().forward(x)
        out: torch.Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return out


class PackedWeight:
    """A weight reordered once for many small products, as decoding on a CPU needs.

    oneDNN reorders a plain weight in every call. Packed once per rollout, the linears of a decode
    step take half the time, and a row's result does not depend on the number of rows
    (docs/log.md): a sample stays the same bits in any batch.

    oneDNN packs bf16 only for processors with AVX-512 or AVX-NE-CONVERT. On others the copy is
    fp32: products of the same bf16 values, summed in fp32 as well, rounded to bf16 once.
    """

    _TYPICAL_ROWS = 32  # packs 2-6 times faster than a hint of 8, and multiplies as fast

    def __init__(self, weight: torch.Tensor) -> None:
        """Reorder a copy of `weight`."""
        pack = torch.ops.mkldnn._reorder_linear_weight
        weight = weight.detach()
        self._dtype = weight.dtype if can_pack(weight.dtype) else torch.float32
        self._weight = pack(weight.to(self._dtype), self._TYPICAL_ROWS)

    def linear(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """`x @ weight.T + bias`, without gradient, in the type of `x`."""
        alone = len(x) == 1
        dtype, x = x.dtype, x.to(self._dtype)
        if alone:  # a single row takes another path in oneDNN, with other roundings
            x = x.expand(2, *x.shape[1:])
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            x, self._weight, None if bias is None else bias.to(self._dtype), "none", [], ""
        ).to(dtype)
        return out[:1] if alone else out


def can_pack(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs weights of this type for this processor."""
    if dtype != torch.bfloat16:
        return True
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return supported


class ColumnLinear(ColumnParallelLinear):  # type: ignore[misc]  # megatron-core is untyped
    """Column-parallel linear that uses its packed weight, if any, without gradient."""

    packed: PackedWeight | None = None

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """As Megatron's, from the packed weight while decoding."""
        if self.packed is None or torch.is_grad_enabled():
            return super().forward(input_, *args, **kwargs)
        assert not self.sequence_parallel
        return self.packed.linear(input_, self.bias), None


class RowLinear(RowParallelLinear):  # type: ignore[misc]  # megatron-core is untyped
    """Row-parallel linear that uses its packed weight, if any, without gradient."""

    packed: PackedWeight | None = None

    def forward(self, input_: torch.Tensor) -> Any:
        """As Megatron's, from the packed weight while decoding."""
        if self.packed is None or torch.is_grad_enabled():
            return super().forward(input_)
        assert not self.sequence_parallel
        out = self.packed.linear(input_)
        return reduce_from_tensor_model_parallel_region(out, group=self.tp_group), None


def pack_weights(module: torch.nn.Module) -> None:
    """Pack the current weights of every linear.

    Linears under sequence parallelism gather their input in Megatron's forward: they stay plain.
    """
    for linear in module.modules():
        if isinstance(linear, ColumnLinear | RowLinear) and not linear.sequence_parallel:
            linear.packed = PackedWeight(linear.weight)


def weights_are_packed(block: Any) -> bool:
    """Whether the block's linears hold packed weights."""
    fc2 = block.layers[0].mlp.linear_fc2
    return isinstance(fc2, RowLinear) and fc2.packed is not None


def unpack_weights(module: torch.nn.Module) -> None:
    """Forget the packed weights: they are stale after an optimizer step."""
    for linear in module.modules():
        if isinstance(linear, ColumnLinear | RowLinear):
            linear.packed = None


def block_spec(config: TransformerConfig, spec: LayerSpec) -> TransformerBlockSubmodules:
    """The transformer block of this pipeline stage."""
    layer = _te_layer(config) if spec == "te" else _local_layer(config)
    layer.submodules.self_attention.submodules.core_attention = CoreAttention
    norm: Any = RMSNorm
    if spec == "te":
        from megatron.core.extensions.transformer_engine import TENorm

        norm = TENorm
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm
    )


def _te_layer(config: TransformerConfig) -> ModuleSpec:
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec

    return copy.deepcopy(
        get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    )


def _local_layer(config: TransformerConfig) -> ModuleSpec:
    layer = copy.deepcopy(
        get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    attention = parts.self_attention.submodules
    attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    mlp = _parts_of_mlp(parts.mlp)
    mlp.linear_fc1, mlp.linear_fc2 = ColumnLinear, RowLinear
    return layer


def _parts_of_mlp(mlp: Any) -> Any:
    """The submodules of a feed-forward layer; since megatron-core 0.18 its spec is a `partial`."""
    return mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
