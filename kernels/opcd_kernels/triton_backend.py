"""Launches the Triton kernels: grid (rows, column splits), one launch an operation."""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from opcd_kernels.options import LN_2, LOG2_E, Kind, Objective, Sharpening
from opcd_kernels.rows import (
    empty_statistics,
    empty_token_statistics,
    merge,
    merge_token,
)
from opcd_kernels.triton_divergence import divergence_gradient, mixture_statistics, row_statistics
from opcd_kernels.triton_token import token_gradient, token_statistics

KIND_CODES: dict[Kind, int] = {"reverse_kl": 0, "forward_kl": 1, "jsd": 2}
_WIDE_ELEMENTS = 8  # 128 bits of a 16-bit type


def wide_unit(*counts: int) -> int:
    """8 when all counts of elements are multiples of it, else 1."""
    return _WIDE_ELEMENTS if all(count % _WIDE_ELEMENTS == 0 for count in counts) else 1


def factor(sharpening: Sharpening) -> float:
    """From the value that a kernel loads to an exponent of base 2: the cap is in the factor."""
    cap = sharpening.logit_map.softcap
    return sharpening.log2_factor if cap is None else sharpening.log2_factor * cap


def tanh_factor(sharpening: Sharpening) -> float:
    """The kernel's `pre`: 2 log2(e) * scale / cap; 0 without a cap."""
    cap = sharpening.logit_map.softcap
    return 0.0 if cap is None else 2.0 * LOG2_E * sharpening.logit_map.scale / cap


