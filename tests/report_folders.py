"""Folders of finished runs and pipelines, written without a model: what `opcd report` reads."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from opcd_nemo.context.registry import Entry, Registry
from opcd_nemo.evaluation.answers_file import ANSWERS, write_answers
from opcd_nemo.evaluation.evaluator import Answer, Evaluation
from opcd_nemo.evaluation.findings import break_even
from opcd_nemo.evaluation.forecast import forecast
from opcd_nemo.evaluation.summary import SUMMARY, Outcome, summarise
from opcd_nemo.evaluation.validations import ValidationHistory
from opcd_nemo.formats.locate import write_json
from opcd_nemo.metrics import METRICS, metric_line
from opcd_nemo.report.pipeline_page import RANKED
from opcd_nemo.report.record import CONFIG
from opcd_nemo.report.run_page import write_run_page
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.training.token_scores import TOKENS, token_statistics

HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\"> "
    "[click](javascript:document.title='taken') \x1b[31mred\x1b]0;title\x07 \u202eevil "
    "{{ 7 * 7 }} {% raw %} </script><!-- ${x} `</style>"
)
THINGS = "mirror balloon axe lamp river kite bakery violin goat fork castle piano coin drum".split()
BOARD = "Board:\nP..\n.#.\n..G"
GAME = f"{BOARD}\n\nMove: [right]\n\n{BOARD}\n\nMove: [down]\nThat move cannot be made.\n\n{BOARD}"


def answer(number: int, text: str, score: float, **changes: Any) -> Answer:
    thing = THINGS[number % len(THINGS)]
    values: dict[str, Any] = {
        "uid": f"test/what/{number}",
        "question": f"What is a {thing}?",
        "sample": 0,
        "text": text,
        "score": score,
        "answered": bool(text.strip()),
        "num_tokens": max(1, len(text.split())),
        "leaked": "experience" in text,
        "transcript": None,
    }
    return Answer(**(values | changes))


def evaluation(answers: Sequence[Answer]) -> Evaluation:
    return Evaluation(answers=tuple(answers))


def _task(row: str, hostile: bool, games: bool) -> Evaluation:
    long = (
        "A {} is a thing that people have known for a very long time. It comes in many shapes and "
        "sizes, and there are several reasons why it is"
    )
    made = []
    for number in range(24):
        thing = THINGS[number % len(THINGS)]
        good = {"base": number == 5, "in_context": True, "student": number % 8 != 3}[row]
        text = f"A {thing} helps people at home." if good else long.format(thing)
        if row == "student" and number == 11:
            text, good = "", False
        if hostile and number < 3:
            text = HOSTILE
        changes: dict[str, Any] = {}
        if games:
            outcome = "P reached G." if good else "The game is over."
            changes["transcript"] = f"{GAME}\n\n{outcome}"
            changes["question"] = f"Get to the goal.\n\n{BOARD}"
        if hostile and number == 1:
            changes["question"] = HOSTILE
        made.append(answer(number, text, float(good), **changes))
    return evaluation(made)


def _unrelated(row: str) -> Evaluation:
    made = []
    for number in range(16):
        good = number % 3 > 0 if row == "base" else number % 4 > 0
        text = "The capital is Paris." if good else "I am not sure."
        question = f"What is the capital of country {number}?"
        uid = f"retention/{number}"
        made.append(answer(number, text, float(good), uid=uid, question=question))
    return evaluation(made)


def token(text: str, kl: float) -> dict[str, Any]:
    student = [[text, 0.62], [" a", 0.2], [" thing", 0.08], ["\n", 0.05], ["<|im_end|>", 0.01]]
    teacher = [["<|im_end|>", 0.7], [text, 0.2], [" the", 0.05], [" home", 0.03], [".", 0.01]]
    return {
        "text": text,
        "kl": kl,
        "student_entropy": 1.1,
        "teacher_entropy": 0.7,
        "student": student,
        "teacher": teacher,
    }


def _tokens(hostile: bool) -> dict[str, list[dict[str, Any]]]:
    words = "A mirror is a thing that people have known . It comes in many shapes".split()
    found: dict[str, list[dict[str, Any]]] = {}
    for when, factor in (("before", 1.0), ("after", 0.2), ("now", 0.05)):
        found[when] = []
        for number in range(3):
            tokens = [
                token(f" {word}" if n else word, factor * (5.0 if word in ".It" else 0.3 * (n % 4)))
                for n, word in enumerate(words)
            ]
            if hostile and number == 0:
                tokens[2] = token(HOSTILE, factor)
            thing = THINGS[number]
            found[when].append(
                {
                    "uid": f"test/what/{number}",
                    "question": HOSTILE if hostile and number == 1 else f"What is a {thing}?",
                    "num_tokens": len(tokens) + 10 * (number == 2),
                    "tokens": tokens,
                }
            )
    return found


def _lines(num_steps: int) -> list[dict[str, float]]:
    lines = []
    for step in range(num_steps):
        decay = math.exp(-step / (num_steps / 4))
        line = {
            "loss/reverse_kl": 1.4 * decay + 0.05,
            "rollout/response_tokens": 10 + 14 * decay,
            "optim/grad_norm": 4 * decay + 0.3 * (step % 3),
            "perf/tokens_per_s": 14 + 20 * decay,
            "time/step_s": 3.0,
            "cpu/step_s": 6.0,
            "cpu/rollout_s": 2.5,
            "cpu/student_s": 3.0,
            "cpu/teacher_s": 0.5,
        }
        if step % 10 == 9:
            line |= {"validation/score": 1 - decay, "validation/retention": 0.7}
        lines.append(line)
    return lines


def write_run(
    folder: Path,
    *,
    hostile: bool = False,
    games: bool = False,
    num_steps: int = 30,
    config: str = "name: run\noptim:\n  lr: 5.0e-05\n",
) -> Path:
    """A run's folder with every file that its page is made of, and the page."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = _lines(num_steps)
    (folder / METRICS).write_text("".join(map(metric_line, range(num_steps), lines)))
    write_json(folder / TOKENS, tokens := _tokens(hostile))
    scores = {
        row: (_task(row, hostile, games), _unrelated(row))
        for row in ("base", "in_context", "student")
    }
    validations = ValidationHistory(None)
    validations.base_retention = 0.6
    parallel: Any = SimpleNamespace(world_size=2, tp=1, pp=1, dp=2, cp=1)
    first = Evaluation(answers=scores["base"][0].answers[:8])
    text = HOSTILE if hostile else "A violin is a string instrument played with a bow."
    context = {
        "system": HOSTILE if hostile else None,
        "demonstrations": [["What is a violin?", text]],
        "experience": None,
        "wrap": None,
    }
    even = break_even(
        context_tokens=87.0,
        answers=240.0,
        tokens_an_answer=40.0,
        train_s=180.0,
        answer_s={"in_context": 0.42, "student": 0.35},
    )
    outcome = Outcome(
        scores=scores,
        controls={"wrong_context": first, "context_returned": first},
        forecast=forecast(scores["base"][0], scores["in_context"][0], str),
        validations=validations,
        parallel=parallel,
        units={"task": str, "retention": str},
        facts={
            "seconds_total": 312.5,
            "peak_rss_gib": 5.9,
            "seed": 1234,
            "device": "cpu (auto: 0 GPUs for 2 ranks)",
            "command": ["recipe=demo_brevity", "parallel=dp2", *[f"name={HOSTILE}"] * hostile],
            "context_hash": "ab" * 32,
            "context_lineage": {"written_by": "a person"},
            "context": context,
            "weights_sha256": "cd" * 32,
            "cpu_seconds_of_evaluations": {"base": 12.0, "control wrong_context": 4.1},
            "peak_rss_gib_by_phase": {"models loaded": 3.1, "training": 5.8},
            "tokens": {when: token_statistics(each) for when, each in tokens.items()},
            "trained_on": {"answers": 240, "response_tokens": 3600},
            "break_even": even,
        },
    )
    # not the pictures, which cost a second
    write_json(folder / SUMMARY, summarise(outcome, lines))
    write_answers(folder / ANSWERS, outcome.scores, outcome.controls)
    (folder / CONFIG).write_text(config)
    write_run_page(RunFolder(folder))
    return folder


