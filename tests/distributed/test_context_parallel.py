"""What `test_parity.py` trains under context parallelism holds what is hard about it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from opcd_nemo.model.context_parallel import StreamShare
from opcd_nemo.model.packing import TokenBatch, pack, pad_stream
from tests.distributed import cases
from tests.error_limits import check

Results = Callable[[str], Any]
SPLIT = [name for name, layout in cases.LAYOUTS.items() if layout.cp > 1]


def streams(case: str, cp: int, step: int = 0) -> list[tuple[TokenBatch, TokenBatch]]:
    """Student's and teacher's stream of every micro-batch of a step without games."""
    pairs, size = cases.training_pairs(step), cases.TRAIN_CASES[case].micro_batch_size
    found = []
    for start in range(0, len(pairs), size):
        rows = pairs[start : start + size]
        counts = [len(response) for _, response in rows]
        sides = [
            [(*context, *prompt, *response[:-1]) for prompt, response in rows]
            for context in ((), cases.OTHER_CONTEXT)
        ]
        student, teacher = (
            pack(side, counts, device=torch.device("cpu"), multiple=2 * cp) for side in sides
        )
        found.append((student, teacher))
    return found


def shares(batch: TokenBatch, cp: int) -> list[StreamShare]:
    tokens = batch.packing.stream_tokens
    return [StreamShare(stream_tokens=tokens, cp=cp, cp_rank=rank) for rank in range(cp)]


def predicted(batch: TokenBatch, cp: int) -> list[int]:
    """Response tokens of each rank."""
    return [len(share.find(batch.predict_index_N)[1]) for share in shares(batch, cp)]


@pytest.mark.parametrize("cp", [2, 4])
def test_some_ranks_have_no_response_token(cp: int) -> None:
    batches = streams("even-overlap", cp)
    assert any(0 in predicted(student, cp) for student, _ in batches)
    assert any(0 in predicted(teacher, cp) for _, teacher in batches)


def test_some_ranks_of_a_pipeline_have_only_padding() -> None:
    students = [student for student, _ in streams("even-overlap", 2, step=2)]
    longest = max(student.packing.stream_tokens for student in students)
    shortest = min(students, key=lambda student: sum(student.packing.lengths))
    second = shares(pad_stream(shortest, longest), 2)[1]
    assert second.runs[0].start >= sum(shortest.packing.lengths)


def test_teacher_and_student_streams_split_elsewhere_and_prefixes_are_shared() -> None:
    batches = streams("llama-untied-distributed", 2)
    assert any(predicted(student, 2) != predicted(teacher, 2) for student, teacher in batches)
    assert all(student.packing.prefix_tokens == len(cases._LEAD) for student, _ in batches)
    chunks = [student.packing.stream_tokens // 4 for student, _ in batches]
    assert min(min(student.packing.lengths) for student, _ in batches) < max(chunks)


@pytest.mark.parametrize("layout", SPLIT)
def test_rollouts_are_counted_once(layout: str, results: Results) -> None:
    for case, found in results(layout)["train"].items():
        for mine, true in zip(found["stats"], results("one")["train"][case]["stats"], strict=True):
            for name in ("rollout/response_tokens", "rollout/eos_rate"):
                assert mine[name] == pytest.approx(true[name]), (case, name)


def test_bf16_is_as_far_from_fp32_as_in_one_process(results: Results) -> None:
    case = "llama-untied-distributed"
    exact = results("one")["train"][case]["gradients"]
    one, split = (_distance(results(name)["bf16"]["gradients"], exact) for name in ("one", "cp2"))
    assert one > 1e-3
    check("gradients: bf16, cp 2 over one process", split / one, 1.2)
    assert results("cp2")["bf16"]["unequal"] == []


def _distance(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """L2 norm of the difference of all tensors, relative to the expected norm."""
    difference, norm = (
        torch.cat([one.double().flatten() for one in tensors])
        for tensors in (
            [actual[name].double() - expected[name] for name in expected],
            expected.values(),
        )
    )
    return (difference.norm() / norm.norm()).item()
