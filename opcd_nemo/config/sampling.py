"""How tokens are drawn: the group `sampling` wherever a model writes."""

from __future__ import annotations

from dataclasses import dataclass

from opcd_nemo.config.doc import doc


@dataclass(kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = doc("0 is greedy", minimum=0)
    top_p: float = doc(
        "draw from the likeliest tokens of this mass; 1: from all", above=0, maximum=1
    )
    top_k: int = doc("draw from so many likeliest tokens; 0: from all", minimum=0)
    max_new_tokens: int = doc("the longest answer, in tokens", minimum=1)
