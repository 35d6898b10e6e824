"""Distributed checkpoints (torch_dist): every rank writes its shards, any layout reads them."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess

from opcd_nemo.checkpoint.shard_writer import (
    CheckpointException,
    Index,
    ShardWriter,
    Written,
    plan,
    write_index,
)
from opcd_nemo.checkpoint.sharded_state import (
    load_optimizer,
    optimizer_to_load,
    optimizer_to_save,
    prepare_loading,
    sharded_weights,
    teacher_state,
)
from opcd_nemo.config.renamed import present_update
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import ABSENT, ReadError, SaveError, UserError
from opcd_nemo.formats.torch_dist import DistributedTensors, read_plain
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.storage import durable
from opcd_nemo.storage.archive import FolderFiles
from opcd_nemo.storage.ranks import on_rank_0
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.training.optim import StudentOptimizer
from opcd_nemo.training.teacher import Teacher

# what torch's reader says of bytes that are not those it has written
_UNREADABLE = (OSError, EOFError, RuntimeError, pickle.UnpicklingError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """A checkpoint on its way to its name."""

    path: Path
    temporary: Path
    shards: ShardWriter
    index: Index


def save(
    path: Path,
    common: dict[str, Any],
    student: LanguageModel,
    optimizer: StudentOptimizer,
    teacher: Teacher,
    parallel: Parallel,
) -> None:
    """Write student and `common` under a temporary name, then publish the folder.

    Collective over the world; see `start_save`.
    """
    started = start_save(path, common, student, optimizer, teacher, parallel, background=False)
    publish(started, parallel, RunFolder(path.parent))


def start_save(
    path: Path,
    common: dict[str, Any],
    student: LanguageModel,
    optimizer: StudentOptimizer,
    teacher: Teacher,
    parallel: Parallel,
    *,
    background: bool,
) -> Save:
    """Begin to write a checkpoint; `publish` gives the checkpoint its name.

    Optimizer and a teacher that moves are written when `common` holds Lightning's
    `optimizer_states`, that is unless the checkpoint callback says `save_weights_only`.
    Collective over the world.

    Args:
        path: the folder that `publish` makes.
        common: what is not sharded.
        student: its weights.
        optimizer: its state.
        teacher: its state.
        parallel: every rank writes one file.
        background: write a copy in a thread while training goes on; else `publish` writes.

    Raises:
        SaveError: on every rank, when the folder cannot be made.
    """
    temporary = durable.partial(path)
    _on_rank_0(lambda: _make_empty(temporary), path, parallel)
    state = {"student": sharded_weights(student)}
    if "optimizer_states" in common:
        state |= optimizer_to_save(state["student"], optimizer, parallel)
        state |= teacher_state(teacher)
    _spread(state["student"], parallel)
    whole = {**state, "common": common, "model": asdict(student.config)}
    shards, index = _prepare(temporary, whole, parallel)
    if background:
        shards.start()
    return Save(path=path, temporary=temporary, shards=shards, index=index)


def _prepare(folder: Path, whole: dict[str, Any], parallel: Parallel) -> tuple[ShardWriter, Index]:
    """This rank's file of a state, not yet written, and the index of all. Collective."""
    sharded, unsharded = save_preprocess(whole, validate_access_integrity=True)
    pieces, index = plan(sharded, parallel)
    files = {"common.pt": _as_bytes(unsharded)} if parallel.rank == 0 else {}
    return ShardWriter(folder, f"__{parallel.rank}_0.distcp", pieces, files), index


def publish(save: Save, parallel: Parallel, run_folder: RunFolder) -> None:
    """Wait for every rank's files, then give the folder its name. Collective over the world.

    Args:
        save: what was begun.
        parallel: the ranks.
        run_folder: of rank 0; if another job holds the folder, it refuses just before the renames.

    Raises:
        SaveError: on every rank, when one could not write; nothing is published.
    """
    _complete(save.shards, save.path, lambda parts: _publish(save, parts, run_folder), parallel)


def _complete(
    shards: ShardWriter,
    path: Path,
    complete: Callable[[Sequence[Written]], None],
    parallel: Parallel,
) -> None:
    """Wait for every rank's files, then let rank 0 add what is about all. Collective."""
    parts = parallel.gather_objects(shards.finish())
    for part in parts:
        if part.error:
            raise _not_saved(path, part.error)
    _on_rank_0(lambda: complete(parts), path, parallel)


def _on_rank_0(write: Callable[[], None], path: Path, parallel: Parallel) -> None:
    try:
        on_rank_0(parallel, write)
    except OSError as error:
        raise _not_saved(path, durable.describe(error)) from error


