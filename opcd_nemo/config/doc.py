"""What a configuration key means and takes: words, range and choices, written at its field."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, Literal, get_args, get_origin

from opcd_nemo.errors import UserError

TYPE_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
    list[int]: "a list of whole numbers",
    dict[str, Any]: "a mapping",
    dict[str, float]: "a mapping of names to numbers",
}
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what neither a file nor a terminal can have


@dataclass(frozen=True, slots=True, kw_only=True)
class Doc:
    """The meaning of a key and what it takes, beyond its type.

    A parameter of a class that YAML names carries it too: `Annotated[float, Doc(...)]`.

    Attributes:
        words: the meaning, for help and for the line about a key without a value.
        minimum, above: the smallest number, or a limit that a number must exceed.
        maximum, below: the largest number, or a limit that a number must not reach.
        choices: the texts that are taken; a list holds each of them once at most.
        takes: what is taken, where the type says too little.
        example: a value that works.
        keys: a dataclass of the keys that a run follows of a group which others define.
        plug: the value is a mapping with a `_target_`.
    """

    words: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    takes: str | None = None
    example: str | None = None
    keys: type | None = None
    plug: bool = False


def doc(words: str, **details: Any) -> Any:
    """A dataclass field with a `Doc`; `default` is the field's, `details` are the `Doc`'s.

    A default is for configurations that were stored before the key; `default_factory` makes a list.
    """
    given = {name: details.pop(name) for name in ("default", "default_factory") if name in details}
    return field(metadata={"doc": Doc(words=words, **details)}, **given)


def doc_of(schema: type, name: str) -> Doc:
    """The `Doc` at a field of a dataclass; the docstring's first line is a group's."""
    found = schema.__dataclass_fields__[name].metadata.get("doc")  # type: ignore[attr-defined]
    assert isinstance(found, Doc), f"{schema.__name__}.{name} has no doc(...)"
    return found


def allowed_words(kind: Any, described: Doc | None) -> str:
    """What a key takes, in words: its type, range and choices."""
    kind, null = _without_null(kind)
    if is_dataclass(kind):
        return f"a group with the keys {', '.join(kind.__dataclass_fields__)}"
    if described is not None and described.takes is not None:
        return f"{described.takes}{', or null' if null else ''}"
    choices = get_args(kind) if get_origin(kind) is Literal else described and described.choices
    if choices and get_origin(kind) is list:
        return f"a list of {', '.join(choices)}, each at most once"
    if choices:
        return ", ".join(["null"] * null + [str(choice) for choice in choices])
    words = TYPE_WORDS.get(kind, "a value in conf/, or key=value")
    limits = " and ".join(_limits(described)) if described is not None else ""
    return f"{words}{f' {limits}' if limits else ''}{', or null' if null else ''}"


def _without_null(kind: Any) -> tuple[Any, bool]:
    others = [part for part in get_args(kind) if part is not type(None)]
    if type(None) in get_args(kind) and len(others) == 1:
        return others[0], True
    return kind, False


def _limits(described: Doc) -> list[str]:
    limits = (
        (">=", described.minimum),
        (">", described.above),
        ("<=", described.maximum),
        ("<", described.below),
    )
    return [f"{sign} {_number(limit)}" for sign, limit in limits if limit is not None]


def _number(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def check_value(key: str, value: Any, kind: Any, described: Doc | None) -> None:
    """Check a value of the right type: writable, finite, within its range, one of its choices.

    Raises:
        UserError: it is none of these.
    """
    parts = value if isinstance(value, list) else [value]
    if isinstance(value, dict) and _without_null(kind)[0] == dict[str, float]:
        parts = list(value.values())
    problem = None
    numbers = [part for part in parts if isinstance(part, int | float) and type(part) is not bool]
    check_texts(key, value, allowed_words(kind, described))
    if not all(math.isfinite(number) for number in numbers):
        problem = "is not finite"
    elif described is None or (
        all(_is_within(number, described) for number in numbers)
        and (not described.choices or _are_chosen(value, parts, described.choices))
    ):
        return
    raise UserError(key, value, allowed_words(kind, described), problem=problem)


def check_texts(key: str, value: Any, allowed: str = "a text") -> None:
    """Refuse characters that no text has, in a value or anywhere inside.

    Raises:
        UserError: a text has some.
    """
    if isinstance(value, str) and _NO_TEXT.search(value):
        raise UserError(key, value, allowed, problem="has a character that no text has")
    if isinstance(value, Mapping):
        for name, inside in value.items():
            check_texts(f"{key}.{name}", inside)
    elif isinstance(value, list | tuple):
        for index, inside in enumerate(value):
            check_texts(f"{key}.{index}", inside)


def _is_within(number: float, described: Doc) -> bool:
    return (
        (described.minimum is None or number >= described.minimum)
        and (described.above is None or number > described.above)
        and (described.maximum is None or number <= described.maximum)
        and (described.below is None or number < described.below)
    )


def _are_chosen(value: Any, parts: Sequence[Any], choices: tuple[str, ...]) -> bool:
    # null passes: a type that does not take it has refused it before
    known = value is None or all(part in choices for part in parts)
    return known and (not isinstance(value, list) or len(set(parts)) == len(parts))
