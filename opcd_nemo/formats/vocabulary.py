"""Text to token ids and back: a `tokenizers` pipeline, a SentencePiece model, a GGUF vocabulary.

Special tokens in a text are parsed, and none is added.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from opcd_nemo.errors import UserError
from opcd_nemo.formats.gguf import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # GGUF token types

_QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3_WORDS = _QWEN2_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")


class Vocabulary(Protocol):
    """What a chat tokenizer needs of one."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of token ids."""

    def token_ids(self) -> dict[str, int]:
        """Every token, special ones included."""


class FastVocabulary:
    """A Hugging Face `tokenizers` pipeline."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Switch off what would change or lengthen a prompt silently."""
        self._tokenizer = tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of token ids."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=skip_special))

    def token_ids(self) -> dict[str, int]:
        """Every token, special ones included."""
        return dict(self._tokenizer.get_vocab(with_added_tokens=True))

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`."""
        self._tokenizer.save(str(path))


class SentencePieceVocabulary:
    """A SentencePiece model; texts are split at special tokens, which it cannot parse."""

    def __init__(self, path: Path, added: dict[int, str], *, prefix_every_part: bool) -> None:
        """Load the model.

        Args:
            path: `tokenizer.model`.
            added: Special tokens by id, besides the control tokens of the model.
            prefix_every_part: Put the model's leading space before every part between special
                tokens (transformers' `legacy`), not before the text alone.

        Raises:
            UserError: Not a SentencePiece model.
        """
        try:
            self._model = SentencePieceProcessor(model_file=str(path))
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
        self._special = {
            self._model.id_to_piece(index): index
            for index in pieces
            if self._model.is_control(index) or self._model.is_unknown(index)
        }
        self._special |= {token: index for index, token in added.items()}
        self._ids |= self._special
        self._token_of = {index: token for token, index in self._special.items()}
        longest_first = sorted(self._special, key=len, reverse=True)
        self._parts = re.compile(f"({'|'.join(map(re.escape, longest_first))})")

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ids: list[int] = []
        for index, part in enumerate(self._parts.split(text)):
            if part in self._special:
                ids.append(self._special[part])
            elif part:
                model = self._later_parts if index else self._model
                ids.extend(model.encode(part))
        return ids

    def decode(self, ids: Sequence[int], skip_special: bool) -> str:
        """Text of token ids; ids past the vocabulary, which a padded head has, are nothing."""
        text = ""
        for special, run in groupby(ids, self._token_of.get):
            if special is None:
                text += str(self._model.decode([i for i in run if i < len(self._model)]))
            elif not skip_special:
                text += special * len(list(run))
        return text

    def token_ids(self) -> dict[str, int]:
        """Every token, special ones included."""
        return dict(self._ids)


def gguf_vocabulary(file: GgufFile) -> FastVocabulary:
    """Byte-level BPE from the metadata of a GGUF file, as the model's own `tokenizer.json` has it.

    Raises:
        UserError: Another kind of tokenizer.
    """
    metadata = file.metadata
    kind = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words: dict[tuple[Any, Any], list[pre_tokenizers.PreTokenizer]] = {
        ("gpt2", "smollm"): [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ],
        ("gpt2", "qwen2"): [pre_tokenizers.Split(Regex(_QWEN2_WORDS), "isolated"), byte_level],
        ("gpt2", "llama-bpe"): [
            pre_tokenizers.Split(Regex(_LLAMA3_WORDS), "isolated"),
            byte_level,
        ],
    }
    if kind not in words:
        allowed = ", ".join(f"{model} and {pre}" for model, pre in words)
        raise UserError(
            file.path,
            allowed=f"{allowed}, or a folder with a tokenizer.json",
            problem=f"tokenizer.ggml.model and .pre are {kind[0]!r} and {kind[1]!r}",
        )
    for key in ("tokens", "merges", "token_type"):
        if f"tokenizer.ggml.{key}" not in metadata:
            raise UserError(
                file.path, allowed="a whole vocabulary", problem=f"no tokenizer.ggml.{key}"
            )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=merges,
            ignore_merges=kind[1] == "llama-bpe",
        )
    )
    if kind[1] == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words[kind])
    tokenizer.decoder = decoders.ByteLevel()
    types: Iterable[int] = metadata["tokenizer.ggml.token_type"]
    added = [
        AddedToken(token, normalized=False, special=token_type == _CONTROL)
        for token, token_type in zip(tokens, types, strict=True)
        if token_type in (_CONTROL, _USER_DEFINED)
    ]
    tokenizer.add_tokens(added)
    return FastVocabulary(tokenizer)
