"""Stands in for Triton: launching a kernel checks its arguments, is counted, and does nothing."""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from opcd_nemo.rehearsal.recorder import Recorder

_OF_THE_LAUNCH = ("num_warps", "num_stages", "num_ctas")


class _Kernel:
    recorder: Recorder

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function, self.__name__ = function, function.__name__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            for number, argument in enumerate(args):
                if isinstance(argument, torch.Tensor) and argument.device.type != "cuda":
                    raise RuntimeError(
                        f"kernel {self.__name__}: argument {number} is on {argument.device}"
                    )
            if not all(isinstance(size, int) and size > 0 for size in grid):
                raise RuntimeError(f"kernel {self.__name__}: the grid is {grid}")
            given = {key: word for key, word in kwargs.items() if key not in _OF_THE_LAUNCH}
            inspect.signature(self._function).bind(*args, **given)
            self.recorder.launch(f"triton.{self.__name__}")

        return launch


def install(recorder: Recorder) -> None:
    """Make `import triton` give the stand-in."""
    _Kernel.recorder = recorder
    triton: Any = types.ModuleType("triton")
    language: Any = types.ModuleType("triton.language")
    language.constexpr = lambda value=None: value
    triton.jit = lambda function=None, **_: _Kernel(function) if function else _Kernel
    triton.cdiv = lambda a, b: -(-a // b)
    triton.language, triton.__version__ = language, "3.7.1"
    triton.__spec__ = importlib.machinery.ModuleSpec("triton", loader=None)
    sys.modules |= {"triton": triton, "triton.language": language}
