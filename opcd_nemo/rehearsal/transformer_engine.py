"""Stands in for the compiled half of Transformer Engine: its Python runs, its kernels do nothing.

The wheel `transformer_engine` is Python alone. `transformer_engine_torch`, which it calls, is
replaced by functions that check devices, types and shapes and return tensors of the right shape:
those that the linears, the norms and FusedAdam need in bf16. FP8 is C++ and is not covered.
"""

from __future__ import annotations

import enum
import importlib.machinery
import os
import sys
import types
from typing import Any

import torch

from opcd_nemo.rehearsal.recorder import Recorder

_DTYPES = {
    "kByte": torch.uint8, "kInt16": torch.int16, "kInt32": torch.int32, "kInt64": torch.int64,
    "kFloat32": torch.float32, "kFloat16": torch.float16, "kBFloat16": torch.bfloat16,
}  # fmt: skip
_FP8_DTYPES = ("kFloat8E4M3", "kFloat8E5M2", "kFloat8E8M0", "kFloat4E2M1")
_FORWARD = [f"GEMM{n}_{kind}" for n in (1, 2, 3) for kind in ("INPUT", "WEIGHT", "OUTPUT")]
_BACKWARD = [f"{kind}{n}" for n in (1, 2, 3) for kind in ("GRAD_OUTPUT", "GRAD_INPUT")]


def install(recorder: Recorder) -> None:
    """Make `import transformer_engine.pytorch` work; the wheel's folder is on the path."""
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # leaves CUDA's libraries alone
    os.environ["NVTE_RELEASE_BUILD"] = "0"
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    import transformer_engine.common as common

    common.load_framework_extension = lambda *_: None
    sys.modules["transformer_engine_torch"] = _extension(recorder)
    name = "transformer_engine.pytorch.onnx_extensions"  # exports, which nothing here does
    sys.modules[name] = _module(name, lambda _: lambda *_, **__: None)
    import transformer_engine.pytorch  # noqa: F401


