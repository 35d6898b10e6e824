"""Operations that torch counts in a student's and a teacher's pass, and the plan's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.losses import DivergenceLoss, TokenTargets
from opcd_nemo.model.head import Head
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.model.packing import TokenBatch, pack
from opcd_nemo.plan.work import (
    Tokens,
    Work,
    backward_flops,
    forward_flops,
    loss_flops,
    student_stream,
    teacher_stream,
)
from tests.sample_work import layout, work
from tests.tiny import model_config

ROWS, RESPONSE = 3, 9
_WIDE = {"hidden_size": 64, "ffn_hidden_size": 160, "max_positions": 512}
MODELS: dict[str, ModelConfig] = {
    "llama": model_config("llama", **_WIDE),
    "qwen2, untied, deep": model_config("qwen2", num_layers=5, **_WIDE),
    "qwen3, tied, large vocabulary": model_config("qwen3", vocab_size=999, tied_embeddings=True),
}
LENGTHS = {"short": (12, 4, 30), "long prompt": (200, 150, 30), "long context": (12, 4, 300)}
"""Tokens of a prompt, of them shared, and of the held context."""


def count_all(parallel: Parallel) -> dict[str, dict[str, tuple[float, float]]]:
    """(torch's count, the plan's) of every model and length, by pass."""
    return {
        f"{name}; {lengths}": _count(parallel, model, *LENGTHS[lengths])
        for name, model in MODELS.items()
        for lengths in LENGTHS
    }


def _count(
    parallel: Parallel, model: ModelConfig, prompt: int, shared: int, held: int
) -> dict[str, tuple[float, float]]:
    tokens = Tokens(
        prompt=prompt,
        shared=shared,
        teacher_prompt=held + prompt,
        held=held,
        response=RESPONSE,
        max_new=RESPONSE,
        retention_max_new=RESPONSE,
    )
    planned = work(model=model, tokens=tokens, sequences=ROWS, layout=layout(micro_batch_size=ROWS))
    student, teacher = _model(parallel, model), _model(parallel, model)
    prefix = teacher.prefix([1] * held)
    asked = _batch(prompt + RESPONSE - 1, shared)
    taught = _batch(prompt + RESPONSE - 1, 0, first_position=held)
    scores: list[torch.Tensor] = []
    counted_teacher = _counted(lambda: scores.extend(teacher.score([taught], [prefix])))

    def loss(head: Head, *_: object) -> Any:
        divergence = DivergenceLoss("reverse_kl", beta=0.5, temperature=1.0, chunk_tokens=8)
        count = len(head.hidden_NH)
        tokens = TokenTargets(
            target_ids_N=torch.zeros(count, dtype=torch.long),
            weight_N=torch.full((count,), 1 / count),
        )
        return divergence(head, teacher.head(scores[0]), tokens)

    counted = _counted(lambda: student.forward_backward(student.module, [asked], loss))
    return {
        "student": (counted, _student(planned)),
        "teacher": (counted_teacher, forward_flops(model, teacher_stream(planned, RESPONSE))),
    }


def _student(planned: Work) -> float:
    stream = student_stream(planned, RESPONSE)
    passes = forward_flops(planned.student, stream)
    passes += backward_flops(planned.student, stream, planned.layout)
    return passes + loss_flops(planned, ROWS * RESPONSE)


def _model(parallel: Parallel, config: ModelConfig) -> LanguageModel:
    model = LanguageModel(config, parallel, torch.float32)
    with torch.no_grad():
        for parameter in model.module.parameters():
            parameter.normal_(std=0.05)
    return model


def _batch(length: int, shared: int, first_position: int = 0) -> TokenBatch:
    """Rows that share exactly so many first tokens."""
    rows = [[1] * shared + [2 + row] * (length - shared) for row in range(ROWS)]
    return pack(rows, [RESPONSE] * ROWS, device=torch.device("cpu"), first_position=first_position)


def _counted(run: Callable[[], object]) -> float:
    unseen = {torch.ops.aten.addmm_: _product_in_place}  # the counter does not know it
    with FlopCounterMode(display=False, custom_mapping=unseen) as counter:
        run()
    return float(counter.get_total_flops())


def _product_in_place(_: Any, left: Any, right: Any, **__: Any) -> int:
    rows, inner = left
    return int(2 * rows * inner * right[1])
