"""Where a model is exported to is checked before anything is read, and nothing is made."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from opcd_nemo.errors import SaveError, UserError
from opcd_nemo.export.convert import export
from tests.quick_compose import compose
from tests.tiny import write_chat_model


def refused(folder: Path, *words: str) -> UserError:
    settings = compose("export", [f"from={folder}/tiny", *words])
    with pytest.raises(UserError) as caught:
        export(settings, lambda: compose("train", []))
    return caught.value


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export")
    write_chat_model(made / "tiny")
    (made / "file").write_text("")
    (made / "dangling").symlink_to("nowhere/at/all")
    return made


@pytest.mark.parametrize(
    "to",
    [
        *("{folder}/file/x", "{folder}/file", "{folder}/dangling", "{folder}/dangling/x"),
        *("/dev/full", "/dev/full/x", "/proc/x", "{folder}/" + "x" * 300, "{folder}/'a\nb'"),
        *("{folder}", "{folder}/tiny/x", "{folder}/" + "y" * 300 + "/x"),
        *("' '", "{folder}/new/..", "{folder}/new/../../x"),
    ],
)
def test_a_target_that_cannot_be_written_is_refused(to: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    assert refused(folder, f"to={to.format(folder=folder)}").key == "to"
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("parallel.sequence_parallel=true", "parallel.sequence_parallel"),
        ("parallel.num_ranks=5", "parallel.num_ranks"),
        ("parallel.fp8=hybrid", "parallel.fp8"),
        ("parallel.timeout_s=long", "parallel.timeout_s"),
        ("max_file_bytes=0", "max_file_bytes"),
    ],
)
def test_a_layout_that_an_export_does_not_have_is_refused(
    word: str, key: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert refused(folder, f"to={folder}/new", word).key == key


def test_folders_above_the_target_are_made(folder: Path) -> None:
    settings = compose("export", [f"from={folder}/tiny", f"to={folder}/a/b/c"])
    assert export(settings, lambda: compose("train", [])) == f"{folder}/a/b/c"
    assert (folder / "a/b/c/config.json").is_file()


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(folder: Path) -> None:
    before = sorted(folder.iterdir())
    settings = compose("export", [f"from={folder}/tiny", f"to={folder}/full"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SaveError, match=r"full is not written: .*File too large"):
            export(settings, lambda: compose("train", []))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(folder.iterdir()) == before
