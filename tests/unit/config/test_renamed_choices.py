"""Every choice that a file of `conf/` was has words that compose today."""

from __future__ import annotations

import pytest

from opcd_nemo.config.renamed import CHOICES
from opcd_nemo.config.train import load_config
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.recipes import CONF


@pytest.mark.parametrize("old", CHOICES)
def test_the_words_for_an_old_choice_compose(old: str) -> None:
    group, _, name = old.partition("=")
    assert not (CONF / group / f"{name}.yaml").exists()
    for words in CHOICES[old].replace(" or ", " ").split(","):
        load_config(compose("train", words.split()))
