"""Bad arguments are refused by name."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from opcd_kernels import (
    LogitMap,
    divergence,
    linear_divergence,
    linear_token_logprob,
    token_logprob,
    topk_divergence,
)

LOGITS = torch.zeros(4, 9)
HIDDEN, WEIGHT = torch.zeros(4, 5), torch.zeros(9, 5)
IDS = torch.zeros(4, dtype=torch.int64)


def call_divergence(**changes: Any) -> None:
    arguments = {"student": LOGITS, "teacher": LOGITS, "kind": "reverse_kl"} | changes
    divergence(arguments.pop("student"), arguments.pop("teacher"), **arguments)


def call_linear(**changes: Any) -> None:
    heads = {"hidden": HIDDEN, "weight": WEIGHT, "teacher_hidden": HIDDEN, "teacher_weight": WEIGHT}
    arguments = heads | {"kind": "reverse_kl"} | changes
    tensors = [arguments.pop(name) for name in heads]
    linear_divergence(*tensors, **arguments)


def call_topk(**changes: Any) -> None:
    arguments = {"student": LOGITS, "kind": "reverse_kl", "k": 3, "tail": "bucket"} | changes
    topk_divergence(arguments.pop("student"), LOGITS, **arguments)


def call_token(**changes: Any) -> None:
    arguments = {"logits": LOGITS, "ids": IDS} | changes
    token_logprob(arguments.pop("logits"), arguments.pop("ids"), **arguments)


def call_linear_token(**changes: Any) -> None:
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "ids": IDS} | changes
    tensors = [arguments.pop(name) for name in ("hidden", "weight", "ids")]
    linear_token_logprob(*tensors, **arguments)


REFUSED: list[tuple[Callable[..., None], dict[str, Any], str]] = [
    (call_divergence, {"kind": "kl"}, "kind"),
    (call_divergence, {"kind": "jsd", "beta": 0.0}, "beta"),
    (call_divergence, {"kind": "jsd", "beta": 1.0}, "beta"),
    (call_divergence, {"beta": math.nan}, "beta"),
    (call_divergence, {"temperature": 0.0}, "temperature"),
    (call_divergence, {"temperature": None}, "temperature"),
    (call_divergence, {"temperature": "1"}, "temperature"),
    (call_divergence, {"student": LOGITS[:1].expand(4, 9)}, "student_logits_NV"),
    (call_divergence, {"weight_N": torch.tensor([1.0, math.inf, 1.0, 1.0])}, "weight_N"),
    (call_divergence, {"weight_N": torch.ones(4).requires_grad_()}, "weight_N"),
    (call_divergence, {"num_valid_columns": 2.5}, "num_valid_columns"),
    (call_linear, {"hidden": torch.tensor(1.0)}, "student_hidden_NH"),
    (call_linear, {"chunk_tokens": 1.5}, "chunk_tokens"),
    (call_linear_token, {"hidden": torch.tensor(1.0)}, "hidden_NH"),
    (call_topk, {"k": 2.5}, "k"),
    (call_topk, {"k": True}, "k"),
    (call_divergence, {"temperature": -1.0}, "temperature"),
    (call_divergence, {"temperature": math.inf}, "temperature"),
    (call_divergence, {"student": LOGITS[0]}, "student_logits_NV"),
    (call_divergence, {"student": LOGITS.long()}, "student_logits_NV"),
    (call_divergence, {"student": LOGITS.double()}, "student_logits_NV"),
    (call_divergence, {"student": torch.zeros(9, 4).T}, "student_logits_NV"),
    (call_divergence, {"teacher": torch.zeros(9, 4).T}, "teacher_logits_NV"),
    (call_divergence, {"teacher": LOGITS[:, :8]}, "teacher_logits_NV"),
    (call_divergence, {"teacher": LOGITS[:3]}, "teacher_logits_NV"),
    (call_divergence, {"teacher": LOGITS.to("meta")}, "teacher_logits_NV"),
    (call_divergence, {"weight_N": torch.ones(3)}, "weight_N"),
    (call_divergence, {"weight_N": torch.ones(4).double()}, "weight_N"),
    (call_divergence, {"weight_N": torch.tensor([1.0, -1.0, 0.0, 1.0])}, "weight_N"),
    (call_divergence, {"weight_N": torch.tensor([1.0, math.nan, 0.0, 1.0])}, "weight_N"),
    (call_divergence, {"weight_N": torch.ones(4, device="meta")}, "weight_N"),
    (call_divergence, {"num_valid_columns": 10}, "num_valid_columns"),
    (call_divergence, {"num_valid_columns": -1}, "num_valid_columns"),
    (call_linear, {"kind": "kl"}, "kind"),
    (call_linear, {"hidden": torch.zeros(4, 6)}, "student_weight_VH"),
    (call_linear, {"weight": WEIGHT.bfloat16()}, "student_weight_VH"),
    (call_linear, {"weight": WEIGHT.to("meta")}, "student_weight_VH"),
    (call_linear, {"weight": torch.zeros(5, 9).T}, "student_weight_VH"),
    (call_linear, {"teacher_hidden": HIDDEN[:3]}, "teacher_hidden_NG"),
    (call_linear, {"teacher_hidden": HIDDEN.int()}, "teacher_hidden_NG"),
    (call_linear, {"teacher_weight": WEIGHT[:8]}, "teacher_weight_VG"),
    (call_linear, {"teacher_weight": torch.zeros(9, 6)}, "teacher_weight_VG"),
    (call_linear, {"chunk_tokens": 0}, "chunk_tokens"),
    (call_linear, {"weight_N": -torch.ones(4)}, "weight_N"),
    (call_linear, {"num_valid_columns": 10}, "num_valid_columns"),
    (call_topk, {"kind": "jsd"}, "kind"),
    (call_topk, {"tail": "truncate"}, "tail is 'truncate'"),
    (call_topk, {"tail": "stop_gradient", "kind": "forward_kl"}, "reverse_kl alone"),
    (call_topk, {"k": 0}, "k is 0"),
    (call_topk, {"k": 10}, "k is 10"),
    (call_topk, {"k": 1025}, "k is 1025"),
    (call_topk, {"student": LOGITS.int()}, "student_logits_NV"),
    (call_topk, {"weight_N": -torch.ones(4)}, "weight_N"),
    (call_token, {"logits": LOGITS.int()}, "logits_NV"),
    (call_token, {"ids": IDS.int()}, "target_ids_N"),
    (call_token, {"ids": IDS[:3]}, "target_ids_N"),
    (call_token, {"temperature": 0.0}, "temperature"),
    (call_linear_token, {"hidden": torch.zeros(4, 6)}, "weight_VH"),
    (call_linear_token, {"ids": IDS.float()}, "target_ids_N"),
    (call_linear_token, {"chunk_tokens": -1}, "chunk_tokens"),
    (call_linear_token, {"weight_N": torch.ones(5)}, "weight_N"),
]


@pytest.mark.parametrize(("call", "changes", "named"), REFUSED)
def test_bad_arguments_are_refused_by_name(
    call: Callable[..., None], changes: dict[str, Any], named: str
) -> None:
    call()
    with pytest.raises(ValueError, match=named):
        call(**changes)


@pytest.mark.parametrize("options", [{"scale": 0.0}, {"softcap": -1.0}, {"softcap": math.inf}])
def test_bad_logit_maps_are_refused_by_name(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LogitMap(**options)
