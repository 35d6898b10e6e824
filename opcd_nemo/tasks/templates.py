"""Texts of questions with slots in braces; other braces, as in LaTeX, are kept."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from opcd_nemo.errors import UserError


def require_slots(key: str, template: str, names: Sequence[str]) -> None:
    """Raises: UserError unless the template has each name once, in braces."""
    for name in names:
        if not isinstance(template, str) or template.count(f"{{{name}}}") != 1:
            raise UserError(key, template, f"a text with {{{name}}} in it once")


def fill(template: str, texts: Mapping[str, str]) -> str:
    """Put the texts into their slots; a slot's name inside a text is only text."""
    slots = re.compile(rf"{{({'|'.join(map(re.escape, texts))})}}")
    return slots.sub(lambda match: texts[match[1]], template)
