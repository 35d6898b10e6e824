"""What `test_paper_models.py` asks of a process of its own: Megatron's view of every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg

from opcd_nemo.config.train import ParallelConfig
from opcd_nemo.distributed import _megatron_cpu
from tests.model_shapes import SHAPES
from tests.unit.recipes.test_paper_recipes import RECIPES, recipe

TRANSFORMER = (
    "num_layers hidden_size num_attention_heads num_query_groups tensor_model_parallel_size "
    "pipeline_model_parallel_size context_parallel_size sequence_parallel recompute_granularity "
    "recompute_modules fp8 bf16 params_dtype use_cpu_initialization"
).split()
DDP = "use_distributed_optimizer overlap_grad_reduce grad_reduce_in_fp32".split()
OPTIMIZER = (
    "optimizer bf16 params_dtype main_params_dtype main_grads_dtype exp_avg_dtype exp_avg_sq_dtype "
    "use_distributed_optimizer lr adam_beta1 adam_beta2 weight_decay clip_grad"
).split()


def built(asked: dict[str, Any]) -> dict[str, Any]:
    """Parameters of every rank of the layouts, and the configurations of the recipes."""
    with torch.device("meta"):  # torch notes its factories, which the next line wraps
        assert torch.empty(1).is_meta
    _megatron_cpu.install()
    shapes = {name.split("/")[1]: config for name, config in SHAPES.items()}
    return {
        "parameters": {
            f"{model} {tp} {pp}": parameters(shapes[model], tp, pp)
            for model, tp, pp in asked["layouts"]
        },
        "configurations": {
            name: configurations(shapes[RECIPES[name][0]], name, more)
            for name, more in asked["recipes"].items()
        },
    }


def view(settings: ParallelConfig, device: str, **rank: int) -> Any:
    """What a model asks of its `Parallel`."""
    pp_rank, pp = rank.get("pp_rank", 0), settings.pipeline_model_parallel_size
    return SimpleNamespace(
        tp=settings.tensor_model_parallel_size,
        pp=pp,
        device=torch.device(device),
        layer_spec="local",
        sequence_parallel=settings.sequence_parallel,
        cp=settings.context_parallel_size,
        recompute_modules=tuple(settings.recompute_modules),
        fp8=settings.fp8,
        is_first_stage=pp_rank == 0,
        is_last_stage=pp_rank == pp - 1,
    )


def parameters(shape: Any, tp: int, pp: int) -> list[tuple[int, int]]:
    """(stage, number of parameters) of every rank."""
    from megatron.core import parallel_state

    from opcd_nemo.model.gpt import build_module, transformer_config

    settings: Any = SimpleNamespace(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=1,
        sequence_parallel=tp > 1,
        recompute_modules=["mlp"],
        fp8=None,
    )
    counts = []
    for rank in range(tp * pp):
        store = fake_pg.FakeStore()
        dist.init_process_group("fake", store=store, rank=rank, world_size=tp * pp)
        parallel_state.initialize_model_parallel(tp, pp, create_gloo_process_groups=False)
        pp_rank = parallel_state.get_pipeline_model_parallel_rank()
        parallel = view(settings, "cpu", pp_rank=pp_rank)
        with torch.device("meta"):
            module = build_module(
                shape, transformer_config(shape, parallel, torch.bfloat16), parallel
            )
        assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
        counts.append((pp_rank, sum(parameter.numel() for parameter in module.parameters())))
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    return counts


def configurations(shape: Any, name: str, more: list[str]) -> dict[str, dict[str, Any]]:
    """Megatron's three configurations of a recipe's student on a GPU."""
    from opcd_nemo.model.gpt import transformer_config
    from opcd_nemo.model.language_model import DTYPES
    from opcd_nemo.training.optim import ddp_config, optimizer_config

    config = recipe(name, *more)
    dtype = DTYPES[config.student.dtype]
    made = {
        "transformer": transformer_config(shape, view(config.parallel, "cuda"), dtype),
        "ddp": ddp_config(config.optim),
        "optimizer": optimizer_config(config.optim, dtype),
    }
    keys = {"transformer": TRANSFORMER, "ddp": DDP, "optimizer": OPTIMIZER}
    return {
        group: {key: plain(getattr(made[group], key)) for key in names}
        for group, names in keys.items()
    }


def plain(value: Any) -> Any:
    return str(value) if isinstance(value, torch.dtype) else value
