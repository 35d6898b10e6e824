"""Where a model is: a path, or a word."""

from __future__ import annotations

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
