"""Refusals with the argument's name, before any arithmetic or collective."""

import torch
from torch import Tensor

MAX_TOP_K = 1024


def check_matrix(name: str, value: Tensor) -> None:
    """Raises ValueError unless `value` is a floating matrix with contiguous rows."""
    if value.dim() != 2:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it must have two dimensions")
    if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"{name} has dtype {value.dtype}; allowed: float32, bfloat16, float16")
    if value.shape[0] > 1 and value.stride(0) < value.shape[1]:
        raise ValueError(
            f"{name} has strides {value.stride()}; its rows overlap: call .contiguous()"
        )
    if value.shape[1] > 1 and value.stride(1) != 1:
        raise ValueError(
            f"{name} has strides {value.stride()}; a row must be contiguous: call .contiguous()"
        )


def check_same(what: str, name: str, value: object, other_name: str, other: object) -> None:
    """Raises ValueError unless both arguments agree in `what` (device, dtype, rows)."""
    if value != other:
        raise ValueError(
            f"{name} has {what} {value}, {other_name} has {what} {other}; they must agree"
        )


def check_head(hidden_name: str, hidden_NH: Tensor, weight_name: str, weight_VH: Tensor) -> None:
    """Raises ValueError unless the two form a linear layer."""
    check_matrix(hidden_name, hidden_NH)
    check_matrix(weight_name, weight_VH)
    check_same("columns", weight_name, weight_VH.shape[1], hidden_name, hidden_NH.shape[1])
    check_same("dtype", weight_name, weight_VH.dtype, hidden_name, hidden_NH.dtype)
    check_same("device", weight_name, weight_VH.device, hidden_name, hidden_NH.device)


def check_logits_pair(student_NV: Tensor, teacher_NV: Tensor) -> None:
    """Raises ValueError unless both are logit matrices of the same tokens and columns."""
    check_matrix("student_logits_NV", student_NV)
    check_matrix("teacher_logits_NV", teacher_NV)
    shapes = tuple(teacher_NV.shape), tuple(student_NV.shape)
    check_same("shape", "teacher_logits_NV", shapes[0], "student_logits_NV", shapes[1])
    devices = teacher_NV.device, student_NV.device
    check_same("device", "teacher_logits_NV", devices[0], "student_logits_NV", devices[1])


def check_weight(weight_N: Tensor, num_rows: int, device: torch.device) -> Tensor:
    """The weights, contiguous.

    Raises:
        ValueError: they are not [num_rows] fp32 on `device`, want a gradient, or one of them is
            negative or not finite; on a GPU the last is asserted there, which waits for nothing.
    """
    if weight_N.shape != (num_rows,) or weight_N.dtype != torch.float32:
        raise ValueError(
            f"weight_N is {weight_N.dtype} of shape {tuple(weight_N.shape)}; "
            f"it must be float32 of shape ({num_rows},)"
        )
    check_same("device", "weight_N", weight_N.device, "the logits or hidden states", device)
    if weight_N.requires_grad:
        raise ValueError("weight_N requires grad, but is a constant here: call .detach()")
    message = (
        "weight_N holds a negative or non-finite weight; weights must be finite and at least 0"
    )
    sound = ((weight_N >= 0) & (weight_N < torch.inf)).all()
    if device.type == "cuda":
        torch._assert_async(sound, message)
    elif not bool(sound):
        raise ValueError(message)
    return weight_N.contiguous()


def check_integer(name: str, value: object) -> None:
    """Raises ValueError unless `value` is a whole number."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} is {value!r}; it must be a whole number")


def check_targets(target_ids_N: Tensor, num_rows: int, device: torch.device) -> None:
    """Raises ValueError unless the ids are int64 of shape [num_rows] on `device`."""
    if target_ids_N.shape != (num_rows,) or target_ids_N.dtype != torch.int64:
        raise ValueError(
            f"target_ids_N is {target_ids_N.dtype} of shape {tuple(target_ids_N.shape)}; "
            f"it must be int64 of shape ({num_rows},)"
        )
    check_same("device", "target_ids_N", target_ids_N.device, "the logits or hidden states", device)


def valid_columns(num_valid_columns: int | None, num_columns: int) -> int:
    """The number of vocabulary columns of this shard that are not padding.

    Raises:
        ValueError: it is negative or above the width of the shard.
    """
    if num_valid_columns is None:
        return num_columns
    check_integer("num_valid_columns", num_valid_columns)
    if not 0 <= num_valid_columns <= num_columns:
        raise ValueError(
            f"num_valid_columns is {num_valid_columns}; allowed: 0 to {num_columns}, the shard"
        )
    return num_valid_columns


def check_top_k(kind: str, tail: str, k: int, num_columns: int | None) -> None:
    """Raises ValueError unless the top-k options name a divergence; None skips the vocabulary."""
    if kind not in ("reverse_kl", "forward_kl"):
        raise ValueError(f"kind is {kind!r}; allowed with a top-k: reverse_kl, forward_kl")
    if tail not in ("bucket", "renorm", "drop", "stop_gradient"):
        raise ValueError(f"tail is {tail!r}; allowed: bucket, renorm, drop, stop_gradient")
    if tail == "stop_gradient" and kind != "reverse_kl":
        raise ValueError(f"tail is {tail!r} with kind {kind!r}; allowed: with reverse_kl alone")
    check_integer("k", k)
    if not 1 <= k <= MAX_TOP_K:
        raise ValueError(f"k is {k}; allowed: 1 to {MAX_TOP_K}")
    if num_columns is not None and k > num_columns:
        raise ValueError(f"k is {k}, more than the {num_columns} columns of the vocabulary")


def check_enough_columns(k: int, num_offers_PR: Tensor) -> None:
    """Raises ValueError when all shards together have fewer than k columns; every rank does."""
    enough = (num_offers_PR.sum(0) >= k).all()
    message = f"k is {k}, more than the columns of the vocabulary over all ranks"
    if num_offers_PR.is_cuda:
        torch._assert_async(enough, message)
    elif not bool(enough):
        raise ValueError(message)
