"""The hub: what is fetched and what is not, from a server that speaks its protocol."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.storage.hub import Address, addresses, parse_address
from tests.fake_hub import FakeHub, serving

FILES = {
    "config.json": b"{}",
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "evil.py": b"import os",
    "pytorch_model.bin": b"a pickle",
    "original/a.safetensors": b"another copy",
}
ROWS = b'{"question": "1 + 1", "answer": "2"}\n'
PROGRAM = """
import json, sys
from opcd_nemo.errors import UserError
from opcd_nemo.storage import hub

said = []
for verb, *words in json.loads(sys.argv[1]):
    address = hub.parse_address(words[-1])
    try:
        if verb == "model":
            said.append(sorted(p.name for p in hub.fetch_model(address).iterdir()))
        elif verb == "file":
            said.append(hub.local_file(words[0]).read_text())
        elif verb == "commit":
            said.append(str(hub.resolve_commit(address)))
        else:
            from pathlib import Path
            said.append(hub.upload_model(Path(words[0]), address))
    except UserError as error:
        said.append([error.key, error.problem, error.allowed])
print(json.dumps(said))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub({"owner/model": FILES, "datasets/owner/rows": {"train.jsonl": ROWS}})
    with serving(server):
        yield server


def ask(hub: FakeHub, cache: Path, *asked: list[str], offline: bool = False) -> list[Any]:
    """What a process says that asks; the client reads its address when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(cache),
        "HF_TOKEN": "hf_test",
        "HF_HUB_OFFLINE": "1" if offline else "0",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(asked)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    said: list[Any] = json.loads(done.stdout)
    return said


def test_addresses_are_read_and_written() -> None:
    for text, address in {
        "hf://a/b": Address(repository="a/b"),
        "hf://a/b@v1.0": Address(repository="a/b", revision="v1.0"),
        "hf://datasets/a/b@main/x/train.parquet": Address(
            repository="a/b", dataset=True, revision="main", file="x/train.parquet"
        ),
    }.items():
        assert parse_address(text) == address
        assert str(address) == text


@pytest.mark.parametrize("text", ["hf://", "hf://a", "hf://a/b@", "hf://a/b/../c", "hf://a b/c"])
def test_what_starts_as_an_address_and_is_none_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_address(text)
    assert caught.value.key == text
    assert "hf://owner/name" in caught.value.allowed


def test_paths_of_this_machine_are_no_addresses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for path in ("models/Qwen3-8B", "here/x", "/a/b", "./a/b", "~/a", "a/b/c", "a", "../a/b"):
        assert parse_address(path) is None
    assert parse_address("Qwen/Qwen3-0.6B") == Address(repository="Qwen/Qwen3-0.6B")


def test_a_model_comes_without_pickles_and_programs(hub: FakeHub, tmp_path: Path) -> None:
    (files,) = ask(hub, tmp_path, ["model", "hf://owner/model"])
    assert files == ["config.json", "model.safetensors", "tokenizer.json"]
    assert not [request for request in hub.requests if "evil" in request or ".bin" in request]


def test_a_commit_stays_while_the_repository_moves_on(hub: FakeHub, tmp_path: Path) -> None:
    (first,) = ask(hub, tmp_path, ["commit", "hf://owner/model"])
    assert first == f"hf://owner/model@{hub.commit('owner/model')}"
    hub.repositories["owner/model"]["config.json"] = b'{"a": 1}'
    moved, same = ask(hub, tmp_path, ["commit", "hf://owner/model"], ["commit", first])
    assert moved != first
    assert same == first


def test_offline_reads_the_cache_alone(hub: FakeHub, tmp_path: Path) -> None:
    online = ask(
        hub,
        tmp_path,
        ["commit", "hf://owner/model"],
        ["file", "hf://datasets/owner/rows/train.jsonl"],
    )
    assert online[1] == ROWS.decode()
    hub.requests.clear()
    offline = ask(
        hub,
        tmp_path,
        ["commit", "hf://owner/model"],
        ["file", "hf://datasets/owner/rows/train.jsonl"],
        ["model", "hf://owner/other"],
        offline=True,
    )
    assert offline[:2] == online
    key, problem, allowed = offline[2]
    assert (key, problem) == ("hf://owner/other", "not in the cache, and HF_HUB_OFFLINE is set")
    assert "hf download owner/other" in allowed
    assert not hub.requests


def test_what_the_hub_does_not_have_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    said = ask(
        hub,
        tmp_path,
        ["model", "hf://owner/none"],
        ["model", "hf://owner/model@nowhere"],
        ["file", "hf://datasets/owner/rows/none.jsonl"],
        ["file", "hf://datasets/owner/rows/run.py"],
        ["model", "hf://datasets/owner/rows/train.jsonl"],
    )
    assert [problem for _, problem, _ in said] == [
        "the hub does not show this repository",
        "no such revision",
        "no such file",
        None,
        None,
    ]


def test_without_network_the_line_says_what_to_do(tmp_path: Path) -> None:
    nobody = FakeHub({})
    nobody.url = "http://127.0.0.1:9"  # the discard port: nobody listens
    ((key, problem, allowed),) = ask(nobody, tmp_path, ["model", "hf://owner/model"])
    assert key == "hf://owner/model"
    assert problem.startswith("the hub cannot be asked")
    assert "a folder of this machine" in allowed


def test_a_folder_is_uploaded_to_a_private_repository(hub: FakeHub, tmp_path: Path) -> None:
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "config.json").write_text('{"a": 2}')
    (page,) = ask(hub, tmp_path / "cache", ["upload", str(folder), "hf://me/student"])
    assert page.startswith(f"{hub.url}/me/student/commit/")
    assert hub.private["me/student"] is True
    assert hub.repositories["me/student"]["config.json"] == b'{"a": 2}'


def test_addresses_of_a_configuration() -> None:
    config = {
        "student": {"path": "hf://a/b"},
        "teacher": {"path": "Qwen/Qwen3-0.6B"},
        "task": {"train": "hf://datasets/a/b/x.jsonl", "template": "a/b", "n": 3},
    }
    assert dict(addresses(config)) == {
        "student.path": "hf://a/b",
        "teacher.path": "Qwen/Qwen3-0.6B",
        "task.train": "hf://datasets/a/b/x.jsonl",
    }
