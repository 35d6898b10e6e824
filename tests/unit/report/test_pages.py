"""Pages as text: everything escaped, every number where it belongs, damaged folders refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.report.answers import game
from opcd_nemo.report.command import write_page
from opcd_nemo.report.costs import commands
from opcd_nemo.report.figures import line_chart, share_bar, ticks
from opcd_nemo.report.page import MOST_BYTES
from opcd_nemo.report.record import read_run
from opcd_nemo.report.words import p_beside, p_text, shown
from tests.report_folders import HOSTILE, write_pipeline, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "evil", hostile=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "whole")


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def test_what_models_wrote_is_escaped_wherever_it_stands(run: Path) -> None:
    page = read(run / "report.html")
    assert len(page) < MOST_BYTES
    assert "<img" not in page
    assert page.count("<script") == 2
    assert "&lt;script&gt;document.title=" in page
    assert r"\x1b[31mred\x1b]0;title\x07 \u202eevil" in page
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", page)
    assert "default-src &#39;none&#39;; style-src &#39;sha256-" in page
    assert "style=" not in page, "the policy would refuse it"
    # the data of the tokens ends where its element does
    (data,) = re.findall(
        r'<script type="application/json" id="token-data">(.*?)</script>', page, re.S
    )
    assert len(json.loads(data)) == 3 * 3 * 15


def test_the_page_says_what_came_out(tmp_path: Path) -> None:
    page = read(write_run(tmp_path / "run") / "report.html")
    text = " ".join(re.sub("<[^>]+>", " ", page.partition("<body>")[2]).split())
    for words in (
        "Without the context the student now scores 0.88 [0.67, 0.96]",
        "87% [71%, 100%] of what the context gives is now in the weights.",
        "control: teacher with a wrong context first 8 questions",
        "Of 16 questions that training never saw, 2 are answered worse than before and 4 better",
        "forecast 0.71 to 1.00",
        "training costs as much as the context in 331 prompts",
        "It falls when answers get shorter",
        "opcd train recipe=demo_brevity parallel=dp2 exp_manager=resumable trainer.max_steps=60",
        "240 answers with 3,600 tokens in all",
    ):
        assert words in text, words
    assert f"opcd chat from={tmp_path}/run/checkpoints/step=30.ckpt" in text


def test_commands_take_the_step_of_the_table_and_name_the_best_besides(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads(read(folder / "summary.json"))
    (folder / "summary.json").write_text(json.dumps(summary | {"best_step": 20}))
    shown = dict(commands(read_run(folder)))
    assert shown["talk to the student"].endswith("step=30.ckpt")
    assert shown["talk to the student of the best validation score"].endswith("step=20.ckpt")


def test_a_run_that_kept_its_weights_alone_is_not_continued(tmp_path: Path) -> None:
    """`exp_manager=resumable` refuses such a checkpoint."""
    key = "exp_manager: {checkpoint_callback_params: {save_weights_only: true}}\n"
    shown = dict(commands(read_run(write_run(tmp_path / "run", config=key))))
    longer = "twice as many steps, from the first step on: this run has kept its weights alone"
    assert shown[longer] == "opcd train recipe=demo_brevity parallel=dp2 trainer.max_steps=60"


def test_a_run_from_before_has_a_page_too(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads(read(folder / "summary.json"))
    old = {name: summary[name] for name in ("base", "in_context", "student", "steps", "versions")}
    (folder / "summary.json").write_text(json.dumps(old))
    (folder / "tokens.json").unlink()
    assert write_page([str(folder)]) == folder / "report.html"
    page = read(folder / "report.html")
    assert "0.88</b>" in page
    assert "Token by token" not in page


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("summary.json", "[]", "a list instead of a record"),
        ("summary.json", '{"base": "x"}', 'base is "x"'),
        ("answers.jsonl", '{"uid": 1}\n', "line 1: "),
        ("answers.jsonl", "", "has no answer of base, task"),
        ("metrics.jsonl", "{}\n", "line 1: no step"),
        ("metrics.jsonl", f'{{"step": {10**40}}}\n', "a step is no number"),
        ("summary.json", f'{{"base": {10**400}}}', "base is 1000"),
        ("tokens.json", '{"before": [3], "after": [], "now": []}', "before: an answer is not"),
        ("tokens.json", '{"before": 1, "after": [], "now": []}', "before is 1"),
        ("config.yaml", "a: &x [1]\nb: *x\n", "aliases"),
    ],
)
def test_a_damaged_file_is_named(run: Path, name: str, text: str, problem: str) -> None:
    file = run / name
    before = file.read_bytes()
    file.write_text(text)
    try:
        with pytest.raises(UserError) as refused:
            write_page([str(run)])
    finally:
        file.write_bytes(before)
    assert name in refused.value.key
    assert problem in str(refused.value.problem)


@pytest.mark.parametrize(
    "nonsense", [None, "x", [], {}, {"value": "x"}, {"value": 1e300}, [[1]], True, -3]
)
def test_nonsense_in_a_summary_is_a_dash_and_no_crash(run: Path, nonsense: Any) -> None:
    file = run / "summary.json"
    before = file.read_text(encoding="utf-8")
    summary = json.loads(before)
    for name in set(summary) - {"base", "in_context", "student"}:
        summary[name] = nonsense
    file.write_text(json.dumps(summary))
    try:
        write_page([str(run)])
    finally:
        file.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ([], "no folder is given"),
        (["nowhere"], "is no folder"),
        (["."], "has no summary.json"),
        (["a", "to=x", "to=y"], "2 are given"),
        (["a", "to="], "names no file"),
    ],
)
def test_what_is_no_run_is_refused(
    words: list[str], problem: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as refused:
        write_page(words)
    assert refused.value.problem == problem


def test_a_folder_above_runs_names_a_run_below(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "a")
    with pytest.raises(UserError) as refused:
        write_page([str(run.parent)])
    assert refused.value.problem == "has no summary.json"
    assert refused.value.allowed.endswith(f", as {run}")


def test_a_configuration_is_no_pipeline_that_lacks_its_table(tmp_path: Path) -> None:
    (tmp_path / "experience.yaml").write_text("name: x\n")  # as conf/ has, and a new pipeline
    with pytest.raises(UserError) as refused:
        write_page([str(tmp_path)])
    assert str(refused.value) == (
        f"opcd report={tmp_path}: has no summary.json; allowed: the folder of a run that has "
        "ended, or of a pipeline after its stage evaluate"
    )


def test_a_pipeline_is_not_compared_with_runs(tmp_path: Path) -> None:
    run, pipeline = write_run(tmp_path / "a"), write_pipeline(tmp_path / "demo_games")
    with pytest.raises(UserError) as refused:
        write_page([str(run), str(pipeline)])
    assert refused.value.value == pipeline
    assert refused.value.problem == "is a pipeline, which is not compared"
    assert f"opcd report {pipeline}" in refused.value.allowed


def without_number(line: str) -> str:
    return f"{json.dumps(json.loads(line) | {'loss/reverse_kl': None})}\n"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda lines: lines[:17], "of 30 training steps it has 17 in 17 lines."),
        (lambda lines: [], "of 30 training steps it has 0 in 0 lines."),
        (lambda lines: lines[:4] + lines[5:], "of 30 training steps it has 29 in 29 lines."),
        (lambda lines: lines + lines[-1:], "of 30 training steps it has 30 in 31 lines."),
        (
            lambda lines: [*lines[:-1], without_number(lines[-1])],
            "Values of metrics.jsonl that are no numbers: 1. The curves are without them.",
        ),
    ],
)
def test_metrics_that_lost_steps_are_said_on_the_page(
    damage: Callable[[list[str]], list[str]], said: str, whole: Path
) -> None:
    file = whole / "metrics.jsonl"
    before = read(file)
    file.write_text("".join(damage(before.splitlines(keepends=True))))
    try:
        assert said in read(write_page([str(whole)]))
    finally:
        file.write_text(before)
    assert 'role="note"' not in read(write_page([str(whole)]))


def test_a_line_of_metrics_that_was_cut_off_is_said(tmp_path: Path, whole: Path) -> None:
    file = write_run(tmp_path / "run") / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    page = read(write_page([str(whole), str(file.parent)]))
    said = "metrics.jsonl is not as the run wrote it: of 30 training steps it has 29 in 29 lines."
    assert f'<p class="lacking" role="note">run: {said}' in page
    assert page.count('role="note"') == 1


def test_runs_are_compared_question_by_question(tmp_path: Path) -> None:
    first = write_run(tmp_path / "a")
    second = write_run(tmp_path / "b", num_steps=500, config="optim:\n  lr: 0.1\n")
    page = read(write_page([str(first), str(second)]))
    assert "b - a" in page
    assert "<code>optim.lr</code></th><td>5e-05</td><td>0.1</td>" in page
    assert "Each point is the mean of 3 steps." in page
    with pytest.raises(UserError, match="each folder once"):
        write_page([str(first), str(tmp_path / "." / "a")])


def test_intervals_of_a_single_seed_are_over_questions_alone(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    summary = json.loads(read(folder / "summary.json"))
    (folder / "summary.json").write_text(json.dumps(summary | {"seeds": [1]}))
    page = read(write_page([str(folder)]))
    assert "A single seed, [1]. Brackets are 95 % intervals for other questions" in page
    assert "other seeds" not in page


@pytest.mark.parametrize("problems", [None, 5, "abc", {"a": 1}])
def test_a_lineage_without_a_list_of_problems_shows_none(tmp_path: Path, problems: Any) -> None:
    folder = tmp_path / "pipeline"
    write_pipeline(folder)
    (file,) = (folder / "registry" / "entries").glob("*.json")
    entry = json.loads(read(file))
    entry["lineage"]["problems"] = problems
    file.write_text(json.dumps(entry))
    assert "the games or problems" not in read(write_page([str(folder)]))


def test_a_pipelines_page_has_notes_candidates_and_games(tmp_path: Path) -> None:
    page = read(write_page([str(write_pipeline(tmp_path / "evil", hostile=True))]))
    assert "<img" not in page
    assert "&lt;script&gt;document.title=" in page
    for words in ("3 candidates", "best, round 1", "+0.087", "p = 0.131", 'class="game"'):
        assert words in page, words
    for words in (
        "Game 1: Get to the goal.</h3>",
        "Game 6</h3>",
        "not won, 29 tokens",
        "written by",
    ):
        assert words in page, words
    assert page.count("Get to the goal.") == 1
    assert "intervals for other seeds and other questions" in page
    assert '<a href="opcd-1/report.html">' in page


def test_no_p_value_contradicts_its_interval(tmp_path: Path) -> None:
    interval = {"value": 0.087, "low": -0.049, "high": 0.224}
    assert p_beside(interval, 0.131) == "p = 0.131"
    assert p_beside(interval | {"low": 0.01}, 0.001) == "p = 0.001"
    assert p_beside(interval | {"low": None}, 0.001) == "p = 0.001"
    left_out = "(no p-value: the file's contradicts the interval)"
    assert p_beside(interval, 0.001) == p_beside(interval | {"low": 0.01}, 0.06) == left_out
    folder = write_pipeline(tmp_path / "of_before")
    summary = json.loads(read(folder / "summary.json"))
    summary["paired"]["opcd - sft"]["p_value"] = 0.001
    (folder / "summary.json").write_text(json.dumps(summary))
    page = read(write_page([str(folder)]))
    assert "p = 0.001" not in page
    assert "(no p-value: the file&#39;s contradicts the interval)" in page


def test_a_pipelines_games_are_of_the_student_in_its_table(tmp_path: Path) -> None:
    """Where validation has chosen an earlier checkpoint, the run's own answers are of another."""
    folder = write_pipeline(tmp_path / "pipeline")
    run = read_run(folder / "opcd-1").evaluations["student", "task"].answers
    chosen = [{**each.record(), "transcript": "Board:\nP.\n\nwas chosen."} for each in run]
    assert "was chosen." not in read(write_page([str(folder)]))
    (folder / "controls.json").write_text(json.dumps({"opcd_best": {"1": {"task": chosen}}}))
    assert read(write_page([str(folder)])).count("was chosen.") == 6
    (folder / "controls.json").write_text(json.dumps({"opcd_best": {"1": {"task": [3]}}}))
    with pytest.raises(UserError, match=r"controls\.json: opcd_best, seed 1: a int instead"):
        write_page([str(folder)])


