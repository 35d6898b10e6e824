"""Digests of what a run reads: a continued run must read the same models and data."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from opcd_nemo.config.train import TrainConfig
from opcd_nemo.formats.locate import model_kind, resolve_model_path
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.storage.digests import file_digest
from opcd_nemo.storage.durable import files_in
from opcd_nemo.storage.hub import local_file

# of a Hugging Face folder: a card and a licence may change, and so may files of other programs
_READ = (".safetensors", ".json", ".jinja", ".model")
_MERGES = "merges.txt"


def input_digests(
    config: TrainConfig, tokenizer: ChatTokenizer | None = None
) -> dict[str, dict[str, str]]:
    """By configuration key, the digest of every file that the key names.

    Paths do not count: a model that was copied elsewhere is the same model.
    """
    student = model_digests(config.student.path)
    if tokenizer is not None:  # a training checkpoint has the tokenizer of its first model
        student["the tokenizer"] = tokenizer_digest(tokenizer)
    digests = {"student.path": student}
    if config.teacher.path is not None:
        digests["teacher.path"] = model_digests(config.teacher.path)
    for name in ("task", "retention"):
        for key, file in _files(name, getattr(config, name)):
            digests[key] = {"": file_digest(file)}
    return digests


def model_digests(path: str) -> dict[str, str]:
    """The digests of a model's files, by their names in its folder."""
    found = resolve_model_path(path)
    if found.is_file():
        return {"": file_digest(found)}
    names = files_in(found)
    if model_kind(found) == "hf":
        names = [name for name in names if "/" not in name and _is_read(name)]
    return {name: file_digest(found / name) for name in names}


def model_digest(path: str) -> str:
    """The digest of all of a model's files together."""
    return (
        f"sha256 {hashlib.sha256(repr(sorted(model_digests(path).items())).encode()).hexdigest()}"
    )


def tokenizer_digest(tokenizer: ChatTokenizer) -> str:
    """SHA-256 of a vocabulary, what ends a response, and the chat template."""
    parts = (tokenizer.fingerprint, tokenizer.eos_ids, tokenizer.chat_template_source)
    return f"sha256 {hashlib.sha256(repr(parts).encode()).hexdigest()}"


def _is_read(name: str) -> bool:
    return name == _MERGES or Path(name).suffix in _READ


def _files(key: str, node: Any) -> Iterator[tuple[str, Path]]:
    """The files that a plug's arguments name, each with its key."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            yield from _files(f"{key}.{name}", value)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _files(f"{key}.{index}", value)
    elif isinstance(node, str) and (file := _named(node)) is not None:
        yield key, file


def _named(text: str) -> Path | None:
    """The file that a text names; most texts name none.

    A word without a folder and an ending, as `answer` of a column, is none, whatever lies here.
    """
    if "/" not in text and not Path(text).suffix:
        return None
    try:
        file = local_file(text)
        return file if file.is_file() else None
    except (OSError, ValueError):  # too long for a name, or with characters that no name has
        return None
