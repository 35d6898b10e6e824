"""A recipe that is given to the wrong command says which command it is for."""

from __future__ import annotations

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.recipes import for_another_program


@pytest.mark.parametrize(
    ("program", "recipe", "key", "told"),
    [
        ("train", "demo_games", "context.path", "opcd experience recipe=demo_games"),
        ("doctor", "demo_sokoban", "context.path", "opcd experience recipe=demo_sokoban"),
        ("experience", "demo_json", "context._target_", "opcd train recipe=demo_json"),
        ("train", "demo_json", "context.path", None),
        ("experience", "demo_games", "context._target_", None),
        ("train", "demo_games", "optim.lr", None),
    ],
)
def test_the_right_command_is_named(program: str, recipe: str, key: str, told: str | None) -> None:
    compose(program, [f"recipe={recipe}"])
    given = UserError(key, 1, "2")
    error = for_another_program(given, program)
    if told is None:
        assert error is given
    else:
        assert isinstance(error, UserError)
        assert (error.key, error.value) == ("recipe", recipe)
        assert error.allowed.startswith(told)


def test_a_bug_stays_a_bug() -> None:
    bug = ValueError("context.path")
    assert for_another_program(bug, "train") is bug


@pytest.mark.parametrize(
    ("program", "words"), [("chat", ["from=a"]), ("train", ["~recipe", "name=a"])]
)
def test_a_program_without_a_recipe_has_its_own_error(program: str, words: list[str]) -> None:
    compose(program, words)
    given = UserError("context.system", "", "a text")
    assert for_another_program(given, program) is given
