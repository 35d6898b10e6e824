"""A published folder is whole, and every kind of damage is found and named."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.config.changes import check_unchanged
from opcd_nemo.errors import UserError
from opcd_nemo.storage import durable
from opcd_nemo.storage.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    temporary = tmp_path / ".one.partial"
    (temporary / "deep").mkdir(parents=True)
    (temporary / "a.bin").write_bytes(b"a" * 1000)
    (temporary / "deep" / "b.bin").write_bytes(b"b" * 10)
    names = durable.files_in(temporary)
    entries = {name: durable.measure(temporary / name, sync=True) for name in names}
    RunFolder(tmp_path).publish(temporary, tmp_path / "one", entries)
    return tmp_path / "one"


def refuse(path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the disk refuse one path; a user who is root is refused nothing."""

    def refusing(do: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(given: Any, *more: Any, **named: Any) -> Any:
            if Path(given) == path:
                raise OSError(number, os.strerror(number), str(path))
            return do(given, *more, **named)

        return refuse

    monkeypatch.setattr(os, "scandir", refusing(os.scandir))
    monkeypatch.setattr(io, "open", refusing(io.open))


def damage_of(folder: Path) -> str | None:
    try:
        entries = durable.read_manifest(folder)
    except UserError as error:
        return str(error)
    return durable.find_damage(folder, entries, sorted(entries))


def test_a_whole_folder_has_no_damage(folder: Path) -> None:
    assert durable.files_in(folder) == ["a.bin", "deep/b.bin"]
    assert damage_of(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_truncation_is_named(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"a" * 999)
    assert damage_of(folder) == f"{folder / 'a.bin'}: has 999 bytes instead of 1000"


def test_one_flipped_bit_is_named(folder: Path) -> None:
    (folder / "deep" / "b.bin").write_bytes(b"b" * 9 + b"c")
    assert damage_of(folder) == f"{folder / 'deep/b.bin'}: its SHA-256 is not the manifest's"


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "deep" / "b.bin").unlink()
    assert str(damage_of(folder)).startswith(f"{folder}: deep/b.bin: is missing; allowed")


def test_an_unknown_file_is_named(folder: Path) -> None:
    (folder / "new.bin").write_bytes(b"")
    assert str(damage_of(folder)).startswith(f"{folder}: new.bin: is not in the manifest")


@pytest.mark.parametrize(
    "text", [None, "", "{", "[]", '{"a.bin": 3}', '{"a.bin": []}', "[" * 99999]
)
def test_a_missing_or_broken_manifest_is_named(folder: Path, text: str | None) -> None:
    manifest = folder / durable.MANIFEST
    manifest.unlink() if text is None else manifest.write_text(text)
    assert str(damage_of(folder)).startswith(f"{folder}: {durable.MANIFEST}: cannot be read")


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EACCES])
@pytest.mark.parametrize("name", ["a.bin", "deep", durable.MANIFEST])
def test_what_a_disk_does_not_give_is_no_damage(
    folder: Path, name: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(folder / name, number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        damage_of(folder)
    assert durable.describe(caught.value).endswith(f"(errno {number})")


def test_a_file_that_goes_while_it_is_verified_is_missing(folder: Path) -> None:
    entries = durable.read_manifest(folder)
    (folder / "a.bin").unlink()
    assert (
        durable.find_damage(folder, entries, sorted(entries)) == f"{folder / 'a.bin'}: is missing"
    )


def test_a_manifest_that_is_a_pipe_is_none(folder: Path) -> None:
    (folder / durable.MANIFEST).unlink()
    os.mkfifo(folder / durable.MANIFEST)
    assert "cannot be read (no plain file)" in str(damage_of(folder))


@pytest.mark.parametrize("umask", [0o077, 0o022, 0o002])
def test_files_and_folders_have_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        with RunFolder.hold(tmp_path / "run") as run_folder:
            temporary = durable.partial(tmp_path / "run" / "one")
            temporary.mkdir(parents=True)
            run_folder.append("metrics.jsonl", "{}\n")
            run_folder.write("summary.json", "{}")
            run_folder.publish(temporary, tmp_path / "run" / "one", {})
    finally:
        os.umask(before)
    made = list(tmp_path.rglob("*"))
    assert len(made) == 6
    for path in made:
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_publishing_replaces_what_had_the_name(folder: Path) -> None:
    temporary = folder.with_name("next")
    temporary.mkdir()
    (temporary / "c.bin").write_bytes(b"c")
    entries = {"c.bin": durable.measure(temporary / "c.bin")}
    RunFolder(folder.parent).publish(temporary, folder, entries)
    assert durable.files_in(folder) == ["c.bin"]
    assert damage_of(folder) is None
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_cleaning_removes_what_a_crash_left_and_no_published_folder(folder: Path) -> None:
    partial = durable.partial(folder)
    partial.mkdir()
    folder.rename(folder.with_name(".one.replaced"))  # the crash came between two renames
    durable.clean(folder.parent)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    assert damage_of(folder) is None
    folder.with_name(".one.replaced").mkdir()
    durable.clean(folder.parent)
    assert [path.name for path in folder.parent.iterdir()] == ["one"]


def test_what_cannot_be_cleaned_stops_no_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    durable.partial(folder).mkdir()

    def rmdir(*_: object, **__: object) -> None:
        raise OSError(errno.ENOTEMPTY, "a node that was given up writes there")

    monkeypatch.setattr(os, "rmdir", rmdir)
    durable.clean(folder.parent)
    assert damage_of(folder) is None


def test_what_is_set_aside_takes_the_first_free_name(folder: Path) -> None:
    for _ in range(2):
        durable.set_aside(folder, ".damaged")
        folder.mkdir()
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == ["one", "one.damaged", "one.damaged.1"]


def config(**changes: object) -> dict[str, object]:
    optim = {"lr": 1.0, "schedule": "constant"}
    return {"optim": optim, "trainer": {"max_steps": 3}, "parallel": {"tp": 1}, **changes}


def test_layout_and_length_may_change() -> None:
    check_unchanged(config(), config(parallel={"tp": 2}, trainer={"max_steps": 9}), [])


def test_length_may_not_change_under_a_schedule() -> None:
    cosine = {"lr": 1.0, "schedule": "cosine"}
    saved = config(optim=cosine)
    with pytest.raises(ValueError, match=r"trainer.max_steps was 3, is 9; allowed"):
        check_unchanged(saved, config(optim=cosine, trainer={"max_steps": 9}), [])


def test_keys_that_came_or_went_are_shown() -> None:
    with pytest.raises(ValueError, match=r"loss.beta was 0.5, is \(absent\); loss.k was \(abs"):
        check_unchanged(config(loss={"beta": 0.5}), config(loss={"k": 3}), [])
    check_unchanged(config(loss={"beta": 0.5}), config(loss={"k": 3}), ["loss"])


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_forced_to_the_disk_when_it_is_measured(
    sync: bool, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forced = []
    monkeypatch.setattr(os, "fsync", forced.append)
    assert durable.measure(folder / "a.bin", sync=sync).num_bytes == 1000
    assert len(forced) == sync


def test_a_file_where_a_folder_must_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    durable.check_folders("name", "run", (tmp_path, tmp_path / "new"))
    for name in ("file", "dangling"):
        with pytest.raises(UserError, match=f"name=run: .*{name} is no folder; allowed: one under"):
            durable.check_folders("name", "run", (tmp_path, tmp_path / name))


def test_a_read_that_fails_is_told_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "memory").symlink_to("/proc/self/mem")  # gives nothing from its start
    with pytest.raises(OSError, match="Input/output error") as caught:
        durable.measure(tmp_path / "memory")
    assert caught.value.filename == str(tmp_path / "memory")


def test_what_is_forced_to_the_disk_has_left_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sync of a file whose last bytes Python still holds would force nothing of them."""
    synced: dict[str, int] = {}

    def note(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        synced[name] = os.fstat(descriptor).st_size

    monkeypatch.setattr(os, "fsync", note)
    durable.write_whole(tmp_path / "whole", "text")
    durable.write_manifest(tmp_path, {"a": durable.Entry(num_bytes=1, sha256="b")})
    with RunFolder.hold(tmp_path / "run"):
        assert synced[".run.lock"] == (tmp_path / ".run.lock").stat().st_size > 0
    assert synced[durable.partial(tmp_path / "whole").name] == 4
    assert synced[durable.MANIFEST] == (tmp_path / durable.MANIFEST).stat().st_size > 0
