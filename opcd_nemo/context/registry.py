"""The experience registry: a folder of entries that never change, and a history of selections.

<registry>/entries/<content hash>.json    items, tokens, lineage, scores
<registry>/history.jsonl                  one line a selection, the newest last
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from difflib import unified_diff
from pathlib import Path
from typing import Any

from opcd_nemo.config.spelling import unknown_name
from opcd_nemo.context.items import as_text, content_hash
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.formats.locate import read_json
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.storage.records import read_lines, read_text

_ENTRIES, _HISTORY = "entries", "history.jsonl"
_SHOWN_HASH = 12
_ROLLBACK = "rollback from"
_SELECTION = {"content_hash": str, "reason": str}
_REMEDY = "lines as `opcd registry` writes them: remove this one, or put a copy of the file back"
COMMANDS = ("list", "show", "diff", "rollback")
_USAGE = "list|show [entry]|diff <entry> <entry>|rollback, and registry=<folder>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One experience; `lineage`: model, seed, prompt version, problems; `scores` as they came."""

    items: tuple[str, ...]
    num_tokens: int
    lineage: dict[str, Any]
    scores: dict[str, Any]

    @property
    def hash(self) -> str:
        """Of the items alone: the same items are the same entry, whoever wrote them."""
        return content_hash(self.items)


class Registry:
    """Entries and which of them is selected."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def add(self, entry: Entry) -> Path:
        """Write an entry, unless the registry has its items; returns the entry's file."""
        path = self.folder / _ENTRIES / f"{entry.hash}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(describe(entry), indent=1, ensure_ascii=False))
        return path

    def select(self, entry_hash: str, reason: str) -> None:
        """Select an entry, unless it is selected; earlier selections stay in the history."""
        selected = self.find(entry_hash)
        if self.history() and self.history()[-1]["content_hash"] == selected.hash:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        line = json.dumps({"content_hash": selected.hash, "reason": reason, "time": now})
        path = self.folder / _HISTORY
        before, newline, _ = read_text(path, _REMEDY).rpartition("\n")  # without a torn end
        write_whole(path, f"{before}{newline}{line}\n")

    def rollback(self) -> Entry:
        """Select again what was selected before the present selection; each goes a step further.

        Raises:
            UserError: the history has no other selection.
        """
        hashes = self._not_rolled_back()
        if len(hashes) < 2:
            raise UserError(
                self.folder,
                allowed="a rollback after two or more",
                problem=f"{len(hashes)} selections",
            )
        self.select(hashes[-2], f"{_ROLLBACK} {hashes[-1][:_SHOWN_HASH]}")
        return self.find(hashes[-2])

    def _not_rolled_back(self) -> list[str]:
        """The selections that led to the present selection, which is the last."""
        hashes: list[str] = []
        for line in self.history():
            selected = line["content_hash"]
            if line["reason"].startswith(_ROLLBACK) and selected in hashes[:-1]:
                while hashes.pop() and hashes[-1] != selected:
                    pass
            else:
                hashes.append(selected)
        return hashes

    def history(self) -> list[dict[str, Any]]:
        """Every selection, oldest first; a line that a crash cut off is not one.

        Raises:
            UserError: a line is no selection.
        """
        return read_lines(self.folder / _HISTORY, _SELECTION, _REMEDY)

    def selected(self) -> Entry:
        """Return the selected entry.

        Raises:
            UserError: none is.
        """
        history = self.history()
        if not history:
            raise UserError(
                self.folder,
                allowed="a registry with a selected entry, or the file of an entry",
                problem="nothing is selected",
            )
        return self.find(history[-1]["content_hash"])

    def find(self, entry_hash: str) -> Entry:
        """Return the entry whose hash starts so.

        Raises:
            UserError: no entry or several entries match, or the entry's file has changed.
        """
        known = self._files()
        found = [file for file in known if file.stem.startswith(entry_hash)] if entry_hash else []
        if len(found) != 1:
            names = ", ".join(file.stem[:_SHOWN_HASH] for file in known)
            raise UserError(
                self.folder,
                allowed=f"the start of one of {names or 'none, for there is no entry'}",
                problem=f"{len(found)} entries start with {entry_hash!r}",
            )
        return read_entry(found[0])

    def entries(self) -> list[Entry]:
        """Every entry, by its hash."""
        return [read_entry(file) for file in self._files()]

    def _files(self) -> list[Path]:
        return sorted((self.folder / _ENTRIES).glob("*.json"))


