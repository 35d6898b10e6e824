"""Geometry of the pages' pictures: line charts, intervals and shares, as numbers for templates.

Pictures are SVG without styles of their own: colours are classes of the page's style sheet, so
that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 10, 30
_MOST_POINTS = 200
_MOST_DOTS = 60
_LEAST_SPAN = 1e-290  # of an axis: less cannot be divided into ticks


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A curve: its words, its class of colours (0 to 7), its path, its dots with their words."""

    words: str
    colour: int
    path: str
    dots: tuple[tuple[float, float, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A line chart with its axes; ticks are (place, label)."""

    title: str
    unit: str
    caption: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM


def line_chart(title: str, unit: str, caption: str, curves: Mapping[str, Points]) -> Chart:
    """A chart of curves over the steps, by the words of each; no curve is empty.

    Of a long run neighbouring steps are averaged, and the caption says how many.
    """
    longest = max(map(len, curves.values()))
    group = math.ceil(longest / _MOST_POINTS)
    if group > 1:
        caption = f"{caption} Each point is the mean of {group} steps."
    drawn = {words: _averaged(points, group) for words, points in curves.items()}
    xs = [x for points in drawn.values() for x, _ in points]
    ys = [y for points in drawn.values() for _, y in points]
    y_ticks = ticks(min(0.0, *ys) if min(ys) < 0.4 * max(ys) else min(ys), max(ys))
    x_low, x_high = min(xs), max(xs)

    def place_x(x: float) -> float:
        return round(_scaled(x, x_low, x_high, _LEFT, WIDTH - _RIGHT), 1)

    def place_y(y: float) -> float:
        return round(_scaled(y, y_ticks[0], y_ticks[-1], HEIGHT - _BOTTOM, _TOP), 1)

    lines = []
    for number, (words, points) in enumerate(drawn.items()):
        places = [(place_x(x), place_y(y)) for x, y in points]
        dots = tuple(
            (px, py, f"{words}, step {x:g}: {shown(y)}")
            for (px, py), (x, y) in zip(places, points, strict=True)
        )
        lines.append(
            Line(
                words=words,
                colour=number % 8,
                path=" ".join(f"{px},{py}" for px, py in places),
                dots=dots if len(dots) <= _MOST_DOTS else (),
            )
        )
    return Chart(
        title=title,
        unit=unit,
        caption=caption,
        lines=tuple(lines),
        x_ticks=tuple((place_x(x), f"{x:g}") for x in _steps(x_low, x_high)),
        y_ticks=tuple((place_y(y), shown(y)) for y in y_ticks),
    )


def _averaged(points: Points, group: int) -> list[tuple[float, float]]:
    groups = (points[start : start + group] for start in range(0, len(points), group))
    return [
        (part[-1][0], sum(y for _, y in part) / len(part)) if group > 1 else part[0]
        for part in groups
    ]


def _scaled(value: float, low: float, high: float, start: float, end: float) -> float:
    return start + (end - start) * ((value - low) / (high - low) if high > low else 0.5)


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at most `low` to at least `high`, 1, 2 or 5 powers of ten apart."""
    if high - low < _LEAST_SPAN:
        room = abs(low) / 10 if abs(low) > _LEAST_SPAN else 0.1
        low, high = low - room, high + room
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _steps(low: float, high: float) -> list[float]:
    """Whole steps for the axis: the first, the last, and round steps that are not close to them."""
    inner = [x for x in ticks(low, high) if low + (high - low) / 8 < x < high - (high - low) / 8]
    return [low, *(x for x in inner if x == int(x)), high] if high > low else [low]


def shown(value: float) -> str:
    """A number with three digits, as an axis has it."""
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1000:.3g}k"
    return f"{value:.3g}" if size >= 0.001 or value == 0 else f"{value:.1e}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a bar of length 100: where it begins, how long it is, what it counts."""

    words: str
    colour: str
    start: float
    length: float
    count: int


def share_bar(counts: Mapping[tuple[str, str], int]) -> tuple[Segment, ...]:
    """A bar of shares by (words, class of colours); parts of nothing are left out."""
    total, start, segments = sum(counts.values()), 0.0, []
    for (words, colour), count in counts.items():
        length = 100 * count / total if total else 0.0
        if count:
            segments.append(
                Segment(words=words, colour=colour, start=start, length=length, count=count)
            )
        start += length
    return tuple(segments)
