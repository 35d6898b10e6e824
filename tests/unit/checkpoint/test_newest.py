"""A run goes on from the newest whole checkpoint; a disk that says nothing has lost nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from opcd_nemo.checkpoint.newest import (
    _set_aside,
    checkpoint_name,
    find_damage,
    newest,
    of_step,
    read_common,
    step_of,
    surplus,
)
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import ReadError, UserError
from opcd_nemo.storage import durable


@dataclass
class Rank:
    """A rank; what the others gather comes before and after its own."""

    rank: int = 0
    world_size: int = 1
    others: Callable[[Any], list[Any]] = lambda value: [value]

    def gather_objects(self, value: Any) -> list[Any]:
        return self.others(value)

    def barrier(self) -> None: ...


def parallel(**fields: Any) -> Parallel:
    return cast(Parallel, Rank(**fields))


ALONE = parallel()
GONE = OSError(errno.EIO, "gone", "x")


def save(folder: Path, step: int) -> Path:
    path = folder / f"step={step}.ckpt"
    path.mkdir(parents=True)
    for name in ("a", "b"):
        (path / name).write_bytes(b"x" * step)
    durable.write_manifest(path, {name: durable.measure(path / name) for name in ("a", "b")})
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (2, 4, 10):
        save(tmp_path, step)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_latest_step_is_no_matter_of_letters(folder: Path) -> None:
    found = newest(folder, ALONE, from_scratch=False)
    assert found == folder / "step=10.ckpt"
    assert [step_of(Path(name)) for name in ("step=10.ckpt", "x-step=3.ckpt", "last.ckpt")] == [
        10,
        3,
        -1,
    ]


def test_damaged_ones_are_set_aside_once_an_older_one_is_whole(folder: Path) -> None:
    (folder / "step=10.ckpt" / "a").write_bytes(b"y" * 10)
    (folder / "step=4.ckpt" / "b").unlink()
    for _ in range(2):  # those that are set aside are not looked at again
        assert newest(folder, ALONE, from_scratch=False) == folder / "step=2.ckpt"
        assert names(folder) == ["step=10.ckpt.damaged", "step=2.ckpt", "step=4.ckpt.damaged"]


@pytest.mark.parametrize("from_scratch", [False, True])
def test_a_run_of_damaged_checkpoints_begins_again_only_where_it_may(
    folder: Path, from_scratch: bool
) -> None:
    before = names(folder)
    for name in before:
        (folder / name / "a").unlink()
    if from_scratch:
        assert newest(folder, ALONE, from_scratch=True) is None
        assert names(folder) == [f"{name}.damaged" for name in before]
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            newest(folder, ALONE, from_scratch=False)
        assert caught.value.key == str(folder)
        assert "resume.from_scratch=true" in caught.value.allowed
    if not from_scratch:
        assert "step=10.ckpt: a: is missing" in str(caught.value.problem)
        assert names(folder) == before


def test_a_checkpoint_whose_name_says_no_step_is_not_passed_over(tmp_path: Path) -> None:
    save(tmp_path, 3).rename(tmp_path / "last.ckpt")
    with pytest.raises(UserError, match=r"last\.ckpt is not read"):
        newest(tmp_path, ALONE, from_scratch=False)
    save(tmp_path, 1)
    assert newest(tmp_path, ALONE, from_scratch=False) == tmp_path / "step=1.ckpt"


def test_over_three_jobs_no_more_checkpoints_stay_than_are_kept(tmp_path: Path) -> None:
    """Each job saves at its interval, for a validation and at the signal that ends it."""
    best = 3
    for saved in ((10, 20, 23), (30, 33), (40, 44)):
        for step in (best, *saved):
            if not (tmp_path / f"step={step}.ckpt").exists():
                save(tmp_path, step)
            for path in surplus(tmp_path, 3, {best}):
                shutil.rmtree(path)
            left = sorted(step_of(path) for path in tmp_path.iterdir())
            assert len(left) <= 4
            assert best in left
            assert max(left) == step or step == best
    assert left == [3, 33, 40, 44]
    assert surplus(tmp_path, -1, ()) == surplus(tmp_path, 4, ()) == surplus(tmp_path, 9, ()) == []
    assert len(surplus(tmp_path, 0, ())) == 4
    assert [path.name for path in surplus(tmp_path, 1, (40,))] == ["step=3.ckpt", "step=33.ckpt"]


def test_only_checkpoints_that_have_their_name_are_removed(folder: Path) -> None:
    for name in (
        ".step=1.ckpt.partial",
        "step=1.ckpt.damaged",
        "last.ckpt",
        "notes",
        ".step=1.ckpt",
    ):
        (folder / name).mkdir()
    assert [path.name for path in surplus(folder, 1, ())] == ["step=2.ckpt", "step=4.ckpt"]


def test_a_checkpoint_has_the_name_of_the_key(tmp_path: Path) -> None:
    assert checkpoint_name("{step}", 7) == "step=7.ckpt"
    assert checkpoint_name("run-{step}-b", 7) == "run-step=7-b.ckpt"
    assert of_step(tmp_path, 7) == tmp_path / "step=7.ckpt"
    save(tmp_path, 7).rename(tmp_path / "run-step=7-b.ckpt")
    assert of_step(tmp_path, 7).name == "run-step=7-b.ckpt"
    assert of_step(tmp_path, 70).name == "step=70.ckpt"


def test_a_checkpoint_before_the_first_step_is_one(tmp_path: Path) -> None:
    assert newest(tmp_path, ALONE, from_scratch=False) is None
    save(tmp_path, 0)
    assert newest(tmp_path, ALONE, from_scratch=False) == tmp_path / "step=0.ckpt"


def test_a_run_that_has_saved_nothing_begins(tmp_path: Path) -> None:
    assert newest(tmp_path / "none", ALONE, from_scratch=False) is None
    (tmp_path / ".step=1.ckpt.partial").mkdir()
    assert newest(tmp_path, ALONE, from_scratch=False) is None


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("where", ["measure", "read_manifest"])
def test_a_read_error_ends_the_run_and_changes_nothing(
    folder: Path, where: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(durable, where, refuse)
    with pytest.raises(ReadError) as caught:
        newest(folder, ALONE, from_scratch=True)
    assert f"{os.strerror(number)} (errno {number})" in str(caught.value)
    assert names(folder) == ["step=10.ckpt", "step=2.ckpt", "step=4.ckpt"]


def test_a_folder_that_cannot_be_listed_is_not_empty(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ReadError, match=f"errno {errno.ESTALE}"):
        newest(folder, ALONE, from_scratch=True)


def test_every_rank_ends_when_one_cannot_read(folder: Path) -> None:
    other = parallel(rank=1, world_size=2, others=lambda mine: [(None, GONE), mine])
    with pytest.raises(ReadError, match=r"step=4\.ckpt cannot be read: x: gone \(errno 5\)"):
        find_damage(folder / "step=4.ckpt", other)


def test_every_rank_ends_when_a_damaged_one_cannot_be_set_aside(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, ending: str) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(durable, "set_aside", refuse)
    (folder / "step=10.ckpt" / "a").write_bytes(b"y" * 10)
    with pytest.raises(ReadError, match=r"set aside: .*step=10\.ckpt: Read-only file system"):
        newest(folder, ALONE, from_scratch=False)
    other = parallel(rank=1, world_size=2, others=lambda mine: [(None, GONE), mine])
    with pytest.raises(ReadError, match=r"set aside: x: gone \(errno 5\)"):
        _set_aside({folder / "step=10.ckpt": "a: is missing"}, other)


def test_ranks_share_the_files_and_the_finding(folder: Path) -> None:
    path = folder / "step=4.ckpt"
    (path / "b").write_bytes(b"zzzz")
    mine = parallel(rank=0, world_size=2, others=lambda mine: [mine, (None, None)])
    assert find_damage(path, mine) is None, "the second file is the other rank's"
    others = parallel(rank=1, world_size=2, others=lambda mine: [(None, None), mine])
    assert str(find_damage(path, others)).endswith("b: its SHA-256 is not the manifest's")


COMMON = {
    "callbacks": {},
    "epoch": 0,
    "global_step": 4,
    "loops": {},
    "opcd": {"config": {"optim": {"schedule": "constant"}}},
}


def write_common(path: Path, common: Any) -> None:
    torch.save({"common": common, "model": {}}, path / "common.pt")


def test_the_plain_part_is_read(tmp_path: Path) -> None:
    write_common(tmp_path, COMMON)
    assert read_common(tmp_path) == COMMON


@pytest.mark.parametrize(
    ("common", "missing"),
    [
        (None, "common"),
        ([], "common"),
        (COMMON | {"global_step": "4"}, "number as global_step"),
        (COMMON | {"opcd": None}, "opcd"),
        (COMMON | {"opcd": {}}, "config"),
        (COMMON | {"opcd": {"config": []}}, "config"),
        (COMMON | {"opcd": {"config": {}}}, "optim"),
        (COMMON | {"opcd": {"config": {"optim": {}}}}, "optim.schedule"),
        (
            {k: v for k, v in COMMON.items() if k != "callbacks"} | {"optimizer_states": []},
            "callbacks",
        ),
        *(
            ({k: v for k, v in COMMON.items() if k != name}, name)
            for name in COMMON
            if name != "callbacks"
        ),
    ],
)
def test_a_checkpoint_of_another_version_is_named_as_that(
    tmp_path: Path, common: Any, missing: str
) -> None:
    write_common(tmp_path, common)
    with pytest.raises(UserError) as caught:
        read_common(tmp_path)
    assert caught.value.key == str(tmp_path)
    assert caught.value.problem == f"its common.pt has no {missing}"
    assert "this version or an earlier one" in caught.value.allowed


LOOPS = {"state_dict": {}, "epoch_progress": {"total": {"ready": 1}, "current": {"ready": 0}}}


@pytest.mark.parametrize(
    ("fit_loop", "missing"),
    [
        (None, "loops.fit_loop"),
        ({}, "loops.fit_loop.state_dict"),
        ({"state_dict": {}}, "loops.fit_loop.epoch_progress"),
        (
            LOOPS | {"epoch_progress": {"total": {"ready": 1}}},
            "loops.fit_loop.epoch_progress.current",
        ),
        (
            LOOPS | {"epoch_progress": {"total": {"ready": 1}, "current": {"ready": "0"}}},
            "loops.fit_loop.epoch_progress.current.ready",
        ),
        (LOOPS, None),
        (LOOPS | {"more": 1}, None),
    ],
)
def test_a_checkpoint_of_another_lightning_is_named_as_that(
    tmp_path: Path, fit_loop: Any, missing: str | None
) -> None:
    write_common(tmp_path, COMMON | {"loops": {"fit_loop": fit_loop}})
    if missing is None:
        assert read_common(tmp_path, LOOPS)["loops"]["fit_loop"] == fit_loop
        return
    with pytest.raises(UserError) as caught:
        read_common(tmp_path, LOOPS)
    assert caught.value.problem == f"its common.pt has no {missing}"


def test_weights_alone_are_not_continued(tmp_path: Path) -> None:
    """Lightning leaves out callbacks and optimizer together."""
    write_common(tmp_path, {name: COMMON[name] for name in COMMON if name != "callbacks"})
    with pytest.raises(UserError, match=r"holds weights only; allowed: .*save_weights_only=false"):
        read_common(tmp_path)


def test_a_plain_part_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "common.pt")
    with pytest.raises(UserError, match=r"common\.pt has no common"):
        read_common(tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_plain_part_that_is_none_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "common.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"common\.pt"):
        read_common(tmp_path)
