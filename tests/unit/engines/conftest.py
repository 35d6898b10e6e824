"""A model's parameters without Megatron, and an engine of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opcd_nemo.engines.vllm import VllmEngine
from opcd_nemo.formats.locate import write_json
from opcd_nemo.formats.shape import ModelConfig, hf_config, tensor_shapes
from opcd_nemo.formats.sharding import megatron_shard, parameter_names
from tests.tiny import model_config
from tests.unit.engines.fake_vllm import FakeVllm, Listening


class Shards:
    """A `LanguageModel` of one stage whose tp ranks are all here."""

    dtype = torch.float32

    def __init__(self, config: ModelConfig, *, tp: int = 1, seed: int = 0) -> None:
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        self.tensors = {
            name: torch.randn(shape, generator=generator)
            for name, shape in tensor_shapes(config).items()
        }
        self._shards: dict[str, list[torch.Tensor]] = {}
        for name in parameter_names(config, "local"):
            self._shards[name] = [
                megatron_shard(
                    self.tensors.__getitem__,
                    config,
                    name,
                    layer=self.global_layer(name),
                    tp_size=tp,
                    tp_rank=rank,
                    spec="local",
                )
                for rank in range(tp)
            ]
        first = {name: shards[0] for name, shards in self._shards.items()}
        self.module = SimpleNamespace(named_parameters=lambda: first.items())
        self.parallel = SimpleNamespace(
            rank=0, world_size=1, tp=tp, tp_rank=0, pp=1, pp_rank=0, dp=1, dp_rank=0,
            layer_spec="local", device=torch.device("cpu"), barrier=lambda: None,
            gather_objects=lambda value: [value], from_first_of_model=lambda value: value,
            gather_tp_shards=self._all_of,
        )  # fmt: skip

    def global_layer(self, name: str) -> int | None:
        return int(name.split(".")[2]) if name.startswith("decoder.layers.") else None

    def _all_of(self, shard: torch.Tensor) -> list[torch.Tensor]:
        return next(
            all_ for all_ in self._shards.values() if all_[0].data_ptr() == shard.data_ptr()
        )


SETTINGS: dict[str, Any] = {
    "urls": [],
    "launch": False,
    "python": None,
    "flags": [],
    "gpus": 0,
    "colocated": False,
    "max_batch_size": 4,
    "timeout_s": 30.0,
    "start_timeout_s": 1.0,
    "max_restarts": 0,
}


def make_engine(model: Any, folder: Path, **changes: Any) -> VllmEngine:
    return VllmEngine(model, (2,), **(SETTINGS | {"folder": str(folder)} | changes))


@pytest.fixture
def model() -> Shards:
    return Shards(model_config())


@pytest.fixture
def vllm(tmp_path: Path, model: Shards) -> FakeVllm:
    served = tmp_path / "served"
    served.mkdir()
    write_json(served / "config.json", hf_config(model.config, torch.float32))
    return FakeVllm(str(served))


@pytest.fixture
def url(vllm: FakeVllm) -> Iterator[str]:
    with Listening(vllm) as listening:
        yield listening.url
