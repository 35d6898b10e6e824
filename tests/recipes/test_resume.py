"""A continued run is the same run; damage, changed keys and second jobs are noticed."""

from __future__ import annotations

import pickle
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from opcd_nemo.metrics import read_metrics
from opcd_nemo.storage.durable import (
    files_in,
    find_damage,
    measure,
    read_manifest,
    write_manifest,
)
from opcd_nemo.storage.lock import lock_folder
from tests.crash import Job, outcome
from tests.recipes.conftest import Train, run_python

RESUMABLE = [
    "exp_manager=resumable",
    "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    "optim.lr=1e-3",
    "name=run",
]
SAVE_NEMO = "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true"
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def resume(train: Train) -> Run:
    def run(folder: Path, steps: int, *overrides: str) -> subprocess.CompletedProcess[str]:
        place = (f"exp_manager.exp_dir={folder}", f"trainer.max_steps={steps}")
        return train(*RESUMABLE, *place, "parallel=dp2", *overrides)

    return run


@pytest.fixture(scope="module")
def folders(resume: Run, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One run of four steps, and one of two."""
    made = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("parts")
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(resume, made, (4, 2)):
            assert done.returncode == 0, done.stderr
    return made


def test_a_changed_key_is_refused(resume: Run, folders: tuple[Path, Path]) -> None:
    refused = resume(folders[1], 4, "loss.temperature=0.5", "optim.weight_decay=0.5")
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert "loss.temperature was 1.0, is 0.5" in line
    assert "resume.allow_changes=[loss.temperature,optim.weight_decay]" in line


def test_a_copied_model_goes_on_and_a_changed_one_does_not(
    resume: Run, folders: tuple[Path, Path], tiny: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders[1], tmp_path / "runs")
    copied = Path(shutil.copytree(tiny, tmp_path / "copied"))
    done = resume(tmp_path / "runs", 3, f"student.path={copied}")
    assert done.returncode == 0, done.stderr
    assert "continuing from" in done.stdout
    weights = copied / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\7")
    refused = resume(tmp_path / "runs", 4, f"student.path={copied}")
    assert refused.returncode == 2
    line = refused.stderr.splitlines()[-1]
    assert "student.path has another content than the run began with (model.safetensors)" in line
    assert "resume.allow_changes=[student.path]" in line


class Payload:
    """What unpickling this does."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.victim,)


def test_a_strangers_index_is_not_unpickled(
    resume: Run, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[1], tmp_path / "runs")
    for checkpoint in (tmp_path / "runs/run/checkpoints").glob("step=*.ckpt"):
        index = checkpoint / ".metadata"
        index.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        files = {name: measure(checkpoint / name) for name in files_in(checkpoint)}
        write_manifest(checkpoint, files)  # who can write the index can write the manifest
    refused = resume(tmp_path / "runs", 4)
    assert refused.returncode == 2, refused.stderr
    assert ".metadata: refused" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


def test_a_second_job_on_the_folder_is_refused(resume: Run, folders: tuple[Path, Path]) -> None:
    with lock_folder(folders[1] / "run"):
        refused = resume(folders[1], 4)
    assert refused.returncode == 2
    assert "in use by host" in refused.stderr
    assert "pid" in refused.stderr


_TAKEN_OVER = """
import sys
from pathlib import Path
from opcd_nemo.cli import main
from opcd_nemo.evaluation import summary
from opcd_nemo.trainer import connector
module, name = {
    "report": (summary, "write_answers"),
    "package": (connector, "write_package"),
}[sys.argv[1]]
write = getattr(module, name)
def write_late(path, *more, **named):
    write(path, *more, **named)
    path.parent.with_name(".run.lock").write_text("a later attempt")
setattr(module, name, write_late)
del sys.argv[1]
main(["train", *sys.argv[1:]])
"""


@pytest.mark.parametrize("after", ["report", "package"])
def test_a_run_that_is_taken_over_at_its_very_end_publishes_no_more(
    after: str, smoke: list[str], tmp_path: Path
) -> None:
    place = f"exp_manager.exp_dir={tmp_path}"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    arguments = [after, *smoke, *RESUMABLE, place, "trainer.max_steps=1", SAVE_NEMO]
    failed = run_python("-c", _TAKEN_OVER, *arguments, environment=alone)
    assert failed.returncode == 1
    assert "the folder is now held by a later attempt" in failed.stderr
    assert (tmp_path / "run" / "run.nemo").exists() == (after == "package")
    assert not (tmp_path / "run" / "DONE").exists()


def test_a_signal_outside_of_steps_loses_nothing(
    train: Train, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    place = (f"exp_manager.exp_dir={tmp_path}", "trainer.max_steps=4", "parallel=dp2")
    task = "task._target_=tests.recipes.faulty_parts.StoppedTask"
    metrics = tmp_path / "run" / "metrics.jsonl"
    for lines in (0, 4):  # before the first step, and in the last evaluation
        stop = {"STOP_FILE": str(metrics), "STOP_LINES": str(lines)}
        stopped = train(*RESUMABLE, *place, task, environment=stop)
        assert stopped.returncode == 75, stopped.stderr
        (line,) = [line for line in stopped.stderr.splitlines() if "a save waits" not in line]
        assert line.startswith("stopped by SIGTERM outside of the steps")
        assert metrics.exists() == (lines > 0)
        assert not (tmp_path / "run" / "DONE").exists()
    done = train(*RESUMABLE, *place, task)
    assert done.returncode == 0, done.stderr
    assert outcome(tmp_path / "run") == outcome(folders[0] / "run")


def test_a_full_disk_is_named_and_the_checkpoints_before_stay(
    smoke: list[str], folders: tuple[Path, Path]
) -> None:
    checkpoints = folders[1] / "run" / "checkpoints"
    arguments = [*smoke, *RESUMABLE, "parallel=dp2", f"exp_manager.exp_dir={folders[1]}"]
    failed = run_python(
        "-c",
        "import resource, os, sys; "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])",
        "recipes/train.py",
        *arguments,
        "trainer.max_steps=4",
    )
    assert failed.returncode == 1
    shard = rf"{re.escape(str(checkpoints))}/\.step=3\.ckpt\.partial/__\d_0\.distcp"
    line = failed.stderr.splitlines()[-1]
    expected = (
        rf"error: rank \d failed first: SaveError: checkpoint step=3.ckpt is not saved: {shard}"
    )
    assert re.fullmatch(rf"{expected}: File too large \(errno 27\)", line), failed.stderr
    assert "Traceback" not in failed.stderr
    assert [path.name for path in sorted(checkpoints.glob("*.ckpt"))] == [
        "step=1.ckpt",
        "step=2.ckpt",
    ]
    for path in checkpoints.glob("*.ckpt"):
        entries = read_manifest(path)
        assert find_damage(path, entries, list(entries)) is None


