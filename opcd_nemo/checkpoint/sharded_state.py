"""The sharded state of student, optimizer and teacher: what a save gathers and a load fills.

Megatron names every shard, so that any layout reads what another has written. No file is touched
here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from opcd_nemo.checkpoint.optimizer_shards import whole_parameters
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.training.optim import StudentOptimizer
from opcd_nemo.training.teacher import Teacher

# gate and up have two keys: a common key would put the padding of gate between them
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": True}


def sharded_weights(student: LanguageModel) -> dict[str, Any]:
    """The sharded weights; layouts pad them differently, always at the end of a dim."""
    state: dict[str, Any] = student.module.sharded_state_dict(metadata=dict(_METADATA))
    for name, part in state.items():
        if "norm" in name:
            continue
        if isinstance(part, ShardedTensor):
            part.allow_shape_mismatch = True
        elif isinstance(part, ShardedTensorFactory):
            part.build_fn = _allowing_mismatch(part.build_fn)
    return state


def _allowing_mismatch(build: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def build_allowing(*args: Any) -> list[Any]:
        parts = build(*args)
        for part in parts:
            part.allow_shape_mismatch = True
        return parts

    return build_allowing


def teacher_state(teacher: Teacher) -> dict[str, Any]:
    """The sharded weights of a teacher that are not the student's present weights."""
    tensors = teacher.state()
    if not tensors:
        return {}
    like = sharded_weights(teacher.model)
    sharded = {
        name: make_sharded_optimizer_tensor(like[name], tensor, "teacher")
        for name, tensor in tensors.items()
    }
    return {"teacher": sharded, "teacher_update": teacher.update}


def optimizer_to_save(
    weights: dict[str, Any], optimizer: StudentOptimizer, parallel: Parallel
) -> dict[str, Any]:
    """State of optimizer and schedule, beside the sharded weights. Collective over dp."""
    (part,) = optimizer.optimizer.chained_optimizers
    state = {"scheduler": optimizer.scheduler.state_dict()}
    if not isinstance(part, DistributedOptimizer):
        return {**state, "optimizer": part.sharded_state_dict(weights, metadata=dict(_METADATA))}
    return {
        **state,
        "optimizer": {
            **part.state_dict(),
            "param_state": whole_parameters(part, weights, parallel),
            "param_state_sharding_type": _METADATA["distrib_optim_sharding_type"],
        },
    }


def optimizer_to_load(weights: dict[str, Any], optimizer: StudentOptimizer) -> dict[str, Any]:
    """What `dist_checkpointing.load` fills, beside the sharded weights."""
    # Megatron 0.16.1 leaves out the padding between buckets, but not from the parameters' offsets
    for buffer in optimizer.ddp.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    return {
        "optimizer": optimizer.optimizer.sharded_state_dict(
            weights, is_loading=True, metadata=dict(_METADATA)
        ),
        "scheduler": optimizer.scheduler.state_dict(),
    }


def prepare_loading(optimizer: Any) -> None:
    """Give torch's AdamW the state Megatron's DistributedOptimizer loads into.

    Megatron 0.16.1 expects a `step` that torch's AdamW has only after its first step.
    """
    for part in optimizer.chained_optimizers:
        if hasattr(part, "init_state_fn"):
            part.init_state_fn(part.optimizer, part.config)
            if _counts_by_parameter(part.optimizer):
                for state in part.optimizer.state.values():
                    state.setdefault("step", torch.tensor(0.0))


def _counts_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is torch's, whose state of every parameter has a `step`.

    FusedAdam of Transformer Engine and of Apex counts steps by group; Transformer Engine's refuses
    a `step` in the state.
    """
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Fill the optimizer, with a separate step count for every parameter.

    Megatron 0.16.1 shares one step tensor among all parameters, so that AdamW would count it once
    for each, and looks for a step in the loaded moments, where there is none. An optimizer that
    counts by group has its count from the loaded groups.
    """
    (part,) = optimizer.chained_optimizers
    moments = loaded.pop("param_state", None)
    part.load_state_dict(loaded)
    states = list(part.optimizer.state.values()) if _counts_by_parameter(part.optimizer) else []
    steps = [state.pop("step").clone() for state in states]
    if moments is not None:
        part.load_parameter_state_from_fully_reshardable(moments)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
