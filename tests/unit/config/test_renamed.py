"""Old keys and names: refused on a command line with the new key, translated in stored files."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.changes import differences
from opcd_nemo.config.renamed import present_config, present_update
from opcd_nemo.config.stored import parse_stored
from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose


def as_before(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as 456d659 wrote it."""
    old = copy.deepcopy(config)
    for name in ("rollout", "evaluation"):
        old[name] |= old[name].pop("sampling")
    lives = {"never": "frozen", "every_n_steps": "hard_sync", "ema": "ema", "shared": "live"}
    old["teacher"]["life"] = lives[old["teacher"].pop("update")]
    return old


@pytest.mark.parametrize("teacher", ["same", "hard_sync", "ema", "live"])
def test_a_stored_configuration_gets_the_present_keys(teacher: str) -> None:
    now: Any = OmegaConf.to_container(compose("train", [f"teacher={teacher}"]), resolve=True)
    old = as_before(now)
    assert old["rollout"]["temperature"] == 1.0
    assert present_config(old) == now
    assert old == as_before(now), "the argument was changed"
    assert parse_stored(OmegaConf.to_yaml(OmegaConf.create(old)).encode(), "a file") == now
    assert load_config(OmegaConf.create(present_config(old))).rollout.sampling.top_p == 1.0


def test_a_checkpoint_of_old_keys_differs_in_nothing() -> None:
    now: Any = OmegaConf.to_container(compose("train", []), resolve=True)
    assert not differences(present_config(as_before(now)), now, ["rollout", "evaluation"], [])
    changed = as_before(now)
    changed["rollout"]["top_k"] = 3
    found = differences(present_config(changed), now, ["rollout"], [])
    assert list(found) == ["rollout.sampling.top_k"]


def test_the_pipelines_keys_are_translated_too() -> None:
    extraction = {"model": None, "temperature": 0.6, "max_new_tokens": 9}
    assert present_config({"experience": {"extraction": extraction}})["experience"] == {
        "extraction": {"model": None, "sampling": {"temperature": 0.6, "max_new_tokens": 9}}
    }


@pytest.mark.parametrize("recipe", ["demo_brevity", "demo_sokoban"])
def test_a_present_configuration_stays_as_it_is(recipe: str) -> None:
    now: Any = OmegaConf.to_container(compose("experience", [f"recipe={recipe}"]))
    assert present_config(now) == now, "a symbol of a game is called target too"


@pytest.mark.parametrize("key", ["rollout.temperature", "evaluation.max_new_tokens"])
def test_an_old_key_on_the_command_line_names_the_new_one(key: str) -> None:
    group, name = key.split(".")
    with pytest.raises(UserError) as refused:
        load_config(compose("train", [f"+{key}=3"]))
    assert (refused.value.key, refused.value.problem) == (key, "was renamed")
    assert refused.value.allowed == f"{group}.sampling.{name}=3"


def test_an_old_value_on_the_command_line_names_the_new_one() -> None:
    with pytest.raises(UserError) as refused:
        load_config(compose("train", ["+teacher.life=hard_sync"]))
    assert refused.value.allowed == "teacher.update=every_n_steps"


def test_the_teacher_of_an_old_checkpoint_has_its_present_word() -> None:
    assert present_update({"teacher_life": "live"}) == "shared"
    assert present_update({"teacher_update": "every_n_steps"}) == "every_n_steps"
    assert present_update({}) == "never"