def _row(value: float, share: float | None = None) -> dict[str, Any]:
    def number(middle: float) -> dict[str, float]:
        return {"value": middle, "low": max(0, middle - 0.1), "high": min(1, middle + 0.08)}

    return {
        "score": number(value),
        "internalised": None if share is None else number(share),
        "format_failure_rate": number(0.01),
        "leakage_rate": number(0.0),
        "response_tokens": {"value": 9.0, "low": 8.0, "high": 10.0},
        "pass_at_k": {"1": number(value)},
        "retention": number(0.7),
    }


def write_pipeline(folder: Path, *, hostile: bool = False) -> Path:
    """A pipeline's folder with every file that its page is made of."""
    folder.mkdir(parents=True, exist_ok=True)
    items = ("[up] moves P up.", "P is lost on #.", HOSTILE if hostile else "[up] is not down.")
    entry = Entry(
        items=items,
        num_tokens=31,
        lineage={
            "written_by": "a model",
            "model": "game-notes",
            "problems": ["train/1"],
            "step": 4,
        },
        scores={"validation": 0.95},
    )
    registry = Registry(folder / "registry")
    registry.add(entry)
    registry.select(entry.hash, "best, round 1")
    (folder / "experience.yaml").write_text("name: demo_games\n")
    ranked = [
        {
            "chain": n,
            "step": n,
            "items": list(items[: n + 1]),
            "num_tokens": 9,
            "score": 1 - 0.3 * n,
        }
        | {"questions": 40 >> n, "problems": [], "experience": entry.hash}
        for n in range(3)
    ]
    write_json(folder / RANKED, {"without": 0.02, "ranked": ranked})
    rows = {"base": _row(0.02), "in_context": _row(0.98), "wrong": _row(0.03)}
    rows |= {"opcd": _row(0.82, 0.83), "sft": _row(0.73, 0.74)}
    difference = {"value": 0.087, "low": -0.049, "high": 0.224}
    validations = [{"step": s, "score": s / 40, "retention": 0.7} for s in (10, 20, 30)]
    summary = {
        "rows": rows,
        "method": "opcd",
        "seeds": [1, 2, 3],
        "round": 1,
        "maps": {"asked": 80, "plays": 80, "random_win_rate_test": 0.04},
        "experience": {
            "content_hash": entry.hash,
            "validation": 0.95,
            "validation_without": 0.02,
        },
        "paired": {"opcd - sft": {"difference": difference, "p_value": 0.131}},
        "validations": {"opcd-1": validations, "sft-1": None},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    write_run(folder / "opcd-1", games=True, hostile=hostile)
    return folder
