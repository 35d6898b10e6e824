"""A tokenizer with a chat template, from a folder or a GGUF file.

Without transformers, which takes seconds to import and more to convert a GGUF vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer

from opcd_nemo.errors import UserError
from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.formats.locate import model_kind, read_json, resolve_model_path, write_json
from opcd_nemo.formats.nemo import base_path, open_package, unpack_hf
from opcd_nemo.formats.shape import end_tokens
from opcd_nemo.formats.vocabulary import (
    FastVocabulary,
    SentencePieceVocabulary,
    Vocabulary,
    gguf_vocabulary,
)
from opcd_nemo.types import Message

_TOKENIZER_FILES = (
    "added_tokens.json chat_template.jinja generation_config.json merges.txt "
    "special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json"
).split()
_GIVEN = {  # to every chat template
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception"),
    "strftime_now",
}
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


class ChatTokenizer:
    """Renders chats to token ids.

    Attributes:
        chat_template_source: The Jinja template.
        eos_ids: Tokens that end a response; the first is the tokenizer's own.
        vocab_size: Largest token id plus one; the model may have more rows.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        chat_template: str,
        special_tokens: Mapping[str, str],
        eos_ids: Iterable[int],
        where: str,
    ) -> None:
        """Compile the template.

        Args:
            vocabulary: Text to ids and back.
            chat_template: Jinja source.
            special_tokens: What the template sees, under names such as `bos_token`.
            eos_ids: Tokens that end a response besides the special token `eos_token`.
            where: Path for error messages.

        Raises:
            UserError: The template does not compile, or nothing ends a response.
        """
        self.chat_template_source = chat_template
        self._arguments: dict[str, Any] = {}
        self._vocabulary = vocabulary
        self._special_tokens = dict(special_tokens)
        self._where = where
        try:
            self._template = _template_environment().from_string(chat_template)
        except jinja2.TemplateError as error:
            raise UserError(
                where, allowed="Jinja", problem=f"chat template does not compile ({error.message})"
            ) from error
        token_ids = vocabulary.token_ids()
        self.vocab_size = max(token_ids.values()) + 1
        eos_token = self._special_tokens.get("eos_token")
        named = [token_ids[eos_token]] if eos_token in token_ids else []
        self.eos_ids = tuple(dict.fromkeys([*named, *sorted(eos_ids)]))
        if not self.eos_ids:
            raise UserError(where, allowed="a known token", problem=f"eos_token is {eos_token!r}")

    @classmethod
    def from_path(cls, path: str) -> ChatTokenizer:
        """Open the tokenizer of what `model_files.model_kind` knows, or of the bundled model.

        Raises:
            UserError: No tokenizer or no chat template there, or of a kind not supported.
        """
        found = resolve_model_path(base_path(path))
        kind = model_kind(found)
        if kind == "gguf":
            return _from_gguf(found)
        if kind == "nemo":
            with unpack_hf(open_package(found)) as folder:
                return _from_folder(Path(folder))
        return _from_folder(found)

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a chat; `add_generation_prompt` opens the assistant's turn.

        Raises:
            UserError: The template refuses the messages.
        """
        try:
            text = self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
                **self._arguments,
            )
        except Exception as error:  # a template can fail as any program
            raise UserError(
                self._where,
                allowed="a task and a context whose messages the model's chat template takes",
                problem=f"the chat template refuses {_roles(messages)}: {error}",
            ) from error
        return self.encode(text)

    def with_arguments(self, arguments: Mapping[str, Any]) -> ChatTokenizer:
        """The same tokenizer, whose template sees these variables besides.

        Raises:
            UserError: the template knows no such variable, or gets it from elsewhere.
        """
        tree = self._template.environment.parse(self.chat_template_source)
        known = find_undeclared_variables(tree) - _GIVEN - set(self._special_tokens)
        for name, value in arguments.items():
            if name not in known:
                raise UserError(
                    name,
                    value,
                    ", ".join(sorted(known)) or "none",
                    problem=f"no variable of the chat template of {self._where}",
                )
        same = copy.copy(self)
        same._arguments = dict(arguments)
        return same

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text; special tokens in it are parsed, none is added."""
        return tuple(self._vocabulary.encode(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return self._vocabulary.decode(ids, skip_special)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the map from id to token: equal for equal vocabularies."""
        tokens = sorted((index, token) for token, index in self._vocabulary.token_ids().items())
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def _roles(messages: Sequence[Message]) -> str:
    """Who speaks in a chat, for an error: `a chat of system, user`."""
    return f"a chat of {', '.join(message['role'] for message in messages)}"


def write_tokenizer(path: str, folder: Path) -> None:
    """Write the tokenizer of a model as transformers reads it, with its generation settings.

    Files of a Hugging Face folder are copied; a GGUF file's vocabulary becomes a `tokenizer.json`.

    Raises:
        UserError: as of `ChatTokenizer.from_path`.
    """
    found = resolve_model_path(base_path(path))
    kind = model_kind(found)
    if kind == "gguf":
        _write_gguf_tokenizer(found, folder)
    elif kind == "nemo":
        with unpack_hf(open_package(found)) as unpacked:
            _copy_tokenizer(Path(unpacked), folder)
    else:
        _copy_tokenizer(found, folder)
    generation = folder / "generation_config.json"
    ends = list(ChatTokenizer.from_path(path).eos_ids)
    write_json(generation, {**_optional_json(generation), "eos_token_id": ends})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_gguf_tokenizer(path: Path, folder: Path) -> None:
    file = GgufFile(path)
    gguf_vocabulary(file).save(folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_gguf_special_tokens(file),
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", settings)
    ids = {
        f"{name}_token_id": file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        for name, key in (("bos", "bos"), ("pad", "padding"))
    }
    write_json(folder / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    template = str(file.metadata["tokenizer.chat_template"])
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _gguf_special_tokens(file: GgufFile) -> dict[str, str]:
    tokens = file.metadata["tokenizer.ggml.tokens"]
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: file.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in names.items()}
    return {f"{name}_token": tokens[index] for name, index in ids.items() if index is not None}


def _from_gguf(path: Path) -> ChatTokenizer:
    file = GgufFile(path)
    metadata = file.metadata
    template = metadata.get("tokenizer.chat_template")
    if template is None:
        raise UserError(
            path, allowed="a file of a chat model", problem="no tokenizer.chat_template"
        )
    vocabulary = gguf_vocabulary(file)
    end_of_turn = metadata.get("tokenizer.ggml.eot_token_id")
    return ChatTokenizer(
        vocabulary,
        chat_template=template,
        special_tokens=_gguf_special_tokens(file),
        eos_ids=[] if end_of_turn is None else [end_of_turn],
        where=str(path),
    )


def _from_folder(folder: Path) -> ChatTokenizer:
    settings = {
        **_optional_json(folder / "special_tokens_map.json"),
        **_optional_json(folder / "tokenizer_config.json"),
    }
    vocabulary = _folder_vocabulary(folder, settings)
    special_tokens = {
        key: _content(value)
        for key, value in settings.items()
        if key.endswith("_token") and isinstance(value, str | dict)
    }
    generation = folder / "generation_config.json"
    return ChatTokenizer(
        vocabulary,
        chat_template=_folder_template(folder, settings),
        special_tokens=special_tokens,
        eos_ids=end_tokens(_optional_json(generation), str(generation)),
        where=str(folder),
    )


def _folder_vocabulary(folder: Path, settings: Mapping[str, Any]) -> Vocabulary:
    added = {int(index): token for index, token in settings.get("added_tokens_decoder", {}).items()}
    fast, pieces = folder / "tokenizer.json", folder / "tokenizer.model"
    if fast.is_file():
        return FastVocabulary(_fast_tokenizer(fast, added))
    if pieces.is_file():
        return SentencePieceVocabulary(
            pieces,
            {index: _content(token) for index, token in added.items()},
            prefix_every_part=bool(settings.get("legacy")),
        )
    raise UserError(folder, allowed="tokenizer.json or tokenizer.model", problem="no tokenizer")


def _fast_tokenizer(file: Path, added: Mapping[int, dict[str, Any]]) -> Tokenizer:
    """A `tokenizer.json`, with the tokens that only `tokenizer_config.json` knows."""
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(
            file, allowed="a tokenizers file", problem=f"cannot be read ({error})"
        ) from error
    for index, token in sorted(added.items()):
        content = _content(token)
        if tokenizer.token_to_id(content) is None:
            flags = {flag: token[flag] for flag in _FLAGS if flag in token}
            tokenizer.add_tokens([AddedToken(content, **flags)])
        if tokenizer.token_to_id(content) != index:
            raise UserError(
                file,
                allowed=f"{index}, as in tokenizer_config.json",
                problem=f"token {content!r} has id {tokenizer.token_to_id(content)}",
            )
    return tokenizer


def _folder_template(folder: Path, settings: Mapping[str, Any]) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    if not isinstance(template, str):
        raise UserError(
            folder,
            allowed="chat_template.jinja, or chat_template in tokenizer_config.json",
            problem="no chat template",
        )
    return template


def _content(token: str | Mapping[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


class _GenerationTag(Extension):
    """`{% generation %}` marks what training masks; here it only has to parse."""

    tags = {"generation"}  # noqa: RUF012 - jinja's interface

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(
            parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line
        )


def _template_environment() -> ImmutableSandboxedEnvironment:
    """What chat templates are written for: the settings and functions of transformers."""

    def raise_exception(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment
