"""Reverse KL from logits, forward and backward: time and memory against what people write today.

python kernels/bench/bench_divergence.py [--device cuda] [--rows 1024] [--columns 49152]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import MIB, compare, report
from providers import chunked_reverse_kl, naive_reverse_kl, unchunked_parallel_reverse_kl
from torch import Tensor

from opcd_kernels import divergence

TABLE = Path(__file__).parent / "results" / "divergence.csv"
TEMPERATURE = 0.7


def main() -> None:
    """Appends the rows of both dtypes to the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        student = torch.randn(options.rows, options.columns, device=options.device).mul_(3)
        teacher = student + torch.randn_like(student)
        pair = student.to(dtype), teacher.to(dtype)
        del student, teacher
        rows = compare(
            op="reverse_kl",
            shape=f"{options.rows}x{options.columns}",
            dtype=dtype,
            device=options.device,
            logits_mib=pair[0].nbytes / MIB,
            providers=_providers(*pair),
            repeats=options.repeats,
        )
        report(rows, TABLE)


def _providers(
    student_NV: Tensor, teacher_NV: Tensor
) -> dict[str, Callable[[], Callable[[], object]]]:
    ours = partial(
        divergence,
        teacher_logits_NV=teacher_NV,
        kind="reverse_kl",
        temperature=TEMPERATURE,
    )
    rest: dict[str, Any] = {"teacher_NV": teacher_NV, "temperature": TEMPERATURE}
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "naive": partial(naive_reverse_kl, **rest),
        "chunked autograd": partial(chunked_reverse_kl, **rest, chunk_tokens=64),
        "unchunked parallel": partial(unchunked_parallel_reverse_kl, **rest),
        "opcd": ours,
    }
    if not student_NV.is_cuda:
        losses["opcd compiled"] = partial(ours, compiled=True)

    def prepare(loss: Callable[[Tensor], Tensor]) -> Callable[[], object]:
        student = student_NV.clone().requires_grad_()

        def call() -> Tensor:
            loss(student).sum().backward()
            return student

        return call

    return {name: partial(prepare, loss) for name, loss in losses.items()}


if __name__ == "__main__":
    main()
