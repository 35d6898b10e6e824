"""Losses through vocabulary-parallel heads against float64 closed forms by autograd."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.formats.stored_model import open_model
from tests.distributed import reference
from tests.distributed.cases import HEAD_LOSSES, HEAD_MODELS
from tests.error_limits import check, relative_error

Results = Callable[[str], Any]


@pytest.mark.parametrize("layout", ["one", "tp2", "tp3", "tp4", "tp2sp", "tp2dp2"])
def test_gradients_equal_the_float64_closed_form(
    layout: str, results: Results, folder: Path
) -> None:
    head = results(layout)["head"]
    for model, (kind, beta, temperature) in product(HEAD_MODELS, HEAD_LOSSES):
        where = f"{layout} {model} {kind} {temperature}"
        found = head[model, kind, temperature]
        check_gradients(found, folder, model, kind, beta, temperature, where)


def check_gradients(
    found: Any, folder: Path, model: str, kind: str, beta: float, temperature: float, where: str
) -> None:
    student, teacher = (
        open_model(str(folder / f"{model}-{who}")).tensor("lm_head.weight").double()
        for who in ("student", "teacher")
    )
    student_hidden, teacher_hidden, targets, weight = found["inputs"]
    hidden = student_hidden.double().requires_grad_()
    student.requires_grad_()
    logits = hidden @ student.T / temperature
    if kind == "hard":
        loss_N = reference.negative_logprob(logits, targets)
    else:
        teacher_logits = teacher_hidden.double() @ teacher.T / temperature
        loss_N = reference.divergence(logits, teacher_logits, kind, beta)
    total = (loss_N * weight.double()).sum()
    total.backward()
    assert hidden.grad is not None
    assert student.grad is not None
    check("head: loss", relative_error(found["loss"], total.detach()), 1e-6, where)
    for of_rank in found["hidden"]:
        check("head: hidden gradient", relative_error(of_rank, hidden.grad), 5e-6, where)
    vocabulary = len(student)
    error = relative_error(found["head"][:vocabulary], student.grad)
    check("head: weight gradient", error, 5e-6, where)
    assert (found["head"][vocabulary:] == 0).all()
