"""Text to token ids and back: a `tokenizers` pipeline, a SentencePiece model, a GGUF vocabulary.

Special tokens in a text are parsed, and none is added.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.storage.plain_file import read_bounded

Added: TypeAlias = Mapping[int, AddedToken]
"""Tokens by id that other files than the vocabulary's add to it."""

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class Vocabulary(Protocol):
    """What a chat tokenizer needs of a vocabulary."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of token ids."""

    def token_ids(self) -> dict[str, int]:
        """Every token, special ones included."""

    def added_ids(self) -> frozenset[int]:
        """The tokens that a text is split at: tokens that are no text, and some that are text."""

    def special_tokens(self) -> frozenset[str]:
        """The tokens that stand for no text."""


class FastVocabulary:
    """A Hugging Face `tokenizers` pipeline."""

    def __init__(self, tokenizer: Tokenizer, path: Path) -> None:
        """Switch off what would change or lengthen a prompt silently; `path` is for errors."""
        self._tokenizer, self._path = tokenizer, path
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        with _refusals(self._path, "cannot tokenize a text"):
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of token ids."""
        with _refusals(self._path, "cannot decode"):
            return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token_ids(self) -> dict[str, int]:
        """Every token, special ones included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def added_ids(self) -> frozenset[int]:
        """The tokens that a text is split at."""
        return frozenset(self._tokenizer.get_added_tokens_decoder())

    def special_tokens(self) -> frozenset[str]:
        """The tokens that stand for no text."""
        added = self._tokenizer.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`."""
        self._tokenizer.save(str(path))


def fast_vocabulary(path: Path, added: Added, named: Sequence[AddedToken]) -> FastVocabulary:
    """A `tokenizer.json`, with the tokens that only other files know.

    `added` have ids; `named` are special tokens, whose ids are the vocabulary's or those after it.

    Raises:
        UserError: the vocabulary cannot be read, or has another id for one of the tokens.
    """
    raw = read_bounded(path, limits.TOKENIZER_BYTES)
    items = sum(map(raw.count, (b"[", b"{", b",")))
    with _refusals(path, "cannot be read"):
        if items > limits.TOKENIZER_ITEMS or raw.count(b'"content"') > limits.ADDED_TOKENS:
            raise ValueError(f"too large: {items} items")
        tokenizer = Tokenizer.from_buffer(raw)
        for part in (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder):
            _check_steps(part)
    known = tokenizer.get_added_tokens_decoder()
    tokenizer.add_tokens(
        [token for index, token in sorted(added.items()) if not _is_same(known.get(index), token)]
    )
    split_at = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for token in named if token.content not in split_at])
    for index, token in added.items():
        if (found := tokenizer.token_to_id(token.content)) != index:
            raise UserError(
                path,
                allowed=f"{index}, as in the files beside it",
                problem=f"token {token.content!r} has id {found}",
            )
    return FastVocabulary(tokenizer, path)


def _check_steps(part: Any) -> None:
    """Refuse what makes a text ever longer, or looks at it ever again.

    Raises:
        ValueError: more steps, or more growth, than a model has a use for.
    """
    steps = [] if part is None else list(_steps(json.loads(part.__getstate__())))
    if len(steps) > limits.TOKENIZER_STEPS:
        raise ValueError(f"{len(steps)} steps, more than {limits.TOKENIZER_STEPS}")
    growth = prod(1 + len(step.get("content", "")) for step in steps if step["type"] == "Replace")
    growth *= 2 ** sum(step["type"] == "ByteLevel" for step in steps)
    if growth > limits.TOKENIZER_GROWTH or any(step["type"] == "Precompiled" for step in steps):
        raise ValueError("its normalizer or decoder makes texts many times as long")


def _steps(node: Any) -> Iterator[dict[str, Any]]:
    """Every mapping with a type in a part of a tokenizer."""
    for value in node.values() if isinstance(node, dict) else node:
        if isinstance(value, dict | list):
            yield from _steps(value)
    if isinstance(node, dict) and "type" in node:
        yield node


@contextmanager
def _refusals(path: Path, problem: str) -> Iterator[None]:
    """Say in one line what tokenizers refuses; it raises nothing narrower, and panics."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise  # an interrupt
        raise UserError(
            path, allowed="a tokenizers file", problem=f"{problem} ({error!s:.300})"
        ) from error


def _is_same(found: AddedToken | None, token: AddedToken) -> bool:
    return found is not None and repr(found) == repr(token)


class SentencePieceVocabulary:
    """A SentencePiece model; texts are split at special tokens, which it cannot parse."""

    def __init__(
        self, path: Path, added: Added, named: Sequence[AddedToken], *, prefix_every_part: bool
    ) -> None:
        """Load the model.

        Args:
            path: `tokenizer.model`.
            added: Tokens by id, besides the control tokens of the model.
            named: Special tokens, whose ids are the model's, the added ones', or those after both.
            prefix_every_part: Put the model's leading space before every part between special
                tokens (transformers' `legacy`), not before the text alone.

        Raises:
            UserError: Not a SentencePiece model.
        """
        raw = read_bounded(path, limits.SENTENCEPIECE_BYTES)
        try:
            self._model = SentencePieceProcessor(model_proto=raw)
        except (OSError, RuntimeError) as error:
            raise UserError(
                path, allowed="one of those", problem="not a SentencePiece model"
            ) from error
        self._later_parts = self._model
        if not prefix_every_part:
            proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
            proto.ParseFromString(self._model.serialized_model_proto())
            proto.normalizer_spec.add_dummy_prefix = False
            self._later_parts = SentencePieceProcessor(model_proto=proto.SerializeToString())
        pieces = range(self._model.get_piece_size())
        self._ids = {self._model.id_to_piece(index): index for index in pieces}
        self._split_at = {
            self._model.id_to_piece(index): index
            for index in pieces
            if self._model.is_control(index) or self._model.is_unknown(index)
        }
        self._hidden = set(self._split_at.values())  # where special tokens are to be skipped
        for index, token in added.items():
            if self._ids.get(token.content, index) != index:
                raise UserError(
                    path,
                    allowed=f"{index}, as in the files beside it",
                    problem=f"token {token.content!r} has id {self._ids[token.content]}",
                )
            self._split_at[token.content] = index
            self._hidden |= {index} if token.special else set()
        self._ids |= self._split_at
        for token in named:
            if token.content not in self._split_at:
                index = self._ids.setdefault(token.content, max(self._ids.values()) + 1)
                self._split_at[token.content] = index
                self._hidden.add(index)
        self._token_of = {index: token for token, index in self._split_at.items()}
        flags = {token.content: token for token in (*named, *added.values())}
        longest_first = sorted(self._split_at, key=len, reverse=True)
        self._parts = re.compile(
            f"({'|'.join(_pattern(token, flags.get(token)) for token in longest_first)})"
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = []
        for index, part in enumerate(self._parts.split(text)):
            if index % 2:  # blanks around it belong to the token, if it says so
                known = self._split_at.get(part)
                ids.append(self._split_at[part.strip()] if known is None else known)
            elif part:
                model = self._later_parts if index else self._model
                ids.extend(model.encode(part))
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of token ids; ids past the vocabulary, which a padded head has, are nothing."""
        text = ""
        for token, run in groupby(ids, self._token_of.get):
            if token is None:
                text += str(self._model.decode([i for i in run if i < len(self._model)]))
            elif not (skip_special and self._split_at[token] in self._hidden):
                text += token * len(list(run))
        return text

    def added_ids(self) -> frozenset[int]:
        """The tokens that a text is split at."""
        return frozenset(self._token_of)

    def special_tokens(self) -> frozenset[str]:
        """The tokens that stand for no text."""
        return frozenset(self._token_of[index] for index in self._hidden)

    def token_ids(self) -> dict[str, int]:
        """Every token, special ones included."""
        return dict(self._ids)


def _pattern(token: str, flags: AddedToken | None) -> str:
    """Where a token is in a text, with the blanks beside it that it takes."""
    left = r"\s*" if flags and flags.lstrip else ""
    right = r"\s*" if flags and flags.rstrip else ""
    return f"{left}{re.escape(token)}{right}"


def gguf_vocabulary(file: GgufFile) -> FastVocabulary:
    """Byte-level BPE from the metadata of a GGUF file, as the model's own `tokenizer.json` has it.

    Raises:
        UserError: Another kind of tokenizer.
    """
    metadata = file.metadata
    model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words: dict[Any, list[pre_tokenizers.PreTokenizer]] = {
        "smollm": [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"), byte_level],
        "llama-bpe": [pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"), byte_level],
    }
    if model != "gpt2" or not isinstance(pre, str) or pre not in words:
        allowed = ", ".join(f"gpt2 and {known}" for known in words)
        raise UserError(
            file.path,
            allowed=f"{allowed}, or a folder with a tokenizer.json",
            problem=f"tokenizer.ggml.model and .pre are {model!r} and {pre!r}",
        )
    tokens, merges, types = (
        _gguf_list(file, key, kind)
        for key, kind in (("tokens", str), ("merges", str), ("token_type", int))
    )
    if len(tokens) != len(types):
        raise UserError(
            file.path,
            allowed="a type for each token",
            problem=f"tokenizer.ggml.token_type has {len(types)} items for {len(tokens)} tokens",
        )
    with _refusals(file.path, "tokenizer.ggml.merges cannot be read"):
        tokenizer = Tokenizer(
            models.BPE(
                vocab={token: index for index, token in enumerate(tokens)},
                merges=[tuple(merge.split(" ")) for merge in merges],
                ignore_merges=pre == "llama-bpe",
            )
        )
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words[pre])
    tokenizer.decoder = decoders.ByteLevel()
    added = [
        AddedToken(token, normalized=False, special=token_type == _CONTROL)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (_CONTROL, _USER_DEFINED)
    ]
    if len(added) > limits.ADDED_TOKENS:
        raise UserError(file.path, allowed=f"at most {limits.ADDED_TOKENS} added tokens")
    tokenizer.add_tokens(added)
    return FastVocabulary(tokenizer, file.path)


def _gguf_list(file: GgufFile, key: str, kind: type) -> list[Any]:
    values = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, list) or not all(type(value) is kind for value in values):
        raise UserError(file.path, allowed="a whole vocabulary", problem=f"no tokenizer.ggml.{key}")
    return values
