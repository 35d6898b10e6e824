"""A name that does not exist is answered by those that look alike, and by few others."""

from __future__ import annotations

from opcd_nemo.config.spelling import unknown_name


def test_the_nearest_name_is_guessed_and_stands_first() -> None:
    error = unknown_name("recipe", ["math", "demo_json", "demo_brevity"], name="demo_brevty")
    assert error.problem == "no such key; did you mean demo_brevity?"
    assert error.allowed == "demo_brevity, math, demo_json"


def test_no_line_has_more_than_a_dozen_names() -> None:
    error = unknown_name("key", [f"a{n}" for n in range(28)], name="zzz", what="recipe")
    assert error.problem == "no such recipe"
    assert error.allowed == ", ".join(f"a{n}" for n in range(12)) + ", ... (16 more)"


def test_a_key_of_another_group_is_guessed_where_no_neighbour_looks_alike() -> None:
    error = unknown_name("optim.top_k", ["lr", "eps"], elsewhere=["rollout.sampling.top_k"])
    assert error.problem == "no such key; did you mean rollout.sampling.top_k?"
    assert error.allowed == "lr, eps"
