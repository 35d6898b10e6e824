"""The paper's models, as far as `conf/shapes` knows them, by their names on the hub."""

from __future__ import annotations

from pathlib import Path

import yaml

from opcd_nemo.formats.shape import ModelConfig, parse_config
from opcd_nemo.plan.parameters import rank_parameters

_FOLDER = Path(__file__).parents[1] / "conf" / "shapes"
_OWNERS = {"Qwen": "Qwen", "Llama": "meta-llama"}


def _read(path: Path) -> ModelConfig:
    return parse_config(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))


def _name(path: Path) -> str:
    owner = next(owner for start, owner in _OWNERS.items() if path.stem.startswith(start))
    return f"{owner}/{path.stem}"


SHAPES: dict[str, ModelConfig] = {
    _name(path): _read(path) for path in sorted(_FOLDER.glob("*.yaml"))
}


def num_parameters(config: ModelConfig) -> int:
    """Parameters of a whole model as Hugging Face stores it, without padding."""
    return rank_parameters(config, tp=1, pp=1, pp_rank=0)
