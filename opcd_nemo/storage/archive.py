"""Files of a folder or of an uncompressed tar (`.nemo`), read in place.

A tar may come from anywhere. Its headers are checked as a whole before any member is read.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.storage.durable import naming
from opcd_nemo.storage.plain_file import open_plain

_TAR = "a whole uncompressed tar"


class Files(Protocol):
    """Named files; names use `/` and are relative."""

    where: str

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        ...

    def read(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes of a file from `start`."""
        ...


def read_whole(files: Files, name: str, most: int = limits.WHOLE_FILE_BYTES) -> bytes:
    """A small file, of at most so many bytes.

    Raises:
        UserError: the file does not exist, or is too large for its name.
    """
    size = files.sizes().get(name)
    if size is None:
        raise UserError(
            files.where, allowed="a file or folder that has it", problem=f"has no {name}"
        )
    if size > most:
        raise UserError(files.where, allowed=f"at most {most}", problem=f"{name} has {size} bytes")
    return files.read(name, 0, size)


class FolderFiles:
    """The files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.where = str(folder)
        self._folder = folder

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {
            str(path.relative_to(self._folder)): path.stat().st_size
            for path in sorted(self._folder.rglob("*"))
            if path.is_file()
        }

    def read(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes of a file from `start`."""
        return _read(self._folder / name, start, count, self.where)


class _Headers:
    """A tar that tarfile may read: its headers are neither endless nor enormous."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, limits.ARCHIVE_HEADERS_BYTES
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Bytes of a header; tarfile reads no others."""
        if not 0 <= size <= limits.ARCHIVE_HEADER_BYTES:
            raise ValueError(f"a header has {size} bytes")
        self._left -= size
        if self._left < 0:
            raise ValueError("its headers do not end")
        return self._file.read(size)


def _opened(file: BinaryIO) -> tarfile.TarFile:
    return tarfile.open(fileobj=_Headers(file), mode="r:")  # type: ignore[call-overload,no-any-return]


class TarFiles:
    """The regular files of an uncompressed tar."""

    def __init__(self, path: Path) -> None:
        """Check every header.

        Raises:
            UserError: not a whole uncompressed tar, or a member that a packed folder does not
                have: a link, a device, a path that leads outside, a size beyond the file's end.
        """
        self.where = str(path)
        self._path = path
        self._members: dict[str, tuple[int, int]] = {}  # name -> start, bytes
        end = path.stat().st_size
        try:
            with open_plain(path) as file, _opened(file) as tar:
                for number, member in enumerate(tar):
                    if number == limits.ARCHIVE_MEMBERS:
                        raise UserError(
                            self.where, allowed=f"at most {limits.ARCHIVE_MEMBERS} members"
                        )
                    self._add(member, end)
        except UserError:
            raise
        except Exception as error:  # headers of a hostile tar make tarfile raise anything
            first = str(error).splitlines()[0] if str(error) else repr(error)
            raise UserError(self.where, allowed=_TAR, problem=first) from error
        if not self._members:
            raise UserError(self.where, allowed=_TAR, problem="holds no files")

    def _add(self, member: tarfile.TarInfo, end: int) -> None:
        name = _plain_name(member.name)
        if name is None:
            raise self._refusal(member, "leads outside", "relative paths without '..'")
        if member.isdir():
            return
        if not member.isreg() or member.issparse():
            raise self._refusal(member, "is not a plain file", "files and folders")
        if member.size < 0 or member.offset_data + member.size > end:
            raise self._refusal(member, f"claims {member.size} bytes", "what the file holds")
        if name in self._members:
            raise self._refusal(member, "is there twice", "every name once")
        self._members[name] = member.offset_data, member.size

    def _refusal(self, member: tarfile.TarInfo, problem: str, allowed: str) -> UserError:
        return UserError(
            f"member {member.name!r}", problem=problem, allowed=allowed, where=self.where
        )

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {name: size for name, (_, size) in self._members.items()}

    def read(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes of a file from `start`."""
        first, size = self._members[name]
        if start < 0 or count < 0 or start + count > size:
            raise _too_short(self.where, name, start + count)
        return _read(self._path, first + start, count, self.where)


def _plain_name(name: str) -> str | None:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        return None
    return "/".join(parts)


def _read(path: Path, start: int, count: int, where: str) -> bytes:
    with naming(path), path.open("rb") as file:
        file.seek(start)
        data = file.read(count)
    if len(data) != count:
        raise _too_short(where, path.name, start + count)
    return data


def _too_short(where: str, name: str, end: int) -> UserError:
    return UserError(name, problem=f"ends before {end} bytes", allowed="a whole file", where=where)


def open_files(path: Path) -> Files:
    """The files of a folder or of a tar.

    Raises:
        UserError: as of `TarFiles`.
    """
    return FolderFiles(path) if path.is_dir() else TarFiles(path)


def write_tar(path: Path, folder: Path, names: Collection[str]) -> None:
    """Pack files of a folder into a tar and force it to the disk.

    Raises:
        OSError: the disk refuses; a part of the tar may be left behind.
    """
    with naming(path), path.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name in names:
                tar.add(folder / name, arcname=name, recursive=False, filter=_anonymous)
        file.flush()
        os.fsync(file.fileno())


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without the owner's name and the time: equal folders give equal files."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o644
    return member
