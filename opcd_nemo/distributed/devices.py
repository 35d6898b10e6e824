"""What a rank computes on: its device, the library of collectives there, the kind of layers."""

from __future__ import annotations

import importlib.util
import os

import torch
import torch.distributed as dist

from opcd_nemo.distributed.launcher import environment_number
from opcd_nemo.errors import UserError
from opcd_nemo.types import LayerSpec

_RANKS_A_PROCESSOR = 8


def choose_device(device: str, ranks_per_node: int) -> tuple[torch.device, str]:
    """Resolve `parallel.device`; returns the device and why it was chosen.

    Raises:
        UserError: CUDA is asked for and there are fewer GPUs than ranks, or the CPU for far more
            ranks than it has processors.
    """
    gpus = torch.cuda.device_count()
    local_rank = environment_number("LOCAL_RANK", 0)
    if device == "cpu" or (device == "auto" and gpus < ranks_per_node):
        _check_processors(ranks_per_node)
    if device == "cpu":
        return torch.device("cpu"), "parallel.device=cpu"
    if gpus >= ranks_per_node:
        return torch.device("cuda", local_rank), f"{gpus} GPUs for {ranks_per_node} ranks"
    if device == "auto":
        return torch.device("cpu"), f"auto: {gpus} GPUs for {ranks_per_node} ranks"
    raise UserError(
        "parallel.device",
        device,
        "as many GPUs as ranks, or parallel.device=cpu",
        problem=f"{gpus} GPUs for {ranks_per_node} ranks",
    )


def last_devices(count: int) -> str:
    """The GPUs that this machine's ranks leave, as `CUDA_VISIBLE_DEVICES` names them.

    Raises:
        UserError: there are fewer.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = named.split(",") if named else list(map(str, range(torch.cuda.device_count())))
    ranks = environment_number("LOCAL_WORLD_SIZE", 1, least=1)
    if len(devices) < ranks + count:
        problem = f"this machine has {len(devices)} GPUs and {ranks} ranks"
        raise UserError("engine.gpus", count, "as many as the ranks leave", problem=problem)
    return ",".join(devices[-count:])


def _check_processors(ranks: int) -> None:
    """Refuse so many ranks that a machine would only switch between them."""
    processors = os.cpu_count() or 1
    most = max(64, _RANKS_A_PROCESSOR * processors)
    if ranks > most:
        allowed = f"at most {most} on this machine of {processors} processors"
        raise UserError("parallel.num_ranks", ranks, allowed)


def backend_version(device: torch.device) -> str:
    """The library of collectives on this device, with its version if it has a version."""
    if device.type == "cpu":
        return "gloo"
    if not dist.is_nccl_available():
        raise UserError("torch", allowed="a build for CUDA", problem="this build has no NCCL")
    return "nccl " + ".".join(map(str, torch.cuda.nccl.version()))


def has_transformer_engine() -> bool:
    """Whether Transformer Engine is installed (on a CPU it need not be)."""
    return importlib.util.find_spec("transformer_engine") is not None


def choose_layer_spec(layer_spec: str, device: torch.device) -> LayerSpec:
    """Resolve `parallel.layer_spec`.

    Raises:
        UserError: Transformer Engine is asked for on a CPU, or is not installed.
    """
    installed = has_transformer_engine()
    if layer_spec == "te" and (device.type == "cpu" or not installed):
        why = "it needs a GPU" if device.type == "cpu" else "Transformer Engine is not installed"
        raise UserError("parallel.layer_spec", "te", "auto or local here", problem=why)
    if layer_spec == "auto":
        return "te" if device.type != "cpu" and installed else "local"
    return "te" if layer_spec == "te" else "local"


def fast_dtype() -> str:
    """`bf16`, or `fp32` where this machine has no GPU and its processor multiplies bf16 slowly.

    Without AVX-512 or AVX-NE-CONVERT torch takes ten times as long for products of bf16 as of fp32.
    """
    fast = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return "bf16" if fast else "fp32"
