"""Names that do not exist: their error line offers names that look alike, and a few others."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from opcd_nemo.errors import ABSENT, UserError

_MOST = 12


def unknown_name(
    key: str,
    names: Iterable[str],
    *,
    value: object = ABSENT,
    name: str | None = None,
    what: str = "key",
    elsewhere: Iterable[str] = (),
) -> UserError:
    """The error for a name that none of `names` is.

    Args:
        key: the whole key, or the option that was given.
        names: what exists where it was looked for.
        value: the value that `key` was given.
        name: what was misspelt; without it the last part of `key`.
        what: what the name should be of: a key, recipe, argument.
        elsewhere: whole keys that were meant if none of `names` looks alike.
    """
    known = list(names)
    name = key.rpartition(".")[2] if name is None else name
    close = get_close_matches(name, known, n=3, cutoff=0.6) or list(elsewhere)[:3]
    problem = f"no such {what}" + (f"; did you mean {' or '.join(close)}?" if close else "")
    shown = [other for other in close if other in known]
    shown += [other for other in known if other not in close]
    more = f", ... ({len(shown) - _MOST} more)" if len(shown) > _MOST else ""
    allowed = ", ".join(shown[:_MOST]) + more
    return UserError(key, value, allowed or "none", problem=problem)
