"""Units, percents, blanks and equations around the number that is compared."""

from __future__ import annotations

from functools import cache

import pytest

from opcd_nemo.tasks.answers import last_box, marked, plain
from opcd_nemo.tasks.quantities import same_value
from opcd_nemo.tasks.timed import TimedVerifier


@cache
def verifier() -> TimedVerifier:
    return TimedVerifier("maths", limit_s=10)


RIGHT = [
    ("50", r"50\%"),
    ("50", "50%"),
    ("50", "50 percent"),
    (r"20\%", "20"),
    ("100", r"100\%"),
    ("0.5", r"50\%"),
    (r"50\%", "0.5"),
    ("18", "18 dollars"),
    ("18", "$18"),
    ("18", r"\$18"),
    ("$18", "18"),
    ("18 dollars", "18"),
    ("18", r"18\text{ dollars}"),
    ("18", r"18 \text{ miles per hour}"),
    ("18", "18 km/h"),
    ("18", r"18\,\mathrm{cm}^2"),
    ("5", "5cm"),
    ("5", "5 m"),
    ("90", "90°"),
    ("90", "90 degrees"),
    ("7", "a + b = 7"),
    ("18", "$18/hour"),
    ("18", "18 €"),
    ("-5", "-$5"),
    ("1234.5", "1 234.5"),
    ("2", r"x \to 2"),
    ("3/4", "3/4 cups"),
    (r"2\pi", r"2\pi meters"),
    ("1000000", r"1\,000\,000"),
    (r"1\,000\,000", "1,000,000"),
    ("1000000", "1 000 000"),
    ("1000000", "1\u202f000\u202f000"),
    ("1000000", r"1{,}000{,}000"),
    ("1000000", "1 million"),
    ("24", "2 dozen eggs"),
    ("18000000", r"18\text{ million}"),
    ("2", "x = 2"),
    ("2", "1+1=2"),
    ("2", "2 = x"),
    ("18", r"\text{Total} = 18 \text{ dollars}"),
    ("7", "a = 3 + 4 = 7"),
    ("1000", r"x = 1\,000"),
    ("18", "-(-18)"),
]
WRONG = [
    ("2", "1=2"),
    ("2", "2=1"),
    ("2", "1 = 2"),
    ("2", r"\frac{1}{2} = 2"),
    ("2", "x = 1 = 2"),
    ("2", r"1 \to 2"),
    ("5", r"5 \text{ hours } 30 \text{ minutes}"),
    ("18", r"18\text{ dollars and }50\text{ cents}"),
    ("2", "1 -> 2"),
    ("2", "1 => 2"),
    ("2", "2 y"),
    ("50", r"5\%"),
    ("50", "0.5"),
    ("18", "18 million"),
    ("18", r"18\text{ million}"),
    ("18", "180 dollars"),
    ("2", "2 x"),
    ("2", "2x"),
    ("2", "2 xy"),
    ("18", "18 or 19"),
    ("1", "1 half"),
    ("1", r"1\,000"),
    ("12", "12 345"),
    ("18", "dollars"),
    ("", "18"),
]


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_what_stands_around_a_number_makes_it_no_other(gold: str, answer: str) -> None:
    assert same_value(gold, answer, verifier()) is True


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_another_number_is_wrong(gold: str, answer: str) -> None:
    assert same_value(gold, answer, verifier()) is False


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so $\boxed 2$.", "2"),
        (r"so \boxed 3 and that is all", "3"),
        (r"\fbox{2}", "2"),
        (r"\framebox{2}", "2"),
        (r"\fbox 2", "2"),
        (r"$\boxed\frac12$", r"\frac12"),
        (r"$x = \boxed \frac{1}{2}$", r"\frac{1}{2}"),
        (r"$\boxed x + 1$", "x + 1"),
        (r"\[\boxed -3\]", "-3"),
        (r"$$\boxed 6$$", "6"),
        (r"{\boxed 6}", "6"),
        (r"\boxed 3.5.", "3.5"),
        (r"\boxed (1, 2)", "(1, 2)"),
        (r"it costs $5, so \boxed 3 because $x$ is 3", "3"),
        (r"\boxed{1} then $\boxed 2$", "2"),
        (r"$\boxed 1$ then \fbox{2}", "2"),
        (r"\boxed{\fbox{2}}", "2"),
        (r"\boxed", None),
        (r"\boxed{2", None),
        (r"\boxes 2", None),
    ],
)
def test_a_box_needs_no_braces_and_may_be_a_frame(text: str, box: str | None) -> None:
    assert last_box(text) == box
    assert (None if (found := marked(text)) is None else plain(found)) == box


@pytest.mark.parametrize(
    "loop", [r"\boxed ", r"$\boxed x", r"\fbox{}", r"\boxed\{", "1 000 ", "a="]
)
def test_long_answers_take_no_time(loop: str) -> None:
    text = loop * (100_000 // len(loop))
    marked(text)
    assert not same_value("2", text, lambda gold, answer: False)
