"""The frozen teacher: it sees the context and scores the student's own tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from opcd_nemo.attention import KeyValue
from opcd_nemo.batching import DistillBatch
from opcd_nemo.language_model import LanguageModel


class FrozenTeacher:
    """Scores with weights that never change, so the context is encoded once for all steps."""

    def __init__(self, model: LanguageModel, prefix_ids: Sequence[int]) -> None:
        """Freeze the model; `prefix_ids` are the tokens that its prompts share (the context)."""
        model.module.requires_grad_(False)
        self.model, self.prefix_ids = model, tuple(prefix_ids)
        self._prefix: dict[int, KeyValue] | None = None

    def score(self, batches: Sequence[DistillBatch]) -> list[torch.Tensor]:
        """Hidden states [N, H] of each micro-batch's response tokens, in the student's order.

        Empty on every pipeline stage but the last. Collective over tp and pp.
        """
        streams = [stream for batch in batches for stream in batch.teacher]
        if self._prefix is None and any(stream.has_prefix for stream in streams):
            self._prefix = self.model.prefix(self.prefix_ids)
        prefixes = [self._prefix if stream.has_prefix else None for stream in streams]
        hidden = self.model.score([stream.batch for stream in streams], prefixes)
        if not hidden:
            return []
        parts = iter(hidden)
        return [self._in_order(batch, [next(parts) for _ in batch.teacher]) for batch in batches]

    def _in_order(self, batch: DistillBatch, parts: list[torch.Tensor]) -> torch.Tensor:
        places = torch.cat([stream.tokens_N for stream in batch.teacher])
        hidden = torch.cat(parts)
        return torch.empty_like(hidden).index_copy_(0, places, hidden)
