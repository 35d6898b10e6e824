"""The transformer block of a decoding step on a CPU, without Megatron's per-layer wrappers.

For a handful of rows the products take a third of a step's time in Megatron's own forward, which
prepares for recomputation, offloading and fused kernels in every layer. This is the same
arithmetic on the same modules (docs/log.md has the times); the result is the same to the bit.

Shape letters: `R` rows (one token each), `H` hidden, `A` query heads, `G` groups, `D` head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from opcd_nemo.model.attention import AttentionState, rotate


def decode_block(block: Any, hidden_RH: torch.Tensor, state: AttentionState) -> torch.Tensor:
    """Hidden states [R, H] after this stage's layers (and final norm, on the last stage).

    Args:
        block: Megatron's TransformerBlock of the `local` layer spec, its weights packed.
        hidden_RH: embeddings or the previous stage's output.
        state: positions, keys and values. Collective over tp.
    """
    for layer in block.layers:
        attention, mlp = layer.self_attention, layer.mlp
        out_RX = _attend(attention, layer.input_layernorm(hidden_RH), state)
        hidden_RH = attention.linear_proj.forward(out_RX)[0] + hidden_RH
        up_RF = mlp.linear_fc1.forward(layer.pre_mlp_layernorm(hidden_RH))[0]
        gate_RF, value_RF = up_RF.chunk(2, dim=-1)
        hidden_RH = mlp.linear_fc2.forward(F.silu(gate_RF) * value_RF)[0] + hidden_RH
    return hidden_RH if block.final_layernorm is None else block.final_layernorm(hidden_RH)


def _attend(attention: Any, x_RH: torch.Tensor, state: AttentionState) -> torch.Tensor:
    groups = attention.num_query_groups_per_partition
    share = attention.num_attention_heads_per_partition // groups
    qkv = attention.linear_qkv.forward(x_RH)[0].view(len(x_RH), groups, share + 2, -1)
    q_RAD, k_RGD, v_RGD = qkv[:, :, :share].flatten(1, 2), qkv[:, :, share], qkv[:, :, share + 1]
    if attention.q_layernorm is not None:
        q_RAD, k_RGD = attention.q_layernorm(q_RAD), attention.k_layernorm(k_RGD)
    q_RAD = rotate(q_RAD, state.cos_TD, state.sin_TD)
    k_RGD = rotate(k_RGD, state.cos_TD, state.sin_TD)
    out_RAD = state.attend(attention.layer_number, q_RAD, k_RGD, v_RGD)
    return out_RAD.reshape(len(x_RH), -1)
