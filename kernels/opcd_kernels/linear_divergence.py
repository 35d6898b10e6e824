"""Per-token divergence from the hidden states and lm_head shards of both models."""

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from opcd_kernels import backend
from opcd_kernels.backend import Backend
from opcd_kernels.checks import check_head, check_same, check_weight, valid_columns
from opcd_kernels.divergence import measure
from opcd_kernels.linear import (
    ChunkPlan,
    active_rows,
    chunk_logits,
    chunk_size,
    linear_loss,
    spread_rows,
    take_rows,
)
from opcd_kernels.options import IDENTITY, Kind, LogitMap, Objective, make_objective


def linear_divergence(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    *,
    kind: Kind,
    beta: float = 0.5,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    weight_N: Tensor | None = None,
    chunk_tokens: int | None = None,
    num_valid_columns: int | None = None,
    student_map: LogitMap = IDENTITY,
    teacher_map: LogitMap = IDENTITY,
) -> Tensor:
    """Per-token divergence in nats, [N] fp32, between two linear heads; kinds as in `divergence`.

    The models are softmax(student_hidden @ student_weight^T) and the same of the teacher.
    Collective over `group`: in forward one all-gather a chunk of 20 bytes a token (and one of 8 for
    JSD), in backward one all-reduce of the hidden gradient.

    Differentiable in the student's hidden states and weight only; every rank gets the full gradient
    of the hidden states and that of its own shard of the weight. The logits of a chunk have the
    weights' dtype, as those of the lm_head itself would; all arithmetic on them is fp32.

    Args:
        student_hidden_NH: final hidden states, the same on every rank of `group`.
        student_weight_VH: this rank's rows of the student's lm_head.
        teacher_hidden_NG: the teacher's hidden states of the same tokens, of any hidden size.
        teacher_weight_VG: the same vocabulary rows of the teacher's lm_head.
        kind: which divergence.
        beta: share of the student in the JSD mixture, in (0, 1); unused by the KLs.
        temperature: divides the logits of both models, after their maps.
        group: the ranks that hold the other rows, in rank order; None when this rank holds all.
        weight_N: fp32 factors of the losses, at least 0; a row with weight 0 costs nothing and gets
            gradient 0. When given, forward makes the gradients and `loss_N.sum().backward()` only
            scales them; without it backward computes the logits again.
        chunk_tokens: tokens whose logits exist at a time; None picks a size for the device.
        num_valid_columns: rows of this shard's weights that are vocabulary; the rest is padding,
            has no probability and gets gradient 0.
        student_map: scale and softcap of the student's logits.
        teacher_map: the same of the teacher.

    Raises:
        ValueError: an option is out of range, or shapes, dtypes or devices disagree.

    Source: the divergences are those of GKD (arXiv 2306.13649); gradients, kernels/README.md.
    """
    objective = make_objective(kind, beta, temperature, student_map, teacher_map)
    heads = (student_hidden_NH, student_weight_VH, teacher_hidden_NG, teacher_weight_VG)
    weight_N, width = check_heads(*heads, weight_N, num_valid_columns)
    num_rows, active = len(student_hidden_NH), active_rows(weight_N)
    chunk = chunk_size(chunk_tokens, student_weight_VH, num_rows, group)
    loss = _TeacherDivergence(
        teacher=TeacherLogits(
            hidden_NG=take_rows(teacher_hidden_NG.detach(), active),
            weight_VG=teacher_weight_VG.detach()[:width],
            chunk_tokens=chunk,
        ),
        objective=objective,
        group=group,
        token_weight_N=None if weight_N is None else take_rows(weight_N, active),
        engine=backend.choose(student_hidden_NH),
    )
    plan = ChunkPlan(chunk_tokens=chunk, width=width, group=group, weight_N=loss.token_weight_N)
    student_hidden = take_rows(student_hidden_NH, active)
    loss_A = linear_loss(student_hidden, student_weight_VH, loss, plan)
    return spread_rows(loss_A, active, num_rows)


def check_heads(
    student_hidden_NH: Tensor,
    student_weight_VH: Tensor,
    teacher_hidden_NG: Tensor,
    teacher_weight_VG: Tensor,
    weight_N: Tensor | None,
    num_valid_columns: int | None,
) -> tuple[Tensor | None, int]:
    """(Contiguous weights, number of valid columns) of two heads over the same tokens.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
    """
    check_head("student_hidden_NH", student_hidden_NH, "student_weight_VH", student_weight_VH)
    check_head("teacher_hidden_NG", teacher_hidden_NG, "teacher_weight_VG", teacher_weight_VG)
    num_rows, num_columns = len(student_hidden_NH), len(student_weight_VH)
    check_same("rows", "teacher_hidden_NG", len(teacher_hidden_NG), "student_hidden_NH", num_rows)
    check_same(
        "rows", "teacher_weight_VG", len(teacher_weight_VG), "student_weight_VH", num_columns
    )
    devices = teacher_hidden_NG.device, student_hidden_NH.device
    check_same("device", "teacher_hidden_NG", devices[0], "student_hidden_NH", devices[1])
    if weight_N is not None:
        weight_N = check_weight(weight_N, num_rows, student_hidden_NH.device)
    return weight_N, valid_columns(num_valid_columns, num_columns)


@dataclass(slots=True, kw_only=True)
class TeacherLogits:
    """The teacher's logits of one chunk, in a buffer that every chunk uses again."""

    hidden_NG: Tensor
    weight_VG: Tensor
    chunk_tokens: int
    buffer_CV: Tensor | None = None

    def restore(self, rows: slice) -> None:
        """Computes the logits of `rows`."""
        if self.buffer_CV is None:
            rows_at_once = min(self.chunk_tokens, self.hidden_NG.shape[0])
            self.buffer_CV = self.weight_VG.new_empty((rows_at_once, self.weight_VG.shape[0]))
        chunk_logits(self.hidden_NG, self.weight_VG, rows, self.buffer_CV)

    def release(self) -> None:
        """Frees the buffer."""
        self.buffer_CV = None

    def logits(self, num_rows: int) -> Tensor:
        """What `restore` computed."""
        assert self.buffer_CV is not None, "restore() comes before"
        return self.buffer_CV[:num_rows]


@dataclass(slots=True, kw_only=True)
class _TeacherDivergence:
    """A `ChunkLoss`: the divergence from a teacher whose logits exist a chunk at a time."""

    teacher: TeacherLogits
    objective: Objective
    group: dist.ProcessGroup | None
    token_weight_N: Tensor | None
    engine: Backend

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.teacher.hidden_NG, self.teacher.weight_VG

    def restore(self, rows: slice) -> None:
        self.teacher.restore(rows)

    def release(self) -> None:
        self.teacher.release()

    def measure(self, logits_CV: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        self.restore(rows)
        weight = None if self.token_weight_N is None else self.token_weight_N[rows]
        teacher = self.teacher.logits(len(logits_CV))
        return measure(logits_CV, teacher, self.objective, self.group, weight, self.engine)

    def differentiate_(
        self, logits_CV: Tensor, constants_CX: Tensor, upstream_C: Tensor, rows: slice
    ) -> None:
        teacher = self.teacher.logits(len(logits_CV))
        self.engine.divergence_gradient_(
            logits_CV, teacher, constants_CX, upstream_C, self.objective
        )
