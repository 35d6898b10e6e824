"""What only a GPU can prove: `pytest -m gpu tests/kernels/test_gpu.py` on a machine that has one.

Rounded bf16 stores, the hardware's exp2, races, launches at real widths, CUDA graphs, NCCL.
"""

import math
import socket

import pytest
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
from tests.kernels.kernel_cases import (
    BETA,
    KINDS,
    PLAIN,
    assert_gradient,
    assert_loss,
    case_of,
    logits_pair,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
CAPPED = LogitMap(scale=0.5, softcap=15.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_columns", [1, 17, 9496, 49152, 50257, 151936])
@pytest.mark.parametrize("logit_map", [PLAIN, CAPPED])
def test_loss_and_gradient_match_float64(
    kind: Kind, dtype: torch.dtype, num_columns: int, logit_map: LogitMap
) -> None:
    student, teacher = logits_pair(6, num_columns, dtype)
    case = case_of(student, teacher, kind, temperature=0.7, logit_map=logit_map)
    weight = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 0.1])
    logits = student.to(CUDA).requires_grad_()
    loss = divergence(
        logits,
        teacher.to(CUDA),
        kind=kind,
        beta=BETA,
        temperature=0.7,
        weight_N=weight.to(CUDA),
        student_map=logit_map,
        teacher_map=logit_map,
    )
    loss.sum().backward()
    assert logits.grad is not None
    gradient = logits.grad.cpu()
    assert_loss(loss.cpu(), case.loss * weight)
    assert_gradient(gradient, case.gradient * weight.unsqueeze(1), relative=5e-5)
    assert (gradient[[0, 2]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["student", "teacher"])
def test_nan_stays_in_its_row(kind: Kind, model: str) -> None:
    student, teacher = logits_pair(3, 9496, torch.bfloat16)
    (student if model == "student" else teacher)[1, 9000] = math.nan
    logits = student.to(CUDA).requires_grad_()
    loss = divergence(logits, teacher.to(CUDA), kind=kind)
    loss.sum().backward()
    assert logits.grad is not None
    assert loss.isnan().tolist() == [False, True, False]
    assert logits.grad[[0, 2]].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_hundred_runs_give_the_same_bits(kind: Kind) -> None:
    student, teacher = (logits.to(CUDA) for logits in logits_pair(64, 151936, torch.bfloat16))
    first = None
    for _ in range(100):
        logits = student.clone().requires_grad_()
        loss = divergence(logits, teacher, kind=kind)
        loss.sum().backward()
        assert logits.grad is not None
        result = torch.cat([loss.detach(), logits.grad.float().sum(1)])
        first = result if first is None else first
        assert torch.equal(result, first)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_linear_form_matches_its_own_logits(weighted: bool) -> None:
    random = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 256, generator=random)
    head = torch.randn(9496, 256, generator=random) / 8
    teacher = hidden + 0.3 * torch.randn(300, 256, generator=random)
    case = case_of(hidden @ head.T, teacher @ head.T, "reverse_kl")
    trained = hidden.to(CUDA).requires_grad_()
    weight = torch.ones(300, device=CUDA) if weighted else None
    device_head = head.to(CUDA)
    loss = linear_divergence(
        trained,
        device_head,
        teacher.to(CUDA),
        device_head,
        kind="reverse_kl",
        weight_N=weight,
        chunk_tokens=128,
    )
    loss.sum().backward()
    assert trained.grad is not None
    assert_loss(loss.cpu(), case.loss)
    assert_gradient(trained.grad.cpu(), case.gradient @ head.double(), relative=5e-5)


def test_tokens_and_topk_equal_the_cpu() -> None:
    student, teacher = logits_pair(16, 9496, torch.float32)
    ids = torch.arange(16) * 500
    scores = token_logprob(student.to(CUDA), ids.to(CUDA))
    torch.testing.assert_close(
        [part.cpu() for part in scores], list(token_logprob(student, ids)), rtol=1e-5, atol=5e-6
    )
    for kind in ("reverse_kl", "forward_kl"):
        results = [
            topk_divergence(student.to(device), teacher.to(device), kind=kind, k=64, tail="bucket")
            for device in (CUDA, torch.device("cpu"))
        ]
        for part, expected in zip(*results, strict=True):
            torch.testing.assert_close(part.cpu(), expected, rtol=1e-5, atol=5e-6)


def test_forward_and_backward_are_captured_in_a_graph() -> None:
    student, teacher = (logits.to(CUDA) for logits in logits_pair(32, 9496, torch.bfloat16))
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_nccl_ranks_match_float64() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_nccl_rank, args=(port,), nprocs=2)
