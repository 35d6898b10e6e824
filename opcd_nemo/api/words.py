"""Python values as words of a command line: `key=value` in Hydra's grammar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from opcd_nemo.config.stored import escaped


def word(key: str, value: object) -> str:
    """The word that gives a key this value; a text may have any characters.

    `value` is None, a bool, a number, a text, a path, or a list or mapping of these.
    """
    return f"{key}={_in_grammar(value)}"


def _in_grammar(value: object) -> str:
    from hydra.core.override_parser.types import Quote, QuotedString

    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_in_grammar(each)}" for key, each in value.items()) + "}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_in_grammar, value))}]"
    assert isinstance(value, str | Path), value
    return QuotedString(text=escaped(str(value)), quote=Quote.single).with_quotes()
