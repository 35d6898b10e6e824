"""The `config.json` of the paper's models, as far as it shapes them.

Sources: the models' own files on the Hugging Face hub under the names of the keys, compared in
November 2026 with copies in public repositories.
"""

from __future__ import annotations

from typing import Any

from opcd_nemo.model_config import ModelConfig, parse_config

_QWEN3 = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "rope_theta": 1000000,
    "max_position_embeddings": 40960,
}
_QWEN2P5 = {
    "model_type": "qwen2",
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "eos_token_id": 151645,
    "use_sliding_window": False,
    "sliding_window": 32768,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
}
_LLAMA3 = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "eos_token_id": [128001, 128008, 128009],
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
}


def _rope(factor: float) -> dict[str, Any]:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


_RAW: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-8B": _QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen3-4B": _QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-1.7B": _QWEN3
    | {
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen/Qwen3-4B-Instruct-2507": _QWEN3
    | {
        "num_hidden_layers": 36,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "tie_word_embeddings": True,
        "rope_theta": 5000000,
        "max_position_embeddings": 262144,
    },
    "Qwen/Qwen2.5-7B-Instruct": _QWEN2P5
    | {
        "num_hidden_layers": 28,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-3B-Instruct": _QWEN2P5
    | {
        "num_hidden_layers": 36,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3
    | {
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
        "rope_scaling": _rope(8.0),
    },
    "meta-llama/Llama-3.2-3B-Instruct": _LLAMA3
    | {
        "num_hidden_layers": 28,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 24,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "rope_scaling": _rope(32.0),
    },
}

SHAPES: dict[str, ModelConfig] = {name: parse_config(raw, name) for name, raw in _RAW.items()}
