"""Log-probability of given tokens from hidden states and an lm_head shard."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opcd_kernels import backend
from opcd_kernels.backend import Backend
from opcd_kernels.checks import check_head, check_targets, check_weight, valid_columns
from opcd_kernels.linear import (
    ChunkPlan,
    active_rows,
    chunk_size,
    linear_loss,
    spread_rows,
    take_rows,
)
from opcd_kernels.options import IDENTITY, LogitMap, Sharpening
from opcd_kernels.rows import merge_token, token_scores
from opcd_kernels.shards import gather_parts, local_columns, vocab_start


def linear_token_logprob(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    target_ids_N: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_N: Tensor | None = None,
    chunk_tokens: int | None = None,
    num_valid_columns: int | None = None,
    first_token_id: int | None = None,
    logit_map: LogitMap = IDENTITY,
) -> Tensor:
    """Log-probability of the targets in nats, [N] fp32; -inf for an id that no rank holds.

    log softmax(hidden @ weight^T / temperature)[target]. Collective over `group`: in forward one
    all-gather a chunk of 16 bytes a token, in backward one all-reduce of the hidden gradient.
    Differentiable in hidden states and weight; every rank gets the full gradient of the hidden
    states and that of its own shard of the weight.

    Args:
        hidden_NH: final hidden states, the same on every rank of `group`.
        weight_VH: this rank's rows of the lm_head.
        target_ids_N: int64 vocabulary ids, counted over all shards.
        temperature: divides the logits after their map.
        group: the ranks that hold the other rows, in rank order; None when this rank holds all.
        weight_N: as in `linear_divergence`: factors of the result, 0 skips the row.
        chunk_tokens: tokens whose logits exist at a time; None picks a size for the device.
        num_valid_columns: rows of this shard that are vocabulary; the rest is padding, has no
            probability and gets gradient 0.
        first_token_id: the id of this shard's first row; None means rank * V, right for shards of
            equal width.
        logit_map: scale and softcap of the logits.

    Raises:
        ValueError: an option is out of range, or shapes, dtypes or devices disagree.
    """
    sharpening = Sharpening(temperature=temperature, logit_map=logit_map)
    check_head("hidden_NH", hidden_NH, "weight_VH", weight_VH)
    num_rows = hidden_NH.shape[0]
    check_targets(target_ids_N, num_rows, hidden_NH.device)
    if weight_N is not None:
        weight_N = check_weight(weight_N, num_rows, hidden_NH.device)
    width = valid_columns(num_valid_columns, weight_VH.shape[0])
    start = vocab_start(weight_VH.shape[0], group) if first_token_id is None else first_token_id
    active = active_rows(weight_N)
    loss = _TokenLogprob(
        column_N=local_columns(take_rows(target_ids_N, active), start, width),
        sharpening=sharpening,
        group=group,
        token_weight_N=None if weight_N is None else take_rows(weight_N, active),
        engine=backend.choose(hidden_NH),
    )
    chunk = chunk_size(chunk_tokens, weight_VH, num_rows, group)
    plan = ChunkPlan(chunk_tokens=chunk, width=width, group=group, weight_N=loss.token_weight_N)
    loss_A = linear_loss(take_rows(hidden_NH, active), weight_VH, loss, plan)
    return spread_rows(loss_A, active, num_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenLogprob:
    """A `ChunkLoss`: the target's log-probability. Nothing lives beside the logits."""

    column_N: Tensor
    sharpening: Sharpening
    group: dist.ProcessGroup | None
    token_weight_N: Tensor | None
    engine: Backend

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def restore(self, rows: slice) -> None:
        pass

    def release(self) -> None:
        pass

    def measure(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        weight = None if self.token_weight_N is None else self.token_weight_N[rows]
        column = self.column_N[rows]
        part = self.engine.token_statistics(logits_CV, column, self.sharpening, weight)
        logprob, _, constants = token_scores(merge_token(gather_parts(part, self.group)))
        return logprob, constants

    def differentiate_(
        self, logits_CV: Tensor, constants_CX: Tensor, upstream_C: Tensor, rows: slice
    ) -> None:
        upstream = torch.stack([upstream_C, torch.zeros_like(upstream_C)], dim=1)
        self.engine.token_gradient_(
            logits_CV, self.column_N[rows], constants_CX, upstream, self.sharpening
        )
