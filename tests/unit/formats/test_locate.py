"""Where a model is: a path, or a word."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import parse_json, resolve_model_path


@pytest.mark.parametrize("path", ["", " "])
def test_no_path_is_not_the_folder_of_the_command(path: str) -> None:
    with pytest.raises(UserError, match="names no model"):
        resolve_model_path(path)


def test_a_key_that_stands_twice_is_refused() -> None:
    with pytest.raises(UserError, match=r"config\.json: .*'hidden_size' stands twice"):
        parse_json('{"hidden_size": 64, "hidden_size": 32}', "config.json")


def test_the_folder_of_a_run_names_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (10, 30, 20):
        (tmp_path / "checkpoints" / f"step={step}.ckpt").mkdir(parents=True)
        os.utime(tmp_path / "checkpoints" / f"step={step}.ckpt", (step, step))
    with pytest.raises(UserError) as refused:
        resolve_model_path(str(tmp_path))
    assert refused.value.problem == "is the folder of a run"
    assert refused.value.allowed == f"a model, as {tmp_path}/checkpoints/step=30.ckpt"
    (tmp_path / "config.json").write_text("{}")  # a model's folder may hold anything besides
    assert resolve_model_path(str(tmp_path)) == tmp_path
