"""From a template and plain values to one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from opcd_nemo.errors import visible

_TEMPLATES = Path(__file__).with_name("templates")
MOST_BYTES = 2_000_000
"""A page is smaller, whatever the run."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of what a run has a page shows; the page says how much it leaves out.

    Attributes:
        letters: of a text.
        entries: of a list.
        tokens: of an answer token by token.
    """

    letters: int
    entries: int
    tokens: int


LIMITS = (
    Limits(20_000, 100, 120),
    Limits(5_000, 60, 120),
    Limits(2_000, 30, 120),
    Limits(500, 20, 60),
    Limits(200, 10, 20),
    Limits(60, 3, 4),  # no text of any letters fills a page so
)
"""The first that keep a page below `MOST_BYTES` are taken: the widest, for an ordinary run."""


def small_page(build: Callable[[Limits], str]) -> str:
    """The page that shows as much as fits below `MOST_BYTES`."""
    for limits in LIMITS:
        page = build(limits)
        if len(page.encode()) < MOST_BYTES:
            return page
    raise AssertionError(f"{len(page)} letters with {LIMITS[-1]}")


@cache
def _environment(limits: Limits) -> Environment:
    """Templates whose texts are cut, and whose filter `shown` cuts lists."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=partial(_shown_text, limits.letters),
    )
    environment.filters["shown"] = partial(_shown_entries, limits.entries)
    return environment


def _shown_text(most: int, value: Any) -> Any:
    """Cut a text, and show what moves a cursor or turns the direction of reading by its code."""
    if type(value) is not str:  # markup of a template
        return value
    more = len(value) - most
    return visible(f"{value[:most]} ... and {more:,} letters more" if more > 0 else value)


def _shown_entries(most: int, values: Sequence[Any]) -> list[Any]:
    return list(values)[:most]


def render(template: str, limits: Limits, **values: Any) -> str:
    """The page of a template; every text in `values` is escaped, none is trusted."""
    style = (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    script = (_TEMPLATES / "page.js").read_text(encoding="utf-8")
    policy = "; ".join(
        (
            "default-src 'none'",
            f"style-src '{_hash(style)}'",
            f"script-src '{_hash(script)}'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    page = _environment(limits).get_template(template)
    return page.render(
        policy=escape(policy),
        style=Markup(style),
        script=Markup(script),
        limits=limits,
        narrowed=limits != LIMITS[0],
        most_megabytes=MOST_BYTES // 1_000_000,
        **values,
    )


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"
