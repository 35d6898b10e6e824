"""Plugs: a mapping with a `_target_` and its arguments, checked at set-up and built later."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin

from opcd_nemo.config.renamed import present_name
from opcd_nemo.config.schema import TYPE_WORDS

RUNTIME_ARGUMENTS = frozenset({"model", "eos_ids"})  # given by the program, not by YAML


def check_plug(key: str, plug: Any) -> None:
    """Check that a plug's `_target_` exists and takes exactly the given arguments.

    Raises:
        ValueError: naming the key, the value and what is allowed.
    """
    if not isinstance(plug, dict) or "_target_" not in plug:
        raise ValueError(f"{key}={plug}: allowed: a mapping with a _target_")
    target = plug["_target_"]
    factory = _resolve(key, target)
    arguments = {name: value for name, value in plug.items() if name != "_target_"}
    parameters = inspect.signature(factory, eval_str=True).parameters
    allowed = ", ".join(name for name in parameters if name not in RUNTIME_ARGUMENTS)
    for name, value in arguments.items():
        if name not in parameters:
            raise ValueError(
                f"{key}.{name}={value}: no such argument of {target}; allowed: {allowed}"
            )
        _check_argument(f"{key}.{name}", value, parameters[name].annotation)
    for name, parameter in parameters.items():
        given = name in arguments or name in RUNTIME_ARGUMENTS
        if parameter.default is inspect.Parameter.empty and not given:
            raise ValueError(f"{key}.{name}: no value is given to {target}; allowed: {allowed}")


def _check_argument(key: str, value: Any, annotation: Any) -> None:
    """Check an argument of a simple type; a class checks the others itself."""
    if get_origin(annotation) is Literal:
        if value not in get_args(annotation):
            raise ValueError(f"{key}={value}: allowed: {', '.join(get_args(annotation))}")
    elif annotation in (bool, int, float, str):
        whole = annotation is float and type(value) is int
        if type(value) is not annotation and not whole:
            raise ValueError(f"{key}={value}: allowed: {TYPE_WORDS[annotation]}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{key}={value}: allowed: a finite number")


def _resolve(key: str, target: Any) -> Callable[..., Any]:
    module, _, name = present_name(str(target)).rpartition(".")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key}._target_={target}: allowed: an importable class ({error})"
        ) from error
    return factory


def build_plug(plug: dict[str, Any], **runtime: Any) -> Any:
    """Instantiate a checked plug; `runtime` are the arguments that the program gives."""
    arguments = {name: value for name, value in plug.items() if name != "_target_"}
    return _resolve("plug", plug["_target_"])(**arguments, **runtime)
