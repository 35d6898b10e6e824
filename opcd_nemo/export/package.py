"""Writes a student as a package: `model_folder`'s folder, or a `.nemo` file of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from opcd_nemo.checkpoint import save_load as checkpoint
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import SaveError
from opcd_nemo.export.provenance import Provenance
from opcd_nemo.formats.locate import NEMO_CONFIG, write_json
from opcd_nemo.formats.nemo import HF, WEIGHTS
from opcd_nemo.formats.shape import hf_config
from opcd_nemo.formats.tokenizer import write_tokenizer
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.storage import durable
from opcd_nemo.storage.archive import write_tar
from opcd_nemo.storage.ranks import on_rank_0
from opcd_nemo.storage.run_folder import RunFolder


def write_package(
    path: Path,
    student: LanguageModel,
    *,
    config_yaml: str,
    tokenizer_path: str,
    provenance: Provenance,
    run_folder: RunFolder,
) -> None:
    """Write `path`: a file when it ends in `.nemo`, else a folder. Collective over the world.

    Args:
        path: what has this name is replaced, at once and only by a whole package.
        student: its weights are stored as this layout holds them; any layout reads them.
        config_yaml: the text of `model_config.yaml`.
        tokenizer_path: the model whose tokenizer the student has.
        provenance: what goes with the weights.
        run_folder: of `path`; if another job holds the folder, it refuses just before the rename.

    Raises:
        SaveError: on every rank, when the package cannot be written; nothing is left behind.
    """
    parallel = student.parallel
    folder = durable.partial(path)

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        (folder / HF).mkdir(parents=True)
        (folder / WEIGHTS).mkdir()
        (folder / NEMO_CONFIG).write_text(config_yaml, encoding="utf-8")
        write_json(folder / HF / "config.json", hf_config(student.config, student.dtype))
        write_tokenizer(tokenizer_path, folder / HF)
        for name, values in provenance.files().items():
            write_json(folder / name, values)

    def publish() -> None:
        names = durable.files_in(folder)
        entries = {name: durable.measure(folder / name, sync=True) for name in names}
        if path.suffix == ".nemo":
            durable.write_manifest(folder, entries)
            tar = folder / "package.tar"  # in the folder that goes whatever happens
            write_tar(tar, folder, _small_first([*names, durable.MANIFEST]))
            run_folder.publish_file(tar, path)
        else:
            run_folder.publish(folder, path, entries)

    try:
        _on_rank_0(parallel, path, prepare)
        checkpoint.save_weights(folder / WEIGHTS, student)
        _on_rank_0(parallel, path, publish)
    finally:
        if parallel.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def _on_rank_0(parallel: Parallel, path: Path, write: Callable[[], None]) -> None:
    """Let rank 0 write; when rank 0 cannot, every rank raises. Collective over the world."""
    try:
        on_rank_0(parallel, write)
    except (OSError, ValueError) as failure:
        words = durable.describe(failure) if isinstance(failure, OSError) else str(failure)
        raise SaveError(f"{path} is not written: {words}") from failure


def _small_first(names: list[str]) -> list[str]:
    """Weights last: who looks for the configuration need not pass them."""
    return sorted(names, key=lambda name: (name.startswith(WEIGHTS), name != NEMO_CONFIG, name))
