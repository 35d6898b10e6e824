"""Recipes of `opcd experience`: their files have its keys, which no other program takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

import opcd_nemo
from opcd_nemo.errors import UserError

CONF = Path(opcd_nemo.__file__).with_name("conf")
PIPELINE = "experience"  # a program of conf/, and the group of its keys


def of_program(program: str, config: DictConfig, words: Sequence[str] = ()) -> DictConfig:
    """A composed configuration without the pipeline's keys, unless the program is the pipeline.

    Raises:
        UserError: a word gives a value to a key that is left out.
    """
    if program == PIPELINE or PIPELINE not in config:
        return config
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if key.startswith(f"{PIPELINE}."):
            raise UserError(key, value, f"a key of opcd {program}; opcd {PIPELINE} has this one")
    kept = config.copy()
    with open_dict(kept):
        kept.pop(PIPELINE)
    return kept


def is_for_pipeline(file: Path) -> bool:
    """Whether a recipe's file, or a file below it in its defaults list, has the pipeline's keys."""
    recipe = OmegaConf.load(file)
    assert isinstance(recipe, DictConfig)
    bases = [item for item in recipe.get("defaults", []) if isinstance(item, str)]
    below = [file.parent / f"{base}.yaml" for base in bases if base != "_self_"]
    return PIPELINE in recipe or any(map(is_for_pipeline, below))


def for_another_program(error: Exception, program: str) -> Exception:
    """What a user who gave a recipe to the wrong command must know; else the error itself.

    A recipe of the pipeline trains on experience, which `opcd train` must be given; a recipe of
    `opcd train` has a context that holds no experience.
    """
    from hydra.core.hydra_config import HydraConfig

    in_context = isinstance(error, UserError) and error.key.startswith("context.")
    if not in_context or not HydraConfig.initialized():
        return error
    recipe = HydraConfig.get().runtime.choices.get("recipe")
    file = CONF / "recipe" / f"{recipe}.yaml"
    if not file.is_file():  # of a chat, or of a run without a recipe
        return error
    piped = is_for_pipeline(file)
    if piped == (program == PIPELINE):
        return error
    if piped:
        allowed = f"opcd {PIPELINE} recipe={recipe}, which writes the experience and trains on it"
        problem = f"is for opcd {PIPELINE}, unless context.path= names experience"
    else:
        allowed = f"opcd train recipe={recipe}; or a recipe of opcd {PIPELINE}, as demo_games"
        problem = "is for opcd train"
    return UserError("recipe", recipe, allowed, problem=problem)
