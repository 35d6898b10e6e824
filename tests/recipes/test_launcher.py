"""Bad input as a user meets it: exit code 2 and one line, before a model loads."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.recipes.runs import recipe
from tests.tiny import write_chat_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def used_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refused run."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_misspelt_key() -> None:
    line = only_line(recipe("optim.lrr=1"))
    assert line == (
        "error: optim.lrr=1: no such key; allowed in optim: lr, min_lr, schedule, warmup_steps, "
        "betas, eps, weight_decay, clip_grad, use_distributed_optimizer, overlap_grad_reduce"
    )


def test_unknown_word_of_a_group() -> None:
    line = only_line(recipe("parallel=tp5"))
    assert line.startswith("error: parallel=tp5: no such file in conf/parallel; allowed: dp2, ")


def test_port_in_use(model: Path, tmp_path: Path, used_port: int) -> None:
    line = only_line(
        recipe(
            f"student.path={model}",
            f"exp_manager.exp_dir={tmp_path}",
            f"parallel.port={used_port}",
        )
    )
    assert line == (
        f"error: parallel.port={used_port}: Address already in use; "
        "allowed: a free port, or 0 for any"
    )


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_speaks(rank: str) -> None:
    done = recipe("optim.lr=-1", RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank)
    if rank == "0":
        assert only_line(done) == "error: optim.lr=-1.0: allowed: a number > 0"
    else:
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")
