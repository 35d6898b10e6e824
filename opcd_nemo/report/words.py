"""Numbers as the pages show them, and the words that go with rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opcd_nemo.report.record import number

LABELS = {
    "base": "before training, without context",
    "in_context": "teacher, with the context",
    "student": "after training, without context",
    "wrong_context": "control: teacher with a wrong context",
    "context_returned": "control: trained student, context given back",
    "trained_wrong_context": "control: trained by a teacher with a wrong context",
    "trained_without_context": "control: trained by the teacher without context",
}
SHORT = {"base": "before", "in_context": "teacher with context", "student": "after"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A number and its interval in words; `interval` is empty where nothing bounds it.

    `start` and `length` are the interval's place on an axis from 0 to 100, `at` the value's.
    """

    value: str
    interval: str = ""
    start: float = 0.0
    length: float = 0.0
    at: float | None = None


NOTHING = Shown(value="-")


def shown(estimate: Any, form: str = ".2f") -> Shown:
    """A record of value, low and high; a dash without a value."""
    value, low, high = (number(estimate, name) for name in ("value", "low", "high"))
    if value is None:
        return NOTHING
    if low is None or high is None:
        ends = ["?" if end is None else f"{end:{form}}" for end in (low, high)]
        interval = "" if low is high is None else f"[{ends[0]}, {ends[1]}]"
        return Shown(value=f"{value:{form}}", interval=interval, at=_on_axis(value))
    return Shown(
        value=f"{value:{form}}",
        interval=f"[{low:{form}}, {high:{form}}]",
        start=_on_axis(low),
        length=_on_axis(high) - _on_axis(low),
        at=_on_axis(value),
    )


def _on_axis(value: float) -> float:
    return round(100 * min(1.0, max(0.0, value)), 1)


_ALPHA = 0.05  # of the intervals
_CONTRADICTION = "(no p-value: the file's contradicts the interval)"


def p_beside(interval: Any, p_value: Any) -> str:
    """The p-value of a difference, as papers print it, unless it contradicts the interval.

    Files of earlier versions have p-values of another model than their intervals.
    """
    low, high, p = number(interval, "low"), number(interval, "high"), number({"p": p_value}, "p")
    if low is not None and high is not None and p is not None:
        holds_zero = low <= 0 <= high
        if holds_zero == (p < _ALPHA) and abs(p - _ALPHA) > 1e-9:
            return _CONTRADICTION
    return p_text(p_value)


def p_text(p_value: Any) -> str:
    """A p-value as papers print it."""
    value = number({"p": p_value}, "p")
    if value is None:
        return ""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def plain(value: Any) -> str:
    """A value of a configuration in a line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def count(value: float | None) -> str:
    """A number of things, with thousands apart."""
    return "-" if value is None else f"{value:,.0f}"


def seconds(value: float | None) -> str:
    """Seconds, as people say them."""
    if value is None:
        return "-"
    if value < 120:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 7200 else f"{value / 3600:.1f} h"


def changes(record: Mapping[str, Any], words: Mapping[str, str]) -> list[dict[str, str]]:
    """Paired differences by key, each with its words, interval and p-value."""
    return [
        {
            "words": text,
            "value": found.value,
            "interval": found.interval,
            "p": p_beside(record[key], record[key].get("p_value")),
        }
        for key, text in words.items()
        if isinstance(record.get(key), Mapping)
        and (found := shown(record[key], "+.2f")) is not NOTHING
    ]
