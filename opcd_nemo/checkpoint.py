"""Distributed checkpoints (torch_dist): every rank writes its shards, any layout reads them."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor

from opcd_nemo import durable
from opcd_nemo.language_model import LanguageModel
from opcd_nemo.optim import StudentOptimizer
from opcd_nemo.parallel import Parallel
from opcd_nemo.teacher import Teacher

# gate and up under keys of their own: one key would put the padding of gate between them
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "singleton_local_shards": True}


def save(
    path: Path,
    common: dict[str, Any],
    student: LanguageModel,
    optimizer: StudentOptimizer,
    teacher: Teacher,
    parallel: Parallel,
) -> None:
    """Write student and `common` under a temporary name, then publish the folder.

    Optimizer and a teacher that moves are written when `common` holds Lightning's
    `optimizer_states`, that is unless the checkpoint callback says `save_weights_only`.
    Collective over the world.
    """
    temporary = path.with_name(f".{path.name}.partial")
    if parallel.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    parallel.barrier()
    state = {"student": _weights(student)}
    if "optimizer_states" in common:
        state |= _optimizer_state(state["student"], optimizer, is_loading=False)
        state |= _teacher_state(teacher)
    whole = {**state, "common": common, "model": asdict(student.config)}
    dist_checkpointing.save(whole, str(temporary))
    parallel.barrier()
    names = durable.files_in(temporary)[parallel.rank :: parallel.world_size]
    entries: dict[str, durable.Entry] = {}
    for part in parallel.gather_objects(
        {name: durable.measure(temporary / name, sync=True) for name in names}
    ):
        entries |= part
    if parallel.rank == 0:
        durable.publish(temporary, path, entries)
    parallel.barrier()


def save_weights(folder: Path, student: LanguageModel) -> None:
    """Write the student alone into an empty folder. Collective over the world."""
    dist_checkpointing.save(
        {"student": _weights(student), "model": asdict(student.config)}, str(folder)
    )


def newest(folder: Path, parallel: Parallel, say: Callable[[str], None]) -> Path | None:
    """The checkpoint of the latest step whose files are as its manifest says.

    Damaged ones are named and set aside as `<name>.damaged`. Collective over the world.
    """
    found = [(step, path) for path in folder.glob("*.ckpt") if (step := step_of(path)) >= 0]
    for _, path in sorted(found, reverse=True):
        damage = find_damage(path, parallel)
        if damage is None:
            return path
        say(f"checkpoint set aside: {damage}")
        if parallel.rank == 0:
            durable.set_aside(path, ".damaged")
        parallel.barrier()
    return None


def step_of(path: Path) -> int:
    """How many steps a checkpoint's name says; -1 when it says nothing."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match[1]) if match else -1


def find_damage(path: Path, parallel: Parallel) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank. Collective."""
    damage = None
    try:
        entries = durable.read_manifest(path)
        names = sorted(entries)[parallel.rank :: parallel.world_size]
        damage = durable.find_damage(path, entries, names)
    except (OSError, ValueError) as error:
        damage = str(error)
    return next((found for found in parallel.gather_objects(damage) if found), None)


def weights_digest(student: LanguageModel) -> str:
    """SHA-256 of the student's weights as this layout holds them. Collective over the world."""
    mine = hashlib.sha256()
    for parameter in student.module.parameters():
        mine.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    parts = student.parallel.gather_objects(mine.hexdigest())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def read_common(path: Path) -> dict[str, Any]:
    """Lightning's part of a checkpoint, and what the model put beside it."""
    common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(path))["common"]
    return common


def load(
    path: Path, student: LanguageModel, optimizer: StudentOptimizer, teacher: Teacher
) -> dict[str, Any]:
    """Fill student, optimizer and teacher from a checkpoint of any layout; returns its `common`.

    Raises:
        ValueError: the checkpoint is of a model with another shape, or holds no optimizer, or not
            the weights of a teacher of this life.
    """
    unsharded = dist_checkpointing.load_common_state_dict(str(path))
    saved, wanted = unsharded["model"], student.config
    for key, value in asdict(wanted).items():
        if saved[key] != value:
            raise ValueError(f"{path}: {key} is {saved[key]}; allowed: the student's {value}")
    _prepare_loading(optimizer.optimizer)
    state = {"student": _weights(student)}
    if "optimizer_states" not in unsharded["common"]:
        raise ValueError(
            f"{path}: holds weights only; allowed: a checkpoint of "
            "exp_manager.checkpoint_callback_params.save_weights_only=false"
        )
    state |= _optimizer_state(state["student"], optimizer, is_loading=True)
    state |= _teacher_state(teacher)
    if "teacher" in state and unsharded.get("teacher_life") != teacher.life:
        raise ValueError(
            f"{path}: holds no weights of a teacher with teacher.life={teacher.life}; "
            f"allowed: the checkpoint's teacher.life={unsharded.get('teacher_life', 'frozen')}"
        )
    loaded = dist_checkpointing.load({**state, "common": {}}, str(path))
    student.module.load_state_dict(loaded["student"], strict=True)
    _load_optimizer(optimizer.optimizer, loaded["optimizer"])
    optimizer.scheduler.load_state_dict(loaded["scheduler"])
    teacher.load_state(loaded.get("teacher", {}), optimizer.scheduler.num_steps)
    common: dict[str, Any] = loaded["common"]
    return common


def _weights(student: LanguageModel) -> dict[str, Any]:
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


def _teacher_state(teacher: Teacher) -> dict[str, Any]:
    """The sharded weights of a teacher that the student's present ones do not give."""
    tensors = teacher.state()
    if not tensors:
        return {}
    like = _weights(teacher.model)
    sharded = {
        name: make_sharded_optimizer_tensor(like[name], tensor, "teacher")
        for name, tensor in tensors.items()
    }
    return {"teacher": sharded, "teacher_life": teacher.life}


def _allowing_mismatch(build: Callable[..., list[Any]]) -> Callable[..., list[Any]]:
    def build_allowing(*args: Any) -> list[Any]:
        parts = build(*args)
        for part in parts:
            part.allow_shape_mismatch = True
        return parts

    return build_allowing


def _optimizer_state(
    weights: dict[str, Any], optimizer: StudentOptimizer, *, is_loading: bool
) -> dict[str, Any]:
    # Megatron 0.16.1 leaves out the padding between buckets, but not from the parameters' offsets
    for buffer in optimizer.ddp.buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    return {
        "optimizer": optimizer.optimizer.sharded_state_dict(
            weights, is_loading=is_loading, metadata=dict(_METADATA)
        ),
        "scheduler": optimizer.scheduler.state_dict(),
    }


def _prepare_loading(optimizer: Any) -> None:
    """Give torch's AdamW the state Megatron's DistributedOptimizer loads into.

    Megatron 0.16.1 expects a `step` that torch's AdamW has only after its first step.
    """
    for part in optimizer.chained_optimizers:
        if hasattr(part, "init_state_fn"):
            part.init_state_fn(part.optimizer, part.config)
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def _load_optimizer(optimizer: Any, loaded: dict[str, Any]) -> None:
    """Fill the optimizer, with a step count of its own for every parameter.

    Megatron 0.16.1 shares one step tensor among all parameters, so that AdamW would count it once
    for each, and looks for a step in the loaded moments, where there is none.
    """
    (part,) = optimizer.chained_optimizers
    moments = loaded.pop("param_state", None)
    part.load_state_dict(loaded)
    states = list(part.optimizer.state.values())
    steps = [state.pop("step").clone() for state in states]
    if moments is not None:
        part.load_parameter_state_from_fully_reshardable(moments)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
