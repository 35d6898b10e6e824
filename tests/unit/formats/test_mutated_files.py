"""Files with random damage are read, or are a user's mistake in one line: no other exception."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd_nemo.errors import UserError
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.formats.torch_dist import DistributedTensors, read_plain
from opcd_nemo.storage.archive import FolderFiles, TarFiles, write_tar
from tests.tiny import (
    LLAMA3_ROPE,
    model_config,
    random_tensors,
    write_chat_model,
    write_gguf,
    write_gguf_tokenizer,
)
from tests.unit.storage.test_archive import write_rows

SEEDS = range(60)
ODD: list[Any] = [
    *(None, True, 0, -1, 2, 10**9, 10**30, 1.5, float("nan"), float("inf")),
    *("", "x", "\ud83d", "llama", "1e5", "{{ messages }}", "<|im_end|>"),
    *([], {}, [1], [[1]], {"a": 1}, [None], {"content": "x"}, {"rope_type": "llama3"}),
]


def places(node: Any, way: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where every value of a JSON document is."""
    if way:
        yield way
    inner = node.items() if isinstance(node, dict) else enumerate(node[:40])
    for key, value in inner:
        yield from places(value, (*way, key)) if isinstance(value, dict | list) else [(*way, key)]


def odd_json(path: Path, chance: random.Random) -> None:
    """Put something odd in the place of a value, or leave it out."""
    document = json.loads(path.read_text())
    *way, last = chance.choice(list(places(document)))
    parent = document
    for key in way:
        parent = parent[key]
    if chance.random() < 0.2:
        del parent[last]
    else:
        parent[last] = copy.deepcopy(chance.choice(ODD))
    path.write_text(json.dumps(document))


def odd_bytes(path: Path, chance: random.Random) -> None:
    """Change, repeat and cut bytes, most of them near the start, where headers are."""
    data = bytearray(path.read_bytes())
    for _ in range(chance.choice([1, 1, 2, 8])):
        at = min(int(chance.expovariate(1 / 300)), len(data) - 1)
        how = chance.randrange(5)
        if how == 0:
            data[at] = chance.randrange(256)
        elif how == 1:
            data[at : at + 8] = chance.choice([b"\xff" * 8, bytes(8), b"\xff" * 7 + b"\x7f"])
        elif how == 2:
            del data[at : at + chance.choice([1, 8, 100])]
        elif how == 3:
            data[at:at] = data[at : at + chance.choice([1, 8, 50])]
        elif chance.random() < 0.3:
            del data[at + 1 :]
    path.write_bytes(data)


def read_model(path: Path) -> None:
    model = open_model(str(path))
    for name in (*model.names()[:3], *model.names()[-2:]):
        model.tensor(name)


def read_tokenizer(path: Path) -> None:
    tokenizer = ChatTokenizer.from_path(str(path))
    tokenizer.decode(tokenizer.encode("the sea <|im_end|>"))


def read_index(path: Path) -> None:
    tensors = DistributedTensors(FolderFiles(path.parent))
    for name in tensors.names():
        tensors.tensor(name)


def read_archive(path: Path) -> None:
    files = TarFiles(path)
    for name, size in files.sizes().items():
        files.read(name, 0, size)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of file, undamaged."""
    folder = tmp_path_factory.mktemp("whole")
    write_chat_model(folder / "model", rope_scaling=LLAMA3_ROPE)
    added = {"2": {"content": "<|im_end|>", "special": True}}
    path = folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}))
    config = model_config("llama")
    write_gguf(folder / "model.gguf", config, random_tensors(config))
    write_gguf_tokenizer(folder / "tokenizer.gguf", folder / "model", "smollm")
    (folder / "index").mkdir()
    write_rows(folder / "index", 5, (3, 2, "b"), (0, 3, "a"))
    (folder / "plain").mkdir()
    torch.save({"a": [1, (2, "x")], "b": torch.zeros(3)}, folder / "plain" / "common.pt")
    write_tar(folder / "archive.nemo", folder / "model", ["config.json", "tokenizer_config.json"])
    return folder


Reader = Callable[[Path], object]
KINDS: dict[str, tuple[str, Callable[[Path, random.Random], None], list[tuple[str, Reader]]]] = {
    "config": ("model/config.json", odd_json, [("model", read_model), ("model", read_tokenizer)]),
    "ends": ("model/generation_config.json", odd_json, [("model", read_model)]),
    "settings": ("model/tokenizer_config.json", odd_json, [("model", read_tokenizer)]),
    "tokenizer": ("model/tokenizer.json", odd_json, [("model", read_tokenizer)]),
    "weights": ("model/model.safetensors", odd_bytes, [("model", read_model)]),
    "gguf": ("model.gguf", odd_bytes, [("model.gguf", read_model)]),
    "gguf tokens": ("tokenizer.gguf", odd_bytes, [("tokenizer.gguf", read_tokenizer)]),
    "index": ("index/.metadata", odd_bytes, [("index/.metadata", read_index)]),
    "plain": ("plain/common.pt", odd_bytes, [("plain", lambda p: read_plain(FolderFiles(p)))]),
    "archive": ("archive.nemo", odd_bytes, [("archive.nemo", read_archive)]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_a_users_mistake_in_one_line(
    kind: str, whole: Path, tmp_path: Path, capfd: Any
) -> None:
    file, damage, readers = KINDS[kind]
    folder = shutil.copytree(whole, tmp_path / "damaged")
    said = []
    for seed in SEEDS:
        shutil.copyfile(whole / file, folder / file)
        damage(folder / file, random.Random(seed))
        for name, read in readers:
            try:
                read(folder / name)
            except UserError as error:
                said.append(str(error))
    assert len(said) > len(SEEDS) // 10
    assert not [message for message in said if "\n" in message]
    capfd.readouterr()  # tokenizers, written in Rust, tells more


def test_the_undamaged_files_are_read(whole: Path) -> None:
    for _, _, readers in KINDS.values():
        for name, read in readers:
            read(whole / name)


def test_damage_is_damage(whole: Path, tmp_path: Path) -> None:
    shutil.copyfile(whole / "model.gguf", tmp_path / "a")
    odd_bytes(tmp_path / "a", random.Random(1))
    assert (tmp_path / "a").read_bytes() != (whole / "model.gguf").read_bytes()
    assert list(places({"a": [1, {"b": 2}]})) == [("a",), ("a", 0), ("a", 1), ("a", 1, "b")]
