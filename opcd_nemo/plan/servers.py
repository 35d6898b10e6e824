"""Seconds and room of vLLM servers that sample beside the ranks: `engine=vllm`.

A roofline of continuous batching: a decode step reads the weights once for all answers that run,
and their keys and values; beside it a fixed latency. Two numbers of the accelerator, its
`engine_bandwidth_share` and `engine_step_s`, are taken from published measurements; docs/plan.md
has the sources, and how far the formula is from them.
"""

from __future__ import annotations

from dataclasses import dataclass

from opcd_nemo.config.train import TrainConfig
from opcd_nemo.errors import UserError
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.memory import GIB, held_beside_server
from opcd_nemo.plan.parameters import rank_parameters
from opcd_nemo.plan.work import (
    BYTES,
    Servers,
    Stream,
    Work,
    forward_flops,
    head_flops,
    key_value_width,
    prompt_stream,
    server_weights,
)

_CPU_CACHE_BYTES = 1 << 30  # as engine.launch asks for


def servers_of(config: TrainConfig, accelerator: Accelerator) -> Servers | None:
    """The servers of a run, one a machine as `engine.launch` starts them; None where ranks sample.

    Raises:
        UserError: nothing says how many processors a server has.
    """
    engine, ranks = config.engine, config.parallel.num_ranks
    if "launch" not in engine:
        return None
    gpus, node = engine["gpus"], accelerator.ranks_per_node
    if engine["colocated"]:
        here, gpus = min(node, ranks), min(node, ranks)
    elif accelerator.memory_is_shared:  # CPUs
        here, gpus = node, 1
    elif 0 < gpus < node:
        here = node - gpus
    else:
        allowed = f"1 to {node - 1}, the GPUs of a server; or engine.colocated=true"
        raise UserError("engine.gpus", gpus, allowed)
    return Servers(
        count=len(engine["urls"]) or -(-ranks // here),
        gpus=gpus,
        colocated=engine["colocated"],
        ahead=_share_ahead(config) if config.rollout.ahead else 0.0,
    )


def _share_ahead(config: TrainConfig) -> float:
    """Of all steps those that are sampled while another trains (training/ahead.py)."""
    saved = config.exp_manager["checkpoint_callback_params"]["every_n_train_steps"]
    every = [number for number in (saved, config.evaluation.every_n_steps) if number]
    steps: int = config.trainer["max_steps"]
    return sum(all(step % number for number in every) for step in range(1, steps)) / steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """Seconds that the servers take for some answers."""

    prefill: float
    decode: float
    step: float  # of one token of every answer that runs
    together: float  # answers of a server


def sampled(
    work: Work, accelerator: Accelerator, rows: int, response: float, *, with_context: bool
) -> Sampled:
    """What the servers take for `rows` answers of every data-parallel rank.

    An answer that ends makes room for the next: with more answers than run together, time goes by
    their sum. A push empties the cache of what prompts share.
    """
    servers = work.servers
    assert servers is not None
    model, dtype = work.sampler(of_teacher=with_context)
    count = max(1.0, rows * work.layout.dp / servers.count)
    prompt = work.tokens.teacher_prompt if with_context else work.tokens.prompt
    room = cache_tokens(work, accelerator, of_teacher=with_context) / (prompt + response)
    together = max(1.0, min(count, work.max_batch_size, room))
    step = decode_step(
        model, dtype, accelerator, rows=together, length=prompt + response / 2, gpus=servers.gpus
    )
    stream = prompt_stream(work, round(count), with_context=with_context)
    flops = forward_flops(model, stream, servers.gpus)
    if with_context and work.tokens.held:
        context = Stream(rows=1, before=0, shared=0, unshared=work.tokens.held)
        flops += forward_flops(model, context, servers.gpus)
    return Sampled(
        prefill=flops / accelerator.flops(dtype, accelerator.prefill_share),
        decode=count / together * response * step,
        step=step,
        together=together,
    )


def longest_seconds(work: Work, accelerator: Accelerator) -> float:
    """What the longest answer takes at least, alone on a server."""
    servers, of_teacher = work.servers, work.samples_from_teacher
    assert servers is not None
    model, dtype = work.sampler(of_teacher=of_teacher)
    longest = work.tokens.max_new
    return longest * decode_step(
        model, dtype, accelerator, rows=1, length=longest / 2, gpus=servers.gpus
    )


def decode_step(
    model: ModelConfig,
    dtype: str,
    accelerator: Accelerator,
    *,
    rows: float,
    length: float,
    gpus: int,
) -> float:
    """Seconds of one token of `rows` answers, each `length` tokens long, on a server of `gpus`.

    The embedding is looked up, not read.
    """
    table = 0 if model.tied_embeddings else model.vocab_size * model.hidden_size
    weights = (rank_parameters(model, tp=1, pp=1, pp_rank=0) - table) / gpus
    cache = rows * length * model.num_layers * key_value_width(model, gpus)
    rate = 1e9 * accelerator.memory_gb_per_s * accelerator.engine_bandwidth_share
    stream = Stream(rows=round(rows), before=length, shared=0, unshared=1)
    flops = forward_flops(model, stream, gpus) + head_flops(model, rows, gpus)
    seconds = accelerator.engine_step_s + max(
        (weights + cache) * BYTES[dtype] / rate,
        flops / accelerator.flops(dtype, accelerator.decode_share),
    )
    if gpus > 1:  # two all-reduces a layer
        size = 2 * (gpus - 1) / gpus * rows * model.hidden_size * BYTES[dtype]
        exchange = accelerator.collective_latency_s + size / accelerator.link(gpus)
        seconds += 2 * model.num_layers * exchange
    return seconds


def push_seconds(work: Work, accelerator: Accelerator) -> float:
    """Weights gathered over tp, written into memory by each stage, read by each GPU of a server."""
    servers, layout = work.servers, work.layout
    assert servers is not None
    model, dtype = work.sampler(of_teacher=work.samples_from_teacher)
    size = rank_parameters(model, tp=1, pp=1, pp_rank=0) * BYTES[dtype]
    gathered = (layout.tp - 1) / layout.tp * size / layout.pp / accelerator.link(layout.tp)
    rate = 1e9 * accelerator.engine_push_gb_per_s
    return gathered + size / layout.pp / rate + size / servers.gpus / rate


def cache_tokens(work: Work, accelerator: Accelerator, *, of_teacher: bool = False) -> float:
    """Tokens whose keys and values a server has room for; 0 where it has none for its weights."""
    servers = work.servers
    assert servers is not None
    model, dtype = work.sampler(of_teacher=of_teacher)
    room = accelerator.memory_gib * accelerator.usable_share - accelerator.engine_base_gib
    room = room * GIB - server_weights(work, of_teacher=of_teacher)
    if servers.colocated:
        room -= held_beside_server(work, accelerator)
    if accelerator.memory_is_shared:
        room = min(room, _CPU_CACHE_BYTES)
    token = model.num_layers * key_value_width(model, servers.gpus) * BYTES[dtype]
    return max(0.0, room / token)


def has_room(work: Work, accelerator: Accelerator) -> bool:
    """Whether a server's cache holds the longest answer with its prompt."""
    tokens, of_teacher = work.tokens, work.samples_from_teacher
    longest = (tokens.teacher_prompt if of_teacher else tokens.prompt) + tokens.max_new
    return cache_tokens(work, accelerator, of_teacher=of_teacher) >= longest
