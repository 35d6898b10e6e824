"""What a model says after its thinking."""

from __future__ import annotations


def spoken(reply: str) -> str:
    """Return what follows the thinking; nothing when the thinking does not end."""
    after = reply.rpartition("</think>")[2]
    return "" if "<think>" in after else after