def _module(name: str, missing: Any) -> Any:
    """A module whose other names are what `missing` makes of them."""
    module: Any = types.ModuleType(name)

    def get(attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        return missing(attribute)

    module.__getattr__, module.__file__ = get, __file__
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    return module


def _extension(recorder: Recorder) -> Any:
    extension = _module("transformer_engine_torch", _absent)
    extension.DType = enum.IntEnum("DType", [*_DTYPES, *_FP8_DTYPES], start=0)  # type: ignore[misc]
    extension.FP8FwdTensors = enum.IntEnum("FP8FwdTensors", _FORWARD, start=0)  # type: ignore[misc]
    extension.FP8BwdTensors = enum.IntEnum("FP8BwdTensors", _BACKWARD, start=0)  # type: ignore[misc]
    extension.get_num_cublas_streams = lambda: 4
    extension.get_cublasLt_version = lambda: 130200
    extension.get_cudnn_version = lambda: 92000
    kernels = _Kernels(recorder)
    for name in ("generic_gemm", "rmsnorm_fwd", "rmsnorm_bwd", "rmsnorm_bwd_add"):
        setattr(extension, name, getattr(kernels, name))
    for name in ("l2norm", "scale", "adam"):
        setattr(extension, f"multi_tensor_{name}", getattr(kernels, f"multi_tensor_{name}"))
    for kind in ("param_remainder", "fp8", "capturable", "capturable_master"):
        setattr(extension, f"multi_tensor_adam_{kind}", kernels.multi_tensor_adam)
    for name in ("layernorm_fwd", "layernorm_bwd"):  # taken by `import *`
        setattr(extension, name, _absent(name))
    return extension


class _Attributes(type):
    """A class whose members are their own names: an enumeration that nothing here reads."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"{cls.__name__}.{name}"


def _absent(name: str) -> Any:
    """A function or a class of the extension that nothing of the project may use."""

    def call(*_: object, **__: object) -> None:
        raise NotImplementedError(f"transformer_engine_torch.{name} has no stand-in")

    members = {"__init__": lambda *_, **__: None, "__call__": call, "__members__": {}}
    return _Attributes(name, (), members)


def _as_dtype(word: Any, default: torch.dtype) -> torch.dtype:
    if word is None or isinstance(word, torch.dtype):
        return word or default
    return _DTYPES[word.name]


class _Kernels:
    """The launches, under the names and with the arguments of the extension's functions."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    def _launch(self, name: str, *tensors: Any) -> None:
        for number, tensor in enumerate(tensors):
            if isinstance(tensor, torch.Tensor) and tensor.device.type != "cuda":
                raise RuntimeError(f"{name}: argument {number} is on {tensor.device}")
        self._recorder.launch(f"te.{name}")

    def generic_gemm(
        self, a: Any, transpose_a: Any, b: Any, transpose_b: Any, out: Any, quantizer: Any,
        out_dtype: Any, bias: Any, bias_type: Any, gelu: Any, gelu_in: Any, grad: Any, *_: Any,
        **__: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        """A product of two matrices, in cuBLAS's order: columns first."""
        self._launch("generic_gemm", a, b, out, bias)
        if quantizer is not None:
            raise NotImplementedError("an FP8 product has no stand-in")
        rows_a, rows_b = a.numel() // a.shape[-1], b.numel() // b.shape[-1]
        m, inner_a = (rows_a, a.shape[-1]) if transpose_a else (a.shape[-1], rows_a)
        n, inner_b = (b.shape[-1], rows_b) if transpose_b else (rows_b, b.shape[-1])
        if inner_a != inner_b or a.dtype != b.dtype:
            shapes = f"{tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
            raise RuntimeError(f"generic_gemm: a product of {shapes}")
        if out is None:
            shape = (n, m) if transpose_b else (*b.shape[:-1], m)
            out = torch.empty(shape, dtype=_as_dtype(out_dtype, a.dtype), device=a.device)
        elif out.numel() != n * m:
            raise RuntimeError(f"generic_gemm: the output is {tuple(out.shape)}, not [{n}, {m}]")
        bias_grad = None
        if grad and bias is not None:
            bias_grad = torch.empty(n if transpose_b else m, dtype=a.dtype, device=a.device)
        return out, bias_grad, None, None

    def rmsnorm_fwd(
        self, x: Any, weight: Any, eps: Any, out: Any, quantizer: Any, dtype: Any, *_: Any
    ) -> tuple[Any, ...]:
        """Forward, and the row constants in fp32."""
        self._launch("rmsnorm_fwd", x, weight)
        rows = x.numel() // x.shape[-1]
        if out is None:
            out = torch.empty(x.shape, dtype=_as_dtype(dtype, x.dtype), device=x.device)
        return out, None, torch.empty(rows, dtype=torch.float32, device=x.device)

    def rmsnorm_bwd(
        self, upstream: Any, x: Any, constants: Any, weight: Any, *_: Any
    ) -> tuple[Any, ...]:
        """Gradients of input and weight."""
        self._launch("rmsnorm_bwd", upstream, x, constants, weight)
        return torch.empty_like(x), torch.empty_like(weight)

    def rmsnorm_bwd_add(self, upstream: Any, x: Any, add: Any, *rest: Any) -> tuple[Any, ...]:
        """The same, with another gradient added to the input's."""
        return self.rmsnorm_bwd(upstream, x, *rest)

    def multi_tensor_l2norm(
        self, _: Any, flag: Any, lists: Any, *__: Any, **___: Any
    ) -> tuple[Any, ...]:
        """Norms of a list of tensors, together and each."""
        self._launch("multi_tensor_l2norm", flag, *lists[0])
        if len({tensor.dtype for tensor in lists[0]}) > 1:
            raise RuntimeError("multi_tensor_l2norm: tensors of several types")
        norm = torch.empty(1, dtype=torch.float32, device=flag.device)
        return norm, torch.empty(len(lists[0]), dtype=torch.float32, device=flag.device)

    def multi_tensor_scale(self, _: Any, flag: Any, lists: Any, *__: Any) -> None:
        """A list of tensors times a number."""
        self._launch("multi_tensor_scale", flag, *lists[0], *lists[1])

    def multi_tensor_adam(self, _: Any, flag: Any, lists: Any, *__: Any) -> None:
        """An update of gradients, parameters and moments, list by list."""
        self._launch("multi_tensor_adam", flag, *(each for part in lists for each in part))
        for group in zip(*lists, strict=True):
            if len({tensor.numel() for tensor in group}) > 1:
                raise RuntimeError(f"multi_tensor_adam: {[tuple(each.shape) for each in group]}")
