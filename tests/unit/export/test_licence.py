"""A licence comes from the base model's own files, of which no more is read than a text has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opcd_nemo.config import limits
from opcd_nemo.export import provenance
from opcd_nemo.export.provenance import base_licence
from tests.tiny import refusal, write_chat_model


def test_the_licence_of_a_model(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    assert base_licence(str(folder))["licence"] == "not stated"
    (folder / "README.md").write_bytes(b"---\nlicense: mit\ntitle: \xff\n---\n# A model")
    (folder / "LICENSE").write_text("Do.")
    found = base_licence(str(folder))
    assert (found["licence"], found["texts"]) == ("mit", {"LICENSE": "Do."})


def test_a_licence_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    folder = write_chat_model(tmp_path / "model")
    (folder / "LICENSE").touch()
    os.truncate(folder / "LICENSE", 10 << 30)
    assert f"at most {limits.SETTINGS_BYTES} bytes" in refusal(base_licence, folder)


def test_the_base_of_a_checkpoint_is_what_its_run_started_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_chat_model(tmp_path / "model")
    monkeypatch.setattr(provenance, "base_path", {"runs/a/step=5.ckpt": str(folder)}.get)
    assert base_licence("runs/a/step=5.ckpt")["base_model"] == str(folder)
