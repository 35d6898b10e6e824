"""Folders that are complete or absent: fsync, a manifest of sizes and digests, an atomic rename."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from opcd_nemo.errors import UserError
from opcd_nemo.storage.attempt import this_attempt

MANIFEST = "manifest.json"
_PARTIAL, _REPLACED = ".partial", ".replaced"
_READ_BYTES = 1 << 22
MISSING = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
"""What a disk says of a file that is not there; all else that it says is no damage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Size and SHA-256 of a file."""

    num_bytes: int
    sha256: str


def measure(file: Path, *, sync: bool = False) -> Entry:
    """Read a file once; `sync` forces it to the disk before."""
    digest, num_bytes = hashlib.sha256(), 0
    with naming(file), file.open("rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        while block := opened.read(_READ_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return Entry(num_bytes=num_bytes, sha256=digest.hexdigest())


def files_in(folder: Path) -> list[str]:
    """Names of all files below `folder` except the manifest, sorted.

    Raises:
        OSError: a folder cannot be listed; `Path.rglob` would take it for an empty one.
    """
    found = []
    for root, _, names in os.walk(folder, onerror=_raise):
        found += [path for name in names if (path := Path(root, name)).is_file()]
    return sorted(name for path in found if (name := str(path.relative_to(folder))) != MANIFEST)


def _raise(error: OSError) -> None:
    raise error


def write_manifest(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Say what the folder must hold."""
    lines = {name: [entries[name].num_bytes, entries[name].sha256] for name in sorted(entries)}
    with naming(folder / MANIFEST), (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(lines, file, indent=0)
        file.flush()
        os.fsync(file.fileno())


def seal(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Give a finished folder its manifest and force both to the disk; its files already are."""
    write_manifest(folder, entries)
    sync(folder)


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder in which nothing can be written, without making it.

    Raises:
        UserError: of this key.
    """
    try:
        with suppress(FileNotFoundError):
            folder.lstat()  # too long a name, or below a file
        nearest = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(key, folder, "a writable folder", problem=error.strerror) from error


def check_folders(key: str, value: object, folders: Sequence[Path]) -> None:
    """Refuse something else where folders are, or will be.

    Raises:
        UserError: of this key and its value.
    """
    for folder in folders:
        if os.path.lexists(folder) and not folder.is_dir():
            allowed = "one under which nothing else is"
            raise UserError(key, value, allowed, problem=f"{folder} is no folder")


def replace_folder(temporary: Path, final: Path) -> None:
    """Give a sealed folder its name; a folder that had the name is removed.

    A folder cannot be renamed onto another that has files. Between the two renames the old folder
    has a name that `clean` knows, so that a crash there loses neither.
    """
    replaced = final.with_name(f".{final.name}{_REPLACED}")
    shutil.rmtree(replaced, ignore_errors=True)
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file that is complete or absent."""
    temporary = partial(file)
    with naming(file), temporary.open("wb") as opened:
        opened.write(content.encode() if isinstance(content, str) else content)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)


def partial(final: Path) -> Path:
    """Where a folder is written before it is published; each attempt of a job uses another name."""
    attempt = this_attempt()
    name = final.name if attempt is None else f"{final.name}.{attempt}"
    return final.with_name(f".{name}{_PARTIAL}")


def clean(folder: Path) -> None:
    """Remove what a crash left in a folder of published folders; no published folder is lost."""
    for path in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)  # a node that was given up may still write into it
    for path in folder.glob(f".*{_REPLACED}"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(_REPLACED))
        if final.exists():
            shutil.rmtree(path)
        else:  # the crash came between the two renames
            path.rename(final)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let a disk's error say which file: one that comes while bytes are written names none.

    Raises:
        OSError: with the name.
    """
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def describe(error: OSError) -> str:
    """What could not be written or read, in a line."""
    where = "" if error.filename is None else f"{error.filename}: "
    return f"{where}{error.strerror} (errno {error.errno})"


def set_aside(path: Path, ending: str = "") -> None:
    """Rename `path` to the first free one of `<path><ending>`, `<path><ending>.1`, ..."""
    target, number = path.with_name(f"{path.name}{ending}"), 0
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{ending}.{number}")
    path.rename(target)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """What the folder must hold.

    Raises:
        UserError: there is no manifest, or the folder's files are not those it names.
        OSError: the disk does not say.
    """
    try:
        if not stat.S_ISREG((folder / MANIFEST).stat().st_mode):  # reading a pipe may not end
            raise FileNotFoundError("no plain file")
        text = (folder / MANIFEST).read_text(encoding="utf-8")
    except (*MISSING, ValueError) as error:
        raise _unlike_manifest(MANIFEST, f"cannot be read ({error})", str(folder)) from error
    return parse_manifest(text, files_in(folder), str(folder))


def parse_manifest(text: str | bytes, names: Sequence[str], where: str) -> dict[str, Entry]:
    """The manifest of a folder with files of these names; `where` is the folder, for errors.

    Raises:
        UserError: it cannot be read, or names other files.
    """
    try:
        lines = json.loads(text)
        entries = {name: Entry(num_bytes=line[0], sha256=line[1]) for name, line in lines.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _unlike_manifest(MANIFEST, f"cannot be read ({error})", where) from error
    if missing := sorted(entries.keys() - names):
        raise _unlike_manifest(missing[0], "is missing", where)
    if unknown := sorted(set(names) - entries.keys()):
        raise _unlike_manifest(unknown[0], "is not in the manifest", where)
    return entries


def _unlike_manifest(name: str, problem: str, where: str) -> UserError:
    return UserError(name, problem=problem, allowed="the files of the manifest", where=where)


def find_damage(folder: Path, entries: Mapping[str, Entry], names: Sequence[str]) -> str | None:
    """The first of these files that is not as the manifest says, with what is wrong.

    Raises:
        OSError: the disk does not say.
    """
    for name in names:
        try:
            wanted, found = entries[name], measure(folder / name)
        except MISSING:
            return f"{folder / name}: is missing"
        if found.num_bytes != wanted.num_bytes:
            return f"{folder / name}: has {found.num_bytes} bytes instead of {wanted.num_bytes}"
        if found.sha256 != wanted.sha256:
            return f"{folder / name}: its SHA-256 is not the manifest's"
    return None


def sync(path: Path) -> None:
    """Force to the disk what was added to a file, or renamed in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
