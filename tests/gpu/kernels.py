"""What only a GPU can prove of the kernels: `python -m tests.gpu.kernels [--device cpu]`.

Rounded stores, the hardware's exp2, races, launches at real widths, CUDA graphs, NCCL; attention of
several rows in one launch. torch and Triton are all that this imports. On a CPU the same checks run
on narrow rows, to try this program.
"""

from __future__ import annotations

import argparse
import math
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from opcd_kernels import (
    Kind,
    LogitMap,
    divergence,
    linear_divergence,
    token_logprob,
    topk_divergence,
)
from opcd_nemo.model.varlen import Branch, Packing, attend_pieces, pieces_of
from tests.kernels.kernel_cases import (
    BETA,
    KINDS,
    PLAIN,
    assert_gradient,
    assert_loss,
    case_of,
    logits_pair,
)

CAPPED = LogitMap(scale=0.5, softcap=15.0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COLUMNS = (1, 17, 9496, 49152, 50257, 151936)
RUNS = 100


def match_float64(
    device: str, kind: Kind, dtype: torch.dtype, num_columns: int, logit_map: LogitMap
) -> None:
    """Loss and gradient are those of the closed form; rows of weight 0 get no gradient."""
    student, teacher = logits_pair(6, num_columns, dtype)
    case = case_of(student, teacher, kind, temperature=0.7, logit_map=logit_map)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.1])
    logits = student.to(device).requires_grad_()
    loss = divergence(
        logits,
        teacher.to(device),
        kind=kind,
        beta=BETA,
        temperature=0.7,
        weight_N=weight.to(device),
        student_map=logit_map,
        teacher_map=logit_map,
    )
    loss.sum().backward()
    assert logits.grad is not None
    gradient = logits.grad.cpu()
    assert_loss(loss.cpu(), case.loss * weight)
    assert_gradient(gradient, case.gradient * weight.unsqueeze(1), relative=5e-5)
    assert (gradient[[0, 2]] == 0).all()


def nan_stays_in_its_row(device: str, kind: Kind, model: str) -> None:
    """Neither the loss nor the gradient of another row is touched."""
    student, teacher = logits_pair(3, 9496, torch.bfloat16)
    (student if model == "student" else teacher)[1, 9000] = math.nan
    logits = student.to(device).requires_grad_()
    loss = divergence(logits, teacher.to(device), kind=kind)
    loss.sum().backward()
    assert logits.grad is not None
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.grad[[0, 2]].isfinite().all()


def runs_give_the_same_bits(device: str, kind: Kind, num_columns: int, runs: int) -> None:
    """A race would show in some of the runs."""
    pair = logits_pair(64, num_columns, torch.bfloat16)
    student, teacher = (logits.to(device) for logits in pair)
    first = None
    for _ in range(runs):
        logits = student.clone().requires_grad_()
        loss = divergence(logits, teacher, kind=kind)
        loss.sum().backward()
        assert logits.grad is not None
        result = torch.cat([loss.detach(), logits.grad.float().sum(1)])
        first = result if first is None else first
        assert torch.equal(result, first)


def linear_form_matches_its_own_logits(device: str, *, weighted: bool) -> None:
    """Chunks of hidden states give the loss and gradient of their logits."""
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=random)
    head = torch.randn(9496, 256, generator=random) / 8
    teacher = hidden + 0.3 * torch.randn(300, 256, generator=random)
    case = case_of(hidden @ head.T, teacher @ head.T, "reverse_kl")
    trained = hidden.to(device).requires_grad_()
    weight = torch.ones(300, device=device) if weighted else None
    device_head = head.to(device)
    loss = linear_divergence(
        trained,
        device_head,
        teacher.to(device),
        device_head,
        kind="reverse_kl",
        weight_N=weight,
        chunk_tokens=128,
    )
    loss.sum().backward()
    assert trained.grad is not None
    assert_loss(loss.cpu(), case.loss)
    assert_gradient(trained.grad.cpu(), case.gradient @ head.double(), relative=5e-5)


def tokens_and_topk_equal_the_cpu(device: str) -> None:
    """Log-probabilities and top-k divergences are those of the other implementation."""
    student, teacher = logits_pair(16, 9496, torch.float32)
    ids = torch.arange(16) * 500
    scores = token_logprob(student.to(device), ids.to(device))
    torch.testing.assert_close(
        [part.cpu() for part in scores], list(token_logprob(student, ids)), rtol=1e-5, atol=5e-6
    )
    for kind in ("reverse_kl", "forward_kl"):
        results = [
            topk_divergence(student.to(to), teacher.to(to), kind=kind, k=64, tail="bucket")
            for to in (device, "cpu")
        ]
        for part, expected in zip(*results, strict=True):
            torch.testing.assert_close(part.cpu(), expected, rtol=1e-5, atol=5e-6)


