"""Losses from hidden states and lm_head shards in token chunks, never storing an [N, V] tensor.

`linear_loss` is the one loop over chunks; what is computed of a chunk's logits is a `ChunkLoss`.
There are two ways to the gradient, both exact:

- `weight_N` given: forward makes the gradients from the logits at hand (4 GEMMs in all). Backward
  only scales them, which is exact for the weight's gradient when the upstream gradient is one
  number, as it is after `loss_N.sum()`.
- else, or when the upstream gradient differs by token: forward keeps row constants only, and
  backward computes the logits again (6 GEMMs).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from opcd_kernels.checks import check_integer
from opcd_kernels.rows import weighted
from opcd_kernels.shards import sum_over_shards

_GPU_CHUNK_BYTES = 1 << 28
_GPU_GROUP_TOKENS = 1024
_CPU_CHUNK_TOKENS = 128
_ROWS = 4096  # of the weight's gradient that are worked on at a time


class ChunkLoss(Protocol):
    """A per-token loss of a chunk's student logits [C, V_valid]; rows refer to the whole batch."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What backward reads again and nobody may overwrite before."""

    def measure(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """(loss_C, constants_CX of its gradient), both fp32. Collective over the group."""

    def differentiate_(
        self, logits_CV: Tensor, constants_CX: Tensor, upstream_C: Tensor, rows: slice
    ) -> None:
        """Overwrites the logits with the gradient of `sum(upstream * loss)`."""

    def restore(self, rows: slice) -> None:
        """Brings back what `measure` left for `differentiate_`, without a collective."""

    def release(self) -> None:
        """Frees what only lives between `measure` or `restore` and `differentiate_`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPlan:
    """How the loop runs.

    Args:
        chunk_tokens: tokens whose logits exist at a time.
        width: vocabulary columns of this shard that are not padding.
        group: the ranks that hold the other columns.
        weight_N: factors of the losses, known in advance.
    """

    chunk_tokens: int
    width: int
    group: dist.ProcessGroup | None
    weight_N: Tensor | None

    def chunks(self, num_rows: int) -> Iterator[slice]:
        """Slices of at most `chunk_tokens` rows, in order."""
        for start in range(0, num_rows, self.chunk_tokens):
            yield slice(start, min(start + self.chunk_tokens, num_rows))


def chunk_size(
    chunk_tokens: int | None, weight_VH: Tensor, num_rows: int, group: dist.ProcessGroup | None
) -> int:
    """The caller's chunk, or one that suits the device, the same on all ranks of a group.

    On a CPU a single chunk is the fastest up to 256 tokens, because the weight's gradient then
    needs no sum; more tokens go in chunks of 128, which keep both models' logits small.

    Raises:
        ValueError: chunk_tokens is below 1.
    """
    if chunk_tokens is None:
        if not weight_VH.is_cuda:
            return num_rows if 0 < num_rows <= 2 * _CPU_CHUNK_TOKENS else _CPU_CHUNK_TOKENS
        if group is not None:  # shards differ in width, collectives must not
            return _GPU_GROUP_TOKENS
        row_bytes = max(1, weight_VH.shape[0]) * weight_VH.element_size()
        return max(64, _GPU_CHUNK_BYTES // row_bytes // 64 * 64)
    check_integer("chunk_tokens", chunk_tokens)
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}; it must be at least 1")
    return chunk_tokens


def chunk_logits(hidden_NH: Tensor, weight_VH: Tensor, rows: slice, buffer_CV: Tensor) -> Tensor:
    """The logits of a chunk, in the buffer's first rows."""
    hidden = hidden_NH[rows]
    return torch.mm(hidden, weight_VH.t(), out=buffer_CV[: hidden.shape[0]])


class _WeightGradient:
    """Sum over chunks of gradient^T hidden, in fp32, or in the weight's dtype of a single chunk.

    The fp32 sum is cast inside its own memory, of which the gradient is then the first half: sum
    and gradient side by side would be the peak, and freeing the sum in parts does not help where
    the allocator keeps them.
    """

    def __init__(self, weight_VH: Tensor, width: int, num_chunks: int) -> None:
        self._width = width
        self._direct = num_chunks == 1 or weight_VH.dtype == torch.float32
        self._sum = torch.zeros_like(
            weight_VH,
            dtype=weight_VH.dtype if self._direct else torch.float32,
            memory_format=torch.contiguous_format,
        )
        self._product = weight_VH[:0] if self._direct else torch.empty_like(weight_VH[:_ROWS])

    def add(self, gradient_CV: Tensor, hidden_CH: Tensor) -> None:
        if self._direct:
            self._sum[: self._width].addmm_(gradient_CV.t(), hidden_CH)
            return
        pieces = self._sum[: self._width].split(_ROWS)
        for piece, columns in zip(pieces, gradient_CV.split(_ROWS, dim=1), strict=True):
            piece += torch.mm(columns.t(), hidden_CH, out=self._product[: len(piece)])

    def finish(self) -> Tensor:
        if self._direct:
            return self._sum
        halves = self._sum.view(-1).view(self._product.dtype)
        narrow = halves[: self._sum.numel()].view_as(self._sum)
        for wide_rows, rows in zip(self._sum.split(_ROWS), narrow.split(_ROWS), strict=True):
            rows.copy_(self._product[: len(rows)].copy_(wide_rows))  # they may overlap
        return narrow


class _Gradients:
    """Gradients of hidden states and weight, chunk by chunk; None for the one not needed."""

    def __init__(
        self, hidden_NH: Tensor, weight_VH: Tensor, plan: ChunkPlan, needed: tuple[bool, ...]
    ) -> None:
        num_chunks = -(-hidden_NH.shape[0] // plan.chunk_tokens)
        self._head = weight_VH[: plan.width]
        self._hidden = torch.zeros_like(hidden_NH) if needed[0] else None
        self._weight = _WeightGradient(weight_VH, plan.width, num_chunks) if needed[1] else None

    def add(self, gradient_CV: Tensor, hidden_NH: Tensor, rows: slice) -> None:
        if self._hidden is not None:
            torch.mm(gradient_CV, self._head, out=self._hidden[rows])
        if self._weight is not None:
            self._weight.add(gradient_CV, hidden_NH[rows])

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        return self._hidden, None if self._weight is None else self._weight.finish()


def linear_loss(hidden_NH: Tensor, weight_VH: Tensor, loss: ChunkLoss, plan: ChunkPlan) -> Tensor:
    """The losses times the plan's weights, [N] fp32, differentiable in hidden states and weight."""
    wanted = torch.is_grad_enabled() and (hidden_NH.requires_grad or weight_VH.requires_grad)
    gradient_in_forward = wanted and plan.weight_N is not None
    loss_N: Tensor = _LinearLoss.apply(hidden_NH, weight_VH, loss, plan, gradient_in_forward)  # type: ignore[no-untyped-call]
    return loss_N


class _Context(FunctionCtx):
    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    loss: ChunkLoss
    plan: ChunkPlan
    ready: tuple[Tensor | None, Tensor | None] | None


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: _Context,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        loss: ChunkLoss,
        plan: ChunkPlan,
        gradient_in_forward: bool,
    ) -> Tensor:
        gradients = None
        if gradient_in_forward:
            gradients = _Gradients(hidden_NH, weight_VH, plan, ctx.needs_input_grad)
        loss_N, constants = _measure_chunks(hidden_NH, weight_VH, loss, plan, gradients)
        ctx.save_for_backward(hidden_NH, weight_VH, *loss.tensors, *constants)
        ctx.loss, ctx.plan = loss, plan
        ctx.ready = None if gradients is None else gradients.finish()
        return weighted(loss_N, plan.weight_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        ready, ctx.ready = ctx.ready, None
        if ready is not None and _is_one_number(upstream_N):
            gradients = tuple(None if made is None else made.mul_(upstream_N[0]) for made in ready)
        else:
            del ready
            hidden, weight, *rest = ctx.saved_tensors  # raises when one was overwritten
            constants = rest[len(ctx.loss.tensors) :]
            gradients = _gradients_again(ctx, hidden, weight, constants, upstream_N)
        hidden_gradient, weight_gradient = gradients
        if hidden_gradient is not None:
            hidden_gradient = sum_over_shards(hidden_gradient, ctx.plan.group)
        return hidden_gradient, weight_gradient, None, None, None


def _is_one_number(upstream_N: Tensor) -> bool:
    """Whether all entries are equal, as far as that is known without waiting for a GPU."""
    if upstream_N.numel() <= 1 or upstream_N.stride(0) == 0:
        return upstream_N.numel() > 0
    return upstream_N.device.type == "cpu" and bool((upstream_N == upstream_N[0]).all())


def _measure_chunks(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    loss: ChunkLoss,
    plan: ChunkPlan,
    gradients: _Gradients | None,
) -> tuple[Tensor, list[Tensor]]:
    """Losses of all rows and constants of each chunk; fills the gradients if there are any."""
    num_rows, head = hidden_NH.shape[0], weight_VH[: plan.width]
    buffer = head.new_empty((min(plan.chunk_tokens, num_rows), plan.width))
    losses, constants = [hidden_NH.new_empty(0, dtype=torch.float32)], []
    for rows in plan.chunks(num_rows):
        logits = chunk_logits(hidden_NH, head, rows, buffer)
        loss_C, constants_CX = loss.measure(logits, rows)
        losses.append(loss_C)
        constants.append(constants_CX)
        if gradients is not None and plan.weight_N is not None:
            loss.differentiate_(logits, constants_CX, plan.weight_N[rows], rows)
            gradients.add(logits, hidden_NH, rows)
    loss.release()
    return torch.cat(losses), constants


def _gradients_again(
    ctx: _Context,
    hidden_NH: Tensor,
    weight_VH: Tensor,
    constants: list[Tensor],
    upstream_N: Tensor,
) -> tuple[Tensor | None, ...]:
    """Both gradients from recomputed logits; row constants are merged, so no rank waits."""
    plan, loss, head = ctx.plan, ctx.loss, weight_VH[: ctx.plan.width]
    upstream = upstream_N if plan.weight_N is None else upstream_N * plan.weight_N
    gradients = _Gradients(hidden_NH, weight_VH, plan, ctx.needs_input_grad)
    buffer = head.new_empty((min(plan.chunk_tokens, hidden_NH.shape[0]), plan.width))
    for rows, constants_CX in zip(plan.chunks(hidden_NH.shape[0]), constants, strict=True):
        logits = chunk_logits(hidden_NH, head, rows, buffer)
        loss.restore(rows)
        loss.differentiate_(logits, constants_CX, upstream[rows].contiguous(), rows)
        gradients.add(logits, hidden_NH, rows)
        del logits
    loss.release()
    del buffer  # before the weight's gradient gets its second copy, in its own dtype
    return gradients.finish()


def active_rows(weight_N: Tensor | None) -> Tensor | None:
    """Indices of the rows with weight above 0; None for all of them.

    Also None on a GPU, where indices would have to be waited for and kernels skip rows themselves.
    """
    if weight_N is None or weight_N.is_cuda or bool((weight_N > 0).all()):
        return None
    return weight_N.nonzero().squeeze(1)


def take_rows(tensor_NX: Tensor, active: Tensor | None) -> Tensor:
    """The active rows, or all."""
    return tensor_NX if active is None else tensor_NX[active]


def spread_rows(rows_AX: Tensor, active: Tensor | None, num_rows: int) -> Tensor:
    """What belongs to active rows at their places, 0 elsewhere."""
    if active is None:
        return rows_AX
    return rows_AX.new_zeros((num_rows, *rows_AX.shape[1:])).index_copy(0, active, rows_AX)
