"""Models and data are known by their content: a copy is the same, a change in place is not."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.config.changes import Digests, check_unchanged
from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.training.digests import input_digests, model_digest, model_digests
from tests.quick_compose import compose
from tests.tiny import write_chat_model


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_chat_model(tmp_path / "tiny")


def digests(model: Path, *words: str) -> Digests:
    config = load_config(compose("train", [f"student.path={model}", *words]))
    return input_digests(config, ChatTokenizer.from_path(str(model)))


def test_a_copied_model_is_the_same_model(model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    (copied / "README.md").write_text("a card")
    assert digests(copied) == digests(model)
    assert model_digest(str(copied)) == model_digest(str(model))


@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_that_was_changed_in_place_is_named(model: Path, name: str) -> None:
    before = digests(model)
    file = model / name
    if name.endswith(".json"):
        file.write_text(f"{file.read_text()}\n")
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"\7")
    with pytest.raises(UserError) as refused:
        check_unchanged(origin(), origin(), [], (before, digests(model)))
    assert f"student.path has another content than the run began with ({name}" in str(refused.value)
    assert "resume.allow_changes=[student.path]" in refused.value.allowed
    check_unchanged(origin(), origin(), ["student.path"], (before, digests(model)))
    check_unchanged(origin(), origin(), ["student"], (before, digests(model)))


def test_files_of_a_task_are_known_wherever_its_arguments_name_them(tmp_path: Path) -> None:
    model = write_chat_model(tmp_path / "tiny")
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f'{{"{name}": 1}}\n')
    words = ["task=gsm8k", *(f"task.{one}={tmp_path}/{one}.jsonl" for one in ("train", "test"))]
    found = digests(model, *words)
    assert found.keys() == {"student.path", "task.train", "task.test"}
    (tmp_path / "train.jsonl").write_text('{"train": 2}\n')
    with pytest.raises(UserError, match=r"task\.train has another content than the run began "):
        check_unchanged(origin(), origin(), [], (found, digests(model, *words)))


def test_a_column_is_no_file_whatever_lies_here(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "test.jsonl", "answer", "question"):
        Path(name).write_text("{}\n")
    words = ("task=gsm8k", "task.train=train.jsonl", "task.test=test.jsonl")
    assert digests(model, *words).keys() == {"student.path", "task.train", "task.test"}


def test_a_file_of_the_same_content_may_have_another_path(model: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(model, tmp_path / "elsewhere"))
    moved = (origin(path="a"), origin(path="b"))
    check_unchanged(*moved, [], (digests(model), digests(copied)))
    with pytest.raises(UserError, match=r"student\.path was a, is b"):
        check_unchanged(*moved, [], ({}, digests(copied)))


def test_a_teacher_has_a_digest_of_its_own(model: Path, tmp_path: Path) -> None:
    teacher = write_chat_model(tmp_path / "teacher", seed=1)
    found = digests(model, f"teacher.path={teacher}")
    assert found["teacher.path"] == model_digests(str(teacher)) != model_digests(str(model))


def origin(path: str = "a") -> dict[str, Any]:
    return {"student": {"path": path}, "optim": {"schedule": "constant"}}
