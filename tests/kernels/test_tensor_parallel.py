"""Vocabulary shards on real gloo processes: four processes start once and run every case.

Each rank holds its columns of the same seeded matrices; the whole is computed beside it without a
group. Shards are uneven, and the last rank of some cases holds nothing but padding.
"""

import math
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.testing import assert_close

from opcd_kernels import (
    divergence,
    linear_divergence,
    linear_token_logprob,
    linear_topk_divergence,
    token_logprob,
    topk_divergence,
)
from tests.kernels.kernel_cases import KINDS

NUM_ROWS, HIDDEN, TEACHER_HIDDEN = 9, 16, 24
NUM_COLUMNS = 1003
WEIGHT = torch.tensor([0.5, 0.0, 2.0, 0.25, 1.0, 0.0, 0.1, 1.0, 3.0])
CLOSE = {"rtol": 1e-5, "atol": 2e-6}
"""The partition may change a loss by 1e-5 of it, and a gradient by 1e-5 of one of order 1."""


class Shards:
    """This rank's columns: uneven parts of the vocabulary, padded to one width."""

    def __init__(self, group: dist.ProcessGroup, *, empty_last: bool) -> None:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        parts = size - 1 if empty_last else size
        cuts = [i * NUM_COLUMNS // parts for i in range(parts + 1)] + [NUM_COLUMNS] * empty_last
        self.low, self.high = cuts[rank], cuts[rank + 1]
        self.width = max(high - low for low, high in pairwise(cuts)) + 3
        self.valid = self.high - self.low

    def columns(self, matrix: Tensor) -> Tensor:
        """[N, V] of the whole to this rank's padded columns."""
        out = torch.full((matrix.shape[0], self.width), 1e4, dtype=matrix.dtype)
        out[:, : self.valid] = matrix[:, self.low : self.high]
        return out

    def rows(self, matrix: Tensor) -> Tensor:
        """[V, H] of the whole to this rank's padded rows."""
        return self.columns(matrix.T).T.contiguous()

    def check(self, local: Tensor | None, whole: Tensor | None) -> None:
        """The shard's gradient is the whole one's columns, and exactly 0 in the padding."""
        assert local is not None
        assert whole is not None
        assert_close(local[:, : self.valid], whole[:, self.low : self.high], **CLOSE)
        assert (local[:, self.valid :] == 0).all()


def matrices(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(5)
    student = torch.randn(NUM_ROWS, NUM_COLUMNS, generator=random) * 3
    teacher = student + torch.randn(NUM_ROWS, NUM_COLUMNS, generator=random)
    teacher[0] = student[0]
    hidden = torch.randn(NUM_ROWS, HIDDEN, generator=random)
    teacher_hidden = torch.randn(NUM_ROWS, TEACHER_HIDDEN, generator=random)
    return {
        "student": student.to(dtype),
        "teacher": teacher.to(dtype),
        "hidden": hidden,
        "weight": torch.randn(NUM_COLUMNS, HIDDEN, generator=random) / 4,
        "teacher_hidden": teacher_hidden,
        "teacher_weight": torch.randn(NUM_COLUMNS, TEACHER_HIDDEN, generator=random) / 5,
    }


def assert_same_bits(tensor: Tensor, group: dist.ProcessGroup) -> None:
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    assert all(torch.equal(parts[0], part) for part in parts)


@contextmanager
def counted_collectives() -> Iterator[list[tuple[str, int]]]:
    """(name, bytes that this rank sends) of every collective."""
    sent: list[tuple[str, int]] = []
    real = {name: getattr(dist, name) for name in ("all_gather", "all_reduce")}

    def all_gather(parts: list[Tensor], part: Tensor, **options: Any) -> None:
        sent.append(("all_gather", part.nbytes))
        real["all_gather"](parts, part, **options)

    def all_reduce(tensor: Tensor, **options: Any) -> None:
        sent.append(("all_reduce", tensor.nbytes))
        real["all_reduce"](tensor, **options)

    with mock.patch.multiple(dist, all_gather=all_gather, all_reduce=all_reduce):
        yield sent


def logits_form_equals_the_whole(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    for kind in KINDS:
        for weight in (None, WEIGHT):
            whole, local = data["student"].clone(), shards.columns(data["student"])
            whole.requires_grad_()
            local.requires_grad_()
            options: dict[str, Any] = {"kind": kind, "temperature": 0.7, "weight_N": weight}
            expected = divergence(whole, data["teacher"], **options)
            with counted_collectives() as sent:
                loss = divergence(
                    local,
                    shards.columns(data["teacher"]),
                    group=group,
                    num_valid_columns=shards.valid,
                    **options,
                )
                expected.sum().backward()
                loss.sum().backward()
            assert_close(loss, expected, **CLOSE)
            shards.check(local.grad, whole.grad)
            assert loss[0] == 0
            gathered = [("all_gather", 20 * NUM_ROWS)]
            assert sent == gathered + [("all_gather", 8 * NUM_ROWS)] * (kind == "jsd")
            assert_same_bits(loss, group)


def bf16_shards_equal_the_whole(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices(torch.bfloat16)
    whole = data["student"].clone().requires_grad_()
    local = shards.columns(data["student"]).requires_grad_()
    expected = divergence(whole, data["teacher"], kind="reverse_kl")
    teacher = shards.columns(data["teacher"])
    options: dict[str, Any] = {"group": group, "num_valid_columns": shards.valid}
    loss = divergence(local, teacher, kind="reverse_kl", **options)
    expected.sum().backward()
    loss.sum().backward()
    assert_close(loss, expected, **CLOSE)
    assert local.grad is not None
    assert whole.grad is not None
    assert_close(
        local.grad[:, : shards.valid],
        whole.grad[:, shards.low : shards.high],
        rtol=2.0**-7,
        atol=1e-6,
    )


def linear_form_equals_the_whole(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    for kind in KINDS:
        for weight, chunk_tokens in ((None, 4), (WEIGHT, 4), (WEIGHT, 100)):
            whole = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
            local = (
                data["hidden"].clone().requires_grad_(),
                shards.rows(data["weight"]).requires_grad_(),
            )
            options: dict[str, Any] = {
                "kind": kind,
                "temperature": 0.7,
                "weight_N": weight,
                "chunk_tokens": chunk_tokens,
            }
            expected = linear_divergence(
                *whole, data["teacher_hidden"], data["teacher_weight"], **options
            )
            expected.sum().backward()
            with counted_collectives() as sent:
                loss = linear_divergence(
                    *local,
                    data["teacher_hidden"],
                    shards.rows(data["teacher_weight"]),
                    group=group,
                    num_valid_columns=shards.valid,
                    **options,
                )
                loss.sum().backward()
            num_tokens = NUM_ROWS if weight is None else int((weight > 0).sum())
            assert_close(loss, expected, **CLOSE)
            assert local[0].grad is not None
            assert local[1].grad is not None
            assert whole[1].grad is not None
            assert_close(local[0].grad, whole[0].grad, **CLOSE)
            shards.check(local[1].grad.T, whole[1].grad.T)
            reduced = [entry for entry in sent if entry[0] == "all_reduce"]
            gathered = sum(size for name, size in sent if name == "all_gather")
            assert reduced == [("all_reduce", 4 * num_tokens * HIDDEN)]
            assert gathered == (28 if kind == "jsd" else 20) * num_tokens
            assert_same_bits(loss, group)
            assert_same_bits(local[0].grad, group)


def tokens_equal_the_whole(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    target_ids = torch.tensor([0, 1002, 333, 334, 335, 250, 251, 501, 502])
    whole, local = data["student"].clone(), shards.columns(data["student"])
    whole.requires_grad_()
    local.requires_grad_()
    options: dict[str, Any] = {
        "group": group,
        "num_valid_columns": shards.valid,
        "first_token_id": shards.low,
    }
    expected = token_logprob(whole, target_ids, temperature=0.7)
    scores = token_logprob(local, target_ids, temperature=0.7, **options)
    (expected.logprob_N - expected.entropy_N).sum().backward()
    (scores.logprob_N - scores.entropy_N).sum().backward()
    assert_close(tuple(scores), tuple(expected), **CLOSE)
    shards.check(local.grad, whole.grad)
    assert_same_bits(torch.stack(scores), group)

    for weight in (None, WEIGHT):
        hidden = data["hidden"].clone().requires_grad_()
        head = data["weight"].clone().requires_grad_()
        local_hidden = data["hidden"].clone().requires_grad_()
        local_head = shards.rows(data["weight"]).requires_grad_()
        one = linear_token_logprob(hidden, head, target_ids, weight_N=weight)
        many = linear_token_logprob(
            local_hidden, local_head, target_ids, weight_N=weight, chunk_tokens=4, **options
        )
        one.sum().backward()
        many.sum().backward()
        assert_close(many, one, **CLOSE)
        assert_close(local_hidden.grad, hidden.grad, **CLOSE)
        assert local_head.grad is not None
        assert head.grad is not None
        shards.check(local_head.grad.T, head.grad.T)


def even_shards_need_no_first_token_id(group: dist.ProcessGroup, _shards: Shards) -> None:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    logits = matrices()["student"][:, : 120 * size]
    target_ids = torch.arange(NUM_ROWS) * 13 * size
    local = logits[:, 120 * rank : 120 * (rank + 1)].contiguous()
    scores = token_logprob(local, target_ids, group=group)
    assert_close(tuple(scores), tuple(token_logprob(logits, target_ids)), **CLOSE)


def topk_equals_the_whole(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    for kind in ("reverse_kl", "forward_kl"):
        for tail in ("bucket", "renorm", "drop" if kind == "forward_kl" else "stop_gradient"):
            for k, temperature in ((1, 1.0), (12, 2.0), (700, 0.7)):
                whole, local = data["student"].clone(), shards.columns(data["student"])
                whole.requires_grad_()
                local.requires_grad_()
                options: dict[str, Any] = {"kind": kind, "tail": tail, "k": k, "weight_N": WEIGHT}
                options["temperature"] = temperature
                expected = topk_divergence(whole, data["teacher"], **options)
                teacher = shards.columns(data["teacher"])
                with counted_collectives() as sent:
                    result = topk_divergence(
                        local, teacher, group=group, num_valid_columns=shards.valid, **options
                    )
                    result.loss_N.sum().backward()
                expected.loss_N.sum().backward()
                num_tokens = int((WEIGHT > 0).sum())
                assert_close(tuple(result), tuple(expected), **CLOSE)
                shards.check(local.grad, whole.grad)
                assert sent == [("all_gather", (8 * k + 24) * num_tokens)]
                assert_same_bits(torch.stack(result), group)


def linear_topk_equals_the_whole(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    for tail in ("renorm", "drop"):
        whole = data["hidden"].clone().requires_grad_(), data["weight"].clone().requires_grad_()
        hidden = data["hidden"].clone().requires_grad_()
        head = shards.rows(data["weight"]).requires_grad_()
        options: dict[str, Any] = {"kind": "reverse_kl", "tail": tail, "k": 12, "weight_N": WEIGHT}
        options["chunk_tokens"] = 4
        teacher = data["teacher_hidden"], data["teacher_weight"]
        expected = linear_topk_divergence(*whole, *teacher, **options)
        result = linear_topk_divergence(
            hidden,
            head,
            teacher[0],
            shards.rows(teacher[1]),
            group=group,
            num_valid_columns=shards.valid,
            **options,
        )
        expected.loss_N.sum().backward()
        result.loss_N.sum().backward()
        assert_close(tuple(result), tuple(expected), **CLOSE)
        assert_close(hidden.grad, whole[0].grad, **CLOSE)
        assert head.grad is not None
        assert whole[1].grad is not None
        shards.check(head.grad.T, whole[1].grad.T)
        assert_same_bits(torch.stack(result), group)


def topk_of_many_rows_sends_the_same_blocks_on_every_rank(
    group: dist.ProcessGroup, shards: Shards
) -> None:
    random = torch.Generator().manual_seed(3)
    student, teacher = (torch.randn(200, NUM_COLUMNS, generator=random) for _ in range(2))
    options: dict[str, Any] = {"kind": "reverse_kl", "tail": "bucket", "k": 4}
    result = topk_divergence(
        shards.columns(student),
        shards.columns(teacher),
        group=group,
        num_valid_columns=shards.valid,
        **options,
    )
    assert_close(tuple(result), tuple(topk_divergence(student, teacher, **options)), **CLOSE)


def topk_without_tokens_or_with_too_few_columns(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    local, teacher = (shards.columns(data[name]) for name in ("student", "teacher"))
    options: dict[str, Any] = {"kind": "forward_kl", "tail": "renorm", "group": group}
    assert topk_divergence(local[:0], teacher[:0], k=3, **options).loss_N.shape == (0,)
    masked = topk_divergence(local, teacher, k=3, weight_N=torch.zeros(NUM_ROWS), **options)
    assert (masked.loss_N == 0).all()
    narrow = min(3, shards.valid)
    with pytest.raises(ValueError, match="k is 20, more than the columns"):
        topk_divergence(local, teacher, k=20, num_valid_columns=narrow, **options)


def topk_ties_over_shards_are_broken_the_same_way(group: dist.ProcessGroup, shards: Shards) -> None:
    student = torch.zeros(2, NUM_COLUMNS)
    teacher = matrices()["teacher"][:2]
    local, options = shards.columns(student), {"group": group, "num_valid_columns": shards.valid}
    result = topk_divergence(
        local, shards.columns(teacher), kind="reverse_kl", k=50, tail="bucket", **options
    )
    assert_same_bits(torch.stack(result), group)
    assert_close(result.student_mass_N, torch.full((2,), 50 / NUM_COLUMNS))


def bad_rows_are_bad_on_every_rank(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    data["student"][3, 1] = math.nan
    data["teacher"][5, 1002] = -math.inf
    options: dict[str, Any] = {"group": group, "num_valid_columns": shards.valid}
    local = shards.columns(data["student"])
    teacher = shards.columns(data["teacher"])
    loss = divergence(local, teacher, kind="reverse_kl", **options)
    assert loss.isnan().tolist() == [row == 3 for row in range(NUM_ROWS)]
    assert loss.isposinf().tolist() == [row == 5 for row in range(NUM_ROWS)]


def no_tokens_send_nothing(group: dist.ProcessGroup, shards: Shards) -> None:
    data = matrices()
    hidden = data["hidden"][:0].clone().requires_grad_()
    head = shards.rows(data["weight"]).requires_grad_()
    with counted_collectives() as sent:
        loss = linear_divergence(
            hidden,
            head,
            data["teacher_hidden"][:0],
            shards.rows(data["teacher_weight"]),
            kind="jsd",
            group=group,
        )
        loss.sum().backward()
    assert sent == []
    assert head.grad is not None
    assert (head.grad == 0).all()


CASES: tuple[Callable[[dist.ProcessGroup, Shards], None], ...] = (
    logits_form_equals_the_whole,
    bf16_shards_equal_the_whole,
    linear_form_equals_the_whole,
    tokens_equal_the_whole,
    even_shards_need_no_first_token_id,
    topk_equals_the_whole,
    linear_topk_equals_the_whole,
    topk_of_many_rows_sends_the_same_blocks_on_every_rank,
    topk_without_tokens_or_with_too_few_columns,
    topk_ties_over_shards_are_broken_the_same_way,
    bad_rows_are_bad_on_every_rank,
    no_tokens_send_nothing,
)


def run_rank(rank: int, port: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    for size in (2, 3, 4):
        group = dist.new_group(list(range(size)))
        if rank < size:
            for empty_last in (False, True):
                for case in CASES:
                    case(group, Shards(group, empty_last=empty_last))
        dist.barrier()
    dist.destroy_process_group()


def test_shards_over_two_three_and_four_ranks_equal_the_whole() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(run_rank, args=(port,), nprocs=4)
