"""Bad values are refused in one line that names the key, the value and what is allowed."""

from __future__ import annotations

from itertools import product

import pytest
from omegaconf import DictConfig

from opcd_nemo.config.plugs import build_plug, check_plug
from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.launch.ranks import CONF, compose


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose("train", [])


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        pytest.param(
            "+optim.lrr=1",
            "optim.lrr=1: no such key; allowed: lr, min_lr, schedule, warmup_steps, betas, eps, "
            "weight_decay, clip_grad, use_distributed_optimizer, overlap_grad_reduce",
            id="misspelt",
        ),
        pytest.param(
            "+loss.temperatur=1",
            "loss.temperatur=1: no such argument of opcd_nemo.losses.DivergenceLoss; "
            "allowed: kind, beta, temperature, chunk_tokens",
            id="misspelt-in-plug",
        ),
        pytest.param(
            "~optim.lr", "optim.lr: no value is given; allowed: a number", id="missing-number"
        ),
        pytest.param(
            "~student.path", "student.path: no value is given; allowed: a text", id="missing-text"
        ),
        pytest.param(
            "seed=???", "seed: no value is given; allowed: a whole number", id="question-marks"
        ),
        pytest.param(
            "~loss.kind",
            "loss.kind: no value is given to opcd_nemo.losses.DivergenceLoss; "
            "allowed: kind, beta, temperature, chunk_tokens",
            id="missing-in-plug",
        ),
        pytest.param("optim.lr=abc", "optim.lr=abc: allowed: a number", id="text-for-number"),
        pytest.param("optim.lr=true", "optim.lr=True: allowed: a number", id="bool-for-number"),
        pytest.param("seed=1.5", "seed=1.5: allowed: a whole number", id="fraction"),
        pytest.param(
            "parallel.sequence_parallel=3",
            "parallel.sequence_parallel=3: allowed: true or false",
            id="number-for-switch",
        ),
        pytest.param(
            "parallel.context_parallel_size=0",
            "parallel.context_parallel_size=0: allowed: a number > 0",
            id="context-parallel",
        ),
        pytest.param(
            "parallel.recompute_modules=[core_attn]",
            "parallel.recompute_modules=['core_attn']: allowed: [] or [mlp]",
            id="recomputation",
        ),
        pytest.param(
            "parallel.layer_spec=apex",
            "parallel.layer_spec=apex: allowed: auto, local, te",
            id="layer-spec",
        ),
        pytest.param(
            "parallel.fp8=e5m2", "parallel.fp8=e5m2: allowed: null, hybrid, e4m3", id="fp8"
        ),
        pytest.param(
            "parallel.fp8=hybrid",
            "parallel.fp8=hybrid: allowed: null with parallel.layer_spec=auto; te has it",
            id="fp8-without-te",
        ),
        pytest.param(
            "student.chat_template_arguments=3",
            "student.chat_template_arguments=3: allowed: a mapping",
            id="template-arguments",
        ),
        pytest.param(
            "parallel.sequence_parallel=true",
            "parallel.sequence_parallel=True: allowed: with tensor_model_parallel_size > 1",
            id="sequence-parallel-alone",
        ),
        pytest.param(
            "loss.beta=1", "loss.beta=1: allowed: a number between 0 and 1", id="share-of-all"
        ),
        pytest.param(
            "trainer.max_steps=1.5",
            "trainer.max_steps=1.5: allowed: a whole number",
            id="fraction-in-untyped-group",
        ),
        pytest.param(
            "engine.max_batch_size=1.5",
            "engine.max_batch_size=1.5: allowed: a whole number",
            id="fraction-in-plug",
        ),
        pytest.param(
            "optim.betas=0.9", "optim.betas=0.9: allowed: a list of numbers", id="not-a-list"
        ),
        pytest.param(
            "student.keep_layers=[a]",
            "student.keep_layers=['a']: allowed: a list of whole numbers, or null",
            id="text-in-list",
        ),
        pytest.param("student.path=null", "student.path=None: allowed: a text", id="null"),
        pytest.param(
            "exp_manager.exp_dir=null", "exp_manager.exp_dir=None: allowed: a text", id="null-text"
        ),
        pytest.param("optim.lr=-1", "optim.lr=-1.0: allowed: a number > 0", id="negative"),
        pytest.param(
            "parallel.num_ranks=0", "parallel.num_ranks=0: allowed: a number > 0", id="zero"
        ),
        pytest.param(
            "rollout.temperature=-0.1",
            "rollout.temperature=-0.1: allowed: a number >= 0",
            id="negative-temperature",
        ),
        pytest.param(
            "loss.chunk_tokens=-1",
            "loss.chunk_tokens=-1: allowed: a number > 0",
            id="negative-in-plug",
        ),
        pytest.param("optim.lr=nan", "optim.lr=nan: allowed: a finite number", id="nan"),
        pytest.param("optim.lr=inf", "optim.lr=inf: allowed: a finite number", id="infinite"),
        pytest.param(
            "loss.temperature=nan", "loss.temperature=nan: allowed: a finite number", id="plug-nan"
        ),
        pytest.param(
            "optim.betas=[nan,0.9]",
            "optim.betas=[nan, 0.9]: allowed: two numbers in [0, 1)",
            id="nan-in-list",
        ),
        pytest.param(
            "rollout.top_p=1.2", "rollout.top_p=1.2: allowed: at most 1.0", id="above-one"
        ),
        pytest.param(
            "parallel.port=70000", "parallel.port=70000: allowed: at most 65535", id="no-such-port"
        ),
        pytest.param(
            "optim.schedule=linear",
            "optim.schedule=linear: allowed: constant, cosine",
            id="no-such-choice",
        ),
        pytest.param(
            "loss.kind=kl",
            "loss.kind=kl: allowed: reverse_kl, forward_kl, jsd",
            id="no-such-choice-in-plug",
        ),
        pytest.param(
            "optim.min_lr=1", "optim.min_lr=1.0: allowed: at most optim.lr=5e-05", id="min-above-lr"
        ),
        pytest.param(
            "batching.micro_batch_size=3",
            "batching.micro_batch_size=3: allowed: a divisor of batching.global_batch_size=8",
            id="micro-batches",
        ),
        pytest.param(
            "evaluation.num_questions=0",
            "evaluation.num_questions=0: allowed: a number > 0",
            id="no-questions",
        ),
        pytest.param(
            "teacher.life=slow",
            "teacher.life=slow: allowed: frozen, hard_sync, ema, live",
            id="no-such-life",
        ),
        pytest.param(
            "teacher.ema_decay=0.9",
            "teacher.ema_decay=0.9: allowed: null with teacher.life=frozen",
            id="decay-of-a-frozen-teacher",
        ),
        pytest.param(
            "teacher.life=ema",
            "teacher.ema_decay=None: allowed: a number between 0 and 1 with teacher.life=ema",
            id="ema-without-decay",
        ),
        pytest.param(
            "teacher.sync_every_n_steps=1.5",
            "teacher.sync_every_n_steps=1.5: allowed: a whole number, or null",
            id="fraction-of-steps",
        ),
        pytest.param(
            "task._target_=nope.Task",
            "task._target_=nope.Task: allowed: an importable class (No module named 'nope')",
            id="no-such-class",
        ),
        pytest.param("name=../x", "name=../x: allowed: the name of a folder", id="name"),
        pytest.param(
            "rollout.max_new_tokens=${foo.bar}",
            "rollout.max_new_tokens: Interpolation key 'foo.bar' not found; "
            "allowed: a key that exists",
            id="interpolation",
        ),
    ],
)
def test_refuses_in_one_line(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        load_config(compose("train", [override]))
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    ("life", "override", "expected"),
    [
        ("ema", "teacher.ema_decay=1", "teacher.ema_decay=1.0: allowed: a number between 0 and 1"),
        ("ema", "teacher.ema_decay=0", "teacher.ema_decay=0.0: allowed: a number between 0 and 1"),
        ("ema", "teacher.ema_decay=nan", "teacher.ema_decay=nan: allowed: a number between 0 and"),
        ("ema", "teacher.sync_every_n_steps=2", "teacher.sync_every_n_steps=2: allowed: null with"),
        ("hard_sync", "teacher.ema_decay=0.0", "teacher.ema_decay=0.0: allowed: null with teacher"),
        (
            "hard_sync",
            "teacher.sync_every_n_steps=0",
            "teacher.sync_every_n_steps=0: allowed: a whole number > 0 with teacher.life=hard_sync",
        ),
        (
            "hard_sync",
            "teacher.sync_every_n_steps=null",
            "teacher.sync_every_n_steps=None: allowed: a whole number > 0",
        ),
        ("live", "teacher.sync_every_n_steps=2", "teacher.sync_every_n_steps=2: allowed: null"),
    ],
)
def test_a_life_of_the_teacher_takes_its_own_keys(life: str, override: str, expected: str) -> None:
    with pytest.raises(ValueError, match="allowed") as caught:
        load_config(compose("train", [f"teacher={life}", override]))
    message = str(caught.value)
    assert message.startswith(expected)
    assert message.endswith(f"with teacher.life={life}")


@pytest.mark.parametrize("life", ["hard_sync", "ema", "live"])
def test_a_teacher_that_moves_has_the_students_parameters(life: str) -> None:
    for override, value in (
        ("teacher.path=other", "null"),
        ("student.keep_layers=[0]", "null"),
        ("teacher.dtype=fp32", "student.dtype=bf16"),
    ):
        with pytest.raises(ValueError, match="allowed") as caught:
            load_config(compose("train", [f"teacher={life}", override]))
        assert str(caught.value) == f"{override}: allowed: {value} with teacher.life={life}"
    assert load_config(compose("train", [f"teacher={life}"])).teacher.life == life


def test_warmup_loss_is_checked_when_there_is_a_warmup() -> None:
    with pytest.raises(ValueError, match=r"^warmup\.loss\.kind=kl: allowed: reverse_kl, "):
        load_config(compose("train", ["warmup=off_policy", "warmup.loss.kind=kl"]))


def test_loads_typed(composed: DictConfig) -> None:
    config = load_config(composed)
    assert isinstance(config, TrainConfig)
    assert config.optim.betas == [0.9, 0.999]
    assert config.teacher.dtype == config.student.dtype == "bf16"
    assert config.evaluation.max_new_tokens == config.rollout.max_new_tokens
    assert config.task["seed"] == config.seed


