"""Recipes of `opcd experience`: their files have its keys, which no other program takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.errors import UserError

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
    """Whether a recipe's file has keys of the pipeline, or one that it is laid over has."""
    recipe = OmegaConf.load(file)
    assert isinstance(recipe, DictConfig)
    bases = [item for item in recipe.get("defaults", []) if isinstance(item, str)]
    below = [file.parent / f"{base}.yaml" for base in bases if base != "_self_"]
    return PIPELINE in recipe or any(map(is_for_pipeline, below))
