"""Whatever bytes a file holds: it is read, or refused in one line; nothing else is called."""

from __future__ import annotations

import json
import os
import pickle
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from opcd_nemo.config.stored import STORED_CLASSES, parse_stored
from opcd_nemo.context.registry import Entry, Registry, read_entry
from opcd_nemo.engines.recorded import RecordedEngine, check_samples
from opcd_nemo.errors import UserError
from opcd_nemo.experience.scoring import ScoreBook
from opcd_nemo.formats.locate import NEMO_CONFIG
from opcd_nemo.formats.nemo import open_package, read_checkpoint, unpack_hf
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.formats.tokenizer_files import read_folder, read_gguf
from opcd_nemo.storage import durable
from opcd_nemo.storage.archive import open_files, read_whole
from opcd_nemo.storage.metrics_file import cut_metrics
from opcd_nemo.tasks.rows import read_rows
from tests.tiny import model_config, random_tensors, write_chat_tokenizer, write_gguf

OLD_FILES = Path(__file__).parents[1] / "recipes" / "old_files" / "456d659.tar.xz"
CPU_S = 3
ODD = (
    *(None, True, -1, 0, 2**31, 10**30, 1e308, float("nan"), "", "x", "\ud800", "\n", "9" * 5000),
    *([], {}, [[]], [None], {"a": None}, {"": []}, "../../x", "/dev/zero", "${oc.env:HOME}"),
    *({"_target_": "os.system"}, [-1, "a"], {"__type": "AddedToken"}),
)
TOKENS = (
    *(b"\x00", b"\xff" * 8, b"\x7f" * 4, b'"', b"{", b"[" * 2000, b"null", b"-1", b"1e999", b"\n"),
    *(b"9" * 5000, b"\\ud800", b"\xed\xa0\x80", b"\r", b"_target_: os.system\n", b"!!python/none"),
    *(b"cos\nsystem\n(S'true'\ntR", b"&a [*a]", b"0\n", b"\x80\x04", b"b", b"R", b"PAR1"),
)
FORBIDDEN = ("os.system", "os.exec", "os.spawn", "os.posix_spawn", "socket.connect")
_watched: list[list[str]] = []


def _watch(event: str, _: object) -> None:
    if _watched and event in FORBIDDEN:
        _watched[-1].append(event)


sys.addaudithook(_watch)


@contextmanager
def nothing_is_called() -> Iterator[None]:
    calls: list[str] = []
    _watched.append(calls)
    try:
        yield
    finally:
        _watched.pop()
    assert not calls


def is_read_or_refused(read: Callable[[], object]) -> None:
    begun = time.process_time()
    said = ""
    with nothing_is_called():
        try:
            read()
        except UserError as mistake:
            said = str(mistake)
    assert "\n" not in said
    assert time.process_time() - begun < CPU_S


def tried(count: int) -> Callable[[Any], Any]:
    """The same examples at every run; with `OPCD_TEST_EXAMPLES=20` so many times as many others."""
    times = int(os.environ.get("OPCD_TEST_EXAMPLES", "1"))
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(
        max_examples=count * times, derandomize=times == 1, deadline=None, database=None,
        suppress_health_check=slow,
    )  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn, whole: bytes, first: int = 0) -> bytes:
    """The bytes with a few edits, from `first` on."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(min(first, len(data)), len(data)))
        end = min(len(data), start + draw(st.sampled_from((0, 1, 1, 2, 8, 200))))
        new = draw(
            st.one_of(
                st.sampled_from(TOKENS), st.binary(min_size=end - start, max_size=end - start)
            )
        )
        data[start:end] = new
        if draw(st.integers(0, 15)) == 0:
            del data[start:]
    return bytes(data)


def places(value: Any, way: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to everything in a value of JSON."""
    found = [way] if way else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in [*items][:200]:
            found += places(item, (*way, key))
    return found


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """A value of JSON in which a few others stand, or are missing."""
    made = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 2))):
        ways = places(made)
        if not ways:
            break
        *above, last = draw(st.sampled_from(ways))
        node = made
        for key in above:
            node = node[key]
        if draw(st.integers(0, 4)):
            node[last] = deepcopy(draw(st.sampled_from(ODD)))
        else:
            del node[last]
    return made


