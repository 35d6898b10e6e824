"""On-policy context distillation on NeMo and megatron-core.

Example:
    from opcd_nemo import distill, load_model
    run = distill("smollm2-135m-instruct", context="Answer in one short sentence.", questions=texts)
    print(run.table)
    load_model(run.student).chat("What is a violin?")
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opcd_nemo.api import ChatModel, FinishedRun, distill, load_model

__all__ = ["ChatModel", "FinishedRun", "distill", "load_model"]


def __getattr__(name: str) -> Any:
    """Import torch when a function of `opcd_nemo.api` is first used, not for `opcd --help`."""
    if name in __all__:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # megatron-core misses apex a dozen times
            return getattr(importlib.import_module("opcd_nemo.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
