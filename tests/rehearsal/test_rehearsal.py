"""Ranks at real widths go through whole steps on fake GPUs, and a fault in the project is seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.rehearsal.command import Player
from opcd_nemo.rehearsal.compare import mismatches
from opcd_nemo.rehearsal.devices import compiled_guard
from opcd_nemo.rehearsal.rank import Task
from opcd_nemo.rehearsal.wheels import unpacked

ROOT = Path(__file__).parents[2]
QWEN = ("recipe=math_qwen3_8b_to_4b_2n8g",)
PIPELINE = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")
CONTEXT = ("parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2")
LLAMA = ("recipe=medical_llama3p2_3b_1n8g",)
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ compiles the guard")


@pytest.fixture(scope="session", autouse=True)
def guard() -> None:
    compiled_guard()


@pytest.fixture(scope="session")
def image() -> list[str]:
    """megatron-core and Transformer Engine as NVIDIA's image has them."""
    try:
        return [
            str(unpacked("megatron_core", "megatron-core", "0.18.0")),
            str(unpacked("transformer_engine", "transformer_engine", "2.16.1")),
        ]
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def player() -> Iterator[Player]:
    """Of ranks on the installed megatron-core; what they print is pytest's."""
    with Player([str(ROOT)]) as found:
        yield found


def task_of(words: Sequence[str], rank: int, world: int, *, with_te: bool = False) -> Task:
    return Task(
        rank=rank,
        world_size=world,
        words=[*words, *(["rehearse.transformer_engine=2.16.1"] if with_te else [])],
        layers=2,
        lengths={"prompt": 24, "context": 40, "response": 48},
        tokens=3,
        gpu="H100",
        memory_gib=80.0,
        per_node=8,
        with_te=with_te,
    )


def start(
    words: Sequence[str], rank: int, world: int, path: Sequence[str] = (), fault: str | None = None
) -> subprocess.CompletedProcess[str]:
    task = task_of(words, rank, world, with_te=bool(path))
    module = ["tests.rehearsal.faults", fault] if fault else ["opcd_nemo.rehearsal.rank"]
    given = os.environ.get("PYTHONPATH", "")
    return subprocess.run(
        [sys.executable, "-m", *module],
        input=json.dumps(asdict(task)) + "\n",
        env=os.environ | {"PYTHONPATH": os.pathsep.join((*path, given)), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def played(player: Player, words: Sequence[str], rank: int) -> dict[str, Any]:
    result = player.play(task_of(words, rank, 16))
    assert result is not None
    return result


def syncs(result: dict[str, Any], phase: str) -> int:
    return sum(result["syncs"].get(phase, {}).values())


@pytest.fixture(scope="session")
def qwen(player: Player) -> list[dict[str, Any]]:
    """Two ranks of tp 4 and dp 4, with responses of other lengths."""
    return [played(player, QWEN, rank) for rank in (0, 5)]


def test_ranks_meet_in_every_collective(qwen: list[dict[str, Any]]) -> None:
    assert mismatches(qwen) == []
    names = {event["name"] for result in qwen for event in result["collectives"]}
    assert {"allreduce_", "_allgather_base_", "_reduce_scatter_base_"} <= names


def test_what_a_rank_holds_is_what_its_models_weigh(qwen: list[dict[str, Any]]) -> None:
    for result in qwen:
        assert result["place"]["tp"][1] == result["place"]["dp"][1] == 4
        assert 1.8 < result["peak_bytes"]["build"] / 2**30 < 1.9
        assert len({*result["held_bytes"].values()}) == 1  # before and after the resume


def test_a_token_waits_for_the_gpu_once_and_a_micro_batch_twice(qwen: list[dict[str, Any]]) -> None:
    """3 tokens, then the rows end; 5 micro-batches in 3 steps."""
    rank = qwen[0]
    reads = {name.partition(" ")[2]: n for name, n in rank["syncs"]["rollout"].items()}
    engine = sum(n for name, n in reads.items() if name.startswith("engines/megatron.py"))
    assert engine == 4
    assert syncs(rank, "rollout") == 5  # and which rows are left
    assert syncs(rank, "student") == 2 * 5  # the loss, and how far the engine is from it


@pytest.mark.parametrize(("words", "ranks"), [(PIPELINE, (0, 8)), (CONTEXT, (0, 3))])
def test_ranks_of_a_pipeline_and_of_context_parallelism_meet(
    player: Player, words: tuple[str, ...], ranks: tuple[int, ...]
) -> None:
    results = [played(player, (*QWEN, *words), rank) for rank in ranks]
    assert mismatches(results) == []
    waits = [name for result in results for names in result["syncs"].values() for name in names]
    assert not [name for name in waits if name.startswith("nonzero")]


def test_transformer_engines_layers_train_and_resume(image: list[str]) -> None:
    done = start(LLAMA, 1, 8, image)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert result["layer_spec"] == "te"
    names = {name for counts in result["launches"].values() for name in counts}
    assert {"te.generic_gemm", "te.rmsnorm_bwd", "te.multi_tensor_adam"} <= names
    assert result["peak_bytes"]["resume"] > 0


@pytest.mark.parametrize(
    ("fault", "words", "message"),
    [
        ("cpu_tensor_in_the_loss", LLAMA, "device"),
        ("transposed_output_is_viewed", LLAMA, "view"),
    ],
)
def test_a_crash_is_seen(fault: str, words: tuple[str, ...], message: str) -> None:
    done = start(words, 0, 8, fault=fault)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("wrong_type_into_a_product", "Found input dtype: torch.float32"),
        ("unknown_parameter", "KeyError"),
    ],
)
def test_a_crash_of_transformer_engine_is_seen(image: list[str], fault: str, message: str) -> None:
    done = start(LLAMA, 0, 8, image, fault=fault)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize(
    ("fault", "ranks", "named"),
    [
        ("collective_left_out", "ranks 0 and 5 differ", "clip_grads.py"),
        ("collectives_swapped", "ranks 0 and 5 come to their groups in another order", "step.py"),
    ],
)
def test_collectives_that_a_rank_leaves_out_or_swaps_are_named(
    qwen: list[dict[str, Any]], fault: str, ranks: str, named: str
) -> None:
    done = start(QWEN, 0, 16, fault=fault)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = mismatches([json.loads(done.stdout), qwen[1]])
    assert any(line.startswith(ranks) and named in line for line in lines)


def test_what_is_sent_and_never_waited_for_is_named() -> None:
    done = start((*QWEN, *PIPELINE), 0, 16, fault="forgotten_wait")
    assert done.returncode == 0, done.stderr[-2000:]
    (line,) = mismatches([json.loads(done.stdout)])
    assert line.startswith("rank 0 never waits for ")
    assert " x isend distributed/groups.py:" in line


def test_tokens_that_need_a_buffer_are_named() -> None:
    fault = "tokens_sent_back_among_hidden_states"
    results = [
        json.loads(start((*QWEN, *PIPELINE), rank, 16, fault=fault).stdout) for rank in (0, 8)
    ]
    (line,) = mismatches(results)
    assert "ranks 0 and 8 would both wait" in line
    assert line.count("send of") == 2
