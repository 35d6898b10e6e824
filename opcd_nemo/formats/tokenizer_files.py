"""The parts of a tokenizer, whichever files hold them: a rule for each fact.

| fact | of a folder | of a GGUF file |
|---|---|---|
| vocabulary | tokenizer.json, else tokenizer.model | tokenizer.ggml.* |
| added tokens | added_tokens_decoder of tokenizer_config.json; without it added_tokens.json; and every special token that is named | token_type |
| special tokens | tokenizer_config.json; special_tokens_map.json wins over one without added_tokens_decoder | *_token_id |
| chat template | chat_template.jinja, else tokenizer_config.json, else chat_template.json | tokenizer.chat_template |
| ends | eos_token, and generation_config.json; config.json where that has none | eos, eot and eom |
| rows | vocab_size of config.json | rows of token_embd.weight |

As transformers 5 has it. What the template closes a turn with is an end besides (`tokenizer.py`).
"""  # noqa: E501 - a table

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.formats.huggingface import stored_ends
from opcd_nemo.formats.locate import optional_settings, read_text
from opcd_nemo.formats.vocabulary import (
    Added,
    SentencePieceVocabulary,
    Vocabulary,
    fast_vocabulary,
    gguf_vocabulary,
)
from opcd_nemo.storage.plain_file import is_there

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_MODEL_CONFIG = "config.json"
_NAMED = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerParts:
    """A vocabulary, and what the other files say of it.

    `eos_ids`: what ends a response, the tokenizer's first. `num_rows`: of the model's embedding,
    None where no model is beside the tokenizer. `where`: for errors.
    """

    vocabulary: Vocabulary
    chat_template: str
    special_tokens: Mapping[str, str]
    eos_ids: tuple[int, ...]
    num_rows: int | None
    where: str


def read_gguf(path: Path) -> TokenizerParts:
    """The tokenizer in a GGUF file.

    Raises:
        UserError: the tokenizer is missing, of no chat model, or of a kind that is not supported.
    """
    file = GgufFile(path)
    template = file.metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise UserError(
            path, allowed="a file of a chat model", problem="no tokenizer.chat_template"
        )
    vocabulary = gguf_vocabulary(file)
    eos, *others = (_gguf_token_id(file, kind) for kind in ("eos", "eot", "eom"))
    return TokenizerParts(
        vocabulary=vocabulary,
        chat_template=template,
        special_tokens=gguf_special_tokens(file),
        eos_ids=_ends(eos, (index for index in others if index is not None)),
        num_rows=file.num_rows,
        where=str(path),
    )


def gguf_special_tokens(file: GgufFile) -> dict[str, str]:
    """The special tokens of a GGUF file under the names of transformers."""
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _gguf_token_id(file, key) for name, key in names.items()}
    tokens = file.metadata["tokenizer.ggml.tokens"]
    return {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}


def _gguf_token_id(file: GgufFile, kind: str) -> int | None:
    key, count = f"tokenizer.ggml.{kind}_token_id", len(file.metadata["tokenizer.ggml.tokens"])
    value: Any = file.metadata.get(key)
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise UserError(key, value, f"an id from 0 to {count - 1}", where=str(file.path))
    return value


def read_folder(folder: Path) -> TokenizerParts:
    """The tokenizer in a Hugging Face folder.

    Raises:
        UserError: the tokenizer or chat template is missing, or a file is malformed.
    """
    settings = optional_settings(folder / _CONFIG)
    if "added_tokens_decoder" in settings:
        added = _decoder_tokens(settings["added_tokens_decoder"], folder / _CONFIG)
    else:
        settings |= optional_settings(folder / _MAP)
        added = _legacy_tokens(folder / _ADDED, settings)
    special = _special_tokens(settings, folder)
    if settings.get("split_special_tokens"):
        raise UserError("split_special_tokens", True, "false", where=str(folder / _CONFIG))
    named = [_named_token(value, key, folder) for key, value in _named(settings)]
    if len(added) + len(named) > limits.ADDED_TOKENS:
        raise UserError(folder, allowed=f"at most {limits.ADDED_TOKENS} added tokens")
    contents = {token.content for token in named}
    for token in added.values():
        token.special = token.special or token.content in contents
    vocabulary = _folder_vocabulary(folder, bool(settings.get("legacy")), added, named)
    eos = vocabulary.token_ids().get(special.get("eos_token", ""))
    rows = optional_settings(folder / _MODEL_CONFIG).get("vocab_size")
    return TokenizerParts(
        vocabulary=vocabulary,
        chat_template=_folder_template(folder, settings),
        special_tokens=special,
        eos_ids=_ends(eos, stored_ends(lambda name: optional_settings(folder / name), str(folder))),
        num_rows=rows if type(rows) is int else None,
        where=str(folder),
    )


