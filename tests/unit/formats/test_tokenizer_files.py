"""Each fact about a tokenizer has one rule, whichever files say it; wrong files are one line."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.formats.tokenizer import ChatTokenizer, write_tokenizer
from opcd_nemo.types import Message
from tests.tiny import (
    CHAT_TEMPLATE,
    END_OF_TEXT,
    IM_END,
    IM_START,
    refusal,
    write_chat_tokenizer,
    write_gguf_tokenizer,
    write_sentencepiece_tokenizer,
)

USER: Message = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | changes))


def opened(folder: Path) -> ChatTokenizer:
    return ChatTokenizer.from_path(str(folder))


# ------------------------------------------------------------------------------------------- ends


def test_what_closes_a_turn_ends_a_response(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert (opened(folder).eos_ids, opened(folder).notes()) == ((2,), [])
    edit(folder / "tokenizer_config.json", eos_token=END_OF_TEXT)
    base = opened(folder)
    assert (base.eos_ids, base.unlisted_end) == ((0, 2), 2)
    assert [IM_END in note for note in base.notes()] == [True]
    edit(folder / "generation_config.json", eos_token_id=[2])
    assert (opened(folder).eos_ids, opened(folder).notes()) == ((0, 2), [])


@pytest.mark.parametrize(
    ("template", "ids"),
    [
        ("{{ messages[0].content }}", (0,)),  # no assistant's turn
        ("<|im_start|>{{ messages[0].content }}<|im_end|>", (0,)),
        ("{% for m in messages %}{{ m.content }}\n### {% endfor %}", (0,)),  # no token closes it
        ("{% for m in messages %}{{ m.content }} \n<|im_end|>{% endfor %}", (0, 2)),
        ("{% for m in messages %}{{ m.content }}<|im_start|>{% endfor %}", (0, 1)),
        ("{% if messages|length > 1 %}{{ raise_exception('') }}{% endif %}a", (0,)),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", (0,)),
    ],
)
def test_only_a_token_after_the_reply_closes_a_turn(
    folder: Path, template: str, ids: tuple[int, ...]
) -> None:
    edit(folder / "tokenizer_config.json", eos_token=END_OF_TEXT, chat_template=template)
    assert opened(folder).eos_ids == ids


def test_a_template_argument_may_change_the_end(folder: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{{ '<|im_start|>' if a else '' }}{% endfor %}"
    edit(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = opened(folder)
    assert tokenizer.eos_ids == (2,)
    assert tokenizer.with_arguments({"a": True}).eos_ids == (2, 1)


def test_config_json_says_the_ends_where_generation_config_does_not(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=END_OF_TEXT)
    edit(folder / "config.json", eos_token_id=[1, 2])
    assert opened(folder).eos_ids == (0, 1, 2)
    edit(folder / "generation_config.json", eos_token_id=2)
    assert opened(folder).eos_ids == (0, 2)
    edit(folder / "config.json", eos_token_id="</s>")
    assert "eos_token_id" in refusal(ChatTokenizer.from_path, folder)


def test_a_gguf_file_without_the_end_of_a_turn(written: Path, tmp_path: Path) -> None:
    path = write_gguf_tokenizer(tmp_path / "a.gguf", written, "smollm")
    key = b"tokenizer.ggml.eos_token_id"
    at = path.read_bytes().index(key) + len(key) + 4
    data = bytearray(path.read_bytes())
    data[at] = 0
    path.write_bytes(data)
    assert opened(path).eos_ids == (0, 2)
    data[at : at + 4] = b"\xff\xff\xff\x7f"
    path.write_bytes(data)
    assert "eos_token_id=2147483647; allowed: an id from 0 to" in refusal(
        ChatTokenizer.from_path, path
    )


def test_a_prompt_that_opens_no_turn_is_said(folder: Path) -> None:
    template = CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{%- if add_gen")]
    edit(folder / "tokenizer_config.json", chat_template=template)
    (note,) = opened(folder).notes()
    assert f"where {IM_START!r} should stand" in note


def test_an_exported_tokenizer_names_all_its_ends(folder: Path, tmp_path: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=END_OF_TEXT)
    (tmp_path / "out").mkdir()
    write_tokenizer(str(folder), tmp_path / "out")
    ends = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert ends == {"eos_token_id": [0, 2]}


# ---------------------------------------------------------------------------------- added tokens


def test_added_tokens_json_is_read_as_transformers_does(tmp_path: Path) -> None:
    import transformers
    from sentencepiece import SentencePieceProcessor

    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    folder = write_sentencepiece_tokenizer(tmp_path, template)
    edit(folder / "tokenizer_config.json", eos_token=IM_END)
    size = SentencePieceProcessor(model_file=str(folder / "tokenizer.model")).get_piece_size()
    (folder / "added_tokens.json").write_text(
        json.dumps({IM_END: size, IM_START: size + 1, "<tool>": size + 2})
    )
    mine = opened(folder)
    theirs = transformers.LlamaTokenizer.from_pretrained(folder)
    for text in (IM_START, f"{IM_START}the sea{IM_END}", f"the sea {IM_END} <tool>the wind"):
        assert list(mine.encode(text)) == theirs.encode(text, add_special_tokens=False), text
    assert mine.encode(IM_START) == (size + 1,)
    assert mine.eos_ids == (size,)
    ids = mine.encode(f"the sea<tool>{IM_END}")
    assert mine.decode(ids) == "the sea<tool>"
    edit(folder / "tokenizer_config.json", added_tokens_decoder={}, eos_token="</s>")
    assert len(opened(folder).encode(IM_START)) > 1  # the newer file decides


TOOL = {"content": "<tool>", "special": False, "normalized": True, "lstrip": True}


@pytest.mark.parametrize(
    ("settings", "others"),
    [
        ({"added_tokens_decoder": {"320": TOOL}}, {}),
        ({"added_tokens_decoder": {"320": TOOL | {"single_word": True}}}, {}),
        ({"added_tokens_decoder": {"2": TOOL | {"content": IM_END}}}, {"tokenizer.json": {}}),
        ({"additional_special_tokens": ["<tool>", IM_START]}, {"tokenizer.json": {}}),
        ({"extra_special_tokens": {"tool_token": "<tool>"}}, {}),
        ({"tool_token": "<tool>"}, {"tokenizer.json": {}}),
        ({}, {"added_tokens.json": {"<tool>": 320, "<x>": 321}}),
        ({}, {"special_tokens_map.json": {"eos_token": END_OF_TEXT, "bos_token": IM_START}}),
        (
            {"added_tokens_decoder": {"320": TOOL}},
            {"special_tokens_map.json": {"eos_token": END_OF_TEXT, "bos_token": IM_START}},
        ),
    ],
    ids=str,
)
def test_every_file_means_what_it_means_to_transformers(
    folder: Path, settings: dict[str, Any], others: dict[str, dict[str, Any]]
) -> None:
    import transformers

    template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    edit(folder / "tokenizer_config.json", chat_template=template, **settings)
    for name, values in others.items():
        edit(folder / name, **(values or {"added_tokens": []}))
    mine = opened(folder)
    theirs: Any = transformers.AutoTokenizer.from_pretrained(folder)
    texts = f"{IM_START}the sea{IM_END}", "a <tool> b<tool>x <TOOL>", f"  <tool>\n<x> {END_OF_TEXT}"
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False)
        assert list(mine.encode(text)) == ids, text
        assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert list(mine.render([USER])) == theirs.apply_chat_template([USER], return_dict=False)
    assert mine.eos_ids == (theirs.eos_token_id,)


def test_a_token_takes_the_blanks_that_it_says(tmp_path: Path) -> None:
    folder = write_sentencepiece_tokenizer(tmp_path, "{{ messages[0].content }}")
    token = {"content": "<x>", "lstrip": True, "rstrip": True, "special": True}
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"400": token})
    tokenizer = opened(folder)
    assert tokenizer.encode("the \n <x> sea") == (
        *tokenizer.encode("the"),
        400,
        *tokenizer.encode("<s>sea")[1:],
    )


@pytest.mark.parametrize(
    "decoder",
    [
        [1],
        None,
        {"x": {"content": "a"}},
        {"-1": {"content": "a"}},
        {"320": "a"},
        {"320": {}},
        {"320": {"content": 5}},
        {"320": {"content": "\ud83d"}},
        {"320": {"content": "qq", "lstrip": "x"}},
        {str(10**30): {"content": "qq"}},
        {str(320 + index): {"content": f"<{index}>"} for index in range(limits.ADDED_TOKENS + 1)},
    ],
    ids=lambda value: repr(value)[:40],
)
def test_added_tokens_that_are_none_are_refused(folder: Path, decoder: Any) -> None:
    edit(folder / "tokenizer_config.json", added_tokens_decoder=decoder)
    assert str(folder) in refusal(ChatTokenizer.from_path, folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"eos_token": {"no": 1}}'),
        ("tokenizer_config.json", '{"split_special_tokens": true}'),
        ("tokenizer_config.json", '{"chat_template": 5}'),
        ("tokenizer_config.json", '{"chat_template": [{"template": "x"}]}'),
        ("tokenizer_config.json", '{"chat_template": {"tool": "x"}}'),
        ("tokenizer_config.json", "[1]"),
        ("added_tokens.json", '{"a": "x"}'),
        ("added_tokens.json", '{"qq": 320, "rr": 320}'),
        ("added_tokens.json", '["a"]'),
        ("special_tokens_map.json", '{"bos_token": {}}'),
        ("generation_config.json", '{"eos_token_id": {"a": 1}}'),
        ("chat_template.json", "7"),
        ("tokenizer.json", "[" * 1000),
        ("tokenizer.json", '{"a":[' + "[]," * (limits.TOKENIZER_ITEMS // 2) + "1]}"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_files_of_another_kind_are_one_line(folder: Path, name: str, text: str) -> None:
    if name == "chat_template.json":
        edit(folder / "tokenizer_config.json", chat_template=None)
    (folder / name).write_text(text)
    assert str(folder) in refusal(ChatTokenizer.from_path, folder)


GROWS = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
SPLIT = {"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Isolated", "invert": False}


@pytest.mark.parametrize(
    ("part", "value", "word"),
    [
        ("normalizer", {"type": "Sequence", "normalizers": [GROWS] * 30}, "many times as long"),
        ("normalizer", GROWS | {"content": "a" * 1000}, "many times as long"),
        ("decoder", {"type": "Sequence", "decoders": [GROWS] * 30}, "many times as long"),
        ("pre_tokenizer", {"type": "Sequence", "pretokenizers": [SPLIT] * 1000}, "more than 64"),
    ],
)
def test_a_tokenizer_that_makes_texts_long_is_refused(
    folder: Path, part: str, value: object, word: str
) -> None:
    edit(folder / "tokenizer.json", **{part: value})
    assert word in refusal(ChatTokenizer.from_path, folder)


def test_a_tokenizer_that_panics_is_one_line(folder: Path, capfd: Any) -> None:
    hangs = SPLIT | {"pattern": {"Regex": "(a+)+$"}}
    edit(folder / "tokenizer.json", pre_tokenizer=hangs)
    with pytest.raises(UserError, match="cannot tokenize a text"):
        opened(folder).encode("a" * 40 + "!")
    capfd.readouterr()  # Rust's own words


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "added_tokens.json", "chat_template.jinja"],
)
def test_pipes_and_devices_are_no_files_of_a_model(folder: Path, name: str) -> None:
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert f"{name}: is a pipe" in refusal(ChatTokenizer.from_path, folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    assert f"{name}: is a pipe" in refusal(ChatTokenizer.from_path, folder)


# -------------------------------------------------------------------------- templates, ids, texts


def test_templates_of_other_files_and_kinds(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", chat_template={"default": "mapping", "tool": "x"})
    assert opened(folder).chat_template_source == "mapping"
    edit(folder / "tokenizer_config.json", chat_template=None)
    edit(folder / "chat_template.json", chat_template="json")
    assert opened(folder).chat_template_source == "json"


def test_an_id_beyond_the_embedding_is_refused(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=opened(folder).vocab_size)
    opened(folder)
    edit(folder / "config.json", vocab_size=opened(folder).vocab_size - 1)
    message = refusal(ChatTokenizer.from_path, folder)
    assert "has id 319, the model's embedding 319 rows" in message


def test_a_template_that_writes_nothing_is_refused(folder: Path) -> None:
    template = "{% for p in messages[0].content if p is mapping %}{{ p.text }}{% endfor %}"
    edit(folder / "tokenizer_config.json", chat_template=template)
    with pytest.raises(UserError, match="writes nothing for a chat of user; allowed"):
        opened(folder).render([USER])


def test_half_of_a_pair_of_surrogates_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match=r"text='\\ud83d': is half of a pair of surrogates"):
        opened(folder).render([{"role": "user", "content": "half \ud83d"}])


def test_thinking_that_the_prompt_opens_belongs_to_the_reply(folder: Path) -> None:
    opening = "{{- '<|im_start|>assistant\\n<think>\\n' }}"
    template = CHAT_TEMPLATE.replace(
        "{{- '<|im_start|>assistant\\n' }}\n{%- endif", f"{opening}\n{{%- endif"
    )
    edit(folder / "tokenizer_config.json", chat_template=template)
    tokenizer = opened(folder)
    prompt = tokenizer.render([USER])
    answer = tokenizer.encode("It is \\boxed{7}")
    assert tokenizer.reply(prompt, answer) == "<think>It is \\boxed{7}"
    closed = tokenizer.encode("</think>")
    assert tokenizer.reply(prompt, (*closed, *answer)) == "<think></think>It is \\boxed{7}"
    plain = opened(folder).encode("<|im_start|>assistant\n")
    assert tokenizer.reply(plain, answer) == "It is \\boxed{7}"
    assert tokenizer.notes() == []


def test_marks_of_thinking_are_never_skipped(folder: Path) -> None:
    for index, mark in enumerate(("<think>", "</think>"), start=320):
        token = {"content": mark, "special": True}
        there = json.loads((folder / "tokenizer_config.json").read_text())
        added = there.get("added_tokens_decoder", {}) | {str(index): token}
        edit(folder / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = opened(folder)
    ids = tokenizer.encode("<think>a</think>b<|im_end|>")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.reply(tokenizer.encode("?"), ids) == "<think>a</think>b"


def test_notes_are_no_log_lines_by_themselves(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edit(folder / "tokenizer_config.json", eos_token=END_OF_TEXT)
    with caplog.at_level(logging.WARNING):
        opened(folder).notes()
    assert caplog.records == []
