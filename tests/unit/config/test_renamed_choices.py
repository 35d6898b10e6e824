"""Every choice that a file of `conf/` was has words that compose today."""

from __future__ import annotations

import pytest

from opcd_nemo.config.renamed import CHOICES
from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.recipes import CONF


@pytest.mark.parametrize("old", CHOICES)
def test_the_words_for_an_old_choice_compose(old: str) -> None:
    group, _, name = old.partition("=")
    assert not (CONF / group / f"{name}.yaml").exists()
    for words in CHOICES[old].replace(" or ", " ").split(","):
        load_config(compose("train", words.split()))


def test_an_old_choice_and_an_old_key_name_the_new_words() -> None:
    with pytest.raises(UserError) as refused:
        compose("train", ["recipe=demo_json_sft"])
    assert refused.value.allowed == "recipe=demo_json method=sft"
    with pytest.raises(UserError) as refused:
        compose("experience", ["experience.consolidation.losses.offpolicy.temperature=0.5"])
    assert refused.value.allowed == (
        "experience.consolidation.settings.off_policy.loss.temperature=0.5"
    )