def _special_tokens(settings: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """What chat templates see, under names such as `bos_token`; add_bos_token is no token."""
    return {
        key: _content(value, key, folder)
        for key, value in settings.items()
        if key.endswith("_token") and (isinstance(value, str | dict) or (key in _NAMED and value))
    }


def _named(settings: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every special token that the settings name, in the order in which transformers adds them."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    more = [("extra_special_tokens", token) for token in extra if isinstance(extra, list)]
    if isinstance(extra, dict):
        more = list(extra.items())
    known = [*_NAMED, *(key for key in settings if key.endswith("_token") and key not in _NAMED)]
    values = [(key, settings.get(key)) for key in known] + more
    return [(key, value) for key, value in values if isinstance(value, str | dict) and value]


def _named_token(value: Any, key: str, folder: Path) -> AddedToken:
    flags = {flag: value[flag] for flag in _FLAGS if flag in value} if type(value) is dict else {}
    return _added_token(_content(value, key, folder), {**flags, "special": True}, folder)


def _ends(eos: int | None, others: Iterable[int]) -> tuple[int, ...]:
    return tuple(dict.fromkeys([*([] if eos is None else [eos]), *sorted(others)]))


def _decoder_tokens(raw: Any, file: Path) -> Added:
    """`added_tokens_decoder`: id -> token with its flags."""
    if not isinstance(raw, dict):
        raise UserError("added_tokens_decoder", raw, "id -> token", where=str(file))
    added: dict[int, AddedToken] = {}
    for index, token in raw.items():
        if not index.isdecimal() or not isinstance(token, dict):
            raise UserError(
                f"added_tokens_decoder.{index}", token, "a token of a whole number", where=str(file)
            )
        flags = {flag: token[flag] for flag in _FLAGS if flag in token}
        added[int(index)] = _added_token(_content(token, index, file), flags, file)
    return added


def _legacy_tokens(file: Path, settings: Mapping[str, Any]) -> Added:
    """`added_tokens.json`: token -> id; tokens that the settings name are special."""
    special = {_content(value, key, file.parent) for key, value in _named(settings)}
    added: dict[int, AddedToken] = {}
    for content, index in optional_settings(file).items():
        if type(index) is not int or index in added:
            raise UserError(content, index, "an id of its own for each token", where=str(file))
        flags = {"normalized": content not in special, "special": content in special}
        added[index] = _added_token(content, flags, file)
    return added


def _added_token(content: str, flags: Mapping[str, Any], file: Path) -> AddedToken:
    try:
        return AddedToken(content, **flags)
    except (TypeError, ValueError) as error:
        raise UserError(
            content, allowed="a token and true or false for its flags", where=str(file)
        ) from error


def _content(token: Any, key: str, where: Path) -> str:
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str):
        raise UserError(key, token, "a text, or a token with its content", where=str(where))
    return content


def _folder_vocabulary(
    folder: Path, legacy: bool, added: Added, named: Sequence[AddedToken]
) -> Vocabulary:
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if is_there(fast):
        return fast_vocabulary(fast, added, named)
    if is_there(pieces):
        return SentencePieceVocabulary(pieces, added, named, prefix_every_part=legacy)
    raise UserError(folder, allowed="tokenizer.json or tokenizer.model", problem="no tokenizer")


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if is_there(file):
        return read_text(file, limits.TEMPLATE_BYTES)
    found = settings.get("chat_template")
    if found is None:
        found = optional_settings(folder / "chat_template.json").get("chat_template")
    if isinstance(found, list):
        pairs = [entry for entry in found if isinstance(entry, dict)]
        found = {str(entry.get("name")): entry.get("template") for entry in pairs}
    if isinstance(found, dict):
        if not isinstance(found.get("default"), str):
            raise UserError(
                folder,
                allowed="a chat template with the name default",
                problem=f"its chat templates are {', '.join(map(str, found)) or 'none'}",
            )
        found = found["default"]
    if not isinstance(found, str):
        raise UserError(
            folder,
            allowed="chat_template.jinja, or chat_template in tokenizer_config.json",
            problem="no chat template",
        )
    return found
