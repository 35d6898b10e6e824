"""The two implementations behind the public functions, and the choice between them."""

from typing import Protocol

from torch import Tensor

from opcd_kernels.options import Objective, Sharpening


class Backend(Protocol):
    """Row statistics of one shard, and gradients in place over its logits; no collective.

    Logits are [N, V] with contiguous columns in fp32, bf16 or fp16; everything else is fp32 and
    contiguous. A row with weight or upstream gradient 0 is not read.
    """

    def row_statistics(
        self,
        first_NV: Tensor,
        second_NV: Tensor,
        first: Sharpening,
        second: Sharpening,
        weight_N: Tensor | None,
    ) -> Tensor:
        """The five numbers of `rows.py`, [N, 5]; those of an empty shard for weight 0."""

    def mixture_statistics(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        constants_N5: Tensor,
        objective: Objective,
        weight_N: Tensor | None,
    ) -> Tensor:
        """KL(student || mixture) and KL(teacher || mixture) in bits, [N, 2]; 0 for weight 0."""

    def divergence_gradient_(
        self,
        student_NV: Tensor,
        teacher_NV: Tensor,
        constants_N5: Tensor,
        upstream_N: Tensor,
        objective: Objective,
    ) -> None:
        """The student's logits become d(sum of upstream * divergence) / d(logit)."""

    def token_statistics(
        self,
        logits_NV: Tensor,
        column_N: Tensor,
        sharpening: Sharpening,
        weight_N: Tensor | None,
    ) -> Tensor:
        """The four numbers of `rows.merge_token`, [N, 4]; `column_N` -1 is another rank's."""

    def token_gradient_(
        self,
        logits_NV: Tensor,
        column_N: Tensor,
        constants_N3: Tensor,
        upstream_N2: Tensor,
        sharpening: Sharpening,
    ) -> None:
        """The logits become the gradient of `upstream @ (logprob, entropy)` in each row."""


def choose(tensor: Tensor, *, compiled: bool = False) -> Backend:
    """Triton for a CUDA tensor, else eager PyTorch in cache-sized blocks, on request compiled.

    Triton is imported here because a CPU installation has none.

    Raises:
        ValueError: `compiled` for a CUDA tensor, whose kernels are compiled anyway.
    """
    if tensor.is_cuda:
        if compiled:
            raise ValueError("compiled is True; it is for the CPU only, CUDA tensors use Triton")
        from opcd_kernels.triton_backend import TritonBackend

        return TritonBackend()
    from opcd_kernels.eager import EagerBackend

    return EagerBackend(block_elements=1 << 18, compiled=True) if compiled else EagerBackend()
