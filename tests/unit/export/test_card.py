"""The model card: numbers of the run, and a stranger's words as text."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import yaml

from opcd_nemo.export.card import model_card
from opcd_nemo.export.provenance import Provenance, _front_matter

CONTEXT = {
    "system": "Answer in one short sentence.",
    "demonstrations": [["What is a bell?", "A bell rings."]],
    "experience": None,
    "content_hash": "3fa2" * 16,
    "lineage": {"written_by": "a person"},
}


def _rows(**scores: dict[str, Any]) -> dict[str, Any]:
    return {name: {"task": score, "retention": {"score": 0.5}} for name, score in scores.items()}


SUMMARY = {
    "evaluation": _rows(
        base={"score": 0.0},
        in_context={"score": 1.0},
        student={
            "score": 0.9,
            "intervals": {"score": {"value": 0.9, "low": 0.784, "high": 0.957}},
        },
    )
}
FULL = Provenance(
    context=CONTEXT,
    evaluation=SUMMARY,
    licence={"base_model": "hf://Qwen/Qwen3-0.6B@abc", "licence": "apache-2.0", "texts": {}},
)


def test_a_card_says_what_the_run_knows() -> None:
    card = model_card(FULL, "me/brief")
    for words in (
        "license: apache-2.0\nbase_model: Qwen/Qwen3-0.6B\n",
        "| **this model**, without the context | 0.90 [0.78, 0.96] | 0.50 |",
        CONTEXT["content_hash"],
        "    Answer in one short sentence.",
        "    Q What is a bell?\n    A A bell rings.",
        "vllm serve me/brief",
        'model="me/brief"',
        "convert_hf_to_gguf.py",
    ):
        assert words in card, words
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"


def test_the_licence_of_a_card_is_read_again(tmp_path: Any) -> None:
    (tmp_path / "README.md").write_text(model_card(FULL, None))
    assert _front_matter(tmp_path / "README.md")["license"] == "apache-2.0"


def test_a_model_that_was_only_converted_has_neither_scores_nor_context() -> None:
    licence = {"base_model": "models/x", "licence": "not stated", "texts": {"LICENSE": "Do."}}
    card = model_card(Provenance(context=None, evaluation=None, licence=licence), None)
    assert "## Scores" not in card
    assert "## The context" not in card
    assert "license:" not in card
    assert "`LICENSE`" in card


def test_words_of_a_stranger_stay_text() -> None:
    hostile = "```\n</code><script>alert(1)</script>\n# [x](javascript:y)\x1b[31m"
    context = {**CONTEXT, "system": hostile, "lineage": {"written_by": "`<b>"}}
    evaluation = {"evaluation": _rows(base={"score": "<script>"}, student={"score": None})}
    licence = {"base_model": "`<i>`", "licence": "mit\nbase_model: evil", "texts": {"`<u>`": ""}}
    card = model_card(Provenance(context=context, evaluation=evaluation, licence=licence), None)
    assert "license:" not in card
    assert "\x1b" not in card
    assert "| ? |" in card
    outside = [line for line in card.splitlines() if not line.startswith("    ")]
    assert not [line for line in outside if "<script>" in line or "javascript" in line]
    for line in outside:
        assert "<" not in "".join(line.split("`")[::2]), line


def test_a_summary_of_something_else_is_no_table_of_numbers() -> None:
    assert "| ? | ? |" in model_card(replace(FULL, evaluation={"evaluation": 3}), None)
