"""A run's folder: rank 0 alone writes, and only as long as no later attempt holds it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.storage import durable, run_folder
from opcd_nemo.storage.attempt import ATTEMPT_ENV
from opcd_nemo.storage.run_folder import RunFolder


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run"


def of_rank(rank: int, said_by_rank_0: Exception | None = None) -> Any:
    """A run of two ranks, of which this is one."""
    said = ("run", said_by_rank_0)
    return SimpleNamespace(rank=rank, gather_objects=lambda value: [said if rank else value, value])


def write(folder: RunFolder) -> None:
    folder.write("a.json", "{}")


def append(folder: RunFolder) -> None:
    folder.append("a.jsonl", "{}\n")


def publish(folder: RunFolder) -> None:
    temporary = durable.partial(folder.path / "step=1.ckpt")
    temporary.mkdir(exist_ok=True)
    folder.publish(temporary, folder.path / "step=1.ckpt", {})


def publish_file(folder: RunFolder) -> None:
    temporary = durable.partial(folder.path / "run.nemo")
    temporary.touch()
    folder.publish_file(temporary, folder.path / "run.nemo")


def set_aside(folder: RunFolder) -> None:
    folder.set_aside()


WRITES = [write, append, publish, publish_file, set_aside]


@pytest.mark.parametrize("change", WRITES)
def test_an_earlier_attempt_changes_nothing_that_has_a_name(
    change: Callable[[RunFolder], None], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPT_ENV, "12.0")
    zombie = RunFolder.hold(path)  # never closed: its node is cut off
    path.mkdir()
    monkeypatch.setenv(ATTEMPT_ENV, "12.1")
    with RunFolder.hold(path) as later:
        later.check_held()
        monkeypatch.setenv(ATTEMPT_ENV, "12.0")
        with pytest.raises(OSError, match=r"now held by host .* attempt 12\.1") as caught:
            change(zombie)
        assert str(path.with_name(".run.lock")) in durable.describe(caught.value)
    assert not [file.name for file in path.iterdir() if not file.name.startswith(".")]


@pytest.mark.parametrize("change", WRITES)
def test_who_holds_the_folder_changes_it(change: Callable[[RunFolder], None], path: Path) -> None:
    path.mkdir()
    with RunFolder.hold(path) as folder:
        change(folder)
    named = {file.name for file in path.parent.rglob("*") if not file.name.startswith(".")}
    assert named != {"run"}


def test_another_rank_writes_nothing(path: Path) -> None:
    path.mkdir()
    folder = RunFolder.hold(path, of_rank(1))
    for change in (write, append, set_aside):
        change(folder)
    assert not list(path.iterdir())
    assert path.exists()


def test_every_rank_is_refused_what_rank_0_is_refused(path: Path) -> None:
    with RunFolder.hold(path), pytest.raises(UserError) as caught:
        RunFolder.hold(path, of_rank(0))
    refusal = caught.value
    assert (refusal.where, refusal.key, refusal.allowed) == ("name", str(path), "one job at a time")
    with pytest.raises(UserError) as caught:
        RunFolder.hold(path, of_rank(1, said_by_rank_0=refusal))
    assert str(caught.value) == str(refusal)


def test_ranks_that_mean_other_folders_are_refused(path: Path) -> None:
    """As by `name=${now:%S}`, which each process works out by itself."""
    with pytest.raises(UserError, match=r"name: .*run-7: rank 0 has run; allowed: a name that is"):
        RunFolder.hold(path.with_name("run-7"), of_rank(1))


def test_a_disk_that_refuses_the_lock_refuses_every_rank(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusal = OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    def refuse(_: Path) -> None:
        raise refusal

    monkeypatch.setattr(run_folder, "lock_folder", refuse)
    for rank in (of_rank(0), of_rank(1, said_by_rank_0=refusal)):
        with pytest.raises(OSError, match="Read-only file system"):
            RunFolder.hold(path, rank)


def test_a_full_disk_is_told_with_the_file(path: Path) -> None:
    path.mkdir()
    folder = RunFolder(path)
    (path / "a.jsonl").symlink_to("/dev/full")
    durable.partial(path / "a.json").symlink_to("/dev/full")
    for change, name in ((append, "a.jsonl"), (write, "a.json")):
        with pytest.raises(OSError, match="No space left") as caught:
            change(folder)
        assert durable.describe(caught.value) == (
            f"{path / name}: No space left on device (errno 28)"
        )


def test_a_folder_that_was_removed_is_no_bug(path: Path) -> None:
    with RunFolder.hold(path) as folder:
        path.with_name(".run.lock").unlink()
        with pytest.raises(OSError, match="was removed") as caught:
            write(folder)
    assert caught.value.errno == errno.ESTALE


def test_an_appended_line_is_read_back(path: Path) -> None:
    path.mkdir()
    folder = RunFolder(path)
    for number in range(2):
        folder.append("lines", f"{number}\n")
        assert (path / "lines").read_text().endswith(f"{number}\n")
    assert (path / "lines").read_text() == "0\n1\n"


def test_lines_are_on_the_disk_before_a_checkpoint_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync = os.fsync

    def remember(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", remember)
    folder = RunFolder(tmp_path)
    for number in range(2):
        folder.append("metrics.jsonl", "{}\n")
        (tmp_path / "new").mkdir()
        folder.publish(tmp_path / "new", tmp_path / f"step={number}.ckpt", {})
        assert done.index("metrics.jsonl") < done.index("new")
        done.clear()


def test_lines_are_utf_8_whatever_the_locale(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.mkdir()
    opened, real = [], Path.open

    def note(self: Path, *given: Any, **named: Any) -> Any:
        opened.append(named.get("encoding"))
        return real(self, *given, **named)

    with RunFolder.hold(path) as folder:
        monkeypatch.setattr(Path, "open", note)
        append(folder)
    assert set(opened) == {"utf-8"}
