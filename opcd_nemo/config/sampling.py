"""How tokens are drawn: the group `sampling` wherever a model writes."""

from __future__ import annotations

from dataclasses import dataclass

from opcd_nemo.config.doc import doc
from opcd_nemo.config.limits import (
    LEAST_TEMPERATURE,
    MOST_TEMPERATURE,
    MOST_TOKENS,
    MOST_VOCABULARY,
)
from opcd_nemo.errors import UserError

_TEMPERATURE = f"0, or a number >= {LEAST_TEMPERATURE:g} and <= {MOST_TEMPERATURE:g}"


@dataclass(kw_only=True)
class Sampling:
    """How tokens are drawn."""

    temperature: float = doc("0 is greedy", minimum=0, maximum=MOST_TEMPERATURE, takes=_TEMPERATURE)
    top_p: float = doc(
        "draw from the likeliest tokens of this mass; 1: from all", above=0, maximum=1
    )
    top_k: int = doc(
        "draw from so many likeliest tokens; 0: from all", minimum=0, maximum=MOST_VOCABULARY
    )
    max_new_tokens: int = doc("the longest answer, in tokens", minimum=1, maximum=MOST_TOKENS)

    def check(self, prefix: str) -> None:
        """Refuse a temperature that divides by next to nothing, and limits of no effect.

        Raises:
            UserError: `prefix` stands before the key.
        """
        temperature = self.temperature
        if 0 < temperature < LEAST_TEMPERATURE:
            raise UserError(f"{prefix}temperature", temperature, _TEMPERATURE)
        for name, value, off in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0)):
            if temperature == 0 and value != off:
                raise UserError(
                    f"{prefix}{name}", value, f"{off} with {prefix}temperature=0, which is greedy"
                )
