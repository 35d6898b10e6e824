"""A digest tells content, not names or times, and of large files a part of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.storage import digests
from opcd_nemo.storage.digests import file_digest


def test_a_copy_has_the_same_digest_and_a_changed_byte_another(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(content)
    os.utime(tmp_path / "b", (1, 1))
    expected = f"3000000 bytes, sha256 {hashlib.sha256(content).hexdigest()}"
    assert file_digest(tmp_path / "a") == file_digest(tmp_path / "b") == expected
    for place in (0, 1_500_000, 2_999_999):
        changed = bytearray(content)
        changed[place] ^= 1
        (tmp_path / "b").write_bytes(changed)
        assert file_digest(tmp_path / "b") != expected


def test_of_a_large_file_blocks_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "WHOLE_BYTES", 1 << 20)
    file, size = tmp_path / "large", 65 << 20
    with file.open("wb") as opened:
        opened.truncate(size)
    before = file_digest(file)
    assert before.startswith(f"{size} bytes, sha256 of blocks ")
    for place, is_seen in ((0, True), (64 << 20, True), (size - 1, True), (32 << 20, False)):
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"x")
        assert (file_digest(file) != before) is is_seen, place
        with file.open("r+b") as opened:
            opened.seek(place)
            opened.write(b"\0")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError):
        file_digest(tmp_path / "pipe")