def _not_saved(path: Path, reason: str) -> SaveError:
    return SaveError(f"checkpoint {path.name} is not saved: {reason}")


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(save: Save, parts: Sequence[Written], run_folder: RunFolder) -> None:
    _write_index(save.temporary, save.index, parts)
    entries = {name: entry for part in parts for name, entry in part.entries.items()}
    for name in durable.files_in(save.temporary):
        if name not in entries:
            entries[name] = durable.measure(save.temporary / name, sync=True)
    run_folder.publish(save.temporary, save.path, entries)


def _write_index(folder: Path, index: Index, parts: Sequence[Written]) -> None:
    write_index(folder, index, parts)
    save_config(CheckpointingConfig("torch_dist", 1), str(folder))


def _as_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _spread(weights: dict[str, Any], parallel: Parallel) -> None:
    """Let the data-parallel ranks, which hold the same weights, take turns in writing them."""
    for number, part in enumerate(weights.values()):
        if hasattr(part, "replica_id"):
            *others, dp_rank = part.replica_id
            part.replica_id = (*others, (dp_rank + number) % parallel.dp)


def _loaded(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """What Megatron reads of a checkpoint that was verified. Collective over the world."""
    try:
        found: dict[str, Any] = dist_checkpointing.load(state, str(path))
    except CheckpointException as error:
        cause = next(one for one, _ in error.failures.values())
        if isinstance(cause, _UNREADABLE):
            raise _unread(path, cause) from error
        # torch's is no `Exception`: it would end a rank without a word
        raise RuntimeError(f"checkpoint {path.name} is not loaded") from error
    except OSError as error:
        raise _unread(path, error) from error
    return found


def _unread(path: Path, error: Exception) -> ReadError:
    words = durable.describe(error) if isinstance(error, OSError) else str(error) or repr(error)
    return ReadError(f"checkpoint {path.name} cannot be read: {words.splitlines()[0]}")


def save_weights(folder: Path, student: LanguageModel) -> None:
    """Write the student alone into an empty folder. Collective over the world.

    Raises:
        SaveError: on every rank, when one could not write.
    """
    parallel, weights = student.parallel, sharded_weights(student)
    _spread(weights, parallel)
    whole = {"student": weights, "model": asdict(student.config)}
    shards, index = _prepare(folder, whole, parallel)
    _complete(shards, folder, lambda parts: _write_index(folder, index, parts), parallel)


def weights_digest(student: LanguageModel) -> str:
    """SHA-256 of the student's weights as this layout holds them. Collective over the world."""
    mine = hashlib.sha256()
    for parameter in student.module.parameters():
        mine.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    parts = student.parallel.gather_objects(mine.hexdigest())
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def load(
    path: Path, student: LanguageModel, optimizer: StudentOptimizer, teacher: Teacher
) -> dict[str, Any]:
    """Fill student, optimizer and teacher from a checkpoint of any layout; returns its `common`.

    Raises:
        UserError: the checkpoint is of a model with another shape, or holds no optimizer, or not
            the weights of a teacher with this `teacher.update`; or its index is none.
        ReadError: on every rank, when a file has changed since it was verified, or a disk fails.
    """
    # torch's reader unpickles the index: only what the project's reader of indices lets through
    DistributedTensors(FolderFiles(path))
    unsharded = read_plain(FolderFiles(path))
    saved = unsharded.get("model")
    for key, value in asdict(student.config).items():
        found = saved.get(key, ABSENT) if isinstance(saved, dict) else ABSENT
        if found != value:
            raise UserError(path, allowed=f"the student's {value}", problem=f"{key} is {found}")
    prepare_loading(optimizer.optimizer)
    state = {"student": sharded_weights(student)}
    if "optimizer_states" not in unsharded["common"]:
        raise UserError(
            str(path),
            allowed="a checkpoint with optimizer, of a checkpoint callback with "
            "save_weights_only=false",
            problem="holds weights only",
        )
    state |= optimizer_to_load(state["student"], optimizer)
    state |= teacher_state(teacher)
    saved_update = present_update(unsharded)
    if "teacher" in state and saved_update != teacher.update:
        raise UserError(
            str(path),
            allowed=f"the checkpoint's teacher.update={saved_update}",
            problem=f"holds no weights of a teacher with teacher.update={teacher.update}",
        )
    loaded = _loaded({**state, "common": {}}, path)
    student.module.load_state_dict(loaded["student"], strict=True)
    load_optimizer(optimizer.optimizer, loaded["optimizer"])
    optimizer.scheduler.load_state_dict(loaded["scheduler"])
    teacher.load_state(loaded.get("teacher", {}), optimizer.scheduler.num_steps)
    common: dict[str, Any] = loaded["common"]
    return common
