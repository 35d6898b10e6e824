r"""When two written answers are the same value, though units, percent signs and blanks differ.

math-verify compares formulas. What people write around a number is read here:

* a unit is dropped, `18 dollars`, `5\text{ cm}^2`; two different units are left to math-verify;
* a percent sign is a unit where the other side has none: 50 is `50\%`; so is 0.5, its value;
* hundred, thousand, million, billion, trillion and dozen multiply: `18 million` is not 18;
* blanks between groups of three digits are dropped, `1\,000\,000`;
* a text with words between numbers, `5 hours 30 minutes`, is not the first of them;
* in an equation every side that is no name must have the value: `1=2` is not 2, `x = 2` is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from opcd_nemo.tasks.answers import plain

_LONGEST = 200  # of an answer that is read as a quantity; a longer answer is a text
_BLANK = r"(?:\\[,;:> ]|[~ \u00a0\u2007\u2009\u202f])"
_BLANKS = re.compile(rf"{_BLANK}+")
_GROUPS = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_BLANK}+\d{{3}})+(?!{_BLANK}*\d)")
_TEXT = re.compile(r"\\(?:text|math|operatorname|mbox)[a-z]*\s*\{([^{}]*)\}")
_PER = re.compile(r"(?<=\d)\s*/\s*(?=[A-Za-z]{2})")
_CURRENCY = re.compile(r"^([-+]?)\s*(?:\\?\$|[€£¥₹]|(?:USD?|EUR|GBP)\b\s*\$?)\s*")
_PERCENT = re.compile(r"\s*(?:%|\bper ?cent|\bpercentage|\bpct)(?: points?)?$", re.IGNORECASE)
_NUMBER = re.compile(
    r"(?:[^A-Za-z\\%°]|\\(?:[dt]?frac|sqrt|pi|cdot|times|left|right)(?![A-Za-z])|\\[{}])*"
)
_UNIT = re.compile(r"[A-Za-z°'][A-Za-z°'/.-]*(?:\^?\{?[23]\}?|[²³])?")
_SHORT_UNITS = frozenset(
    "am cl cm dl ft gb hr hz in kb kg km lb mb mg mi ml mm oz pm pt yd".split()
)
_LETTER_UNITS = frozenset("ghlms")
_FACTORS = {
    "hundred": "100",
    "thousand": "1000",
    "million": "10^6",
    "billion": "10^9",
    "trillion": "10^{12}",
    "dozen": "12",
}
# words after a number that say something else than what it counts
_NO_UNITS = frozenset(
    "and or to not no nor over by plus minus times divided multiplied mod modulo base sqrt root pi "
    "log ln sin cos tan exp infinity infinite half halves third thirds fourth fourths quarter "
    "quarters fifth fifths sixth sixths seventh eighth eighths ninth tenth tenths hundredth "
    "hundredths thousandth thousandths squared cubed factorial choose if when where is are was "
    "abc abcd xyz but except wrong incorrect less more than at least most about".split()
)
_NAME = re.compile(r"[A-Za-z\\][\w\\{}'() ]*|")
_COMMAND = re.compile(r"\\[A-Za-z]+|\b(?:sin|cos|tan|log|ln|exp|mod|gcd|lcm|max|min)\b")
_COMPOUND = re.compile(r"\d\s+[A-Za-z]{3,}[^=]*\d")
_EQUALS = re.compile(
    r"(?<![\\<>!:=~-])=(?![=>])|=>|->|[→⇒]|\\(?:to|implies|[Rr]ightarrow)(?![A-Za-z])"
)
_SEVERAL = re.compile(r"(?<!\\)[,;]|\\(?:quad|qquad|lor|land)\b|\b(?:and|or)\b")

Equal = Callable[[str, str], bool | None]


class Quantity(NamedTuple):
    """A number as math-verify reads it, and what stands around it.

    `is_scaled` says that a word such as million multiplies the number.
    """

    number: str
    unit: str
    is_percent: bool
    is_scaled: bool

    @property
    def value(self) -> str:
        """The number, of a percentage a hundredth."""
        return rf"\frac{{{self.number}}}{{100}}" if self.is_percent else self.number


def same_value(gold: str, answer: str, equal: Equal) -> bool:
    """Whether an answer has the value of the right answer; `equal` compares formulas."""
    if answer == gold:
        return True
    if not _EQUALS.search(gold) and (sides := _sides(answer)):
        return all(same_value(gold, side, equal) for side in sides)
    wanted, given = quantity(gold), quantity(answer)
    if wanted is not None and given is not None:
        comparable = wanted.unit == given.unit or not (wanted.unit and given.unit)
        if comparable and equal(wanted.number, given.number):
            return True
        if wanted.is_percent != given.is_percent and equal(wanted.value, given.value):
            return True
        if wanted.is_scaled or given.is_scaled:
            return False  # math-verify takes the million for a unit
        if (wanted.number, given.number) == (gold, answer):
            return False
    elif wanted is not None and _is_compound(answer):
        return False  # math-verify reads the first number alone
    return bool(equal(gold, answer))


def _is_compound(answer: str) -> bool:
    """Whether a text has words between numbers, as `5 hours 30 minutes` has."""
    text = _COMMAND.sub(" ", _TEXT.sub(r" \1 ", answer))
    return len(answer) <= _LONGEST and _COMPOUND.search(text) is not None


def quantity(text: str) -> Quantity | None:
    """Read a number with or without a unit; None where the text is something else."""
    if len(text) > _LONGEST:
        return None
    text = plain(text).replace(r"\!", "")
    text = _GROUPS.sub(lambda match: _BLANKS.sub("", match[0]), text)
    text = _TEXT.sub(r" \1 ", text).replace(r"\%", "%")
    text = _CURRENCY.sub(r"\1", _BLANKS.sub(" ", text).strip())
    text = _PER.sub(" per ", text.rstrip("$€£¥₹ ").removesuffix("\\"))
    without = _PERCENT.sub("", text)
    found = _NUMBER.match(without)
    if found is None or not re.search(r"\d", found[0]):
        return None
    words = without[found.end() :].casefold().split()
    units = [word for word in words if word not in _FACTORS]
    is_apart = not words or found[0][-1].isspace() or words[0][0] == "°" or _is_short(words[0])
    if not is_apart or not all(map(_is_unit, units)):
        return None
    number = found[0].strip()
    factors = [_FACTORS[word] for word in words if word in _FACTORS]
    return Quantity(
        number=r" \cdot ".join([f"({number})", *factors]) if factors else number,
        unit=" ".join(units),
        is_percent=without != text,
        is_scaled=bool(factors),
    )


def _is_unit(word: str) -> bool:
    if _UNIT.fullmatch(word) is None or word.strip(".'") in _NO_UNITS:
        return False
    bare = word.rstrip("^{}23²³")
    return "°" in word or len(bare) > 2 or bare in _LETTER_UNITS or _is_short(word)


def _is_short(word: str) -> bool:
    return word.rstrip("^{}23²³.") in _SHORT_UNITS


def _sides(answer: str) -> list[str]:
    """The sides of an equation that are no names; nothing if the text has not exactly one."""
    sides = [side.strip() for side in _EQUALS.split(answer)]
    if len(sides) < 2 or len(answer) > _LONGEST or _SEVERAL.search(answer):
        return []
    values = [side for side in sides if quantity(side) is not None]
    names = [side for side in sides if side not in values and _NAME.fullmatch(side)]
    return values if len(values) + len(names) == len(sides) else []
