"""How many parameters a rank holds, in closed form: what a plan of its memory starts from."""

from __future__ import annotations

from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.sharding import padded_ffn_size, padded_query_groups, padded_vocab_size


def rank_parameters(config: ModelConfig, *, tp: int, pp: int, pp_rank: int) -> int:
    """Parameters of the megatron-core model on each tensor-parallel rank of one pipeline stage.

    With the padding that `tp` asks for; norms are on every rank. Tied embeddings lie on the first
    stage and again on the last.

    Args:
        config: Shape of the model, unpadded.
        tp: Tensor-parallel size.
        pp: Pipeline-parallel size, a divisor of the layers.
        pp_rank: The stage, from 0.
    """
    assert config.num_layers % pp == 0, (config.num_layers, pp)
    hidden = config.hidden_size
    vocabulary = padded_vocab_size(config.vocab_size, tp) // tp * hidden
    total = config.num_layers // pp * _layer_parameters(config, tp)
    is_first, is_last = pp_rank == 0, pp_rank == pp - 1
    if is_first:
        total += vocabulary
    if is_last:
        total += hidden  # the final norm
        if not (config.tied_embeddings and is_first):
            total += vocabulary
    return total


def _layer_parameters(config: ModelConfig, tp: int) -> int:
    hidden, head = config.hidden_size, config.head_dim
    groups = padded_query_groups(config, tp) // tp
    queries = groups * config.heads_per_group * head
    qkv = queries + 2 * groups * head
    attention = (qkv + queries) * hidden + (qkv if config.qkv_bias else 0)
    mlp = 3 * padded_ffn_size(config, tp) // tp * hidden
    norms = 2 * hidden + (2 * head if config.qk_norm else 0)
    return attention + mlp + norms
