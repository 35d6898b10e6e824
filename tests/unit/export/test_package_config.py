"""The configuration of a package that is exported again holds no more than a new one would."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from opcd_nemo.export.convert import package_config
from opcd_nemo.storage import durable

PLAIN = "# as NeMo wrote it\nstudent: {path: /models/a, eos_token: </s>}\ntrainer: {max_steps: 3}\n"
SECRET = """
student: {path: /models/a}
exp_manager:
  wandb_logger_kwargs: {settings: {api_key: 0123456789abcdef}}
  exp_dir: /runs/0123456789abcdef/x
"""


def packaged(folder: Path, text: str) -> str:
    (folder / "model_config.yaml").write_text(text)
    entry = durable.measure(folder / "model_config.yaml")
    durable.write_manifest(folder, {"model_config.yaml": entry})
    return package_config(str(folder), lambda: pytest.fail("it has one"))


def test_a_configuration_without_secrets_is_kept_to_the_letter(tmp_path: Path) -> None:
    assert packaged(tmp_path, PLAIN) == PLAIN


def test_secrets_of_an_earlier_version_are_not_handed_on(tmp_path: Path) -> None:
    text = packaged(tmp_path, SECRET)
    assert "0123456789abcdef" not in text
    found = yaml.safe_load(text)
    assert found["student"] == {"path": "/models/a"}
    assert found["exp_manager"]["exp_dir"] == "/runs/<secret>/x"
