"""Files that commit 456d659 wrote are read, and the runs in them continued, to the bit.

`old_files/456d659.tar.xz` holds a tiny student, two runs that were stopped after 2 of 4 steps, a
`.nemo` file of each, and metrics and summary of the same runs when nobody stopped them. Classes and
configuration keys had other names then: `opcd_nemo/config/renamed.py` knows them.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest

from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.metrics import read_metrics
from tests.golden.curves import machine
from tests.recipes.conftest import ROOT, run_python

FILES = Path(__file__).parent / "old_files"
SETTINGS = (
    "student.path=student student.dtype=fp32 parallel=single parallel.device=cpu "
    "trainer.max_steps=4 evaluation.num_questions=2 evaluation.num_retention=2 "
    "evaluation.retention_max_new_tokens=4 rollout.sampling.max_new_tokens=4 "
    "batching.global_batch_size=4 batching.micro_batch_size=2 optim.lr=1e-3 optim.eps=1e-6 "
    "exp_manager=resumable exp_manager.exp_dir=runs"
)
RUNS = {
    "game": "task=frozen_lake context=experience_games context.path=experience.json "
    "loss=reverse_kl_top256 loss.k=16",
    "style": "task=json context=json loss=jsd teacher=ema teacher.ema_decay=0.9 "
    "method=opcd_warmup warmup.steps=1 optim.schedule=cosine optim.warmup_steps=1 "
    "rollout.anchor_fraction=0.25 evaluation.every_n_steps=2",
}
TIMED = ("time/", "cpu/", "perf/")
KEPT = ("context_hash", "steps", "best_step", "validations", "student", "retention_after")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The old files; their paths are relative to it."""
    with tarfile.open(FILES / "456d659.tar.xz") as tar:
        tar.extractall(tmp_path, filter="data")
    return tmp_path


def curves(file: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(TIMED)}
        for line in read_metrics(file)
    ]


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_is_continued_as_if_nothing_had_been_renamed(name: str, folder: Path) -> None:
    words = (*SETTINGS.split(), f"name={name}", *RUNS[name].split())
    done = run_python(str(ROOT / "recipes/train.py"), *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert f"continuing from runs/{name}/checkpoints/step=2.ckpt" in done.stdout
    before = json.loads((folder / f"summary-4-steps.{name}.json").read_text())
    after = json.loads((folder / "runs" / name / "summary.json").read_text())
    assert {key: after.get(key) for key in KEPT} == {key: before.get(key) for key in KEPT}
    expected = curves(folder / f"metrics-4-steps.{name}.jsonl")
    found = curves(folder / "runs" / name / "metrics.jsonl")
    # what the old program did not measure is not compared
    found = [{key: line[key] for key in old} for line, old in zip(found, expected, strict=True)]
    for line, old in zip(found, expected, strict=True):
        assert line == pytest.approx(old, rel=1e-4, abs=1e-7)
    # since then what the turns of a game have in common is computed once: other last bits
    if name != "game" and machine() == json.loads((FILES / "machine.json").read_text()):
        assert found == expected
        assert after["weights_sha256"] == before["weights_sha256"]


RESTORE = """
import os, sys

from opcd_nemo.trainer.model import OPCDModel

model = OPCDModel.restore_from(sys.argv[1])
print("score", model.summary, "context", model.context["content_hash"])
model.trainer.fit(model)
print("trained", model.trainer.global_step, "steps")
model.save_to(sys.argv[2])
sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.parametrize("name", RUNS)
def test_a_nemo_file_is_restored_and_trained(name: str, folder: Path) -> None:
    (folder / "restore.py").write_text(RESTORE)
    done = run_python("restore.py", f"{name}.nemo", "again.nemo", cwd=folder)
    assert done.returncode == 0, done.stderr
    context_hash = json.loads((folder / f"summary-4-steps.{name}.json").read_text())["context_hash"]
    assert f"context {context_hash}" in done.stdout
    assert "trained 4 steps" in done.stdout
    before, after = (open_model(str(folder / f"{n}.nemo")) for n in (name, "again"))
    assert before.config == after.config
    assert any(not before.tensor(n).equal(after.tensor(n)) for n in before.names())
