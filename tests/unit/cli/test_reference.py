"""docs/configuration.md is what the dataclasses say."""

from __future__ import annotations

from opcd_nemo.cli.reference import reference
from tests.tree import ROOT


def test_the_reference_is_up_to_date() -> None:
    written = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert written == reference(), "stale: make docs writes it anew"
