"""Stands in for what fake tensors lack: values for the host, storages, a choice of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
)
from torch.nn.attention import bias
from torch.utils._python_dispatch import _disable_current_modes

from opcd_nemo.rehearsal.recorder import Recorder


class Answers:
    """What the host reads of a fake tensor: ones, and at last the end of a sequence."""

    def __init__(self) -> None:
        self._left, self._eos = -1, 1

    def end_after(self, reads: int, eos: int) -> None:
        """Let sampled tokens be ones so many times more, and `eos` from then on."""
        self._left, self._eos = reads, eos

    def sampled(self) -> int:
        """A token as it is read."""
        self._left -= 1
        return 1 if self._left >= 0 else self._eos


def install(recorder: Recorder, answers: Answers) -> None:
    """Put every stand-in of this module in place."""
    # `torch.tensor(.., device="cuda")` would ask for a real device
    FakeTensorMode.avoid_device_init = property(lambda _: True)  # type: ignore[assignment,method-assign]
    torch.compile = _uncompiled  # type: ignore[assignment]
    torch.nn.Module.to = _module_to  # type: ignore[method-assign,assignment]
    _answer_reads(recorder, answers)
    _follow_storages(recorder)
    _choose_attention()


def _uncompiled(function: Any = None, **_: object) -> Any:
    """Stands in for `torch.compile`, which has no compiler for a GPU here."""
    return function if function is not None else (lambda decorated: decorated)


def _answer_reads(recorder: Recorder, answers: Answers) -> None:
    """Note every read of a GPU's value as a host sync, and answer it."""
    conversions: dict[str, Any] = {
        "tolist": None,
        "item": lambda value: value,
        "__float__": float,
        "__int__": int,
        "__bool__": bool,
        "__index__": int,
    }
    for name, convert in conversions.items():
        setattr(FakeTensor, name, _reader(name, convert, recorder, answers))

    def nonzero(self: FakeTensor, *_: Any, **__: Any) -> Any:
        """Half of the entries: the length is a value too."""
        if self.device.type == "cuda":
            recorder.sync("nonzero")
        return torch.arange(self.numel() // 2, device=self.device)[:, None]

    FakeTensor.nonzero = nonzero  # type: ignore[assignment,method-assign]


def _reader(name: str, convert: Any, recorder: Recorder, answers: Answers) -> Any:
    """Stands in for a method of tensors that reads values; `convert` is None for nested lists."""
    real = getattr(FakeTensor, name)

    def call(self: FakeTensor, *args: Any, **kwargs: Any) -> Any:
        if self.device.type == "cuda":
            recorder.sync(name)
        else:
            try:
                return real(self, *args, **kwargs)
            except DataDependentOutputException:
                pass  # a fake tensor on the CPU
        if convert is None:
            return _filled(list(self.shape), _value(self, answers))
        return convert(_value(self, answers))

    return call


def _value(tensor: torch.Tensor, answers: Answers) -> bool | int | float:
    # the engine reads tokens and their log-probabilities together, in fp64
    is_sampled = tensor.dtype == torch.float64 and tensor.dim() == 2
    value = answers.sampled() if is_sampled else 1
    if tensor.dtype == torch.bool:
        return bool(value)
    return float(value) if tensor.dtype.is_floating_point else value


def _filled(shape: list[int], value: Any) -> Any:
    return [_filled(shape[1:], value) for _ in range(shape[0])] if shape else value


def _follow_storages(recorder: Recorder) -> None:
    storage: Any = torch.UntypedStorage
    real_resize = storage.resize_

    def resize(self: Any, size: int) -> Any:
        if self.device.type in ("meta", "cuda"):
            recorder.resized(self, size)
        return real_resize(self, size)

    storage.resize_ = resize


def _module_to(self: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Stands in for `Module.to`, which swaps a tensor's insides: a fake one's cannot be."""
    for module in self.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is None or old.device.type == device.type:
                    continue
                new = old.detach().to(device)
                if isinstance(old, torch.nn.Parameter):
                    new = torch.nn.Parameter(new, old.requires_grad)
                # Megatron's marks; what `new` has too is a fake tensor's knowledge of itself
                new.__dict__.update({k: v for k, v in vars(old).items() if k not in vars(new)})
                held[name] = new  # type: ignore[assignment]
    return self


def takes_flash(query: torch.Tensor) -> bool:
    """Whether torch takes its flash kernel for a query on sm_90.

    Source: `sdp_utils.cpp` of torch 2.13: half precision, heads of up to 256, no mask but a causal
    one. A new torch: read that file again.
    """
    return query.dtype in (torch.bfloat16, torch.float16) and query.shape[-1] <= 256


def _choose_attention() -> None:
    """Stands in for the choice of an attention kernel, for which C++ asks a device.

    | mask | kernel |
    |---|---|
    | none, or causal to the lower right, in half precision | flash |
    | a tensor | memory-efficient; its bias is padded to 16 keys |
    | none, in fp32 | the products of `math` |
    """
    real_lower_right, real = (
        bias.causal_lower_right,
        torch.nn.functional.scaled_dot_product_attention,
    )

    def lower_right(*sizes: int) -> Any:
        with _disable_current_modes():  # a subclass of Tensor, which a mode would make fake
            return real_lower_right(*sizes)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,  # torch's signature
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        if isinstance(attn_mask, bias.CausalBias):
            return bias.CausalBias._dispatch(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
            )
        aten: Any = torch.ops.aten
        if attn_mask is None and takes_flash(query):
            out: torch.Tensor = aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, return_debug_mask=False, scale=scale
            )[0]
            return out
        if attn_mask is None:
            return real(query, key, value, is_causal=is_causal, enable_gqa=enable_gqa)
        padded = _as_bias(attn_mask, query, key.shape[2])
        out = aten._scaled_dot_product_efficient_attention(
            query, key, value, padded, False, dropout_p, is_causal, scale=scale
        )[0]
        return out

    bias.causal_lower_right = lower_right
    bias.can_use_flash_attention = lambda words, *_: takes_flash(words.query)  # type: ignore[attr-defined]
    torch.nn.functional.scaled_dot_product_attention = attention


def _as_bias(mask: torch.Tensor, query: torch.Tensor, keys: int) -> torch.Tensor:
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
    mask = torch.nn.functional.pad(mask, (0, -keys % 16))
    return mask.expand(*query.shape[:3], mask.shape[-1])[..., :keys]
