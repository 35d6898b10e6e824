"""The content of a `.nemo` file, packed or unpacked, and a training checkpoint's model record.

    model_config.yaml     the run's configuration, as NeMo wants it
    hf/                   config.json, tokenizer files, chat template, generation settings
    model_weights/        the student, a torch_dist checkpoint that any layout reads
    context.json evaluation.json licence.json manifest.json

Export to Hugging Face is `hf/` with safetensors added.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import NEMO_CONFIG, model_kind, parse_json, resolve_model_path
from opcd_nemo.formats.torch_dist import read_plain
from opcd_nemo.storage import durable
from opcd_nemo.storage.archive import Files, FolderFiles, open_files, read_whole
from opcd_nemo.storage.durable import MANIFEST

HF, WEIGHTS = "hf/", "model_weights/"
CONTEXT, EVALUATION, LICENCE = "context.json", "evaluation.json", "licence.json"
_BLOCK = 1 << 22
_MAX_HOPS = 16
_ALLOWED = re.compile(
    rf"{NEMO_CONFIG}|{CONTEXT}|{EVALUATION}|{LICENCE}|{MANIFEST}"
    rf"|{HF}[\w.-]+\.(json|jinja|txt|model|md)"
    rf"|{WEIGHTS}(\.metadata|metadata\.json|common\.pt|__\d+_\d+\.distcp)"
)


class CheckedFiles:
    """Files with a manifest: each is compared with it, whole, before its first byte is used.

    A rank that needs some of the files reads no others.
    """

    def __init__(self, files: Files) -> None:
        """Read the manifest.

        Raises:
            UserError: the manifest is missing, or names other files.
        """
        self.where = files.where
        self._files, self._sizes = files, files.sizes()
        members = [name for name in self._sizes if name != MANIFEST]
        text = read_whole(files, MANIFEST, limits.SETTINGS_BYTES)
        self._unchecked = durable.parse_manifest(text, members, self.where)

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return self._sizes

    def read(self, name: str, start: int, count: int) -> bytes:
        """`count` bytes of a file from `start`.

        Raises:
            UserError: the file is not as the manifest says.
        """
        if name not in self._sizes:
            raise UserError(self.where, allowed="what its manifest says", problem=f"has no {name}")
        entry = self._unchecked.get(name)
        if entry is not None:
            self._check(name, entry)
            del self._unchecked[name]
        return self._files.read(name, start, count)

    def _check(self, name: str, entry: durable.Entry) -> None:
        digest, size = hashlib.sha256(), self._sizes[name]
        for start in range(0, size, _BLOCK):
            digest.update(self._files.read(name, start, min(_BLOCK, size - start)))
        if (size, digest.hexdigest()) != (entry.num_bytes, entry.sha256):
            raise UserError(
                self.where,
                allowed="what its manifest says",
                problem=f"{name} is damaged ({size} bytes of {entry.num_bytes}, or another "
                "SHA-256)",
            )


def open_training_checkpoint(path: Path) -> Files:
    """The files of a checkpoint of train.py.

    Raises:
        UserError: it has no manifest.
    """
    return CheckedFiles(FolderFiles(path))


def open_package(path: Path) -> Files:
    """The files of a `.nemo`, or of a folder that a `.nemo` was unpacked to.

    Raises:
        UserError: a file that a package does not have (pickled weights, for one), or as of
            `archive.TarFiles`.
    """
    files = open_files(path)
    if unknown := [name for name in files.sizes() if _ALLOWED.fullmatch(name) is None]:
        raise UserError(
            path,
            allowed=f"{NEMO_CONFIG}, {HF}, {WEIGHTS} (torch_dist), {CONTEXT}, {EVALUATION}, "
            f"{LICENCE}, {MANIFEST}",
            problem=f"member {unknown[0]!r} is unexpected",
        )
    return CheckedFiles(files)


def read_record(files: Files, name: str) -> dict[str, Any]:
    """One of the package's JSON files."""
    text = read_whole(files, name, limits.RECORD_BYTES)
    return parse_json(text, f"{files.where}: {name}")


def unpack_hf(files: Files) -> tempfile.TemporaryDirectory[str]:
    """The `hf/` files in a folder that is removed with the returned object."""
    folder = tempfile.TemporaryDirectory()
    for name in files.sizes():
        if name.startswith(HF):
            (Path(folder.name) / name.removeprefix(HF)).write_bytes(
                read_whole(files, name, limits.TOKENIZER_BYTES)
            )
    return folder


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCheckpoint:
    """What a checkpoint of train.py says beside its tensors.

    `model`: fields of the student's `ModelConfig`; `config`: of the run, with its context hash;
    `context`: as `provenance.describe_context` gives it.
    """

    step: int
    model: dict[str, Any]
    config: dict[str, Any]
    context: dict[str, Any]


def read_checkpoint(path: Path) -> TrainingCheckpoint:
    """Read a checkpoint's plain part.

    Raises:
        UserError: the checkpoint is damaged, or `opcd train` has not written it.
    """
    plain = read_plain(open_training_checkpoint(path))
    try:
        state, model = plain["common"], plain["model"]
        found = TrainingCheckpoint(
            step=int(state["global_step"]),
            model=dict(model),
            config=dict(state["opcd"]["config"]),
            context=dict(state["opcd"]["context"]),
        )
        str(found.config["student"]["path"])
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(
            path,
            allowed="a checkpoint of this version's train.py",
            problem=f"its {error} is missing",
        ) from error
    return found


def base_path(path: str) -> str:
    """Where the tokenizer of a model is: follows training checkpoints to what they started from.

    Raises:
        UserError: a model on the way does not exist, or the way does not end.
    """
    for _ in range(_MAX_HOPS):
        found = resolve_model_path(path)
        if model_kind(found) != "checkpoint":
            return path
        path = str(read_checkpoint(found).config["student"]["path"])
    raise UserError(
        path,
        allowed="one that starts from a model",
        problem="student.path leads from checkpoint to checkpoint without an end",
    )
