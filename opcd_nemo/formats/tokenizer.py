"""A tokenizer with a chat template, from a folder or a GGUF file.

Without transformers, which takes seconds to import and more to convert a GGUF vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from opcd_nemo.errors import UserError
from opcd_nemo.formats.chat_template import ChatTemplate, in_words
from opcd_nemo.formats.gguf import GgufFile
from opcd_nemo.formats.locate import model_kind, optional_settings, resolve_model_path, write_json
from opcd_nemo.formats.nemo import base_path, open_package, unpack_hf
from opcd_nemo.formats.plain_content import PlainContent
from opcd_nemo.formats.tokenizer_files import (
    TokenizerParts,
    gguf_special_tokens,
    read_folder,
    read_gguf,
)
from opcd_nemo.formats.vocabulary import gguf_vocabulary
from opcd_nemo.types import Message

_TOKENIZER_FILES = (
    "added_tokens.json chat_template.jinja chat_template.json generation_config.json merges.txt "
    "special_tokens_map.json tokenizer.json tokenizer.model tokenizer_config.json vocab.json"
).split()
_GIVEN = {  # to every chat template
    *("messages", "tools", "documents", "add_generation_prompt", "raise_exception"),
    "strftime_now",
}
_THINK, _END_THINK = "<think>", "</think>"
_REPLY = "So it is."  # a made-up reply without blanks at its ends, which templates may strip
_TAIL = 16  # tokens, in which the end of a prompt is looked for


class ChatTokenizer:
    """Renders chats to token ids.

    Attributes:
        vocab_size: Largest token id plus one; the model may have more rows.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        """Parse the template, and compare the ids with the model's rows.

        Raises:
            UserError: The template is no Jinja, nothing ends a response, or the model's embedding
                has no row for a token.
        """
        self._parts = parts
        self._template = ChatTemplate(parts.chat_template, parts.where)
        self._arguments: dict[str, Any] = {}
        token_ids = parts.vocabulary.token_ids()
        if not token_ids:
            raise UserError(parts.where, allowed="a tokenizer of a model", problem="has no tokens")
        self._marks = {token_ids[mark]: mark for mark in (_THINK, _END_THINK) if mark in token_ids}
        last = max(token_ids, key=token_ids.__getitem__)
        self.vocab_size = token_ids[last] + 1
        if parts.num_rows is not None and self.vocab_size > parts.num_rows:
            raise UserError(
                parts.where,
                allowed="an embedding with a row for every token",
                problem=f"token {last!r} has id {token_ids[last]}, the model's embedding "
                f"{parts.num_rows} rows",
            )
        if not parts.eos_ids:
            eos_token = parts.special_tokens.get("eos_token")
            raise UserError(
                parts.where, allowed="a known token", problem=f"eos_token is {eos_token!r}"
            )

    @classmethod
    def from_path(cls, path: str) -> ChatTokenizer:
        """Open the tokenizer of what `locate.model_kind` knows, or of the bundled model.

        Raises:
            UserError: no tokenizer or no chat template is found, or its kind is not supported.
        """
        found = resolve_model_path(base_path(path))
        kind = model_kind(found)
        if kind == "gguf":
            return cls(read_gguf(found))
        if kind == "nemo":
            with unpack_hf(open_package(found)) as folder:
                return cls(read_folder(Path(folder)))
        return cls(read_folder(found))

    @property
    def chat_template_source(self) -> str:
        """The Jinja template."""
        return self._template.source

    def render(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> tuple[int, ...]:
        """Token ids of a chat; `add_generation_prompt` opens the assistant's turn.

        Special tokens come from the template alone: in messages their texts are plain text.

        Raises:
            UserError: The template refuses the messages, or writes nothing for them.
        """
        messages, cut = self._plain_content.cut(messages)
        text = self._text(messages, add_generation_prompt)
        parts = [text] if cut is None else text.split(cut)
        ids = tuple(chain.from_iterable(map(self.encode, parts)))
        if not ids:
            raise UserError(
                self._parts.where,
                allowed="a chat template that writes out messages whose content is a text",
                problem=f"the chat template writes nothing for {in_words(messages)}",
            )
        return ids

    def _text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        variables = {
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **self._parts.special_tokens,
            **self._arguments,
        }
        return self._template.render(messages, variables)

    def with_arguments(self, arguments: Mapping[str, Any]) -> ChatTokenizer:
        """The same tokenizer, whose template sees these variables besides.

        Raises:
            UserError: the template knows no such variable, or gets it from elsewhere.
        """
        if not arguments:
            return self
        known = self._template.names() - _GIVEN - set(self._parts.special_tokens)
        for name, value in arguments.items():
            if name not in known:
                raise UserError(
                    name,
                    value,
                    ", ".join(sorted(known)) or "none",
                    problem=f"no variable of the chat template of {self._parts.where}",
                )
        same = copy.copy(self)
        same._arguments = dict(arguments)
        for name in ("_around_reply", "_plain_content", "eos_ids"):  # it may write other chats
            same.__dict__.pop(name, None)
        return same

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text; special tokens in it are parsed, none is added.

        Raises:
            UserError: the text is none that UTF-8 can write.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                "text",
                repr(text[error.start : error.end]),
                "texts that UTF-8 can write",
                problem="is half of a pair of surrogates",
            ) from error
        return tuple(self._parts.vocabulary.encode(text))

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """Text of token ids."""
        return self._parts.vocabulary.decode(ids, skip_special)

    def reply(self, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> str:
        """Text of a response with the marks of its thinking, also that which the prompt opens.

        Some templates end a prompt with `<think>`: a response that is cut before `</think>` must
        not be taken for what follows the thinking.
        """
        end = self.decode(prompt_ids[-_TAIL:], skip_special=False)
        opened = _THINK if end.rstrip().endswith(_THINK) else ""
        return opened + "".join(
            self.decode(list(run)) if mark is None else mark * len(list(run))
            for mark, run in groupby(response_ids, key=self._marks.get)
        )

    @cached_property
    def _plain_content(self) -> PlainContent:
        ends = (self.decode([index], skip_special=False) for index in self.eos_ids)
        return PlainContent({*self._parts.vocabulary.special_tokens(), *ends})

    @cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: the tokens that the files name, then what closes a turn."""
        listed, closing = self._parts.eos_ids, self.unlisted_end
        return listed if closing is None else (*listed, closing)

    @property
    def unlisted_end(self) -> int | None:
        """The token with which the template closes a turn, where no file calls it an end."""
        after = self._around_reply[1]
        written = (index for index in self.encode(after) if self.decode([index], False).strip())
        closing = next(written, None)
        is_end = closing in self._parts.vocabulary.added_ids()
        return closing if is_end and closing not in self._parts.eos_ids else None

    def notes(self) -> list[str]:
        """Lines about the tokenizer that a run shows at its start."""
        where, notes = self._parts.where, []
        if (closing := self.unlisted_end) is not None:
            notes.append(
                f"{where}: the chat template closes a turn with {self.decode([closing], False)!r}, "
                "which eos_token_id does not name: it ends a response too"
            )
        added = self._parts.vocabulary.added_ids()
        between = [index for index in self.encode(self._around_reply[0]) if index in added]
        words = [self.decode([index], False) for index in between]
        if opening := [word for word in words if "think" not in word]:
            notes.append(
                f"{where}: the chat template does not open the assistant's turn "
                f"(add_generation_prompt): a response begins where {opening[0]!r} should stand"
            )
        return notes

    @cached_property
    def _around_reply(self) -> tuple[str, str]:
        """What the template writes between a prompt and its reply, and after the reply."""
        question: Message = {"role": "user", "content": "Is it so?"}
        try:
            prompt = self._text([question], True)
            chat = self._text([question, {"role": "assistant", "content": _REPLY}], False)
        except UserError:
            return "", ""  # it takes other chats alone
        before, found, after = chat.rpartition(_REPLY)
        if not found:
            return "", ""  # it writes no reply
        return before.removeprefix(prompt) if before.startswith(prompt) else "", after

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the map from id to token: equal for equal vocabularies."""
        token_ids = self._parts.vocabulary.token_ids()
        tokens = sorted((index, token) for token, index in token_ids.items())
        return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


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
    write_json(generation, {**optional_settings(generation), "eos_token_id": ends})


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_gguf_tokenizer(path: Path, folder: Path) -> None:
    file = GgufFile(path)
    gguf_vocabulary(file).save(folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **gguf_special_tokens(file),
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
