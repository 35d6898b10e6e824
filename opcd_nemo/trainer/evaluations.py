"""Evaluations before and after training: the table's rows, the controls, and their costs."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from opcd_nemo.config.train import EvaluationConfig
from opcd_nemo.evaluation.evaluator import Evaluation, Evaluator
from opcd_nemo.evaluation.findings import Pair, break_even
from opcd_nemo.evaluation.forecast import Forecast, forecast
from opcd_nemo.evaluation.intervals import Unit
from opcd_nemo.evaluation.report import gib, peak_rss_kib
from opcd_nemo.metrics import Stats, Stopwatch
from opcd_nemo.rollout.collect import SamplerName
from opcd_nemo.trainer.model import OPCDModel
from opcd_nemo.training.build import build_evaluator
from opcd_nemo.training.inputs import has_text, wrong_source
from opcd_nemo.training.prepared import PreparedRun
from opcd_nemo.training.token_scores import (
    MOST_ANSWERS,
    TOKENS,
    score_answers,
    token_statistics,
)

_log = logging.getLogger(__name__)
_ROWS: Mapping[str, tuple[SamplerName, str, bool]] = {
    "base": ("student", "the base model", False),
    "in_context": ("teacher", "the teacher with the context", True),
    "student": ("student", "the trained student", False),
}
"""By row of the table: who answers, in words for the screen, and whether the context is read."""


class RunEvaluations:
    """The evaluations of a run; every method is collective over the world.

    Attributes:
        scores: task and retention by row.
        controls: of the task alone, by the name in `evaluation.controls`.
        units: what a play is a repetition of, by part.
    """

    def __init__(self, model: OPCDModel, prepared: PreparedRun) -> None:
        self._model, self._run = model, model.run
        self._settings: EvaluationConfig = prepared.config.evaluation
        inputs, parallel = prepared.inputs, model.run.parallel
        self.scores: dict[str, Pair] = {}
        self.controls: dict[str, Evaluation] = {}
        self.units: dict[str, Unit] = {
            "task": inputs.task.unit_of,
            "retention": inputs.retention.unit_of,
        }
        self._watch = Stopwatch()
        self._peaks: dict[str, int] = {"models loaded": peak_rss_kib()}
        self._tokens: dict[str, list[dict[str, Any]]] = {}
        self._has_context = has_text(inputs.conversation.source)
        self._wrong: Evaluator | None = None
        wrong = wrong_source(prepared.config, inputs.conversation.source)
        if wrong is not None:
            changed = inputs.with_source(wrong, self._settings.num_questions)
            self._wrong = build_evaluator(prepared.config, changed, parallel)

    def before(self) -> Forecast:
        """Ask base and teacher, score a few answers token by token, and say what may be hoped for.

        Raises:
            UserError: the context lifts the score by less than `evaluation.min_gap`.
        """
        base = self._ask("base")
        self._model.validations.base_retention = base[1].score
        self._tokens["before"] = score_answers(self._run, base[0].rollouts)
        in_context = self._ask("in_context")
        law = forecast(base[0], in_context[0], self.units["task"])
        _log.info(
            "in-context gap before training: without context %.2f, with context %.2f",
            base[0].score,
            in_context[0].score,
        )
        for line in law.lines():
            _log.info("%s", line)
        law.require(self._settings.min_gap)
        if self._wrong is not None:
            words = "the teacher with a wrong context"
            self._control("wrong_context", "teacher", self._wrong, words)
        self._peaks["evaluations before"] = peak_rss_kib()
        return law

    def after(self) -> None:
        """Ask the trained student, without the context and with it."""
        self._peaks["training"] = peak_rss_kib()
        student = self._ask("student")
        self._tokens["after"] = score_answers(self._run, self.scores["base"][0].rollouts)
        self._tokens["now"] = score_answers(self._run, student[0].rollouts)
        if "context_returned" in self._settings.controls and self._has_context:
            words = "the trained student with the context given back"
            self._control("context_returned", "student", self._model.evaluator, words)
        self._peaks["evaluations after"] = peak_rss_kib()

    def _ask(self, row: str) -> Pair:
        who, words, with_context = _ROWS[row]
        engine, evaluator = self._model.load_engine(who), self._model.evaluator
        with self._watch.phase(row):
            task = evaluator.task_score(
                engine, "test", with_context=with_context, keep=MOST_ANSWERS, whom=words
            )
        with self._watch.phase(f"{row}, unrelated questions"):
            retention = evaluator.retention(engine, with_context=with_context, whom=words)
        engine.release_weights()
        self.scores[row] = task, retention
        return self.scores[row]

    def _control(self, name: str, who: SamplerName, evaluator: Evaluator, words: str) -> None:
        count = min(self._settings.num_control_questions, self._settings.num_questions)
        engine = self._model.load_engine(who)
        with self._watch.phase(f"control {name}"):
            self.controls[name] = evaluator.task_score(
                engine, "test", with_context=True, questions=range(count), whom=words
            )
        engine.release_weights()

    def costs(self) -> dict[str, dict[str, float]]:
        """CPU-seconds and peak memory (KiB) of all ranks, by phase."""
        return {"cpu_s": self._over_ranks(self._watch.cpu_s), "kib": self._over_ranks(self._peaks)}

    def facts(
        self, costs: Mapping[str, Mapping[str, float]], lines: Sequence[Mapping[str, float]]
    ) -> dict[str, Any]:
        """Costs and token statistics for summary.json; writes the answers token by token.

        On rank 0 alone, and no collective.

        Args:
            costs: as `costs` gives them.
            lines: of metrics.jsonl.
        """
        self._model.run_folder.write(TOKENS, json.dumps(self._tokens, ensure_ascii=False))
        trained = _trained_on(lines)
        return {
            "cpu_seconds_of_evaluations": {k: round(s, 2) for k, s in costs["cpu_s"].items()},
            "peak_rss_gib_by_phase": {k: gib([round(kib)]) for k, kib in costs["kib"].items()},
            "tokens": {when: token_statistics(each) for when, each in self._tokens.items()},
            "trained_on": trained,
            "break_even": self._break_even(lines, trained, costs["cpu_s"]),
        }

    def _over_ranks(self, values: Mapping[str, float]) -> dict[str, float]:
        sums = Stats()
        for of_rank in self._run.parallel.gather_objects(dict(values)):
            sums.add(Stats({name: (value, 1.0) for name, value in of_rank.items()}))
        return {name: value for name, (value, _) in sums.sums.items()}

    def _break_even(
        self,
        lines: Sequence[Mapping[str, float]],
        trained: Mapping[str, float],
        spent: Mapping[str, float],
    ) -> dict[str, Any] | None:
        """After how many answers distilling has cost less than the context in every prompt."""
        shown = self.scores["base"][0].rollouts
        if not self._has_context or not trained["answers"]:
            return None
        prompt = fmean(len(rollout.prompt_ids) for rollout in shown)
        with_context = fmean(len(rollout.teacher_prompt_ids) for rollout in shown)
        answer = trained["response_tokens"] / trained["answers"]
        # of several ranks that share a model each has all of the answers
        count = len(self.scores["student"][0].answers)
        return break_even(
            context_tokens=with_context - prompt,
            answers=trained["answers"],
            tokens_an_answer=prompt + answer,
            train_s=sum(line["cpu/step_s"] for line in lines),
            answer_s={row: spent[row] / count for row in ("in_context", "student")},
        )


def _trained_on(lines: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """How many answers, and tokens of answers, the steps had."""
    tokens = [line["perf/tokens_per_s"] * line["time/step_s"] for line in lines]
    each = [line["rollout/response_tokens"] for line in lines]
    answers = (total / mean for total, mean in zip(tokens, each, strict=True) if mean)
    return {"answers": round(sum(answers)), "response_tokens": round(sum(tokens))}