def json_bytes(value: Any) -> st.SearchStrategy[bytes]:
    """A JSON file, with other values or other bytes."""
    whole = json.dumps(value).encode()
    return st.one_of(changed(value).map(lambda made: json.dumps(made).encode()), damaged(whole))


def json_lines(values: list[Any]) -> st.SearchStrategy[bytes]:
    def lines(made: Any) -> bytes:
        return b"".join(json.dumps(each).encode() + b"\n" for each in made)

    return st.one_of(changed(values).map(lines), damaged(lines(values)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an earlier version wrote: runs with checkpoints, packages, a student."""
    folder = tmp_path_factory.mktemp("whole")
    with tarfile.open(OLD_FILES) as tar:
        tar.extractall(folder, filter="data")
    return folder


def copied(source: Path, target: Path, names: tuple[str, ...] = ()) -> Path:
    target.mkdir(exist_ok=True)
    for file in source.iterdir():
        if file.is_file() and (not names or file.name in names):
            (target / file.name).write_bytes(file.read_bytes())
    return target


def read_model(path: Path) -> None:
    model = open_model(str(path))
    for tensor in model.tensors().values():
        assert tensor.numel() < 1 << 20


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_settings_of_a_model(name: str, folder: Path, tmp_path: Path) -> None:
    copied(folder / "student", tmp_path)
    whole = json.loads((tmp_path / name).read_text())

    @tried(60)
    @given(json_bytes(whole))
    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        is_read_or_refused(lambda: read_model(tmp_path))

    check()


def test_safetensors(folder: Path, tmp_path: Path) -> None:
    file = copied(folder / "student", tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, values = json.loads(whole[8 : 8 + length]), whole[8 + length :]

    def packed(made: bytes) -> bytes:
        return len(made).to_bytes(8, "little") + made + values

    @tried(100)
    @given(st.one_of(json_bytes(header).map(packed), damaged(whole)))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        is_read_or_refused(lambda: read_model(tmp_path))

    check()


def test_an_index_of_safetensors(folder: Path, tmp_path: Path) -> None:
    copied(folder / "student", tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-1.safetensors")
    length = int.from_bytes((tmp_path / "model-1.safetensors").read_bytes()[:8], "little")
    header = (tmp_path / "model-1.safetensors").read_bytes()[8 : 8 + length]
    names = [name for name in json.loads(header) if name != "__metadata__"]
    index = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(names, "model-1.safetensors"),
    }

    @tried(60)
    @given(json_bytes(index))
    def check(data: bytes) -> None:
        (tmp_path / "model.safetensors.index.json").write_bytes(data)
        is_read_or_refused(lambda: read_model(tmp_path))

    check()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_files_of_a_tokenizer(name: str, tmp_path: Path) -> None:
    write_chat_tokenizer(tmp_path)
    whole = json.loads((tmp_path / name).read_text())

    @tried(60)
    @given(json_bytes(whole))
    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        is_read_or_refused(lambda: read_folder(tmp_path))

    check()


def test_chat_templates(tmp_path: Path) -> None:
    write_chat_tokenizer(tmp_path)
    settings_file = tmp_path / "tokenizer_config.json"
    values = json.loads(settings_file.read_text())

    @tried(12)
    @given(damaged(values["chat_template"].encode()))
    def check(data: bytes) -> None:
        values["chat_template"] = data.decode("latin-1")
        settings_file.write_text(json.dumps(values))
        is_read_or_refused(
            lambda: ChatTokenizer.from_path(str(tmp_path)).render(
                [{"role": "user", "content": "Why?"}]
            )
        )

    check()


def test_gguf(tmp_path: Path) -> None:
    config = model_config("llama")
    file = write_gguf(tmp_path / "a.gguf", config, random_tensors(config))
    whole = file.read_bytes()

    @tried(150)
    @given(damaged(whole[:3000]))
    def check(data: bytes) -> None:
        file.write_bytes(data + whole[3000:])
        is_read_or_refused(lambda: read_model(file))
        is_read_or_refused(lambda: read_gguf(file))

    check()


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "__0_0.distcp"])
def test_checkpoints(name: str, folder: Path, tmp_path: Path) -> None:
    copied(folder / "runs/game/checkpoints/step=2.ckpt", tmp_path)
    whole = (tmp_path / name).read_bytes()
    names = [file.name for file in tmp_path.iterdir() if file.name != "manifest.json"]

    @tried(40)
    @given(damaged(whole))
    def check(data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        durable.write_manifest(tmp_path, {each: durable.measure(tmp_path / each) for each in names})
        is_read_or_refused(lambda: read_model(tmp_path))
        is_read_or_refused(lambda: read_checkpoint(tmp_path))

    check()


@pytest.mark.parametrize("manifest", [False, True])
def test_packages(manifest: bool, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.nemo"
    whole = (folder / "game.nemo").read_bytes()
    with tarfile.open(folder / "game.nemo") as tar:
        starts = [member.offset for member in tar]

    @st.composite
    def of_headers(draw: st.DrawFn) -> bytes:
        start = draw(st.sampled_from(starts))
        header = draw(damaged(whole[start : start + 512]))[:512].ljust(512, b"\x00")
        if draw(st.booleans()):  # a header whose sum is right
            blank = header[:148] + b" " * 8 + header[156:]
            header = header[:148] + b"%06o\x00 " % sum(blank) + header[156:]
        return whole[:start] + header + whole[start + 512 :]

    def read() -> None:
        files = open_package(file)
        for name in files.sizes():
            read_whole(files, name)
        with unpack_hf(files) as unpacked:
            read_folder(Path(unpacked))
        read_model(file)

    @tried(40)
    @given(of_headers() if manifest else damaged(whole))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        is_read_or_refused(read)

    check()


def classes(node: Any) -> set[str]:
    """Every class that a configuration names; its values are those of JSON."""
    if isinstance(node, dict):
        named = {str(node["_target_"])} if "_target_" in node else set()
        return named.union(*map(classes, node.values()))
    if isinstance(node, list):
        return set().union(*map(classes, node))
    assert node is None or type(node) in (bool, int, float, str)
    return set()


def test_stored_configurations(folder: Path) -> None:
    whole = read_whole(open_files(folder / "game.nemo"), NEMO_CONFIG)
    values = yaml.safe_load(whole)
    known = set().union(*STORED_CLASSES.values())

    @tried(120)
    @given(st.one_of(damaged(whole), changed(values).map(lambda made: yaml.dump(made).encode())))
    def check(data: bytes) -> None:
        named: set[str] = set()
        is_read_or_refused(lambda: named.update(classes(parse_stored(data, "a.nemo"))))
        assert named <= known

    check()


ROWS = [{"q": f"What is {n}?", "chat": [{"content": f"{n}"}], "n": n} for n in range(5)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_rows_of_text(suffix: str, tmp_path: Path) -> None:
    file = tmp_path / f"a{suffix}"
    table = "q,n\n" + "".join(f'"What is {n}?",{n}\n' for n in range(5))
    kinds = {
        ".jsonl": json_lines(ROWS),
        ".json": json_bytes(ROWS),
        ".csv": damaged(table.encode()),
        ".tsv": damaged(table.replace(",", "\t").encode()),
    }

    def read() -> None:
        for row in read_rows("task.train", str(file), ("q", "n", "chat.0.content")):
            for column in ("q", "n", "chat.0.content"):
                row.text("task.problem_column", column).encode()

    @tried(60)
    @given(kinds[suffix])
    def check(data: bytes) -> None:
        file.write_bytes(data)
        is_read_or_refused(read)

    check()


def test_rows_of_parquet(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
    whole = file.read_bytes()

    @tried(120)
    @given(st.one_of(damaged(whole), damaged(whole, len(whole) - 900)))
    def check(data: bytes) -> None:
        file.write_bytes(data)
        is_read_or_refused(
            lambda: [
                row.text("k", "q") for row in read_rows("k", str(file), ["q", "chat.0.content"])
            ]
        )

    check()


def test_lines_of_scores(tmp_path: Path) -> None:
    lines = [{"experience": "a" * 64, "start": start, "scores": [0.5, 1]} for start in (0, 2, 4)]
    run_folder: Any = SimpleNamespace(path=tmp_path, write=lambda *_: None)

    def read() -> None:
        book = ScoreBook(run_folder, "scoring.jsonl")
        assert all(type(score) in (int, float) for score in book.known("a" * 64))

    @tried(60)
    @given(json_lines(lines))
    def check(data: bytes) -> None:
        (tmp_path / "scoring.jsonl").write_bytes(data)
        is_read_or_refused(read)

    check()


def test_lines_of_selections_and_entries(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    entry = Entry(items=("a", "b"), num_tokens=2, lineage={"m": 1}, scores={"validation": 0.5})
    path = registry.add(entry)
    history = tmp_path / "history.jsonl"
    line = {"content_hash": entry.hash, "reason": "first", "time": "2026-01-01T00:00:00+00:00"}

    @tried(60)
    @given(json_lines([line] * 3))
    def check_history(data: bytes) -> None:
        history.write_bytes(data)
        is_read_or_refused(registry.selected)
        is_read_or_refused(registry.rollback)

    @tried(60)
    @given(json_bytes(json.loads(path.read_text())))
    def check_entry(data: bytes) -> None:
        path.write_bytes(data)
        is_read_or_refused(lambda: read_entry(path))

    check_history()
    check_entry()


def test_lines_of_metrics(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 0.5} for step in range(4)]
    file = tmp_path / "metrics.jsonl"

    @tried(80)
    @given(json_lines(lines), st.integers(0, 5))
    def check(data: bytes, num_steps: int) -> None:
        file.write_bytes(data)
        is_read_or_refused(lambda: cut_metrics(file, num_steps))

    check()


def test_lines_of_samples(tmp_path: Path) -> None:
    made_of = {"the teacher": "sha256 ab", "rollout.sampling": {"temperature": 1.0}, "seed": 1}
    alone: Any = SimpleNamespace(
        rank=0,
        tp_rank=0,
        pp_rank=0,
        gather_objects=lambda value: [value],
        from_first_of_model=lambda value: value,
    )
    nobody: Any = SimpleNamespace()
    engine = RecordedEngine(nobody, tmp_path, alone, made_of=made_of, vocab_size=9)
    record, file = tmp_path / "samples_of.json", tmp_path / "step=0000.index=0-0.jsonl"
    line = {"key": "a", "response_ids": [1, 8], "logprobs": [-1.0, 0], "finish_reason": "eos"}

    @tried(60)
    @given(json_bytes(made_of))
    def check_record(data: bytes) -> None:
        record.write_bytes(data)
        is_read_or_refused(lambda: check_samples(tmp_path, made_of))

    @tried(60)
    @given(json_lines([line] * 3))
    def check_lines(data: bytes) -> None:
        file.write_bytes(data)
        engine._files = [file]
        is_read_or_refused(lambda: engine._read(0))

    check_record()
    check_lines()


def test_the_watch_sees_a_call() -> None:
    class Call:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, ("true",)

    with pytest.raises(AssertionError), nothing_is_called():
        pickle.loads(pickle.dumps(Call()))
