"""Where a model is: a path, or a word."""

from __future__ import annotations

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import resolve_model_path


@pytest.mark.parametrize("path", ["", " "])
def test_no_path_is_not_the_folder_of_the_command(path: str) -> None:
    with pytest.raises(UserError, match="names no model"):
        resolve_model_path(path)