def pieces_match_fp32(device: str, packing: Packing, held: int) -> None:
    """Attention of several rows in one launch, forward and backward, is the CPU's in fp32."""
    total = packing.stream_tokens
    random = torch.Generator().manual_seed(0)
    shapes = (total, 8, 128), (total, 2, 128), (total, 2, 128), (held, 2, 128), (held, 2, 128)
    drawn = [torch.randn(shape, generator=random).bfloat16() for shape in shapes]
    upstream = torch.randn(total, 8, 128, generator=random)
    results = []
    for to, dtype in ((device, torch.bfloat16), ("cpu", torch.float32)):
        q, k, v, *before = (each.to(to, dtype, copy=True).requires_grad_() for each in drawn)
        pieces = pieces_of(replace(packing, device=torch.device(to)), held)
        out = attend_pieces(q, k, v, pieces, (before[0], before[1]) if held else None)
        (out.float() * upstream.to(to)).sum().backward()
        results.append([each.detach().float().cpu() for each in (out, q.grad, k.grad, v.grad)])
    for ours, expected in zip(*results, strict=True):
        error = (ours - expected).abs().max() / expected.abs().max()
        assert error < 2.0**-6, f"largest error {error:.2e} of the largest entry"


def graph_captures_forward_and_backward() -> None:
    """A replayed graph gives the bits of the eager pass."""
    student, teacher = (logits.to("cuda") for logits in logits_pair(32, 9496, torch.bfloat16))
    expected_logits = student.clone().requires_grad_()
    expected = divergence(expected_logits, teacher, kind="reverse_kl")
    expected.sum().backward()
    static = student.clone().requires_grad_()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        divergence(static, teacher, kind="reverse_kl").sum().backward()
    side.synchronize()
    static.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = divergence(static, teacher, kind="reverse_kl")
        loss.sum().backward()
    static.data.copy_(student)
    graph.replay()
    torch.cuda.synchronize()
    assert static.grad is not None
    assert torch.equal(loss, expected)
    assert torch.equal(static.grad, expected_logits.grad)


def two_nccl_ranks_match_float64() -> None:
    """A vocabulary sharded over two GPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_nccl_rank, args=(port,), nprocs=2)


def _nccl_rank(rank: int, port: int) -> None:
    torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", init_method=address, rank=rank, world_size=2)
    student, teacher = logits_pair(64, 9496 * 2, torch.bfloat16)
    case = case_of(student, teacher, "reverse_kl")
    columns = slice(9496 * rank, 9496 * (rank + 1))
    logits = student[:, columns].contiguous().cuda().requires_grad_()
    local_teacher = teacher[:, columns].contiguous().cuda()
    loss = divergence(logits, local_teacher, kind="reverse_kl", group=dist.group.WORLD)
    loss.sum().backward()
    assert logits.grad is not None
    assert_loss(loss.cpu(), case.loss)
    assert_gradient(logits.grad.cpu(), case.gradient[:, columns], relative=5e-5)
    dist.destroy_process_group()


def checks(device: str) -> Iterator[Callable[[], None]]:
    """What runs on a device, cheap checks first."""
    on_gpu = device == "cuda"
    yield partial(tokens_and_topk_equal_the_cpu, device)
    for weighted in (False, True):
        yield partial(linear_form_matches_its_own_logits, device, weighted=weighted)
    for kind, model in product(KINDS, ("student", "teacher")):
        yield partial(nan_stays_in_its_row, device, kind, model)
    cpu, turn = torch.device("cpu"), Branch(0, 64, 30)
    for packing, held in (  # the last 5 tokens are padding
        (Packing(0, (300,), 305, cpu), 0),
        (Packing(16, (200, 130, 77), 428, cpu), 0),
        (Packing(16, (90, 140), 251, cpu), 256),
        (Packing(16, (90, 140), 281, cpu, (turn,)), 256),
    ):
        yield partial(pieces_match_fp32, device, packing, held)
    widths = COLUMNS if on_gpu else COLUMNS[:3]
    for columns, kind, dtype, logit_map in product(widths, KINDS, DTYPES, (PLAIN, CAPPED)):
        yield partial(match_float64, device, kind, dtype, columns, logit_map)
    for kind in KINDS:
        yield partial(runs_give_the_same_bits, device, kind, widths[-1], RUNS if on_gpu else 3)
    if on_gpu:
        yield graph_captures_forward_and_backward
        if torch.cuda.device_count() > 1:
            yield two_nccl_ranks_match_float64


def main() -> int:
    """Run every check; 1 where any failed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    device = parser.parse_args().device
    failed, count = 0, 0
    for check in checks(device):
        started, count = time.perf_counter(), count + 1
        try:
            check()
        except Exception:  # the other checks say what else is wrong
            failed += 1
            sys.stdout.write(f"FAILED {_name(check)}\n{traceback.format_exc(limit=-2)}")
        else:
            took = time.perf_counter() - started
            if took > 1:  # compiling a kernel
                sys.stdout.write(f"passed {_name(check)}: {took:.1f} s\n")
        sys.stdout.flush()
    sys.stdout.write(f"kernels on {device}: {count - failed} of {count} checks passed\n")
    return int(failed > 0)


def _name(check: Callable[[], None]) -> str:
    if isinstance(check, partial):
        words = [str(word) for word in (*check.args[1:], *check.keywords.values())]
        return " ".join([check.func.__name__, *words])
    return check.__name__


if __name__ == "__main__":
    sys.exit(main())