def has_cap(sharpening: Sharpening) -> bool:
    """Whether the model caps its logits."""
    return sharpening.logit_map.softcap is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonBackend:
    """A `Backend` for CUDA tensors, and for CPU tensors under Triton's interpreter.

    Args:
        statistics_block: columns a program reads at a time in statistics kernels.
        gradient_block: the same in gradient kernels.
        num_warps: warps a program.
        min_programs: few rows are split by columns until about so many programs run.
    """

    statistics_block: int = 4096
    gradient_block: int = 2048
    num_warps: int = 4
    min_programs: int = 1024

    def _splits(self, num_rows: int, num_columns: int, block: int) -> tuple[int, int]:
        """(column splits of a row, full blocks a split)."""
        num_blocks = max(1, num_columns // block)
        splits = min(num_blocks, triton.cdiv(self.min_programs, num_rows))
        blocks_per_split = triton.cdiv(num_blocks, splits)
        return triton.cdiv(num_blocks, blocks_per_split), blocks_per_split

    def row_statistics(
        self,
        first_NV: Tensor,
        second_NV: Tensor,
        first: Sharpening,
        second: Sharpening,
        weight_N: Tensor | None,
    ) -> Tensor:
        """Implements `Backend.row_statistics`."""
        num_rows, num_columns = first_NV.shape
        if num_rows == 0:
            return empty_statistics((0,), first_NV.device)
        splits, blocks_per_split = self._splits(num_rows, num_columns, self.statistics_block)
        out = empty_statistics((splits, num_rows), first_NV.device)
        row_unit = wide_unit(first_NV.stride(0), second_NV.stride(0))
        column_unit = wide_unit(num_columns)
        row_statistics[(num_rows, splits)](
            first_NV,
            second_NV,
            out,
            out if weight_N is None else weight_N,
            first_NV.stride(0) // row_unit,
            second_NV.stride(0) // row_unit,
            num_columns // column_unit,
            blocks_per_split,
            factor(first),
            factor(second),
            tanh_factor(first),
            tanh_factor(second),
            BLOCK=self.statistics_block,
            ROW_UNIT=row_unit,
            COLUMN_UNIT=column_unit,
            HAS_WEIGHT=weight_N is not None,
            FIRST_CAP=has_cap(first),
            SECOND_CAP=has_cap(second),
            num_warps=self.num_warps,
        )
        return merge(out)

    def mixture_statistics(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        constants_N5: Tensor,
        objective: Objective,
        weight_N: Tensor | None,
    ) -> Tensor:
        """Implements `Backend.mixture_statistics`."""
        num_rows, num_columns = student_NV.shape
        if num_rows == 0:
            return constants_N5.new_empty((0, 2))
        splits, blocks_per_split = self._splits(num_rows, num_columns, self.gradient_block)
        out = constants_N5.new_zeros((splits, num_rows, 2))
        row_unit = wide_unit(student_NV.stride(0), teacher_NV.stride(0))
        column_unit = wide_unit(num_columns)
        mixture_statistics[(num_rows, splits)](
            student_NV,
            teacher_NV,
            constants_N5,
            out,
            out if weight_N is None else weight_N,
            student_NV.stride(0) // row_unit,
            teacher_NV.stride(0) // row_unit,
            num_columns // column_unit,
            blocks_per_split,
            factor(objective.student),
            factor(objective.teacher),
            tanh_factor(objective.student),
            tanh_factor(objective.teacher),
            *objective.mixture_shares,
            BLOCK=self.gradient_block,
            ROW_UNIT=row_unit,
            COLUMN_UNIT=column_unit,
            HAS_WEIGHT=weight_N is not None,
            STUDENT_CAP=has_cap(objective.student),
            TEACHER_CAP=has_cap(objective.teacher),
            num_warps=self.num_warps,
        )
        return out.sum(0)

    def divergence_gradient_(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        constants_N5: Tensor,
        upstream_N: Tensor,
        objective: Objective,
    ) -> None:
        """Implements `Backend.divergence_gradient_`."""
        num_rows, num_columns = student_NV.shape
        if num_rows == 0:
            return
        splits, blocks_per_split = self._splits(num_rows, num_columns, self.gradient_block)
        row_unit = wide_unit(student_NV.stride(0), teacher_NV.stride(0))
        column_unit = wide_unit(num_columns)
        slope = objective.student.slope
        if objective.kind != "forward_kl":
            slope *= LN_2
        if objective.kind == "jsd":
            slope *= objective.mixture_shares[0]
        divergence_gradient[(num_rows, splits)](
            student_NV,
            teacher_NV,
            constants_N5,
            upstream_N,
            student_NV.stride(0) // row_unit,
            teacher_NV.stride(0) // row_unit,
            num_columns // column_unit,
            blocks_per_split,
            factor(objective.student),
            factor(objective.teacher),
            tanh_factor(objective.student),
            tanh_factor(objective.teacher),
            *objective.mixture_shares,
            slope,
            BLOCK=self.gradient_block,
            ROW_UNIT=row_unit,
            COLUMN_UNIT=column_unit,
            KIND=KIND_CODES[objective.kind],
            STUDENT_CAP=has_cap(objective.student),
            TEACHER_CAP=has_cap(objective.teacher),
            num_warps=self.num_warps,
        )
        torch.autograd.graph.increment_version(student_NV)

    def token_statistics(
        self,
        logits_NV: Tensor,
        column_N: Tensor,
        sharpening: Sharpening,
        weight_N: Tensor | None,
    ) -> Tensor:
        """Implements `Backend.token_statistics`."""
        num_rows, num_columns = logits_NV.shape
        if num_rows == 0:
            return empty_token_statistics((0,), logits_NV.device)
        splits, blocks_per_split = self._splits(num_rows, num_columns, self.statistics_block)
        out = empty_token_statistics((splits, num_rows), logits_NV.device)
        row_unit = wide_unit(logits_NV.stride(0))
        column_unit = wide_unit(num_columns)
        token_statistics[(num_rows, splits)](
            logits_NV,
            column_N,
            out,
            out if weight_N is None else weight_N,
            logits_NV.stride(0) // row_unit,
            num_columns // column_unit,
            blocks_per_split,
            factor(sharpening),
            tanh_factor(sharpening),
            BLOCK=self.statistics_block,
            ROW_UNIT=row_unit,
            COLUMN_UNIT=column_unit,
            HAS_WEIGHT=weight_N is not None,
            CAP=has_cap(sharpening),
            num_warps=self.num_warps,
        )
        return merge_token(out)

    def token_gradient_(
        self,
        logits_NV: Tensor,
        column_N: Tensor,
        constants_N3: Tensor,
        upstream_N2: Tensor,
        sharpening: Sharpening,
    ) -> None:
        """Implements `Backend.token_gradient_`."""
        num_rows, num_columns = logits_NV.shape
        if num_rows == 0:
            return
        splits, blocks_per_split = self._splits(num_rows, num_columns, self.gradient_block)
        row_unit = wide_unit(logits_NV.stride(0))
        column_unit = wide_unit(num_columns)
        token_gradient[(num_rows, splits)](
            logits_NV,
            column_N,
            constants_N3,
            upstream_N2,
            logits_NV.stride(0) // row_unit,
            num_columns // column_unit,
            blocks_per_split,
            factor(sharpening),
            tanh_factor(sharpening),
            sharpening.slope,
            BLOCK=self.gradient_block,
            ROW_UNIT=row_unit,
            COLUMN_UNIT=column_unit,
            CAP=has_cap(sharpening),
            num_warps=self.num_warps,
        )
        torch.autograd.graph.increment_version(logits_NV)
