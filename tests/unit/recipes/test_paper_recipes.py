"""The paper's recipes compose, and their values are those of its tables and of its code.

Sources: arXiv 2602.12275, its appendix on hyper-parameters, and the scripts and defaults of its
code; what differs on purpose stands in `DIFFERENT` and in recipes/paper.md.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.experience.run_configs import configs_before_start
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.recipes import CONF

FILES = {
    "dapo": ["task.train=dapo.parquet"],
    "medmcqa": ["task.train=train.parquet", "task.test=validation.parquet"],
    "safety": [
        f"task.sources.{source}.{split}={source}.parquet"
        for source, split in (
            ("tweeteval", "train"),
            ("tweeteval", "test"),
            ("hatecheck", "train"),
            ("ethos", "train"),
        )
    ],
}
EXPERIENCE = ["context.path=registry"]
LLAMA_3B, LLAMA_8B, QWEN_7B, QWEN_3B = (
    "Llama-3.2-3B-Instruct",
    "Llama-3.1-8B-Instruct",
    "Qwen2.5-7B-Instruct",
    "Qwen2.5-3B-Instruct",
)
RECIPES = {  # student, larger teacher, GPUs, kind of experiment, overrides that name files
    "math_qwen3_8b_2n8g": ("Qwen3-8B", None, 16, "math", "dapo"),
    "math_qwen3_8b_to_4b_2n8g": ("Qwen3-4B", "Qwen3-8B", 16, "math", "dapo"),
    "math_qwen3_8b_to_1p7b_1n8g": ("Qwen3-1.7B", "Qwen3-8B", 8, "math", "dapo"),
    "frozen_lake_qwen3_1p7b_1n8g": ("Qwen3-1.7B", None, 8, "games", ""),
    "sokoban_qwen3_4b_1n8g": ("Qwen3-4B-Instruct-2507", None, 8, "games", ""),
    "medical_llama3p1_8b_1n8g": (LLAMA_8B, None, 8, "system", "medmcqa"),
    "medical_llama3p2_3b_1n8g": (LLAMA_3B, None, 8, "system", "medmcqa"),
    "medical_qwen2p5_7b_1n8g": (QWEN_7B, None, 8, "system", "medmcqa"),
    "safety_llama3p1_8b_1n8g": (LLAMA_8B, None, 8, "system", "safety"),
    "safety_llama3p2_3b_1n8g": (LLAMA_3B, None, 8, "system", "safety"),
    "safety_qwen2p5_7b_1n8g": (QWEN_7B, None, 8, "system", "safety"),
    "safety_qwen2p5_7b_to_3b_1n8g": (QWEN_3B, QWEN_7B, 8, "system", "safety"),
}
COMMON = {
    "trainer.max_steps": 50,
    "optim.lr": 5e-6,
    "optim.schedule": "constant",
    "optim.warmup_steps": 0,
    "optim.betas": [0.9, 0.999],
    "optim.weight_decay": 0.01,
    "optim.clip_grad": 1.0,
    "loss.kind": "reverse_kl",
    "loss.k": 256,
    "rollout.sampler": "student",
    "rollout.sampling.top_p": 1.0,
    "rollout.sampling.top_k": 0,
    "rollout.anchor_fraction": 0.0,
    "warmup.steps": 0,
    "teacher.update": "never",
    "student.dtype": "bf16",
    "retention._target_": "opcd_nemo.tasks.instructions.instructions",  # the paper asks IF-Eval
    "retention.level": "prompt",
    "evaluation.num_retention": 300,
    "batching.aggregation": "sequence_mean",  # the paper's formula; its code averages over tokens
}
TABLE: dict[str, dict[str, object]] = {
    "math": {
        "batching.global_batch_size": 128,
        "rollout.sampling.temperature": 0.6,
        "loss.temperature": 0.6,  # the code divides the logits by the rollout's
        "rollout.sampling.max_new_tokens": 16384,
        "evaluation.num_questions": 1000,
        "evaluation.sampling.max_new_tokens": 16384,
        "evaluation.sampling.temperature": 0.6,
        "evaluation.sampling.top_p": 0.95,
        "evaluation.sampling.top_k": 20,
        "evaluation.samples_per_question": 1,
    },
    "games": {
        "batching.global_batch_size": 64,
        "rollout.sampling.temperature": 0.7,
        "loss.temperature": 0.7,
        "rollout.sampling.max_new_tokens": 1024,
        "task.rounds": 5,
        "evaluation.num_questions": 128,
        "evaluation.sampling.max_new_tokens": 1024,
        "evaluation.sampling.temperature": 0.7,
        "evaluation.sampling.top_p": 0.8,
        "evaluation.sampling.top_k": 20,
        "evaluation.samples_per_question": 1,
    },
    "system": {
        "batching.global_batch_size": 128,
        "rollout.sampling.temperature": 1.0,
        "loss.temperature": 1.0,
        "rollout.sampling.max_new_tokens": 512,
        "evaluation.num_questions": 500,
        "evaluation.sampling.max_new_tokens": 512,
        "evaluation.sampling.temperature": 1.0,
        "evaluation.sampling.top_p": 0.95,
        "evaluation.sampling.top_k": 20,
        "evaluation.samples_per_question": 1,
    },
}
ONLY: dict[str, dict[str, object]] = {
    "frozen_lake_qwen3_1p7b_1n8g": {"task.size": 3, "task.num_holes": 2},
    "sokoban_qwen3_4b_1n8g": {"task.size": 6, "task.num_boxes": 1},
    "safety_llama3p1_8b_1n8g": {"loss.tail": "renorm"},
}
THINKING_TOKENS = 4096  # of retention's answers where the model thinks before them
DIFFERENT = {  # on purpose, from every two steps and the test set
    "exp_manager.checkpoint_callback_params.every_n_train_steps": 10,
    "evaluation.every_n_steps": 10,
    "evaluation.min_retention": 0.85,  # the paper reports IF-Eval and stops by nothing
}


PAPER = (CONF.resolve().parent / "recipes/paper.md").read_text()
COMMANDS = [
    ("experience" if chain else program, tuple(f"{chain}{arguments}".split()))
    for chain, program, arguments in re.findall(
        r"(?:OPCD_(recipe=\S+ )slurm/chain\.sh|(?:opcd |recipes/)(train|experience)(?:\.py)?)"
        r" ((?:[\w.=/]+ ?)+)",
        re.sub(r"\\\n\s*", "", PAPER.partition("## Commands")[2]).replace("RECIPE=", "recipe="),
    )
]


@functools.cache
def recipe(name: str, *more: str) -> TrainConfig:
    kind, files = RECIPES[name][3:]
    context = [] if kind == "system" else EXPERIENCE
    overrides = [f"recipe={name}", *FILES.get(files, []), *context, *more]
    return load_config(compose("train", overrides))


def values(config: TrainConfig, keys: Mapping[str, object]) -> dict[str, Any]:
    tree = OmegaConf.structured(config)
    return {key: OmegaConf.select(tree, key) for key in keys}


def test_every_recipe_of_the_paper_is_in_the_table() -> None:
    files = {path.stem for path in (CONF / "recipe").glob("*.yaml")}
    assert {name for name in files if name.endswith("n8g")} == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_papers_values(name: str) -> None:
    student, teacher, num_gpus, kind, _ = RECIPES[name]
    config = recipe(name)
    expected = {
        **COMMON,
        **TABLE[kind],
        "loss.tail": "drop",
        **ONLY.get(name, {}),
        **DIFFERENT,
        "student.path": f"models/{student}",
        "teacher.path": teacher and f"models/{teacher}",
        "parallel.num_ranks": num_gpus,
        "parallel.device": "cuda",
    }
    assert values(config, expected) == expected


@pytest.mark.parametrize("name", RECIPES)
def test_retention_s_answers_have_room_for_what_the_model_thinks(name: str) -> None:
    config = recipe(name)
    thinks = config.student.chat_template_arguments.get("enable_thinking", False)
    tokens = config.evaluation.retention_max_new_tokens
    assert tokens == (THINKING_TOKENS if thinks else 1024)


@pytest.mark.parametrize("name", RECIPES)
def test_every_rank_has_whole_micro_batches(name: str) -> None:
    parallel, batching = recipe(name).parallel, recipe(name).batching
    model_parallel = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    dp, rest = divmod(parallel.num_ranks, model_parallel)
    assert rest == 0
    assert batching.global_batch_size % (dp * batching.micro_batch_size) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_models_are_looked_for_in_the_folder_of_the_environment(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPCD_MODELS", "/elsewhere")
    config = recipe(name, "name=elsewhere")
    paths = [config.student.path, config.teacher.path or config.student.path]
    assert all(path.startswith("/elsewhere/") for path in paths)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("math_qwen3_8b_2n8g", "task.train"),
        ("sokoban_qwen3_4b_1n8g", "context.path"),
        ("medical_qwen2p5_7b_1n8g", "task.train"),
    ],
)
def test_what_only_the_user_has_is_asked_for(name: str, key: str) -> None:
    with pytest.raises(UserError, match=r"no value is given: ") as asked:
        load_config(compose("train", [f"recipe={name}"]))
    assert (asked.value.key, asked.value.value) == (key, ABSENT)


@pytest.mark.parametrize("name", ["safety_llama3p1_8b_1n8g", "safety_qwen2p5_7b_to_3b_1n8g"])
def test_the_exact_loss_and_the_baselines_are_a_word_away(name: str) -> None:
    exact = recipe(name, "loss=reverse_kl")
    assert (exact.loss["_target_"], exact.loss["temperature"], exact.loss["chunk_tokens"]) == (
        "opcd_nemo.losses.DivergenceLoss",
        1.0,
        1024,
    )
    for method, kind in (("method=off_policy", "forward_kl"), ("method=sft", None)):
        off_policy = recipe(name, method)
        assert (off_policy.rollout.sampler, off_policy.loss.get("kind")) == ("teacher", kind)
        assert off_policy.rollout.sampling.max_new_tokens == 512
    assert recipe(name, "loss.kind=forward_kl", "rollout.sampler=teacher").loss["k"] == 256
    assert recipe(name, "parallel=dp2").parallel.num_ranks == 2


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_a_documented_command_is_complete(program: str, arguments: tuple[str, ...]) -> None:
    config = compose(program, list(arguments))
    for one in [config] if program == "train" else configs_before_start(config):
        load_config(one)


def test_every_registry_that_a_command_reads_is_made_by_a_command_before_it() -> None:
    made: set[str] = set()
    for program, arguments in COMMANDS:
        values = dict(argument.split("=", 1) for argument in arguments)
        if program == "experience":
            made.add(f"runs/{values['recipe']}/registry")
        elif "context.path" in values:
            assert values["context.path"] in made
    assert len(made) == 3
