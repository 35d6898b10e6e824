"""Answers, on a CPU, the CUDA calls that megatron-core makes without asking.

Private: only `groups.py` imports this module, and installs it when a run's device is the CPU.
Megatron-core has no switch for it: more than a hundred call sites name CUDA literally.
`torch.cuda.device_count` and `is_available` stay as they are; Lightning reads them.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_CPU = torch.device("cpu")
_PIECE = 4 << 20  # elements of a gradient exchange
_MEGATRON = str(Path("megatron", "core"))
_FACTORIES = "tensor zeros ones empty full arange as_tensor empty_like zeros_like ones_like".split()


class _Nothing:
    """Stands for a stream or an event: every operation completes at once."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0

    def record_event(self, *_: object) -> _Nothing:
        return self

    wait = synchronize = wait_stream = wait_event = record


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def call(*args: object, **kwargs: object) -> object:
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return call


def _type_for_megatron(real: Callable[..., Any]) -> Callable[..., Any]:
    """Optimizers and clipping compare `param.type()` with 'torch.cuda.FloatTensor'."""

    def type_(self: torch.Tensor, *args: object, **kwargs: object) -> object:
        answer = real(self, *args, **kwargs)
        if args or kwargs or _MEGATRON not in sys._getframe(1).f_code.co_filename:
            return answer
        return answer.replace("torch.", "torch.cuda.", 1)

    return type_


def _itself(self: object, *_: object, **__: object) -> object:
    return self


def _answer(value: object = None) -> Callable[..., Any]:
    """A new function each time: torch's compiler refuses an object under two names."""
    return lambda *_, **__: value


def _uncompiled(function: Any = None, **_: object) -> Any:
    return _uncompiled if function is None else function


def _reduce_scatter(
    output: torch.Tensor, input: torch.Tensor, *, op: Any, group: Any, async_op: bool
) -> None:
    """Sum `input` over the group's ranks and keep this rank's chunk.

    Own values first, then the others' in rank order, piece by piece, so that nothing of the size
    of the gradients is allocated. Gloo's own is an all-reduce and a copy: 3-6 times the CPU and
    wall time (docs/log.md).
    """
    assert op == dist.ReduceOp.SUM
    chunks = input.chunk(dist.get_world_size(group))
    me = dist.get_rank(group)
    others = {rank: dist.get_global_rank(group, rank) for rank in range(len(chunks)) if rank != me}
    for start in range(0, len(output), _PIECE):
        piece = slice(start, start + _PIECE)
        sent: list[Any] = [dist.isend(chunks[rank][piece], to) for rank, to in others.items()]
        total, received = chunks[me][piece], torch.empty_like(output[piece])
        for source in others.values():
            dist.recv(received, source)
            total = torch.add(total, received, out=output[piece])
        for work in sent:
            work.wait()


def _all_gather(output: torch.Tensor, input: torch.Tensor, *, group: Any, async_op: bool) -> None:
    """Fill `output` with every rank's `input`, in rank order."""
    chunks = output.chunk(dist.get_world_size(group))
    me = dist.get_rank(group)
    others = [rank for rank in range(len(chunks)) if rank != me]
    sent: list[Any] = [dist.isend(input, dist.get_global_rank(group, rank)) for rank in others]
    chunks[me].copy_(input)
    for rank in others:
        dist.recv(chunks[rank], dist.get_global_rank(group, rank))
    for work in sent:
        work.wait()


@functools.cache
def install() -> None:
    """Install the stand-ins, once per process and before megatron-core is first imported."""
    cuda: Any = torch.cuda
    cuda.current_device = _answer(_CPU)
    cuda.is_current_stream_capturing = _answer(False)
    for name in ("synchronize", "set_device", "empty_cache"):
        setattr(cuda, name, _answer())
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, _answer(_Nothing()))
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Nothing
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    tensor: Any = torch.Tensor
    tensor.type = _type_for_megatron(tensor.type)
    tensor.cuda = torch.nn.Module.cuda = _itself  # type: ignore[assignment]

    # Megatron decorates its fusions with torch.compile at import: seconds, for code unused here
    compile_ = torch.compile
    torch.compile = _uncompiled  # type: ignore[assignment]
    import megatron.core.jit
    import megatron.core.models.gpt  # the import that decorates
    import megatron.core.tensor_parallel.random as megatron_random

    torch.compile = compile_
    import megatron.core.distributed.param_and_grad_buffer as buffers

    buffers.dist_reduce_scatter_func = _reduce_scatter
    buffers.dist_all_gather_func = _all_gather
    megatron.core.jit.disable_jit_fuser()
    megatron_random._get_cuda_rng_state = cuda.get_rng_state
    megatron_random._set_cuda_rng_state = cuda.set_rng_state
