"""One job on a folder: a lock that ends with its holder, and a fence against earlier attempts."""

from __future__ import annotations

import errno
import fcntl
import os
import re
from pathlib import Path

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.storage.attempt import ATTEMPT_ENV
from opcd_nemo.storage.lock import lock_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_lock_names_its_holder_and_ends_with_it(run: Path) -> None:
    held = lock_folder(run)
    with pytest.raises(UserError) as caught:
        lock_folder(run)
    assert caught.value.key == str(run)
    assert re.fullmatch(r"in use by host .*, pid \d+, started 2.*", str(caught.value.problem))
    held.check()
    held.close()
    lock_folder(run).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named_as_that(
    number: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    monkeypatch.setenv(ATTEMPT_ENV, "12.1")
    with pytest.raises(UserError) as caught:
        lock_folder(run)
    assert caught.value.problem == f"its file system gives no lock ({os.strerror(number)})"
    assert "-o flock" in caught.value.allowed


def test_an_earlier_attempt_cannot_take_the_folder_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPT_ENV, "12.0")
    zombie = lock_folder(run)  # never closed: its node is cut off
    monkeypatch.setenv(ATTEMPT_ENV, "12.1")
    lock_folder(run).close()
    monkeypatch.setenv(ATTEMPT_ENV, "12.0")
    with pytest.raises(UserError) as caught:
        lock_folder(run)
    assert re.fullmatch(r"in use by .*attempt 12\.1", str(caught.value.problem))
    with pytest.raises(OSError, match="now held by"):
        zombie.check()


@pytest.mark.parametrize("attempt", [None, "12.1", "13.2"])
def test_nobody_else_takes_a_held_folder(
    run: Path, attempt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPT_ENV, "12.1")
    held = lock_folder(run)
    monkeypatch.delenv(ATTEMPT_ENV)
    if attempt is not None:
        monkeypatch.setenv(ATTEMPT_ENV, attempt)
    with pytest.raises(UserError, match=r"in use by .*attempt 12\.1"):
        lock_folder(run)
    held.check()


def test_another_job_follows_one_that_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT_ENV, "12.7")
    lock_folder(run).close()
    monkeypatch.setenv(ATTEMPT_ENV, "13.0")
    lock_folder(run).close()


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_what_is_no_file_under_the_lock_s_name_is_refused(tmp_path: Path, kind: str) -> None:
    victim, lock = tmp_path / "victim", tmp_path / ".run.lock"
    if kind == "folder":
        lock.mkdir()
    elif kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(victim)
    if kind == "link":
        victim.write_text("precious")
    with pytest.raises(UserError) as caught:
        lock_folder(tmp_path / "run")
    assert caught.value.key == str(lock)
    assert victim.exists() == (kind == "link")
    assert kind != "link" or victim.read_text() == "precious"


def test_a_lock_that_is_no_text_is_taken_over(tmp_path: Path) -> None:
    (tmp_path / ".run.lock").write_bytes(b"\xff\xfe\x00 not a text")
    with lock_folder(tmp_path / "run") as lock:
        lock.check()
