"""The paper's recipes as Megatron sees them: settings of a GPU, and true sizes on `meta`.

Megatron builds every rank's module in a process of its own, whose process group sends nothing. Its
layers are those of the layer spec `local`: Transformer Engine, which cannot be imported without a
GPU, shards the same matrices.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.config.train import TrainConfig
from opcd_nemo.plan.parameters import rank_parameters
from tests.fork_server import choose_python
from tests.model_shapes import SHAPES
from tests.unit.recipes.test_paper_recipes import RECIPES, recipe

ROOT = Path(__file__).parents[3]
SHAPE_OF = {name.split("/")[1]: config for name, config in SHAPES.items()}
FP8 = "safety_qwen2p5_7b_1n8g"  # asked for FP8 besides
SPLIT = "math_qwen3_8b_2n8g"  # asked for context parallelism
MORE = {FP8: ["parallel.fp8=hybrid"], SPLIT: ["parallel=h100_2n8g_tp4_cp2"]}
PIPELINED = ("Qwen3-4B", 2, 2)  # model, tp, pp: none of the recipes has stages, and it is tied

PROGRAM = """
import json, sys
from tests.unit.recipes.paper_ranks import built
json.dump(built(json.load(sys.stdin)), sys.stdout)
"""


def models(config: TrainConfig) -> list[str]:
    paths = {config.student.path, config.teacher.path or config.student.path}
    return sorted(path.rpartition("/")[2] for path in paths)


def layouts() -> list[tuple[str, int, int]]:
    found = {PIPELINED}
    for name in RECIPES:
        parallel = recipe(name).parallel
        sizes = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        found |= {(model, *sizes) for model in models(recipe(name))}
    return sorted(found)


@pytest.fixture(scope="module")
def built(fork_server: None) -> dict[str, Any]:
    asked = {
        "layouts": layouts(),
        "recipes": {name: MORE.get(name, []) for name in RECIPES},
    }
    done = subprocess.run(
        [choose_python(), "-c", PROGRAM],
        input=json.dumps(asked),
        capture_output=True,
        cwd=ROOT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize(("model", "tp", "pp"), layouts())
def test_every_rank_holds_the_parameters_of_the_closed_form(
    model: str, tp: int, pp: int, built: dict[str, Any]
) -> None:
    counts = built["parameters"][f"{model} {tp} {pp}"]
    assert len(counts) == tp * pp
    for pp_rank, count in counts:
        assert count == rank_parameters(SHAPE_OF[model], tp=tp, pp=pp, pp_rank=pp_rank)


@pytest.mark.parametrize("name", RECIPES)
def test_megatrons_configurations_are_the_recipes(name: str, built: dict[str, Any]) -> None:
    parallel = recipe(name).parallel
    tp = parallel.tensor_model_parallel_size
    shape = SHAPE_OF[RECIPES[name][0]]
    assert built["configurations"][name] == {
        "transformer": {
            "num_layers": shape.num_layers,
            "hidden_size": shape.hidden_size,
            "num_attention_heads": shape.num_attention_heads,
            "num_query_groups": shape.num_query_groups,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": 1,
            "context_parallel_size": 2 if name == SPLIT else 1,
            "sequence_parallel": tp > 1,
            "recompute_granularity": "selective",
            "recompute_modules": ["mlp"],
            "fp8": "hybrid" if name == FP8 else None,
            "bf16": True,
            "params_dtype": "torch.bfloat16",
            "use_cpu_initialization": False,
        },
        "ddp": {
            "use_distributed_optimizer": True,
            "overlap_grad_reduce": True,
            "grad_reduce_in_fp32": True,
        },
        "optimizer": {
            "optimizer": "adam",
            "bf16": True,
            "params_dtype": "torch.bfloat16",
            "main_params_dtype": "torch.float32",
            "main_grads_dtype": "torch.float32",
            "exp_avg_dtype": "torch.float32",
            "exp_avg_sq_dtype": "torch.float32",
            "use_distributed_optimizer": True,
            "lr": 5e-6,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "weight_decay": 0.01,
            "clip_grad": 1.0,
        },
    }