def read_entry(path: Path) -> Entry:
    """Read an entry, or the selected entry of a registry's folder.

    Raises:
        UserError: the entry does not exist, or its content differs from its hash.
    """
    if path.is_dir():
        return Registry(path).selected()
    stored = read_json(path)
    try:
        entry = Entry(
            items=tuple(str(item) for item in stored["items"]),
            num_tokens=int(stored["num_tokens"]),
            lineage=dict(stored["lineage"]),
            scores=dict(stored["scores"]),
        )
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(path, allowed="an entry", problem=f"cannot be read ({error!r})") from error
    score = entry.scores.get("validation")
    if score is not None and type(score) not in (int, float):
        raise UserError(
            path, allowed="a number, or null", problem=f"scores.validation is {score!r}"
        )
    if not entry.items or stored.get("content_hash") != entry.hash:
        raise UserError(
            path,
            allowed=f"that of its {len(entry.items)} items, {entry.hash}",
            problem=f"content_hash is {stored.get('content_hash')}",
        )
    return entry


def table(registry: Registry) -> str:
    """A line for each entry: hash, items, tokens, its last score, whether it is selected."""
    history = registry.history()
    selected = history[-1]["content_hash"] if history else ""
    lines = [f"{'entry':14}{'items':>6}{'tokens':>8}{'score':>8}  written by"]
    for entry in registry.entries():
        mark = "*" if entry.hash == selected else " "
        score = entry.scores.get("validation")
        shown = "" if score is None else f"{score:.3f}"
        lines.append(
            f"{mark} {entry.hash[:_SHOWN_HASH]}{len(entry.items):6}{entry.num_tokens:8}{shown:>8}  "
            f"{entry.lineage.get('model', '')}"
        )
    return "\n".join(lines)


def difference(before: Entry, after: Entry) -> str:
    """The items that differ, as a unified diff."""
    old, new = (as_text(entry.items).splitlines() for entry in (before, after))
    names = before.hash[:_SHOWN_HASH], after.hash[:_SHOWN_HASH]
    return "\n".join(unified_diff(old, new, *names, lineterm=""))


def describe(entry: Entry) -> Mapping[str, Any]:
    """An entry with its hash, as `show` prints them."""
    return {"content_hash": entry.hash, **asdict(entry)}


def answer(words: Sequence[str]) -> str:
    """Do a command of the registry; returns what it shows.

    `registry=<folder>` names the registry; an entry is named by the start of its hash.

    Raises:
        UserError: the command, registry or entry does not exist.
    """
    folders = [word.partition("=")[2] for word in words if word.startswith("registry=")]
    command, *entries = [word for word in words if not word.startswith("registry=")] or [""]
    if command not in COMMANDS:
        key = f"opcd registry {command}".rstrip()
        raise unknown_name(key, COMMANDS, name=command, what="command")
    if len(folders) != 1 or not Path(folders[0]).expanduser().is_dir():
        given = ", ".join(folders) if folders else None
        raise UserError("registry", given, "a folder of a registry, as runs/demo_games/registry")
    return _answer(Registry(Path(folders[0]).expanduser()), command, entries)


def _answer(registry: Registry, command: str, entries: Sequence[str]) -> str:
    counts = {"list": (0,), "show": (0, 1), "diff": (2,), "rollback": (0,)}
    if len(entries) not in counts[command]:
        count = f"{len(entries)} entries are given"
        raise UserError(f"opcd registry {command}", ABSENT, _USAGE, problem=count)
    if command == "list":
        return table(registry)
    if command == "diff":
        return difference(registry.find(entries[0]), registry.find(entries[1]))
    if command == "rollback":
        return f"selected: {registry.rollback().hash}"
    shown = registry.find(entries[0]) if entries else registry.selected()
    return json.dumps(describe(shown), indent=1, ensure_ascii=False)
