"""The documented command, with smoke settings, on every layout of two ranks."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from opcd_nemo.metrics import read_metrics
from tests.recipes.conftest import Train

LAYOUTS = {"dp2": (1, 1, 2, 1), "tp2": (2, 1, 1, 1), "pp2": (1, 2, 1, 1), "cp2": (1, 1, 2, 2)}
SUMMARY_KEYS = (
    "base in_context student retention_before retention_after retention_in_context steps "
    "seconds_total cpu_seconds_per_step peak_rss_gib world_size tp pp dp cp seed versions"
).split()


CONTROLS = (
    "evaluation.controls=[wrong_context,context_returned,trained_wrong_context]"  # a second run
)


@contextmanager
def addresses() -> Iterator[set[str]]:
    """The addresses on which what this process has started listens, meanwhile."""
    found: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    sockets = process.net_connections("inet")
                    found.update(one.laddr.ip for one in sockets if one.status == "LISTEN")

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


@pytest.fixture(scope="module")
def runs(train: Train, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One run of two steps on each layout; gives the folders."""
    folder = tmp_path_factory.mktemp("runs")

    def run(layout: str) -> Path:
        command = ["recipe=demo_brevity", f"parallel={layout}", f"exp_manager.exp_dir={folder}"]
        if layout == "dp2":
            command.append(CONTROLS)
        done = train(*command, fresh=layout == "dp2")
        assert done.returncode == 0, done.stderr
        for words in ("device cpu", "in-context gap before training", "after training"):
            assert words in done.stdout
        return folder / f"demo_brevity-{layout}"

    with addresses() as found, ThreadPoolExecutor(2) as pool:
        done = dict(zip(LAYOUTS, pool.map(run, LAYOUTS), strict=True))
    assert found == {"127.0.0.1"}, "launchers, ranks and gloo are met from this machine alone"
    return done


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_leaves_every_file(runs: dict[str, Path], layout: str) -> None:
    folder = runs[layout]
    summary = json.loads((folder / "summary.json").read_text())
    assert set(SUMMARY_KEYS) <= summary.keys()
    assert tuple(summary[axis] for axis in ("tp", "pp", "dp", "cp")) == LAYOUTS[layout]
    assert (summary["world_size"], summary["steps"]) == (2, 2)
    assert summary["versions"].keys() >= {"torch", "megatron-core", "nemo-toolkit"}
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == [0, 1]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "samples.md").read_text().startswith("# Samples")
    assert "`report.html`" in (folder / "README.md").read_text()
    tokens = json.loads((folder / "tokens.json").read_text())
    assert [len(tokens[when]) for when in ("before", "after", "now")] == [2, 2, 2]
    assert "Token by token" in (folder / "report.html").read_text()
    assert set(summary["controls"]) == {"wrong_context", "context_returned"}
    assert summary["evaluation"]["student"]["task"]["intervals"]["score"]["high"] is not None
    assert summary["forecast"]["came"] == summary["student"]
    assert summary["trained_on"]["answers"] == 8
    assert f"parallel={layout}" in summary["command"]
    assert OmegaConf.load(folder / "config.yaml").trainer.max_steps == 2
    assert (folder / "checkpoints" / "step=2.ckpt" / ".metadata").is_file()


def test_a_control_that_is_trained_is_a_run_in_the_folder_of_the_run(
    runs: dict[str, Path],
) -> None:
    folder = runs["dp2"]
    summary = json.loads((folder / "summary.json").read_text())
    control = json.loads((folder / "trained_wrong_context" / "summary.json").read_text())
    row = summary["trained_controls"]["trained_wrong_context"]
    assert row["task"] == control["evaluation"]["student"]["task"]
    assert control["context_hash"] != summary["context_hash"]
    assert control["controls"] == {}
    assert "trained by a teacher with a wrong context" in (folder / "report.html").read_text()


def test_layouts_agree_on_what_a_token_costs(runs: dict[str, Path]) -> None:
    costs = {
        layout: [
            token["kl"]
            for answer in json.loads((folder / "tokens.json").read_text())["before"]
            for token in answer["tokens"]
        ]
        for layout, folder in runs.items()
    }
    for layout in LAYOUTS:
        assert costs[layout] == pytest.approx(costs["dp2"], abs=2e-4)


def test_layouts_agree_on_the_first_loss(runs: dict[str, Path]) -> None:
    losses = {
        layout: read_metrics(folder / "metrics.jsonl")[0]["loss/reverse_kl"]
        for layout, folder in runs.items()
    }
    assert losses["tp2"] == pytest.approx(losses["dp2"], rel=1e-5)
    assert losses["pp2"] == pytest.approx(losses["dp2"], rel=1e-5)
    assert losses["cp2"] == pytest.approx(losses["dp2"], rel=1e-5)
