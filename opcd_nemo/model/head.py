"""The output head: hidden states whose logits exist only in chunks.

Shape letters: `N` response tokens, `H` hidden, `V` vocabulary of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Hidden states and this rank's shard of the output head; logits exist only in chunks."""

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    num_valid_columns: int
