"""The scores on the validation split during a run: which step is best, and when to stop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from opcd_nemo.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """Scores on the validation split and of retention, and after how many steps they were."""

    step: int
    score: float
    retention: float


class ValidationHistory:
    """Every validation of a run, in order.

    `base_retention` is the retention score before training; `min_retention` is the share of it
    below which the run stops, or None.
    """

    def __init__(self, min_retention: float | None) -> None:
        self.min_retention = min_retention
        self.base_retention: float | None = None
        self._validations: list[Validation] = []

    def add(self, validation: Validation) -> None:
        """Add the latest."""
        self._validations.append(validation)

    def records(self) -> list[dict[str, Any]]:
        """Plain values, for a checkpoint and for the summary."""
        return list(map(asdict, self._validations))

    def load(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Become what `records` gave."""
        self._validations = [Validation(**record) for record in records]

    @property
    def best(self) -> Validation | None:
        """The first validation with the best score."""
        return max(self._validations, key=lambda validation: validation.score, default=None)

    @property
    def stopped_by_retention(self) -> Validation | None:
        """The first validation that found too little retention.

        Raises:
            UserError: the base model's score, of which a share decides, is missing or 0.
        """
        if self.min_retention is None:
            return None
        if not self.base_retention:
            raise UserError(
                "evaluation.min_retention",
                self.min_retention,
                "null, or a score above 0 (the training program takes it)",
                problem=f"the score before training is {self.base_retention}",
            )
        least = self.min_retention * self.base_retention
        return next((found for found in self._validations if found.retention < least), None)
