"""This rank's shard of a Megatron GPT, as a model's shape and the layout describe it.

Shape letters: `T` stream tokens, `H` hidden.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.sharding import padded_ffn_size, padded_query_groups, padded_vocab_size
from opcd_nemo.model.attention import AttentionState
from opcd_nemo.model.cache import DecodeAttention, ExtendAttention
from opcd_nemo.model.decode import decode_block
from opcd_nemo.model.layers import block_spec, weights_are_packed


class HiddenGPT(GPTModel):  # type: ignore[misc]  # megatron-core is untyped
    """GPTModel that returns hidden states; the head is applied by losses and engines."""

    def forward(self, token_ids_T: torch.Tensor, state: AttentionState) -> torch.Tensor:
        """This stage's hidden states [T, 1, H] (T / tp under sequence parallelism)."""
        hidden = self.embedding(token_ids_T[None], None) if self.pre_process else None
        if isinstance(state, DecodeAttention | ExtendAttention) and weights_are_packed(
            self.decoder
        ):
            hidden = self.decoder.input_tensor if hidden is None else hidden
            return decode_block(self.decoder, hidden[:, 0], state)[:, None]
        out: torch.Tensor = self.decoder(hidden_states=hidden, attention_mask=state)
        return out


def transformer_config(
    config: ModelConfig, parallel: Parallel, dtype: torch.dtype
) -> TransformerConfig:
    """Megatron's description of the padded model on this device and layout."""
    groups = padded_query_groups(config, parallel.tp)
    heads = config.num_attention_heads // config.num_query_groups * groups
    on_cpu = parallel.device.type == "cpu"
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=padded_ffn_size(config, parallel.tp),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=config.qkv_bias,
        qk_layernorm=config.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        sequence_parallel=parallel.sequence_parallel,
        context_parallel_size=parallel.cp,
        recompute_granularity="selective" if parallel.recompute_modules else None,
        recompute_modules=list(parallel.recompute_modules),
        fp8=parallel.fp8,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        perform_initialization=False,  # every weight is loaded
        use_cpu_initialization=on_cpu,
        calculate_per_token_loss=True,  # weights are normalised in the batch: only ever sum
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        batch_p2p_comm=False,
    )


def build_module(
    config: ModelConfig, megatron_config: TransformerConfig, parallel: Parallel
) -> HiddenGPT:
    """This rank's shard, uninitialised, on torch's default device if that device is no GPU."""
    return HiddenGPT(
        megatron_config,
        block_spec(megatron_config, parallel.layer_spec),
        vocab_size=padded_vocab_size(config.vocab_size, parallel.tp),
        max_sequence_length=config.max_positions,
        pre_process=parallel.is_first_stage,
        post_process=parallel.is_last_stage,
        parallel_output=True,
        share_embeddings_and_output_weights=config.tied_embeddings,
        position_embedding_type="none",
    )
