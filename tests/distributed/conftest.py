"""Model folders, transformers' answers, and the results of every layout; each made once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd_nemo.formats.huggingface import write_hf_folder
from tests.distributed import cases
from tests.distributed.reference import choose_ends
from tests.tiny import (
    model_config,
    random_tensors,
    write_chat_model,
    write_gguf,
    write_transformers_folder,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the models are, by name."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def transformers_models(folder: Path) -> dict[str, Any]:
    """Every model as transformers has it, in fp32; written to `folder` on the way."""
    torch.set_num_threads(1)
    models = {
        name: write_transformers_folder(folder / name, config, seed)
        for seed, (name, config) in enumerate(cases.MODELS.items())
    }
    gguf = cases.MODELS["llama-gguf"]
    write_gguf(folder / "llama.gguf", gguf, dict(models["llama-gguf"].state_dict()))
    config = model_config("llama")
    tensors = random_tensors(config)
    tensors["model.embed_tokens.weight"][:, 0] = 2.0  # one large channel in every hidden state
    tensors["lm_head.weight"][:, 0] = -4.0
    write_hf_folder(folder / cases.PADDING_WINS, config, tensors, torch.float32)
    write_chat_model(folder / cases.CHAT)
    ends = {name: choose_ends(models[name]) for name in cases.GENERATORS}
    (folder / "ends.json").write_text(json.dumps(ends))
    return models


@pytest.fixture(scope="session")
def run_job(
    folder: Path, transformers_models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Path]]:
    """Runs a job of `worker` on its first call; gives the folder of its results."""
    results = tmp_path_factory.mktemp("results")
    worker = subprocess.Popen(
        [sys.executable, "-m", "tests.distributed.worker", str(folder), str(results)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    answers: dict[str, str] = {}

    def run(job: str) -> Path:
        if job not in answers:
            assert worker.stdin is not None
            assert worker.stdout is not None
            worker.stdin.write(f"{job}\n")
            worker.stdin.flush()
            answers[job] = worker.stdout.readline().strip()
        answer = answers[job]
        assert answer == "ok", Path(answer).read_text() if answer else "the worker died"
        return results

    yield run
    worker.communicate()


@pytest.fixture(scope="session")
def results(run_job: Callable[[str], Path]) -> Callable[[str], Any]:
    """What a layout found, by its name; for others `<source>-to-<target>`, `<job>-<layout>`."""
    loaded: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in loaded:
            prefix = next(
                (one for one in ("teachers", "doctor", "plan") if name.startswith(one)), "world"
            )
            source, *moved = name.removeprefix(f"{prefix}-").split("-to-")
            kind = "moves" if moved else prefix
            job = f"{kind} {cases.LAYOUTS[source].world}"
            loaded[name] = torch.load(run_job(job) / f"{name}.pt", weights_only=False)
        return loaded[name]

    return load
