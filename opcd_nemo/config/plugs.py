"""Plugs: a mapping with a `_target_` and its arguments, checked at set-up and built later."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, get_args, get_origin

from opcd_nemo.config.doc import Doc, allowed_words, check_texts, check_value
from opcd_nemo.config.renamed import present_name
from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.errors import ABSENT, UserError

RUNTIME_ARGUMENTS = frozenset({"model", "eos_ids"})  # given by the program, not by YAML


def check_plug(key: str, plug: Any) -> None:
    """Check that a plug's `_target_` exists and takes exactly the given arguments.

    The target is inspected, not called.

    Raises:
        UserError: the target cannot be used, or an argument is misspelt, missing or wrong.
    """
    if not isinstance(plug, dict) or "_target_" not in plug:
        raise UserError(key, plug, "a mapping with a _target_")
    factory = _factory(key, plug["_target_"])
    parameters = _parameters(factory)
    for name, value in plug.items():
        if name == "_target_":
            continue
        if name not in parameters:
            raise unknown_name(f"{key}.{name}", parameters, value=value, what="argument")
        check_texts(f"{key}.{name}", value)
        _check_argument(f"{key}.{name}", value, parameters[name].annotation)
    for name, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and name not in plug:
            raise missing_argument(key, plug, name)


def missing_argument(key: str, plug: Mapping[str, Any], name: str) -> UserError:
    """The error for an argument of a plug that has no value: it says what the argument is."""
    factory = _factory(key, plug["_target_"])
    kind, described = _split(_parameters(factory)[name].annotation)
    words = described.words if described is not None else _docstring_words(factory, name)
    allowed = allowed_words(kind, described)
    if described is not None and described.example is not None:
        allowed += f", e.g. {key}.{name}={described.example}"
    problem = f"no value is given{'' if words is None else f': {words}'}"
    return UserError(f"{key}.{name}", ABSENT, allowed, problem=problem)


def build_plug(plug: dict[str, Any], **runtime: Any) -> Any:
    """Instantiate a checked plug; `runtime` are the arguments that the program gives."""
    arguments = {name: value for name, value in plug.items() if name != "_target_"}
    return _factory("plug", plug["_target_"])(**arguments, **runtime)


def plug_factory(key: str, plug: Mapping[str, Any]) -> Callable[..., Any]:
    """The class or function of a checked plug."""
    return _factory(key, plug["_target_"])


def makes(target: str, protocol: type) -> bool:
    """Whether a checked target is a class with a protocol's methods, or returns such a class."""
    factory = _factory("plug", target)
    made: Any = factory
    if not inspect.isclass(factory):
        made = inspect.get_annotations(factory, eval_str=True).get("return")
    methods = [name for name, value in vars(protocol).items() if inspect.isfunction(value)]
    public = [name for name in methods if not name.startswith("_")]
    return made is protocol or all(callable(getattr(made, name, None)) for name in public)


def _parameters(factory: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """The arguments that YAML gives, with the meaning of their annotations.

    Annotations of `RUNTIME_ARGUMENTS` may name classes that a check need not import.
    """
    parameters = inspect.signature(factory).parameters
    unread = {
        parameters[name].annotation: object for name in RUNTIME_ARGUMENTS if name in parameters
    }
    meant = inspect.signature(factory, eval_str=True, locals=unread).parameters
    return {name: each for name, each in meant.items() if name not in RUNTIME_ARGUMENTS}


def _split(annotation: Any) -> tuple[Any, Doc | None]:
    """The type of a parameter, and its description."""
    if get_origin(annotation) is not Annotated:
        return annotation, None
    kind, *notes = get_args(annotation)
    return kind, next((note for note in notes if isinstance(note, Doc)), None)


def _check_argument(key: str, value: Any, annotation: Any) -> None:
    """Check an argument of a simple type; a class checks the others itself."""
    kind, described = _split(annotation)
    if get_origin(kind) is Literal:
        good = value in get_args(kind)
    elif kind in (bool, int, float, str):
        good = type(value) is kind or (kind is float and type(value) is int)
    else:
        return
    if not good:
        raise UserError(key, value, allowed_words(kind, described))
    check_value(key, value, kind, described)


def _factory(key: str, target: Any) -> Callable[..., Any]:
    """The class or function that a configuration names, from whatever package it is of."""
    module, _, name = present_name(str(target)).rpartition(".")
    key = f"{key}._target_"
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(key, target, "an importable class", problem=str(error)) from error
    # a program of another kind (`os.system`) must not run because a file names it
    if not (inspect.isclass(factory) or inspect.isfunction(factory)) or not _is_annotated(factory):
        raise UserError(key, target, "a class or function of Python with annotated arguments")
    return factory


def _is_annotated(factory: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except ValueError:  # a class that is written in C
        return False
    return all(each.annotation is not inspect.Parameter.empty for each in parameters)


def _docstring_words(factory: Callable[..., Any], name: str) -> str | None:
    """What the `Args:` of a docstring says about an argument, up to its first full stop."""
    texts = (factory.__doc__, getattr(factory.__init__, "__doc__", None))
    for text in filter(None, texts):
        _, _, arguments = inspect.cleandoc(text).partition("Args:\n")
        found = re.search(rf"^ +{re.escape(name)}: (.+(?:\n {{8,}}.+)*)", arguments, re.MULTILINE)
        if found is not None:
            return " ".join(found[1].split()).removesuffix(".")
    return None
