"""Every mistake of a user ends with one line that names key, value and what is allowed."""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.recipes.conftest import Train
from tests.tiny import write_chat_model

# what is wrong -> the command's last words, and what the one line must say
MISTAKES = {
    "a misspelt key": (
        ["optim.lrr=1"],
        ["optim.lrr=1: no such key; did you mean lr?", "lr, min_lr"],
    ),
    "a misspelt group": (["optimm.lr=1"], ["optimm.lr=1: no such key; did you mean optim.lr?"]),
    "a misspelt choice": (
        ["loss=reverse"],
        ["loss=reverse: no such file in conf/loss", "did you mean reverse_kl"],
    ),
    "a missing key": (["~optim.lr"], ["optim.lr: no value is given: ", "allowed: a number > 0"]),
    "a wrong type": (["optim.lr=fast"], ["optim.lr=fast; allowed: a number > 0"]),
    "sizes that do not divide the world": (
        ["parallel=dp2", "parallel.tensor_model_parallel_size=3"],
        ["tensor_model_parallel_size=3", "the 2 ranks of the run", "allowed: a world size that"],
    ),
    "layers that stages do not divide": (
        ["parallel=single", "parallel.num_ranks=3", "parallel.pipeline_model_parallel_size=3"],
        ["pipeline_model_parallel_size=3", "has 2 layers", "allowed: a divisor"],
    ),
    "a model folder that is not there": (
        ["student.path=nowhere"],
        ["student.path=nowhere", "not there; allowed: a Hugging Face folder"],
    ),
    "a folder without tokenizer": (
        ["student.path={folder}/no_tokenizer"],
        ["student.path=", "no tokenizer; allowed: tokenizer.json"],
    ),
    "an architecture that is not supported": (
        ["student.path={folder}/other_architecture"],
        ["student.path=", "model_type=mamba; allowed: llama, qwen2, qwen3"],
    ),
    "a tokenizer without chat template": (
        ["student.path={folder}/no_template"],
        ["student.path=", "no chat template; allowed: chat_template.jinja"],
    ),
    "a teacher with another vocabulary": (
        ["teacher.path={folder}/other_vocabulary"],
        ["teacher.path=", "vocabulary of 300", "student's 320", "allowed: the same tokens"],
    ),
    "a teacher with another end of sequence": (
        ["teacher.path={folder}/other_eos"],
        ["teacher.path=", "end-of-sequence ids (2, 1)", "(2,)", "allowed: the same ids"],
    ),
    "a context longer than the model's positions": (
        ["student.path={folder}/short"],
        ["context._target_=", "max_new_tokens=4", "128 positions", "allowed: a shorter context"],
    ),
    "an empty prompt set": (
        ["task._target_=tests.recipes.faulty_parts.EmptyTask"],
        ["evaluation.num_questions=2", "the task has 0 prompts", "allowed: a task that is not"],
    ),
    "an output folder that cannot be written": (
        ["exp_manager.exp_dir={folder}/file/runs"],
        ["exp_manager.exp_dir=", "Not a directory; allowed: a writable folder"],
    ),
    "a port in use": (
        ["parallel.port={port}"],
        ["parallel.port={port}", "Address already in use; allowed: a free port, or 0"],
    ),
    "more GPUs than there are": (
        ["parallel.device=cuda", "parallel.num_ranks=64", "batching.global_batch_size=128"],
        ["parallel.device=cuda", "for 64 ranks; allowed: as many GPUs as ranks"],
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Model folders with one fault each, and a port that somebody holds."""
    folder = tmp_path_factory.mktemp("faulty")
    (write_chat_model(folder / "no_tokenizer") / "tokenizer.json").unlink()
    write_chat_model(folder / "other_vocabulary", vocab_size=300)
    write_chat_model(folder / "short", max_positions=128)
    _edit(write_chat_model(folder / "other_architecture") / "config.json", model_type="mamba")
    _edit(write_chat_model(folder / "no_template") / "tokenizer_config.json", chat_template=None)
    _edit(write_chat_model(folder / "other_eos") / "generation_config.json", eos_token_id=[1, 2])
    (folder / "file").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield {"folder": str(folder), "port": str(taken.getsockname()[1])}


def _edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_ends_with_one_line_and_code_2(
    mistake: str, train: Train, places: dict[str, str]
) -> None:
    overrides, expected = MISTAKES[mistake]
    refusal = train(*(text.format(**places) for text in overrides))
    assert refusal.stderr.startswith("error: "), refusal.stderr
    assert refusal.stderr.count("\n") == 1, refusal.stderr
    for words in expected:
        assert words.format(**places) in refusal.stderr
    assert refusal.returncode == 2
    assert refusal.stdout == ""  # a run's first line comes before its models load


def test_weights_that_are_no_numbers_end_a_run_before_its_first_step(
    train: Train, tmp_path: Path
) -> None:
    weights = write_chat_model(tmp_path / "nan") / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, weights)
    refusal = train(f"student.path={tmp_path / 'nan'}")
    assert refusal.returncode == 2
    assert refusal.stderr.count("\n") == 1, refusal.stderr
    assert "final_layernorm.weight has values that are infinite or no numbers" in refusal.stderr


def test_line_stands_alone_on_a_users_screen(train: Train) -> None:
    refusal = train("student.path=nowhere", fresh=True)
    assert refusal.stderr.startswith("error: student.path=nowhere: ")
    assert refusal.stderr.count("\n") == 1, refusal.stderr
    assert (refusal.returncode, refusal.stdout) == (2, "")


@pytest.mark.parametrize("key", ["trainer.foo", "exp_manager.foo"])
def test_lightnings_and_nemos_keys_are_checked_before_ranks_start(train: Train, key: str) -> None:
    refusal = train(f"+{key}=1")
    assert refusal.stderr.startswith(f"error: {key}=1: no such key; allowed: ")
    assert (refusal.returncode, refusal.stdout) == (2, "")


def test_only_rank_0_prints_under_torchrun(train: Train) -> None:
    def rank(number: int) -> subprocess.CompletedProcess[str]:
        world = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
        return train("parallel=dp2", "optim.lr=-1", environment=world)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(rank, range(2))
    assert first.stderr == "error: optim.lr=-1.0; allowed: a number > 0 and <= 10\n"
    assert second.stderr == ""
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stdout + second.stdout == ""


def test_port_in_use_is_refused_under_torchrun(train: Train, places: dict[str, str]) -> None:
    world = {
        **{"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": places["port"]},
    }
    refusal = train("parallel=dp2", environment=world)
    lines = [line for line in refusal.stderr.splitlines() if line.startswith("error: ")]
    assert lines == [
        f"error: MASTER_PORT={places['port']}: the port is in use; allowed: a free port, or "
        "parallel.port=0 to take any"
    ]
    assert refusal.returncode == 2
