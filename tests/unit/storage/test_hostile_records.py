"""Whatever becomes of the bytes of a record, its reader gives what was written or refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.metrics import metric_line
from opcd_nemo.storage import durable
from opcd_nemo.storage.lock import lock_folder
from opcd_nemo.storage.metrics_file import cut_metrics
from opcd_nemo.storage.records import read_lines

MUTANTS = 300
BYTES = b'{}[]":,0123456789eE-.nultrfasx\x00\xff\n\r'
WORDS = (b"null", b"true", b"1e999", b"-1", b"[]", b'"x"', b"NaN", b"9" * 5000, b"\\ud800")
FIELDS = {"name": str, "scores": list[float]}


def mutant(good: bytes, random: Random) -> bytes:
    for _ in range(random.choice((1, 1, 2, 5))):
        start, length = random.randrange(len(good) + 1), random.randrange(1, 30)
        middle = random.choice(
            (
                bytes(random.choices(BYTES, k=random.randrange(1, 8))),
                random.choice(WORDS),
                good[: random.randrange(len(good) + 1)],
                b"",
            )
        )
        good = good[:start] + middle + good[start + random.choice((0, length)) :]
    return good


def metrics(file: Path) -> None:
    before = file.read_bytes()
    try:
        cut_metrics(file, 3)
    except UserError:
        assert file.read_bytes() == before
        raise
    assert [json.loads(line)["step"] for line in file.read_bytes().splitlines()] == [0, 1, 2]


def manifest(file: Path) -> None:
    entries = durable.read_manifest(file.parent)
    assert set(entries) == {"a"}
    durable.find_damage(file.parent, entries, ["a"])


def records(file: Path) -> None:
    for record in read_lines(file, FIELDS, "a copy"):
        assert isinstance(record["name"], str)
        assert sum(record["scores"]) < float("inf")


def lock(file: Path) -> None:
    with lock_folder(file.with_name("run")) as held:
        held.check()


READERS: dict[str, tuple[Callable[[Path], None], bytes]] = {
    "metrics.jsonl": (metrics, "".join(metric_line(n, {"x": 0.5}) for n in range(5)).encode()),
    durable.MANIFEST: (manifest, json.dumps({"a": [1, "0" * 64]}).encode()),
    "records.jsonl": (records, b'{"name": "a", "scores": [0.5, 1]}\n' * 2),
    ".run.lock": (lock, b"host vm, pid 12, started 2026, attempt 12.1\n"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_mutant_is_read_or_refused(name: str, tmp_path: Path) -> None:
    read, good = READERS[name]
    (tmp_path / "a").write_bytes(b"x")
    random = Random(0)
    for _ in range(MUTANTS):
        (tmp_path / name).write_bytes(mutant(good, random))
        with suppress(UserError):
            read(tmp_path / name)
