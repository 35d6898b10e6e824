"""vLLM servers in the plan: against published measurements, and against what must hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.train import load_config
from opcd_nemo.engines import vllm_settings
from opcd_nemo.engines.vllm import VllmEngine
from opcd_nemo.plan import duration, memory, servers
from opcd_nemo.plan.planning import plan
from opcd_nemo.plan.report import plan_report
from opcd_nemo.plan.work import Servers, Work
from tests.quick_compose import compose
from tests.sample_work import layout, work
from tests.unit.plan.test_plan import LLAMA, QWEN, accelerator, refused, seen

RECIPES = sorted(
    file.stem for file in (Path(__file__).parents[3] / "conf/recipe").glob("*_?n8g.yaml")
)
# rows, tokens of each, median ms between tokens: silybench-data, vLLM 0.30.0, Qwen3-8B, bf16, H100
MEASURED = [
    (1, 640, 6.858), (4, 640, 7.009), (16, 640, 7.530), (32, 640, 8.110), (64, 640, 9.494),
    (128, 640, 12.004), (1, 3072, 6.998), (16, 3072, 9.464), (32, 3072, 11.865),
    (64, 3072, 17.053), (1, 8448, 7.301), (4, 8448, 8.617),
]  # fmt: skip
BESIDE = Servers(count=2, gpus=4, colocated=False, ahead=0.0)
LENGTHS = ["plan.prompt_tokens=150", "plan.context_tokens=2000", "plan.response_tokens=100"]


def served(**changes: Any) -> Work:
    return work(model=QWEN, layout=layout(dp=4), servers=replace(BESIDE, **changes), sequences=64)


@pytest.mark.parametrize(("rows", "length", "ms"), MEASURED)
def test_a_decode_step_is_within_5_percent_of_what_was_measured(
    rows: int, length: int, ms: float
) -> None:
    seconds = servers.decode_step(QWEN, "bf16", accelerator(), rows=rows, length=length, gpus=1)
    assert 1000 * seconds == pytest.approx(ms, rel=0.05)


def test_the_same_shares_hold_for_another_gpu_and_model() -> None:
    a100 = accelerator("a100", memory_gb_per_s=1555.0)  # the 40 GB one
    seconds = servers.decode_step(LLAMA, "bf16", a100, rows=1, length=1088, gpus=1)
    assert 1 / seconds == pytest.approx(75, rel=0.02)


def test_a_cache_has_the_room_that_was_measured() -> None:
    h100 = accelerator(usable_share=0.9)  # --gpu-memory-utilization
    one = served(count=1, gpus=1)
    assert servers.cache_tokens(one, h100) == pytest.approx(377_024, rel=0.02)


def test_answers_beyond_the_servers_width_wait_for_others_to_end() -> None:
    wide = servers.sampled(served(), accelerator(), 16, 100.0, with_context=False)
    assert wide.together == 32  # 16 of 4 ranks, over 2 servers
    assert wide.decode == pytest.approx(100 * wide.step)
    narrow = servers.sampled(
        replace(served(), max_batch_size=8), accelerator(), 16, 100.0, with_context=False
    )
    assert narrow.together == 8
    assert narrow.decode == pytest.approx(4 * 100 * narrow.step)
    assert narrow.step < wide.step < 4 * narrow.step


def test_a_context_is_read_once_a_server() -> None:
    def prefill(held: int) -> float:
        tokens = replace(served().tokens, held=held)
        one = replace(served(), tokens=tokens)
        return servers.sampled(one, accelerator(), 16, 100.0, with_context=True).prefill

    assert prefill(100) < 0.5 * prefill(0)


def test_weights_are_written_by_stages_and_read_by_the_servers_gpus() -> None:
    quick = accelerator(link_gb_per_s=1e6, engine_push_gb_per_s=1.0)
    size = memory.server_weights(served(gpus=1), of_teacher=False) / 1e9
    assert servers.push_seconds(served(gpus=1), quick) == pytest.approx(2 * size)
    assert servers.push_seconds(served(gpus=4), quick) == pytest.approx(1.25 * size)
    staged = replace(served(gpus=4), layout=layout(pp=2, dp=2))
    assert servers.push_seconds(staged, quick) == pytest.approx(0.75 * size)


def test_ranks_hold_no_cache_where_servers_sample() -> None:
    def phases(one: Work) -> dict[str, dict[str, float]]:
        return {each.phase: each.parts for each in memory.memory_by_phase(one, accelerator())}

    alone, beside = phases(replace(served(), servers=None)), phases(served())
    assert beside["student"] == alone["student"]
    assert not {"KV cache", "sampling"} & set(beside["rollout"])
    shared = phases(served(colocated=True))
    assert shared["rollout"]["server awake"] > 4 * memory.GIB
    assert shared["student"]["server asleep"] == 2 * memory.GIB
    room = [servers.cache_tokens(served(colocated=both), accelerator()) for both in (False, True)]
    assert room[1] < room[0]


def test_the_shorter_of_sampling_and_training_is_hidden_when_ahead() -> None:
    plain, ahead = (
        duration.run_duration(served(ahead=share), accelerator()) for share in (0.0, 0.5)
    )
    sampled = plain.step["rollout prefill"] + plain.step["rollout decode"]
    others = plain.step_s - sampled - plain.step["weight push"]
    assert ahead.step_s == pytest.approx(plain.step_s - 0.5 * min(sampled, others))


def test_gpus_of_servers_cost_too_and_must_have_room() -> None:
    assert (served().num_gpus, served(colocated=True).num_gpus) == (12, 4)
    large = accelerator(memory_gib=400.0)
    assert "servers: 2 of 4 processors beside the ranks, 32 answers" in plan_report(
        served(), large, ""
    )
    assert "\nfits: " in plan_report(served(), large, "")
    assert "DOES NOT FIT" in plan_report(served(), replace(large, engine_base_gib=390.0), "")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_for_h100_goes_with_servers(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_settings, "find_python", lambda _: "python")
    words = [f"recipe={recipe}", "engine=vllm", "engine.launch=true", "engine.gpus=4", *LENGTHS]
    raw = compose("plan", words)
    engine: Any = OmegaConf.to_container(raw.engine)
    VllmEngine.check(engine, (), 1, on_cpu=False)
    with seen() as lines:
        plan(raw)
    assert "\nfits: " in lines[0]
    assert "weight push" in lines[0]


def test_samples_ahead_are_those_between_checkpoints_and_validations() -> None:
    words = ["recipe=demo_brevity", "engine=vllm", "engine.launch=true", "rollout.ahead=1"]
    words += ["trainer.max_steps=10", "evaluation.every_n_steps=0"]
    words += ["exp_manager.checkpoint_callback_params.every_n_train_steps=5"]
    found = servers.servers_of(load_config(compose("train", words)), accelerator("this_cpu"))
    assert found is not None
    assert found.ahead == 0.8  # not the steps 0 and 5
    assert (found.count, found.gpus) == (1, 1)


def test_a_plan_asks_how_many_gpus_a_server_has() -> None:
    line = refused("recipe=math_qwen3_8b_2n8g", "engine=vllm", "engine.launch=true", *LENGTHS)
    assert line.startswith("engine.gpus=0; allowed: 1 to 7, the GPUs of a server")
