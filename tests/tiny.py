"""Tiny random models and tokenizers on disk, for tests.

transformers is imported inside the builders: it takes seconds, and most tests do without.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd_nemo.formats.huggingface import write_hf_folder
from opcd_nemo.formats.shape import (
    CLASS_NAMES,
    Architecture,
    ModelConfig,
    RopeScaling,
    tensor_shapes,
)

ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "qwen3")
LLAMA3_ROPE = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=32
)
IM_START, IM_END, END_OF_TEXT = "<|im_start|>", "<|im_end|>", "<|endoftext|>"

CHAT_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are a tiny model.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}{% generation %}{{ message.content }}{% endgeneration %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == 'user' or not loop.first %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

_CORPUS = [
    "A violin is a string instrument played with a bow.",
    "You are a tiny model. The user asks, the assistant answers: it's 12 or 34?",
    "What is the capital of France? Tell me about the sea, the sky and the wind.",
    "system user assistant\n\nnaïve café über 日本語",
]


def model_config(architecture: Architecture = "qwen3", **changes: Any) -> ModelConfig:
    """A shape with three KV groups and odd sizes, so that TP 2 and 4 must pad everything."""
    values: dict[str, Any] = {
        "architecture": architecture,
        "num_layers": 2,
        "hidden_size": 24,
        "ffn_hidden_size": 41,
        "num_attention_heads": 6,
        "num_query_groups": 3,
        "head_dim": 8 if architecture == "qwen3" else 4,
        "vocab_size": 67,
        "max_positions": 64,
        "rope_theta": 5000.0,
        "rope_scaling": None,
        "norm_eps": 1e-5,
        "tied_embeddings": False,
        "qkv_bias": architecture == "qwen2",
        "qk_norm": architecture == "qwen3",
        "eos_token_ids": (2,),
    }
    return ModelConfig(**(values | changes))


def random_tensors(
    config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """Every Hugging Face tensor of a model, small and non-zero; norms near one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        values = 0.1 * torch.randn(shape, generator=generator)
        tensors[name] = (values + 1 if "norm" in name else values).to(dtype)
    return tensors


def write_transformers_folder(
    folder: Path, config: ModelConfig, seed: int = 0, max_shard_size: str = "5GB"
) -> Any:
    """Let transformers write a model folder; returns its model, in fp32, for comparison."""
    import transformers

    prefix = CLASS_NAMES[config.architecture].removesuffix("ForCausalLM")
    rope: dict[str, Any] = {"rope_type": "default"}
    if config.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "factor": config.rope_scaling.factor,
            "low_freq_factor": config.rope_scaling.low_freq_factor,
            "high_freq_factor": config.rope_scaling.high_freq_factor,
            "original_max_position_embeddings": config.rope_scaling.original_max_positions,
        }
    hf_config = getattr(transformers, f"{prefix}Config")(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_positions,
        rope_parameters={**rope, "rope_theta": config.rope_theta},
        rms_norm_eps=config.norm_eps,
        tie_word_embeddings=config.tied_embeddings,
        bos_token_id=None,
        pad_token_id=None,
        eos_token_id=list(config.eos_token_ids),
    )
    model = getattr(transformers, CLASS_NAMES[config.architecture])(hf_config).eval()
    model.load_state_dict(random_tensors(config, seed), strict=not config.tied_embeddings)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def write_chat_tokenizer(
    folder: Path, template: str | None = CHAT_TEMPLATE, vocab_size: int = 320
) -> Path:
    """A byte-level BPE tokenizer with a Qwen-like chat template, in a folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, IM_START, IM_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": IM_END,
        "pad_token": {"__type": "AddedToken", "content": END_OF_TEXT, "special": True},
    }
    if template is not None:
        settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def write_sentencepiece_tokenizer(folder: Path, template: str) -> Path:
    """A SentencePiece BPE model with byte fallback, as Llama 2 has it."""
    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(_CORPUS * 5),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _permuted(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows as llama.cpp stores them: the two rotary halves of a head interleaved."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.transpose(1, 2).reshape(tensor.shape)


_GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def write_gguf(
    path: Path,
    config: ModelConfig,
    tensors: dict[str, torch.Tensor],
    quantization: str = "F32",
) -> Path:
    """A GGUF file as llama.cpp's converter makes it; matrices are quantised, norms are not."""
    from gguf import GGMLQuantizationType, GGUFWriter
    from gguf.quants import quantize

    writer = GGUFWriter(path, config.architecture)
    writer.add_block_count(config.num_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.ffn_hidden_size)
    writer.add_head_count(config.num_attention_heads)
    if config.num_query_groups != config.num_attention_heads:
        writer.add_head_count_kv(config.num_query_groups)
    writer.add_key_length(config.head_dim)
    writer.add_context_length(config.max_positions)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_eos_token_id(config.eos_token_ids[0])
    writer.add_eot_token_id(config.eos_token_ids[-1])
    for name, tensor in tensors.items():
        if config.architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            query = "q_proj" in name
            tensor = _permuted(
                tensor, config.num_attention_heads if query else config.num_query_groups
            )
        gguf_name = name
        for hf_part, gguf_part in _GGUF_NAMES.items():
            gguf_name = gguf_name.replace(f"{hf_part}.", f"{gguf_part}.")
        kind = GGMLQuantizationType[quantization if tensor.ndim == 2 else "F32"]
        writer.add_tensor(gguf_name, quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refusal(open_path: Callable[[str], object], path: Path | str) -> str:
    """Message of the `ValueError` for a bad path: one line that says what is allowed."""
    with pytest.raises(ValueError, match="allowed") as caught:
        open_path(str(path))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_gguf_tokenizer(path: Path, folder: Path, pre: str) -> Path:
    """The tokenizer of `write_chat_tokenizer` in a GGUF file, with a pre-tokenizer's name."""
    from gguf import GGUFWriter

    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    special = {END_OF_TEXT, IM_START, IM_END}
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokens.index(IM_START))
    writer.add_eos_token_id(tokens.index(IM_END))
    writer.add_chat_template(CHAT_TEMPLATE)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_chat_model(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A model folder as a user has it: config, random weights, tokenizer and chat template."""
    values = {"vocab_size": 320, "max_positions": 2048, **changes}
    config = model_config("llama", **values)
    write_hf_folder(folder, config, random_tensors(config, seed), torch.float32)
    return write_chat_tokenizer(folder, vocab_size=config.vocab_size)
