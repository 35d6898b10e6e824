"""One job on a folder: a lock that ends with its holder, and a fence against earlier attempts."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from opcd_nemo.metrics import MetricLogger, read_metrics
from opcd_nemo.storage import durable
from opcd_nemo.storage.attempt import ATTEMPT_ENV
from opcd_nemo.storage.lock import lock_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_lock_names_its_holder_and_ends_with_it(run: Path) -> None:
    held = lock_folder(run)
    with pytest.raises(ValueError, match=r"in use by host .*, pid \d+, started 2.*allowed"):
        lock_folder(run)
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
    with pytest.raises(ValueError, match=r"gives no lock \(.*\); allowed: .* -o flock") as caught:
        lock_folder(run)
    assert os.strerror(number) in str(caught.value)
    assert "in use" not in str(caught.value)


def test_a_later_attempt_takes_over_and_the_earlier_one_can_publish_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPT_ENV, "12.0")
    zombie = lock_folder(run)  # never closed: its node is cut off
    run.mkdir()
    metrics = MetricLogger(run / "metrics.jsonl", zombie.check)
    metrics.log(0, {})
    final = run / "step=1.ckpt"
    old = durable.partial(final)
    old.mkdir()
    monkeypatch.setenv(ATTEMPT_ENV, "12.1")
    with lock_folder(run) as lock:
        lock.check()
        assert durable.partial(final) != old
        with pytest.raises(OSError, match=r"now held by host .* attempt 12\.1") as caught:
            durable.publish(old, final, {}, zombie.check)
        assert str(run.with_name(".run.lock")) in durable.describe(caught.value)
        with pytest.raises(OSError, match="now held by"):
            metrics.log(1, {})
    assert not final.exists()
    assert len(read_metrics(run / "metrics.jsonl")) == 1
    monkeypatch.setenv(ATTEMPT_ENV, "12.0")
    with pytest.raises(ValueError, match=r"in use by .*attempt 12\.1; allowed"):
        lock_folder(run)


@pytest.mark.parametrize("attempt", [None, "12.1", "13.2"])
def test_nobody_else_takes_a_held_folder(
    run: Path, attempt: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ATTEMPT_ENV, "12.1")
    held = lock_folder(run)
    monkeypatch.delenv(ATTEMPT_ENV)
    if attempt is not None:
        monkeypatch.setenv(ATTEMPT_ENV, attempt)
    with pytest.raises(ValueError, match=r"in use by .*attempt 12\.1"):
        lock_folder(run)
    held.check()


def test_another_job_follows_one_that_ended(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ATTEMPT_ENV, "12.7")
    lock_folder(run).close()
    monkeypatch.setenv(ATTEMPT_ENV, "13.0")
    lock_folder(run).close()
