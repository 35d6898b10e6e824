"""Reverse KL from hidden states and two lm_heads, forward and backward: time and memory.

python kernels/bench/bench_linear_divergence.py [--device cuda] [--rows 1024] [--hidden 576]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from measure import MIB, compare, report
from providers import Loss, chunked, naive_reverse_kl, unchunked_parallel_reverse_kl
from torch import Tensor

from opcd_kernels import linear_divergence

TABLE = Path(__file__).parent / "results" / "linear_divergence.csv"
TEMPERATURE = 0.7


def main() -> None:
    """Appends the rows of both dtypes to the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=49152)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        hidden = torch.randn(options.rows, options.hidden, device=options.device)
        weight = torch.randn(options.columns, options.hidden, device=options.device)
        weight *= 3 / options.hidden**0.5
        teacher_hidden = hidden + 0.3 * torch.randn_like(hidden)
        heads = [tensor.to(dtype) for tensor in (hidden, weight, teacher_hidden, weight)]
        rows = compare(
            op="linear_reverse_kl",
            shape=f"{options.rows}x{options.hidden}x{options.columns}",
            dtype=dtype,
            device=options.device,
            logits_mib=options.rows * options.columns * heads[0].element_size() / MIB,
            providers=_providers(heads),
            repeats=options.repeats,
        )
        report(rows, options.table)


def _providers(heads: list[Tensor]) -> dict[str, Callable[[], Callable[[], object]]]:
    _, _, teacher_hidden, teacher_weight = heads
    ones = torch.ones(len(teacher_hidden), device=teacher_hidden.device)
    ours = partial(
        linear_divergence,
        teacher_hidden_NG=teacher_hidden,
        teacher_weight_VG=teacher_weight,
        kind="reverse_kl",
        temperature=TEMPERATURE,
    )

    def of_logits(reverse_kl: Loss, hidden: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            teacher = teacher_hidden @ teacher_weight.T
        return reverse_kl(hidden @ weight.T, teacher, TEMPERATURE)

    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "naive": partial(of_logits, naive_reverse_kl),
        "chunked autograd": partial(of_logits, partial(chunked, naive_reverse_kl)),
        "unchunked parallel": partial(of_logits, unchunked_parallel_reverse_kl),
        "opcd": partial(ours, weight_N=ones),
        "opcd recomputing": ours,
    }

    def prepare(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], object]:
        student = [tensor.clone().requires_grad_() for tensor in heads[:2]]

        def call() -> list[Tensor]:
            loss(*student).sum().backward()
            return student

        return call

    return {name: partial(prepare, loss) for name, loss in losses.items()}


if __name__ == "__main__":
    main()
