"""Tables, samples, curves and the numbers of the summary."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from opcd_nemo.evaluation import report
from opcd_nemo.evaluation.answers_file import write_answers
from opcd_nemo.evaluation.curves import panels, write_curves
from opcd_nemo.evaluation.evaluator import Answer, Evaluation
from opcd_nemo.formats.locate import write_json
from opcd_nemo.metrics import metric_line

PLOTTED = ("rollout/response_tokens", "optim/grad_norm", "perf/tokens_per_s")


def evaluation(*answers: tuple[str, float]) -> Evaluation:
    return Evaluation(
        answers=tuple(
            Answer(
                uid=f"test/{index}",
                question=f"What is {index}?",
                sample=0,
                text=text,
                score=score,
                answered=text != "y",
                num_tokens=len(text),
                leaked=text == "y",
            )
            for index, (text, score) in enumerate(answers)
        )
    )


def test_a_full_disk_is_told_with_the_file(tmp_path: Path) -> None:
    found, metrics = evaluation(("a", 1.0)), tmp_path / "metrics.jsonl"
    line = dict.fromkeys(("loss/reverse_kl", *PLOTTED), 1.0)
    metrics.write_text(metric_line(0, line))
    writers: list[Callable[[Path], None]] = [
        lambda path: report.write_samples(path, {"base": found}),
        lambda path: write_answers(path, {"base": (found, found)}),
        lambda path: write_curves(path, metrics),
    ]
    for number, write in enumerate(writers):
        path = tmp_path / f"{number}.png"
        path.symlink_to("/dev/full")
        with pytest.raises(OSError, match="No space left") as caught:
            write(path)
        assert caught.value.filename == str(path)


def test_table_has_a_row_for_every_name() -> None:
    low, open_end = ({"value": v, "low": 0.0, "high": e} for v, e in ((0.04, 0.125), (1.0, None)))
    table = report.results_table({"base": (low, low), "after training": (open_end, low)})
    header, base, after = table.splitlines()
    assert header.split() == ["task", "retention"]
    assert base.split() == ["base", *["0.04", "[0.00,", "0.12]"] * 2]
    assert after.split()[:5] == ["after", "training", "1.00", "[0.00,", "?]"]


def test_peak_memory_of_another_process_is_its_own_account() -> None:
    mine = report.peak_rss_kib()
    assert report.peak_rss_of(os.getpid()) == pytest.approx(mine, rel=0.05)
    assert report.gib([2**20, 2**19]) == 1.5


def test_versions_name_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_VERSIONS", ("torch", "no-such-package"))
    versions = report.versions()
    assert versions["no-such-package"] == "not installed"
    assert versions["torch"].startswith("2.")
    assert set(versions) == {"python", "torch", "no-such-package"}


def test_json_keeps_the_order(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"b": 1, "a": {"c": 2.5}})
    text = (tmp_path / "summary.json").read_text()
    assert list(json.loads(text)) == ["b", "a"]
    assert text.endswith("}\n")


def test_samples_stand_side_by_side(tmp_path: Path) -> None:
    columns = {
        "base": evaluation(("one\ntwo", 0.0), ("x", 1.0)),
        "student": evaluation(("short", 1.0), ("y", 0.0)),
    }
    report.write_samples(tmp_path / "samples.md", columns, count=1)
    assert (tmp_path / "samples.md").read_text() == (
        "# Samples\n\n"
        "- **base**: score 0.50, without an answer 0.00, leaking 0.00, 4.0 tokens\n"
        "- **student**: score 0.50, without an answer 0.50, leaking 0.50, 3.0 tokens\n\n"
        "## What is 0?\n\n`test/0`\n\n- **base** (score 0, 7 tokens)\n  > one\n  > two\n"
        "- **student** (score 1, 5 tokens)\n  > short\n"
    )
    report.write_samples(tmp_path / "samples.md", columns)
    last = (tmp_path / "samples.md").read_text().splitlines()[-2:]
    assert last == ["- **student** (score 0, 1 tokens, no answer found, leaks)", "  > y"]


def test_a_question_of_several_lines_and_a_partial_score_are_shown_whole(tmp_path: Path) -> None:
    (answer,) = evaluation(("[up]", 0.7)).answers
    game = replace(answer, question="Get to the goal.\n\nBoard:\nP #\n. G\n")
    report.write_samples(tmp_path / "samples.md", {"base": Evaluation(answers=(game,))})
    assert (
        (tmp_path / "samples.md")
        .read_text()
        .endswith(
            "## Get to the goal.\n\n`test/0`\n\n    Board:\n    P #\n    . G\n\n"
            "- **base** (score 0.7, 4 tokens)\n  > [up]\n"
        )
    )


def test_samples_do_nothing_in_a_terminal_or_a_browser(tmp_path: Path) -> None:
    text = (
        "\x1b[31mred\x1b]0;title\x07 back\rspace\x9b2J \u202eevil\ud83d <img src=x> "
        "![a](http://b/c) ![d][e]\n[e]: http://f\n\\<script> [g](javascript:h) \\![i](j) [up] x < y"
    )
    (answer,) = evaluation((text, 1.0)).answers
    hostile = replace(answer, question=f"{text}\n{text}", uid=f"`{text}`")
    report.write_samples(tmp_path / "samples.md", {"base": Evaluation(answers=(hostile,))})
    found = (tmp_path / "samples.md").read_text(encoding="utf-8")
    assert all(character.isprintable() or character == "\n" for character in found)
    assert r"\x1b[31mred\x1b]0;title\x07 back\rspace\x9b2J \u202eevil\ud83d" in found
    markdown = [line for line in found.splitlines() if not line.startswith(("    ", "`"))]
    for raw in ("<", "![", "](", "]:", "]["):
        assert not any(raw in line for line in markdown), raw
    assert found.endswith("\n  > [e]\\: http://f\n  > \\&lt;script> [g]\\(javascript:h) "
                          "\\!\\[i]\\(j) [up] x &lt; y\n")  # fmt: skip


def test_every_answer_is_a_line_of_its_own(tmp_path: Path) -> None:
    pair = (evaluation(("a", 1.0), ("é\n", 0.0)), evaluation(("y", 0.5)))
    write_answers(tmp_path / "answers.jsonl", {"base": pair, "student": pair})
    lines = (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert [(one["evaluation"], one["part"], one["text"]) for one in found] == [
        (name, part, text)
        for name in ("base", "student")
        for part, text in (("task", "a"), ("task", "é\n"), ("retention", "y"))
    ]
    assert found[2] == {
        "evaluation": "base",
        "part": "retention",
        "uid": "test/0",
        "question": "What is 0?",
        "sample": 0,
        "text": "y",
        "score": 0.5,
        "answered": False,
        "num_tokens": 1,
        "leaked": True,
    }


def test_curves_are_a_picture_whatever_losses_there_are(tmp_path: Path) -> None:
    lines = [
        {
            loss: 0.5,
            "rollout/response_tokens": 20.0,
            "optim/grad_norm": 1.0,
            "perf/tokens_per_s": 30.0,
        }
        for loss in ("loss/forward_kl", "loss/reverse_kl", "loss/captured_mass")
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(map(metric_line, range(3), lines)))
    write_curves(tmp_path / "curves.png", tmp_path / "metrics.jsonl")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_a_panel_has_a_title_a_unit_and_no_metric_that_the_run_lacks() -> None:
    lines = [{"step": 0.0, "loss/nll": 1.0, "loss/captured_mass": 0.9, "validation/score": 0.5}]
    found = panels(lines)
    assert [panel.title for panel in found] == ["Loss", "Captured probability", "Validation"]
    assert found[0].metrics == {"loss/nll": "negative log-likelihood of the samples"}
    assert found[2].metrics == {"validation/score": "task"}
    assert all(panel.unit and panel.caption for panel in found)
