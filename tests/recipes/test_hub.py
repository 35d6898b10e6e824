"""A run whose model is on the hub reads one commit, also when it is continued."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fake_hub import FakeHub, serving
from tests.recipes.conftest import Train, run_python


@pytest.fixture
def hub(tiny: Path) -> Iterator[FakeHub]:
    files = {file.name: file.read_bytes() for file in tiny.iterdir()}
    server = FakeHub({"owner/tiny": files | {"modeling.py": b"raise SystemExit"}})
    with serving(server):
        yield server


def test_a_run_keeps_the_commit_that_it_began_with(
    train: Train, hub: FakeHub, tmp_path: Path
) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
    words = (
        "student.path=owner/tiny", f"exp_manager.exp_dir={tmp_path}", "name=run", "parallel=single",
        "exp_manager=resumable", "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
    )  # fmt: skip
    first = train(*words, "trainer.max_steps=1", environment=environment, fresh=True)
    assert first.returncode == 0, first.stderr
    commit = f"hf://owner/tiny@{hub.commit('owner/tiny')}"
    run = tmp_path / "run"
    assert json.loads((run / "hub.json").read_text()) == {"owner/tiny": commit}
    assert commit in (run / "config.yaml").read_text()
    assert not [request for request in hub.requests if "modeling.py" in request]

    hub.repositories["owner/tiny"]["config.json"] = b"{}"  # the repository moves on
    again = train(*words, "trainer.max_steps=2", environment=environment, fresh=True)
    assert again.returncode == 0, again.stderr
    assert json.loads((run / "hub.json").read_text()) == {"owner/tiny": commit}

    another = train(
        *words, "name=other", "trainer.max_steps=1", environment=environment, fresh=True
    )
    assert another.returncode == 2
    assert "config.json" in another.stderr


def test_export_reads_from_the_hub_and_writes_to_it(hub: FakeHub, tmp_path: Path) -> None:
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_TOKEN": "hf_test"}
    words = ("recipes/export.py", "from=hf://owner/tiny", "to=hf://me/student")
    done = run_python(*words, environment=environment, fresh=True)
    assert done.returncode == 0, done.stderr
    assert f"written: {hub.url}/me/student/commit/" in done.stdout
    assert hub.private["me/student"] is True
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(
        hub.repositories["me/student"]
    )
