"""A tar from a stranger is refused, or read in place; nothing of it is unpacked or run."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opcd_nemo.config import limits
from opcd_nemo.config.stored import parse_stored
from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import NEMO_CONFIG
from opcd_nemo.formats.nemo import CheckedFiles, open_package
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.torch_dist import DistributedTensors, read_plain
from opcd_nemo.storage import durable
from opcd_nemo.storage.archive import FolderFiles, TarFiles, open_files, read_whole, write_tar
from tests.tiny import refusal

Member = tuple[tarfile.TarInfo, bytes]


def member(name: str, data: bytes = b"x", **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(path: Path, *members: Member, mode: str = "w") -> Path:
    with tarfile.open(path, mode) as file:  # type: ignore[call-overload]
        for info, data in members:
            file.addfile(info, io.BytesIO(data))
    return path


LINK = {"linkname": "/etc/passwd", "size": 0}
HOSTILE = {
    "parent": (member("../outside"), "leads outside"),
    "inner parent": (member("hf/../../outside"), "leads outside"),
    "absolute": (member("/etc/cron.d/job"), "leads outside"),
    "backslash": (member("..\\outside"), "leads outside"),
    "symbolic link": (member("hf", b"", type=tarfile.SYMTYPE, **LINK), "not a plain file"),
    "hard link": (member("hf", b"", type=tarfile.LNKTYPE, **LINK), "not a plain file"),
    "character device": (member("null", b"", type=tarfile.CHRTYPE), "not a plain file"),
    "block device": (member("disk", b"", type=tarfile.BLKTYPE), "not a plain file"),
    "named pipe": (member("pipe", b"", type=tarfile.FIFOTYPE), "not a plain file"),
    "holes": (member("holes", b"", type=tarfile.GNUTYPE_SPARSE), "not a plain file"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_member_is_refused(kind: str, tmp_path: Path) -> None:
    bad, word = HOSTILE[kind]
    path = tar(tmp_path / "a.nemo", member(NEMO_CONFIG), bad)
    assert word in refusal(lambda p: TarFiles(Path(p)), path)


@pytest.mark.parametrize("size", [10**6, 1 << 45])
def test_a_size_beyond_the_file_is_refused(size: int, tmp_path: Path) -> None:
    info, _ = member(NEMO_CONFIG, b"", size=size)
    path = tmp_path / "a.nemo"
    path.write_bytes(info.tobuf() + b"x" * 512)
    assert "bytes" in refusal(lambda p: TarFiles(Path(p)), path)


@pytest.mark.parametrize(
    "kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK]
)
def test_a_header_of_gigabytes_is_not_read(kind: bytes, tmp_path: Path) -> None:
    info, _ = member("x", b"", size=6 << 30, type=kind)
    path = tmp_path / "a.nemo"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 7 << 30)  # no more than a name on the disk
    assert f"a header has {6 << 30} bytes" in refusal(lambda p: TarFiles(Path(p)), path)


def test_headers_without_an_end_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    members = [member(f"{number}") for number in range(4)]
    path = tar(tmp_path / "a.nemo", *members)
    assert len(TarFiles(path).sizes()) == 4
    monkeypatch.setattr("opcd_nemo.config.limits.ARCHIVE_MEMBERS", 3)
    assert "at most 3 members" in refusal(lambda p: TarFiles(Path(p)), path)
    monkeypatch.setattr("opcd_nemo.config.limits.ARCHIVE_HEADERS_BYTES", 1500)
    assert "headers do not end" in refusal(lambda p: TarFiles(Path(p)), path)


def test_a_pipe_is_no_archive(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.nemo")
    assert "is a pipe" in refusal(lambda p: TarFiles(Path(p)), tmp_path / "a.nemo")


def test_a_name_twice_a_compressed_tar_and_other_files_are_refused(tmp_path: Path) -> None:
    twice = tar(tmp_path / "a.nemo", member(NEMO_CONFIG), member(f"./{NEMO_CONFIG}"))
    assert "twice" in refusal(lambda p: TarFiles(Path(p)), twice)
    packed = tar(tmp_path / "b.nemo", member(NEMO_CONFIG), mode="w:gz")
    assert "uncompressed" in refusal(lambda p: TarFiles(Path(p)), packed)
    (tmp_path / "c.nemo").write_bytes(os.urandom(4096))
    assert "uncompressed" in refusal(lambda p: TarFiles(Path(p)), tmp_path / "c.nemo")
    (tmp_path / "d.nemo").write_bytes(b"")
    assert "uncompressed" in refusal(lambda p: TarFiles(Path(p)), tmp_path / "d.nemo")


@pytest.mark.parametrize(
    "name",
    ["model_weights.ckpt", "model_weights/mp_rank_00.pt", "hf/setup.py", "hf/pytorch_model.bin"],
)
def test_pickled_weights_and_programs_are_no_members(name: str, tmp_path: Path) -> None:
    path = tar(tmp_path / "a.nemo", member(NEMO_CONFIG, b"a: 1"), member(name))
    assert "unexpected" in refusal(lambda p: open_package(Path(p)), path)


def test_what_was_packed_is_read_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "hf").mkdir(parents=True)
    (folder / NEMO_CONFIG).write_text("a: 1")
    (folder / "hf" / "config.json").write_bytes(bytes(range(256)))
    path = tmp_path / "a.nemo"
    write_tar(path, folder, [NEMO_CONFIG, "hf/config.json"])
    files = open_files(path)
    assert files.sizes() == {NEMO_CONFIG: 4, "hf/config.json": 256}
    assert files.read("hf/config.json", 10, 5) == bytes(range(10, 15))
    assert read_whole(files, NEMO_CONFIG) == b"a: 1"
    with pytest.raises(ValueError, match="ends before"):
        files.read("hf/config.json", 250, 10)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.nemo", "folder"]
    again = tmp_path / "b.nemo"
    write_tar(again, folder, [NEMO_CONFIG, "hf/config.json"])
    assert again.read_bytes() == path.read_bytes()


class _Runs:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return os.symlink, ("/etc/passwd", str(self._path))


def test_a_pickle_that_runs_something_is_refused(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Runs(ran)))
    assert "posix.symlink" in refusal(lambda p: DistributedTensors(FolderFiles(Path(p))), tmp_path)
    torch.save({"common": _Runs(ran)}, tmp_path / "common.pt")
    assert "plain values" in refusal(lambda p: read_plain(FolderFiles(Path(p))), tmp_path)
    names = durable.files_in(tmp_path)
    durable.write_manifest(tmp_path, {name: durable.measure(tmp_path / name) for name in names})
    assert "plain values" in refusal(open_model, tmp_path)
    assert not ran.exists()


Chunk = tuple[int, int, str]  # first row, rows, file


def write_rows(folder: Path, rows: int, *chunks: Chunk) -> DistributedTensors:
    """A checkpoint of one tensor `x` [rows, 2] whose index says what `chunks` say."""
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        ChunkStorageMetadata,
        Metadata,
        MetadataIndex,
        TensorProperties,
        TensorStorageMetadata,
    )

    about, places = [], {}
    for first, count, name in chunks:
        data = io.BytesIO()
        torch.save(torch.arange(first, first + count)[:, None].expand(count, 2).clone(), data)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data.getvalue())
        offsets = torch.Size([first, 0])
        about.append(ChunkStorageMetadata(offsets=offsets, sizes=torch.Size([count, 2])))
        length = len(data.getvalue())
        places[MetadataIndex("x", offsets)] = _StorageInfo(name, 0, length)
    one = TensorStorageMetadata(
        properties=TensorProperties(dtype=torch.int64), size=torch.Size([rows, 2]), chunks=about
    )
    index = Metadata(state_dict_metadata={"x": one}, storage_data=places)
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    files = [name for name in durable.files_in(folder) if ".." not in name]
    durable.write_manifest(folder, {name: durable.measure(folder / name) for name in files})
    return DistributedTensors(CheckedFiles(FolderFiles(folder)))


def test_pieces_of_a_tensor_are_put_together(tmp_path: Path) -> None:
    tensors = write_rows(tmp_path, 5, (3, 2, "b"), (0, 3, "a"))
    assert tensors.tensor("x").tolist() == [[row, row] for row in range(5)]


@pytest.mark.parametrize(
    "chunks", [[(0, 2, "a"), (0, 2, "b")], [(0, 3, "a"), (2, 2, "b")], [(0, 3, "a")]]
)
def test_pieces_that_overlap_or_leave_gaps_are_refused(chunks: list[Chunk], tmp_path: Path) -> None:
    tensors = write_rows(tmp_path, 4, *chunks)
    with pytest.raises(ValueError, match="each value once"):
        tensors.tensor("x")


def test_thousands_of_pieces_are_compared_at_once(tmp_path: Path) -> None:
    from opcd_nemo.formats.torch_dist import _are_apart, _Piece

    pieces = [
        _Piece(offsets=(row, column), sizes=(2, 3), file="", start=0, length=0)
        for row in range(0, 128, 2)
        for column in range(0, 192, 3)
    ]
    assert len(pieces) == limits.PIECES
    before = time.process_time()
    assert _are_apart(pieces)
    assert time.process_time() - before < 3
    assert not _are_apart([*pieces, pieces[7]])
    assert not _are_apart([*pieces[1:], dataclasses.replace(pieces[0], sizes=(2, 4))])
    assert not _are_apart([*pieces[1:], dataclasses.replace(pieces[0], sizes=(3, 3))])
    point = _Piece(offsets=(), sizes=(), file="", start=0, length=0)
    assert _are_apart([point])
    assert not _are_apart([point, point])


def test_an_index_of_many_megabytes_is_not_unpickled(tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(b"\x80\x04" + b"]" * limits.INDEX_BYTES + b".")
    message = refusal(lambda p: DistributedTensors(FolderFiles(Path(p))), tmp_path)
    assert f"allowed: at most {limits.INDEX_BYTES}" in message


def packed(value: object, compression: int = zipfile.ZIP_STORED) -> bytes:
    """What `torch.save` writes, compressed or not."""
    plain, out = io.BytesIO(), io.BytesIO()
    torch.save(value, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(out, "w", compression) as target:
        for name in source.namelist():
            target.writestr(name, source.read(name))
    return out.getvalue()


def test_a_plain_part_is_as_large_as_its_file(tmp_path: Path) -> None:
    def plain(_: str) -> object:
        return read_plain(FolderFiles(tmp_path))

    file = tmp_path / "common.pt"
    file.write_bytes(packed({"a": torch.zeros(3)}))
    assert torch.equal(read_plain(FolderFiles(tmp_path))["a"], torch.zeros(3))
    file.write_bytes(packed({"a": torch.zeros(10**6)}, zipfile.ZIP_DEFLATED))
    assert file.stat().st_size < 10_000
    assert "common.pt is refused (it is compressed)" in refusal(plain, tmp_path)
    file.write_bytes(packed({"a": [[] for _ in range(limits.PLAIN_OPERATIONS // 2)]}))
    assert "parts" in refusal(plain, tmp_path)
    file.write_bytes(pickle.dumps({"a": 1}))
    assert "common.pt is refused" in refusal(plain, tmp_path)
    data = bytearray(packed({"a": torch.zeros(3)}))
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"data/0") if b"data/0" in data else None)
    data[at + 24 : at + 28] = (1 << 30).to_bytes(4, "little")  # what it says to hold unpacked
    file.write_bytes(data)
    assert "larger unpacked" in refusal(plain, tmp_path)


def test_a_piece_is_no_larger_than_its_values(tmp_path: Path) -> None:
    class Large:
        where = "x"

        def sizes(self) -> dict[str, int]:
            return {**files.sizes(), "a": 6 << 30}

        def read(self, name: str, start: int, count: int) -> bytes:
            assert count < limits.INDEX_BYTES
            return files.read(name, start, count)

    write_rows(tmp_path, 3, (0, 3, "a"))
    files = FolderFiles(tmp_path)
    assert DistributedTensors(Large()).tensor("x").shape == (3, 2)
    index = (tmp_path / ".metadata").read_bytes()
    length = (tmp_path / "a").stat().st_size
    assert index.count(b"M" + length.to_bytes(2, "little")) == 1
    grown = b"J" + (1 << 30).to_bytes(4, "little")
    index = index.replace(b"M" + length.to_bytes(2, "little"), grown)
    (tmp_path / ".metadata").write_bytes(index[:2] + _without_frame(index[2:]))
    with pytest.raises(ValueError, match="not the whole tensor"):
        DistributedTensors(Large()).tensor("x")


def _without_frame(pickled: bytes) -> bytes:
    """A pickle whose first frame does not say how long it is."""
    assert pickled.startswith(b"\x95")
    return pickled[9:]


def test_a_piece_outside_the_folder_is_refused(tmp_path: Path) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    tensors = write_rows(inside, 2, (0, 2, "../secret"))
    with pytest.raises(ValueError, match="in files that are there"):
        tensors.tensor("x")


def test_an_index_changes_no_class(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.metadata import Metadata

    harmful = (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n"
        b"N}\x8c\x08__init__ctorch\nSize\ns\x86b."
    )
    (tmp_path / ".metadata").write_bytes(harmful)
    refusal(lambda p: DistributedTensors(FolderFiles(Path(p))), tmp_path)
    assert Metadata({}).state_dict_metadata == {}


def test_a_tar_of_nested_headers_is_refused(tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type = tarfile.XHDTYPE
    (tmp_path / "a.nemo").write_bytes(header.tobuf() * 3000)
    refusal(lambda p: TarFiles(Path(p)), tmp_path / "a.nemo")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("a: &x [1]\nb: *x", "aliases"),
        ("context: ${oc.env:HOME}", "interpolation"),
        ("a: [{b: '${oc.decode:1}'}]", "interpolation"),
        ("context: {_target_: os.system}", "_target_=os.system"),
        ("a: {b: [{_target_: opcd_nemo.config.plugs.build_plug}]}", "build_plug"),
        ("target: opcd_nemo.launch.ranks.run_recipe", "run_recipe"),
        ("[1, 2]", "no mapping"),
        ("a: [", "YAML"),
        ("!!python/object/apply:os.system [ls]", "YAML"),
    ],
)
def test_a_strangers_configuration_is_refused(text: str, word: str) -> None:
    assert word in refusal(lambda p: parse_stored(text.encode(), str(p)), "config")


def test_folders_are_passed_over_and_a_read_beyond_a_file_names_it(tmp_path: Path) -> None:
    folder = member("hf", b"", type=tarfile.DIRTYPE)
    path = tar(tmp_path / "a.nemo", folder, member("hf/a.json", b"{}"))
    files = TarFiles(path)
    assert files.sizes() == {"hf/a.json": 2}
    with pytest.raises(UserError) as caught:
        files.read("hf/a.json", 1, 2)
    assert (caught.value.key, caught.value.where) == ("hf/a.json", str(path))
    assert caught.value.problem == "ends before 3 bytes"
