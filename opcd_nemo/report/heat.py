"""Answers token by token: every word with the heat of KL(student || teacher), before and after."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opcd_nemo.errors import visible
from opcd_nemo.report.page import Limits
from opcd_nemo.report.record import RunRecord, number, pick
from opcd_nemo.training.token_scores import MOST_ANSWERS, TOKENS

_LONGEST_TOKEN = 64
"""Letters of a token that are shown: vocabularies have runs of blanks that are longer."""
_LEVELS = (0.02, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
_LINES = {
    "before": "its answer before training, scored by the untrained student",
    "after": "the same words, scored by the trained student",
    "now": "its answer after training, scored by the trained student",
}


def heat(run: RunRecord, limits: Limits) -> dict[str, Any]:
    """Answers token by token: the words with their heat, and the data of every token shown."""
    questions: dict[str, dict[str, Any]] = {}
    data: list[Any] = []
    most = min(MOST_ANSWERS, limits.entries)
    for when, words in _LINES.items():
        for record in run.tokens.get(when, [])[:most]:
            shown_of = questions.setdefault(
                record["uid"], {"question": record["question"].strip(), "lines": []}
            )
            first, tokens = len(data), record["tokens"][: limits.tokens]
            data += [_token_data(token) for token in tokens]
            kls = [token["kl"] for token in record["tokens"]]
            shown_of["lines"].append(
                {
                    "words": words,
                    "mean": f"{sum(kls) / max(1, len(kls)):.2f}",
                    "left_out": max(0, max(len(kls), record["num_tokens"]) - len(tokens)),
                    "tokens": [
                        {"text": _cut(token["text"]), "heat": _heat_of(token["kl"]), "index": index}
                        for index, token in enumerate(tokens, start=first)
                    ],
                }
            )
    answers = max((len(records) for records in run.tokens.values()), default=0)
    return {
        "file": TOKENS,
        "questions": list(questions.values()),
        "most": most,
        "answers": answers,
        "data": data,
        "levels": [f"{level:g}" for level in _LEVELS],
        "statistics": [
            {"words": words, **_statistics(pick(run.summary, "tokens", when))}
            for when, words in _LINES.items()
            if isinstance(pick(run.summary, "tokens", when), Mapping)
        ],
    }


_STATISTICS = {
    "kl": ".2f",
    "student_entropy": ".2f",
    "teacher_entropy": ".2f",
    "top_overlap": ".0%",
    "heaviest_share": ".0%",
}


def _statistics(record: Any) -> dict[str, str]:
    found = {name: number(record, name) for name in _STATISTICS}
    return {
        name: "-" if value is None else f"{value:{_STATISTICS[name]}}"
        for name, value in found.items()
    }


def _heat_of(kl: float) -> int:
    return sum(kl >= level for level in _LEVELS)


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_TOKEN else f"{text[:_LONGEST_TOKEN]}..."


def _token_data(token: Mapping[str, Any]) -> list[Any]:
    sides = (
        [[visible(_cut(text)), p] for text, p in token[side][:5]] for side in ("student", "teacher")
    )
    return [
        visible(_cut(token["text"])),
        token["kl"],
        token["student_entropy"],
        token["teacher_entropy"],
        *sides,
    ]
