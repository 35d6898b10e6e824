"""The ops on logits, forward and backward: time and memory against what people write today.

python kernels/bench/bench_divergence.py [--device cuda] [--rows 1024] [--columns 49152]
    [--ops jsd ...]
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import providers
import torch
from measure import MIB, compare, report
from torch import Tensor

from opcd_kernels import Kind, divergence, token_logprob, topk_divergence

TABLE = Path(__file__).parent / "results" / "divergence.csv"
TEMPERATURE = 0.7
TOP_K = 64
OPS = ("reverse_kl", "forward_kl", "jsd", "topk_reverse_kl", "token_logprob")
NAIVE: dict[str, providers.Loss] = {
    "reverse_kl": providers.naive_reverse_kl,
    "forward_kl": providers.naive_forward_kl,
    "jsd": providers.naive_jsd,
    "topk_reverse_kl": partial(providers.naive_topk_reverse_kl, k=TOP_K),
    "token_logprob": providers.naive_token_logprob,
}
KINDS: dict[str, Kind] = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "jsd": "jsd"}


def main() -> None:
    """Appends the rows of all ops and both dtypes to the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--columns", type=int, default=49152)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for op in options.ops:
        for dtype in (torch.float32, torch.bfloat16):
            student, second = _inputs(op, options.rows, options.columns, options.device, dtype)
            rows = compare(
                op=op,
                shape=f"{options.rows}x{options.columns}",
                dtype=dtype,
                device=options.device,
                logits_mib=student.nbytes / MIB,
                providers=_providers(op, student, second),
                repeats=options.repeats,
            )
            report(rows, options.table)


def _inputs(
    op: str, rows: int, columns: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Student logits, and the teacher's or the target ids."""
    torch.manual_seed(0)
    student = torch.randn(rows, columns, device=device).mul_(3)
    if op == "token_logprob":
        return student.to(dtype), torch.randint(columns, (rows,), device=device)
    return student.to(dtype), (student + torch.randn_like(student)).to(dtype)


def _providers(
    op: str, student_NV: Tensor, second: Tensor
) -> dict[str, Callable[[], Callable[[], object]]]:
    losses = {"naive": NAIVE[op], "chunked autograd": partial(providers.chunked, NAIVE[op])}
    if op == "reverse_kl":
        losses["unchunked parallel"] = providers.unchunked_parallel_reverse_kl
    losses["opcd"] = partial(_ours, op)
    if op in KINDS and not student_NV.is_cuda:
        losses["opcd compiled"] = partial(_ours, op, compiled=True)

    def prepare(loss: providers.Loss) -> Callable[[], object]:
        student = student_NV.clone().requires_grad_()

        def call() -> Tensor:
            loss(student, second, TEMPERATURE).sum().backward()
            return student

        return call

    return {name: partial(prepare, loss) for name, loss in losses.items()}


def _ours(
    op: str, student_NV: Tensor, second: Tensor, temperature: float, compiled: bool = False
) -> Tensor:
    if op == "token_logprob":
        scores = token_logprob(student_NV, second, temperature=temperature)
        return scores.logprob_N + scores.entropy_N
    if op == "topk_reverse_kl":
        return topk_divergence(
            student_NV,
            second,
            kind="reverse_kl",
            k=TOP_K,
            tail="bucket",
            temperature=temperature,
        ).loss_N
    kind = KINDS[op]
    return divergence(student_NV, second, kind=kind, temperature=temperature, compiled=compiled)


if __name__ == "__main__":
    main()
