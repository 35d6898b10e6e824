"""A user's mistake is told alike in every process."""

from __future__ import annotations

import pickle

import pytest

from opcd_nemo.errors import ABSENT, UserError


@pytest.mark.parametrize("value", [ABSENT, None, "x", 3, True])
def test_another_process_tells_the_same(value: object) -> None:
    error = UserError("a.b", value, "another", problem="is wrong", where="a file")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert (again.value is ABSENT) == (value is ABSENT)
