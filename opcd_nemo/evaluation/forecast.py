"""A forecast before a run's hours: the gain is proportional to the in-context gap.

Source: the published law of on-policy self-distillation (arXiv 2605.30070), which is linear in the
gap with slopes of 0.66 to 1.51 over two model families and sizes of 0.6B to 8B.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opcd_nemo.errors import UserError
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.intervals import Unit, paired
from opcd_nemo.evaluation.report import interval_text

SLOPES = (0.7, 1.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Scores between `low` and `high` are what the law forecasts of the student without context.

    `gap` is in-context minus base, with its interval and p-value.
    """

    base: float
    in_context: float
    gap: dict[str, Any]

    @property
    def low(self) -> float:
        """The forecast of the lesser slope; without a gap nothing is gained."""
        return self._at(SLOPES[0])

    @property
    def high(self) -> float:
        """The forecast of the greater slope; no score is above 1."""
        return self._at(SLOPES[1])

    def _at(self, slope: float) -> float:
        gain = slope * max(0.0, float(self.gap["value"]))
        return min(1.0, self.base + gain)

    @property
    def is_in_doubt(self) -> bool:
        """Whether the questions leave open that the context helps at all."""
        low = self.gap["low"]
        return low is None or bool(low <= 0)

    def lines(self) -> list[str]:
        """What the program prints before the first step."""
        words = (
            f"forecast: {self.low:.2f} to {self.high:.2f} after training, without context (a gain "
            f"of {SLOPES[0]} to {SLOPES[1]} times the gap, as published; at most 1)"
        )
        gap = f"in-context gap {interval_text(self.gap, '+.2f')}"
        if not self.is_in_doubt:
            return [f"{gap}; {words}"]
        return [
            f"{gap}: these questions do not show that the context helps, and a student can hardly "
            "learn what its teacher does not do; evaluation.min_gap stops such runs",
            words,
        ]

    def require(self, min_gap: float | None) -> None:
        """End the run before its first step where the gap is too small for it.

        Raises:
            UserError: the gap is below `min_gap`.
        """
        if min_gap is not None and self.gap["value"] < min_gap:
            raise UserError(
                "evaluation.min_gap",
                min_gap,
                "a context that helps more, or a smaller gap; null: never",
                problem=f"the context lifts the score from {self.base:.3f} to "
                f"{self.in_context:.3f}, by {interval_text(self.gap, '+.2f')}",
            )

    def record(self) -> dict[str, Any]:
        """As summary.json has it."""
        return {"gap": self.gap, "slopes": list(SLOPES), "low": self.low, "high": self.high}


def forecast(base: Evaluation, in_context: Evaluation, unit: Unit) -> Forecast:
    """The forecast of a run whose base and teacher have these scores."""
    gap = paired(in_context, base, unit)
    return Forecast(base=base.score, in_context=in_context.score, gap=gap)