def test_defaults_follow_the_paper(composed: DictConfig) -> None:
    config = load_config(composed)
    optim = config.optim
    assert (optim.weight_decay, optim.clip_grad, optim.warmup_steps) == (0.01, 1.0, 0)
    assert config.batching.aggregation == "sequence_mean"
    assert (config.loss["kind"], config.loss["temperature"]) == ("reverse_kl", 1.0)
    assert (config.rollout.sampler, config.rollout.temperature) == ("student", 1.0)


STYLES = ("demo_brevity", "demo_bullets", "demo_json", "demo_pirate")  # demo_games asks for a path
DEMOS = [name for name in names("recipe") if name.startswith(STYLES)]
LAYOUTS = [name for name in names("parallel") if not name.startswith("h100_")]


@pytest.mark.parametrize(("recipe", "parallel"), product(DEMOS, LAYOUTS))
def test_every_demo_composes_with_every_layout(recipe: str, parallel: str) -> None:
    config = load_config(compose("train", [f"recipe={recipe}", f"parallel={parallel}"]))
    assert config.name == f"{recipe}-{parallel}"
    assert recipe.split("_")[1] == config.task["verifier"]
    assert config.rollout.sampler == (
        "teacher" if recipe.endswith(("_offpolicy", "_sft")) else "student"
    )


NOT_OF_ONE_RUN = ("recipe", "parallel", "experience", "pipeline", "accelerator", "shapes")


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (path.name, name)
        for path in sorted(CONF.iterdir())
        if path.is_dir() and path.name not in NOT_OF_ONE_RUN
        for name in names(path.name)
    ],
)
def test_every_word_of_a_group_loads_once_its_files_are_named(group: str, name: str) -> None:
    overrides = [f"{group}={name}"]
    while key := _missing(overrides):
        assert group in ("task", "context"), key
        assert len(overrides) < 6
        overrides.append(f"{key}=/data/some.jsonl")


def _missing(overrides: list[str]) -> str | None:
    try:
        load_config(compose("train", overrides))
    except ValueError as error:
        key, asks, _ = str(error).partition(": no value is given; allowed: ")
        if not asks:
            raise
        return key
    return None


def test_any_task_can_be_asked_for_retention() -> None:
    config = load_config(compose("train", ["~retention", "+task@retention=json"]))
    assert config.retention == {**config.task, "verifier": "json"}
    with pytest.raises(ValueError, match=r"^retention\.verifier: no value is given to "):
        load_config(compose("train", [f"retention._target_={config.task['_target_']}"]))


class Plug:
    def __init__(self, model: str, *, size: int, share: float = 0.5, rest: object = None) -> None:
        self.values = (model, size, share, rest)


def test_plug_is_built_of_yaml_and_runtime_arguments() -> None:
    plug = {"_target_": f"{__name__}.Plug", "size": 3, "share": 1, "rest": ["any"]}
    check_plug("plug", plug)
    assert build_plug(plug, model="tiny").values == ("tiny", 3, 1, ["any"])
    with pytest.raises(ValueError, match=r"^plug\.size=True: allowed: a whole number$"):
        check_plug("plug", plug | {"size": True})
    with pytest.raises(ValueError, match=r"^plug=None: allowed: a mapping with a _target_$"):
        check_plug("plug", None)
