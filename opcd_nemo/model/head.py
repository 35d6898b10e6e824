"""The output head: hidden states whose logits exist only in chunks.

Shape letters: `N` response tokens, `H` hidden, `V` vocabulary of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """Hidden states and this rank's shard of the output head; logits exist only in chunks.

    Attributes:
        hidden_NH: the same on all ranks that share the vocabulary.
        weight_VH: this rank's rows, padding last.
        num_valid_columns: how many of the rows are no padding.
        group: the process group of the ranks that share the vocabulary; None: all of it is here.
    """

    hidden_NH: torch.Tensor
    weight_VH: torch.Tensor
    num_valid_columns: int
    group: Any = None
