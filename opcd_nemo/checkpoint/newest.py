"""The checkpoint that a run continues from: the newest complete checkpoint of its folder."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import ReadError, UserError
from opcd_nemo.formats.torch_dist import read_plain
from opcd_nemo.storage import durable
from opcd_nemo.storage.archive import FolderFiles
from opcd_nemo.storage.ranks import on_every_rank, on_rank_0

logger = logging.getLogger(__name__)

_ENDING, _DAMAGED = ".ckpt", ".damaged"
# of Lightning's part: what its trainer restores without looking whether it is there
_LIGHTNINGS = ("callbacks", "epoch", "global_step", "loops")


def newest(folder: Path, parallel: Parallel, *, from_scratch: bool) -> Path | None:
    """The checkpoint of the latest step whose files are as its manifest says.

    Damaged ones that are newer are named, and set aside as `<name>.damaged`. Collective over the
    world.

    Args:
        folder: of the checkpoints.
        parallel: every rank verifies a share of the files.
        from_scratch: None is an answer although the folder holds checkpoints, all of them damaged.

    Raises:
        UserError: every checkpoint is damaged, or has a name that says no step.
        ReadError: a disk does not give what it holds, or refuses to set a damaged one aside.
    """
    names = _names(folder, parallel)
    whole, damaged = None, dict[Path, str]()
    for name in sorted(names, key=lambda name: step_of(folder / name), reverse=True):
        path = folder / name
        if step_of(path) < 0 or path.suffix != _ENDING:
            continue
        damage = find_damage(path, parallel)
        if damage is None:
            whole = path
            break
        damaged[path] = damage
    if whole is None and names and not from_scratch:
        found = next(iter(damaged.values()), f"{folder / names[0]} is not read")
        raise UserError(
            folder,
            allowed="a whole checkpoint, from a copy; or resume.from_scratch=true, to begin again "
            "at step 0 where none is left",
            problem=f"holds no whole checkpoint: {found}",
        )
    _set_aside(damaged, parallel)
    return whole


def _set_aside(damaged: Mapping[Path, str], parallel: Parallel) -> None:
    for damage in damaged.values():
        logger.info("checkpoint set aside: %s", damage)

    def rename() -> None:
        for path in damaged:
            durable.set_aside(path, _DAMAGED)

    try:
        on_rank_0(parallel, rename)
    except OSError as error:
        refusal = durable.describe(error)
        raise ReadError(f"a damaged checkpoint cannot be set aside: {refusal}") from error


def _names(folder: Path, parallel: Parallel) -> list[str]:
    """What rank 0 sees of checkpoints, whole or damaged; a shared disk may show others less."""

    def listed() -> list[str]:
        try:
            found = [path.name for path in folder.iterdir()]
        except durable.MISSING:
            return []  # the run has saved nothing yet
        return sorted(name for name in found if _ENDING in name and name[0] != ".")

    try:
        return on_rank_0(parallel, listed)
    except OSError as error:
        unread = durable.describe(error)
        raise ReadError(f"checkpoints cannot be read: {unread}") from error


def step_of(path: Path) -> int:
    """The number of steps in a checkpoint's name; -1 for another name."""
    match = re.search(r"step=(\d+)", path.name)
    return int(match[1]) if match else -1


def checkpoint_name(filename: str, step: int) -> str:
    """What Lightning calls the checkpoint of a step, with the key `filename` of its callback."""
    return f"{filename.replace('{step}', f'step={step}')}{_ENDING}"


def of_step(folder: Path, step: int) -> Path:
    """The checkpoint of a step, whatever it is called; `step=N.ckpt` where there is none."""
    found = sorted(path for path in folder.glob(f"*{_ENDING}") if step_of(path) == step)
    return found[0] if found else folder / checkpoint_name("{step}", step)


def surplus(folder: Path, num_kept: int, kept_steps: Collection[int]) -> list[Path]:
    """The checkpoints that are not among the last ones.

    Args:
        folder: of the checkpoints of all jobs of a run, whoever has saved them.
        num_kept: how many of the last ones stay; -1: all.
        kept_steps: whose checkpoints stay besides.
    """
    if num_kept < 0:
        return []
    named = [path for path in folder.glob(f"*{_ENDING}") if path.name[0] != "."]
    found = sorted((path for path in named if step_of(path) >= 0), key=step_of)
    return [
        path for path in found[: max(len(found) - num_kept, 0)] if step_of(path) not in kept_steps
    ]


def find_damage(path: Path, parallel: Parallel) -> str | None:
    """What is wrong with a checkpoint's files, the same on every rank. Collective.

    Raises:
        ReadError: on every rank, when one cannot read a file: that is no damage, for the disk may
            give the file at the next start.
    """

    def damage_of_share() -> str | None:
        try:
            entries = durable.read_manifest(path)
            names = sorted(entries)[parallel.rank :: parallel.world_size]
            return durable.find_damage(path, entries, names)
        except UserError as error:
            return str(error)

    try:
        found = on_every_rank(parallel, damage_of_share)
    except OSError as error:
        unread = durable.describe(error)
        raise ReadError(f"checkpoint {path.name} cannot be read: {unread}") from error
    return next((damage for damage in found if damage is not None), None)


def read_common(path: Path, loops: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Lightning's part of a checkpoint, and the part that the model added as `opcd`.

    Args:
        path: the checkpoint.
        loops: what Lightning's loop of steps must find of itself, as its state of any run; None:
            no run is continued.

    Raises:
        UserError: another program, or another version of this program, wrote the checkpoint.
        ReadError: a disk does not give what it holds.
    """
    try:
        plain: Any = read_plain(FolderFiles(path))
    except OSError as error:
        raise ReadError(
            f"checkpoint {path.name} cannot be read: {durable.describe(error)}"
        ) from error
    common: Any = plain.get("common") if isinstance(plain, dict) else None
    missing = _missing(common)
    if missing is None and loops is not None:
        missing = _unlike(common["loops"], {"fit_loop": loops}, "loops")
    if missing == "callbacks" and "optimizer_states" not in common:
        raise UserError(
            path,
            allowed="a checkpoint of a run with save_weights_only=false; or student.path with this "
            "one, and another name, to begin another run from its weights",
            problem="holds weights only",
        )
    if missing is not None:
        raise UserError(
            path,
            allowed="a checkpoint that `opcd train` of this version or an earlier one has written; "
            "another name= begins another run",
            problem=f"its common.pt has no {missing}",
        )
    assert isinstance(common, dict)
    return common


def _missing(common: Any) -> str | None:
    """The first thing that a run could not be continued without."""
    if not isinstance(common, dict):
        return "common"
    for name in _LIGHTNINGS:
        if name not in common:
            return name
    if type(common["global_step"]) is not int:
        return "number as global_step"
    origin: Any = common
    for name in ("opcd", "config", "optim"):
        if not isinstance(origin, Mapping) or not isinstance(origin.get(name), Mapping):
            return name
        origin = origin[name]
    return None if "schedule" in origin else "optim.schedule"


def _unlike(saved: Any, wanted: Mapping[str, Any], name: str) -> str | None:
    """The first of another program's values that a checkpoint lacks, or has as another kind."""
    for key, value in wanted.items():
        inside = f"{name}.{key}"
        kind = Mapping if isinstance(value, Mapping) else type(value)
        if not isinstance(saved, Mapping) or not isinstance(saved.get(key), kind):
            return inside
        if isinstance(value, Mapping) and (missing := _unlike(saved[key], value, inside)):
            return missing
    return None