def test_damage_is_named_and_the_run_continued_before_it_is_the_uninterrupted_one(
    resume: Run, folders: tuple[Path, Path]
) -> None:
    whole, parts = folders
    checkpoints = parts / "run" / "checkpoints"
    shard = checkpoints / "step=2.ckpt" / "__0_0.distcp"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    done = resume(parts, 4)
    assert done.returncode == 0, done.stderr
    assert f"checkpoint set aside: {shard}: its SHA-256 is not the manifest's" in done.stdout
    assert f"continuing from {checkpoints / 'step=1.ckpt'}" in done.stdout
    assert not list(checkpoints.glob(".*.partial")), "of the run that found the disk full"
    assert outcome(parts / "run") == outcome(whole / "run")
    kept = sorted(path.name for path in checkpoints.glob("*.ckpt"))
    assert kept == [f"step={n}.ckpt" for n in (2, 3, 4)], "the one continued from is no extra"
    assert (checkpoints / "step=2.ckpt.damaged").is_dir()


def test_a_signal_ends_the_run_at_a_step_boundary_with_a_checkpoint(
    tiny: Path, tmp_path: Path
) -> None:
    job = Job(tiny, tmp_path / "job", "dp2")
    process = job.start()
    job.wait_for_training(process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 75, job.log.read_text()
    stopped = re.search(r"stopped by SIGTERM after step (\d+); saved (\S+);", job.log.read_text())
    assert stopped is not None
    assert len(read_metrics(job.run / "metrics.jsonl")) == int(stopped[1])
    assert (Path(stopped[2]) / "manifest.json").is_file()


def test_a_finished_run_goes_on_when_it_is_given_more_steps(resume: Run, tmp_path: Path) -> None:
    """Its last checkpoint is not one of the callback's: the interval is longer than the run."""
    rare = "exp_manager.checkpoint_callback_params.every_n_train_steps=3"
    for steps in (2, 4):
        done = resume(tmp_path, steps, rare)
        assert done.returncode == 0, done.stderr
    lines = read_metrics(tmp_path / "run/metrics.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