def test_the_selected_candidate_is_marked(tmp_path: Path) -> None:
    folder = write_pipeline(tmp_path / "pipeline")
    ranking = json.loads(read(folder / "ranked.json"))
    for record in ranking["ranked"][1:]:
        record["experience"] = "another"
    (folder / "ranked.json").write_text(json.dumps(ranking))
    assert read(write_page([str(folder)])).count("<b>selected</b>") == 1


def test_a_game_is_boards_with_the_moves_between_them() -> None:
    found = game("Get there.\n\nBoard:\nP.\n\nMove: [up]\nNo.\n\nBoard:\n.P\n\nP won.")
    assert found is not None
    assert [(f.caption, f.board) for f in found.frames] == [
        ("start", "P."),
        ("Move: [up] No.", ".P"),
    ]
    assert found.outcome == "P won."
    assert game("no board\n\nover") is None


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0.05, 1.45), (3, 3), (0, 0), (-2e8, 9e9), (1e-9, 2e-9), (0, 5e-324)]
)
def test_ticks_are_round_and_hold_all_values(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high
    assert 2 <= len(found) <= 7


def test_a_long_curve_is_averaged_and_says_so() -> None:
    chart = line_chart("t", "u", "c.", {"x": [(float(n), float(n)) for n in range(1000)]})
    assert chart.caption == "c. Each point is the mean of 5 steps."
    assert len(chart.lines[0].path.split()) == 200
    short = line_chart("t", "u", "c.", {"x": [(1.0, 2.0)]})
    assert short.lines[0].dots[0][2] == "x, step 1: 2"


def test_parts_of_a_bar_add_up_and_empty_ones_are_left_out() -> None:
    bar = share_bar({("right", "right"): 3, ("partly", "partly"): 0, ("wrong", "wrong"): 1})
    assert [(part.words, part.start, part.length) for part in bar] == [
        ("right", 0.0, 75.0),
        ("wrong", 75.0, 25.0),
    ]


def test_numbers_in_words() -> None:
    assert shown({"value": 0.5, "low": 0.25, "high": 1.0}).interval == "[0.25, 1.00]"
    assert shown({"value": 0.5, "low": None, "high": None}).interval == ""
    assert shown({"value": 0.5, "low": 0.1, "high": None}).interval == "[0.10, ?]"
    assert shown(3).value == "-"
    assert (p_text(0.0004), p_text(0.05), p_text(None)) == ("p < 0.001", "p = 0.050", "")


def test_the_configuration_is_flat(run: Path) -> None:
    assert read_run(run).config == {"name": "run", "optim.lr": 5e-05}
    assert HOSTILE in read_run(run).evaluations["base", "task"].answers[0].text


def test_a_control_that_was_trained_has_its_row(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    summary = json.loads(read(folder / "summary.json"))
    summary["trained_controls"] = {"trained_wrong_context": summary["evaluation"]["base"]}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = read(write_page([str(folder)]))
    assert page.index("context given back") < page.index("trained by a teacher with a wrong")
