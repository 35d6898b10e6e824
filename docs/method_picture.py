"""Draws docs/method.svg, the picture of README.md: `python docs/method_picture.py`."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 840, 292
BLUE, ORANGE, GREY, INK = "#2f6db5", "#c9700a", "#6b7280", "#1f2937"
TOKENS = ("A", "violin", "is", "an", "instrument", ".")
SURE = (0.9, 0.95, 0.85, 0.5, 0.75, 0.9)  # of the teacher, drawn as bars
UNSURE = (0.8, 0.9, 0.8, 0.35, 0.45, 0.2)  # of the student


def lines() -> Iterator[str]:
    """The elements of the picture, back to front."""
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'font-family="sans-serif" font-size="14" fill="{INK}">'
    )
    yield "<title>On-policy context distillation</title>"
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="#ffffff"/>'
    yield from _side(20, "Student", "reads the question, writes the answer", BLUE, None, UNSURE)
    yield from _side(
        450, "Teacher (frozen)", "reads context + question, scores the answer", ORANGE,
        "Answer in one short sentence.", SURE,
    )  # fmt: skip
    yield f'<path d="M400 175h36m-7 -6l8 6l-8 6" stroke="{GREY}" stroke-width="2" fill="none"/>'
    yield _text(420, 162, "same", GREY, 12, "middle")
    yield _text(420, 198, "tokens", GREY, 12, "middle")
    words = "loss = mean over the tokens of KL(student || teacher); only the student learns"
    yield _text(WIDTH / 2, 276, words, INK, 15, "middle")
    yield "</svg>"


def _side(
    x: int, title: str, about: str, colour: str, context: str | None, sure: tuple[float, ...]
) -> Iterator[str]:
    yield (
        f'<rect x="{x}" y="16" width="370" height="236" rx="8" fill="none" stroke="{colour}" '
        f'stroke-width="2"/>'
    )
    yield _text(x + 16, 42, title, colour, 17)
    yield _text(x + 16, 62, about, GREY, 13)
    if context is not None:
        yield (
            f'<rect x="{x + 16}" y="74" width="338" height="26" rx="4" fill="{colour}" '
            f'fill-opacity="0.15"/>'
        )
        yield _text(x + 26, 92, context, colour, 13)
    yield _text(x + 26, 124, "What is a violin?", INK, 13)
    yield _text(x + 26, 158, "how likely is each token of the answer?", GREY, 12)
    places = (16, 60, 124, 158, 196, 300)
    for token, place, share in zip(TOKENS, places, sure, strict=True):
        yield _text(x + 10 + place, 180, token, INK, 14)
        yield (
            f'<rect x="{x + 10 + place}" y="{240 - 44 * share:.1f}" width="24" '
            f'height="{44 * share:.1f}" fill="{colour}" fill-opacity="0.6"/>'
        )


def _text(x: float, y: float, text: str, colour: str, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def picture() -> str:
    """The text of the SVG file."""
    return "\n".join(lines()) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("method.svg").write_text(picture(), encoding="utf-8")
