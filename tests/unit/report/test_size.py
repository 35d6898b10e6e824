"""A page stays below its size whatever the run's files hold, and says what it leaves out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.report.command import write_page
from opcd_nemo.report.page import LIMITS, MOST_BYTES
from tests.report_folders import HOSTILE, token, write_pipeline, write_run

NASTY = "\"'<&" * 5 + "\U000e0001"  # 21 letters, each of which takes four bytes of a page or more


def text_of(page: Path) -> str:
    body = page.read_text(encoding="utf-8").partition("<body>")[2]
    return " ".join(re.sub("<[^>]+>", " ", body).split())


def change(file: Path, act: Callable[[Any], Any]) -> None:
    file.write_text(json.dumps(act(json.loads(file.read_text(encoding="utf-8")))))


def change_lines(file: Path, act: Callable[[Any], Any]) -> None:
    lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    file.write_text("".join(f"{json.dumps(act(json.loads(line)))}\n" for line in lines))


def swollen_tokens(tokens: Any) -> Any:
    """Twenty answers of 150 tokens: a run writes six of 120."""
    for records in tokens.values():
        records[:] = [
            {
                "uid": f"test/{number}",
                "question": "What?",
                "num_tokens": 150,
                "tokens": [token(f" word{n}", 0.3) for n in range(150)],
            }
            for number in range(20 if records is tokens["now"] else 5)
        ]
    return tokens


def test_a_swollen_token_file_makes_no_large_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    change(folder / "tokens.json", swollen_tokens)
    page = write_page([str(folder)])
    assert page.stat().st_size < MOST_BYTES
    text = text_of(page)
    assert "... and 30 tokens more" in text
    assert "The first 6 of 20 answers are shown; tokens.json has the others." in text
    assert "To stay below" not in text, "the answers that a run writes fit"


def test_an_ordinary_page_shows_all_and_says_so(tmp_path: Path) -> None:
    text = text_of(write_run(tmp_path / "run") / "report.html")
    assert "The first 12 of 24 test questions" in text
    assert "are shown" not in text
    assert "letters more" not in text


def test_long_answers_and_questions_are_cut_where_they_stand(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    change_lines(
        folder / "answers.jsonl",
        lambda line: line | {"text": NASTY * 700, "question": NASTY * 1500},
    )
    page = write_page([str(folder)])
    assert page.stat().st_size < MOST_BYTES
    text = text_of(page)
    assert "To stay below 2 MB this page shows the first" in text
    assert "letters of a text. The files of the run's folder have the rest." in text
    assert re.search(r"\.\.\. and 26,500 letters more", text)


def hostile(folder: Path) -> None:
    """Every part of every file is more than a run writes."""
    long = NASTY * 19
    numbers = {f"{n}{long}": 1.0 for n in range(120)}
    rows = {f"{long}{n}": {"value": 1.0, "intervals": {}, "task": {}} for n in range(120)}
    costs = ("cpu_seconds_by_phase", "cpu_seconds_of_evaluations", "peak_rss_gib_by_phase")
    pool = [{"system": long, "demonstrations": [[long, long]] * 110, "wrap": long}] * 20
    facts: dict[str, Any] = {
        "versions": {f"{n}{long}": long for n in range(120)},
        "command": [long] * 120,
        "controls": rows,
        "trained_controls": rows,
        "device": long,
        "tp": long,
        "context": {"pool": pool},
    }
    facts |= dict.fromkeys(costs, numbers)
    change(folder / "summary.json", lambda summary: summary | facts)
    odd = token(NASTY * 3, 1.0)
    odd |= {"student": [[NASTY * 3, 0.5]] * 7}
    record = {"uid": "same", "question": long, "num_tokens": 10**9, "tokens": [odd] * 121}
    tokens = {when: [record] * 7 for when in ("before", "after", "now")}
    (folder / "tokens.json").write_text(json.dumps(tokens))
    losses = {f"loss/{long}{n}": 1.0 for n in range(20)}
    change_lines(folder / "metrics.jsonl", lambda line: line | losses)
    transcript = "\n\n".join([f"Board:\n{long}", "Move: [up]"] * 110 + [long])
    texts = {"text": long, "question": long, "transcript": transcript}
    change_lines(folder / "answers.jsonl", lambda line: line | texts)
    values = {f"key{n}": f"{folder.name}{'<' * 6000}" for n in range(120)}
    (folder / "config.yaml").write_text(json.dumps(values))


def test_no_file_of_a_run_makes_a_large_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a", "b")]
    hostile(folders[0])
    for words in ([folders[0]], folders):
        page = write_page([str(word) for word in words])
        assert page.stat().st_size < MOST_BYTES
        assert "To stay below 2 MB this page shows the first" in text_of(page)


def test_many_candidates_are_counted_where_not_all_are_shown(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")

    def more(ranking: Any) -> Any:
        (first, *_) = ranking["ranked"]
        return ranking | {"ranked": [first] * 250}

    change(folder / "ranked.json", more)
    text = text_of(write_page([str(folder)]))
    assert "250 candidates" in text
    assert "The first 100 of 250 candidates are shown; ranked.json has the others." in text
    assert "The first 6 of 24 test games" in text


def test_no_file_of_a_pipeline_makes_a_large_page(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline", hostile=True)
    hostile(folder / "opcd-1")
    long = NASTY * 19

    def swell(summary: Any) -> Any:
        rows = summary["rows"] | {f"{long}{n}": summary["rows"]["opcd"] for n in range(110)}
        paired = {f"{long} - {n}": summary["paired"]["opcd - sft"] for n in range(110)}
        validations = {
            f"{long}{n}": [{"step": s, "score": 0.5, "retention": 0.5} for s in range(40)]
            for n in range(110)
        }
        return summary | {"rows": rows, "paired": paired, "validations": validations}

    change(folder / "summary.json", swell)
    change(
        folder / "ranked.json",
        lambda ranking: (
            ranking | {"ranked": [ranking["ranked"][0] | {"items": [HOSTILE] * 5}] * 110}
        ),
    )
    page = write_page([str(folder)])
    assert page.stat().st_size < MOST_BYTES
    assert 'href="opcd-1/report.html"' in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("limits", LIMITS)
def test_limits_only_narrow(limits: Any) -> None:
    wider = LIMITS[max(0, LIMITS.index(limits) - 1)]
    assert limits.letters <= wider.letters
    assert limits.entries <= wider.entries
    assert limits.tokens <= wider.tokens
