"""The operator that joins statistics of disjoint columns."""

import pytest
import torch

from opcd_kernels.eager import EagerBackend
from opcd_kernels.options import Sharpening
from opcd_kernels.reference import divergence_and_gradient, log_softmax
from opcd_kernels.rows import kl_from_statistics, merge, merge_token, token_scores
from tests.kernels.kernel_cases import logits_pair

PLAIN = Sharpening()


@pytest.mark.parametrize("seed", range(10))
def test_any_partition_in_any_order_gives_the_same_kl(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    student, teacher = logits_pair(4, 997, torch.float32, seed=seed)
    teacher += 20.0
    logs = log_softmax(student), log_softmax(teacher)
    expected, _ = divergence_and_gradient(*logs, kind="reverse_kl")
    cuts = torch.randint(0, 997, (6,), generator=random).sort().values.tolist()
    engine = EagerBackend()
    parts = [
        engine.row_statistics(student[:, low:high], teacher[:, low:high], PLAIN, PLAIN, None)
        for low, high in zip([0, *cuts], [*cuts, 997], strict=True)
    ]
    order = torch.randperm(len(parts), generator=random).tolist()
    shuffled = merge(torch.stack([parts[i] for i in order]))
    nested = merge(torch.stack([merge(torch.stack(parts[:3])), merge(torch.stack(parts[3:]))]))
    for merged in (shuffled, nested):
        error = (kl_from_statistics(merged).double() - expected).abs()
        assert (error <= 2e-6 + 1e-5 * expected).all()


def test_an_empty_part_changes_nothing() -> None:
    student, teacher = logits_pair(4, 97, torch.float32)
    engine = EagerBackend()
    whole = engine.row_statistics(student, teacher, PLAIN, PLAIN, None)
    empty = engine.row_statistics(student[:, :0], teacher[:, :0], PLAIN, PLAIN, None)
    assert torch.equal(merge(torch.stack([empty, whole, empty])), whole)


def test_token_statistics_join_like_the_whole() -> None:
    logits, _ = logits_pair(4, 97, torch.float32)
    column = torch.tensor([0, 40, 60, 96])
    engine = EagerBackend()
    parts = []
    for low, high in ((0, 41), (41, 41), (41, 97)):
        local = torch.where((column >= low) & (column < high), column - low, -1)
        parts.append(engine.token_statistics(logits[:, low:high], local, PLAIN, None))
    whole = engine.token_statistics(logits, column, PLAIN, None)
    for joined, single in zip(
        token_scores(merge_token(torch.stack(parts))), token_scores(whole), strict=True
    ):
        torch.testing.assert_close(joined, single, rtol=1e-5, atol=1e-6)
