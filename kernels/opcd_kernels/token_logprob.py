"""Log-probability of given tokens and entropy from logits, sharded over the vocabulary or not."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from opcd_kernels import backend
from opcd_kernels.backend import Backend
from opcd_kernels.checks import check_matrix, check_targets, check_weight, valid_columns
from opcd_kernels.options import IDENTITY, LogitMap, Sharpening
from opcd_kernels.rows import merge_token, token_scores, weighted
from opcd_kernels.shards import gather_parts, local_columns, vocab_start


class TokenScores(NamedTuple):
    """Log-probability of the target and entropy of the softmax, both [N] fp32 in nats."""

    logprob_N: Tensor
    entropy_N: Tensor


def token_logprob(
    logits_NV: Tensor,
    target_ids_N: Tensor,
    *,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_N: Tensor | None = None,
    num_valid_columns: int | None = None,
    first_token_id: int | None = None,
    logit_map: LogitMap = IDENTITY,
) -> TokenScores:
    """Log-probabilities, -inf for an id that no rank holds, and entropies, the same on every rank.

    Collective over `group`: one all-gather of 16 bytes a token in forward, none in backward. Both
    results are differentiable, and **backward writes the gradient over the logits**: use them for
    nothing afterwards; autograd refuses a second backward.

    Args:
        logits_NV: this rank's columns, before temperature; fp32, bf16 or fp16.
        target_ids_N: int64 vocabulary ids, counted over all shards.
        temperature: divides the logits after their map.
        group: the ranks that hold the other columns, in rank order; None when this rank holds all.
        weight_N: fp32 factors of both results, at least 0; a row with weight 0 is not read.
        num_valid_columns: columns of this shard that are vocabulary; the rest is padding, has no
            probability and gets gradient 0.
        first_token_id: the id of this shard's first column; None means rank * V, right for shards
            of equal width.
        logit_map: scale and softcap that the model applies to these logits.

    Raises:
        ValueError: an option is out of range, or shapes, dtypes or devices disagree.
    """
    sharpening = Sharpening(temperature=temperature, logit_map=logit_map)
    check_matrix("logits_NV", logits_NV)
    num_rows, num_columns = logits_NV.shape
    check_targets(target_ids_N, num_rows, logits_NV.device)
    if weight_N is not None:
        weight_N = check_weight(weight_N, num_rows, logits_NV.device)
    width = valid_columns(num_valid_columns, num_columns)
    start = vocab_start(num_columns, group) if first_token_id is None else first_token_id
    column = local_columns(target_ids_N, start, width)
    engine = backend.choose(logits_NV)
    logprob, entropy = _TokenScores.apply(  # type: ignore[no-untyped-call]
        logits_NV, column, weight_N, width, sharpening, group, engine
    )
    return TokenScores(logprob, entropy)


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    width: int
    sharpening: Sharpening
    engine: Backend


class _TokenScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        logits_NV: Tensor,
        column_N: Tensor,
        weight_N: Tensor | None,
        width: int,
        sharpening: Sharpening,
        group: dist.ProcessGroup | None,
        engine: Backend,
    ) -> tuple[Tensor, Tensor]:
        part = engine.token_statistics(logits_NV[:, :width], column_N, sharpening, weight_N)
        logprob, entropy, constants = token_scores(merge_token(gather_parts(part, group)))
        ctx.save_for_backward(logits_NV, column_N, weight_N, constants)  # type: ignore[arg-type]
        ctx.width, ctx.sharpening, ctx.engine = width, sharpening, engine
        return weighted(logprob, weight_N), weighted(entropy, weight_N)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: _Context, logprob_upstream_N: Tensor, entropy_upstream_N: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, column, weight, constants = ctx.saved_tensors
        upstream = torch.stack([logprob_upstream_N, entropy_upstream_N], dim=1)
        if weight is not None:
            upstream *= weight.unsqueeze(1)
        gradient = logits.detach()
        ctx.engine.token_gradient_(
            gradient[:, : ctx.width], column, constants, upstream, ctx.sharpening
        )
        gradient[:, ctx.width :] = 0
        return gradient, None, None, None, None, None, None
