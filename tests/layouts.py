"""A run that is continued on another layout is the uninterrupted run, but for rounding.

    python -m tests.layouts [single-tp2 ...]

Each run of a tiny model in fp32 saves after two of four steps. From there it is continued on the
second layout. Every metric that is not a time, and every tensor of the last checkpoint (weights,
master weights, moments), must be those of the run that stayed on the first. Exit status 1 if not.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from opcd_nemo.metrics import read_metrics
from tests.crash import TIMED, Job
from tests.tiny import write_chat_model

MOVES = ["tp2_pp2-single", "single-tp2", "dp2-single", "pp2-tp2", "cp2-single", "dp2-cp2"]
SETTINGS = (
    "exp_manager.checkpoint_callback_params.every_n_train_steps=2 trainer.max_steps=4"
).split()
METRIC_BAR, TENSOR_BAR = 2e-5, 1e-5


def run(model: Path, folder: Path, layout: str) -> Path:
    """The run's folder; it continues what is there."""
    job = Job(model, folder, layout, SETTINGS)
    job.finish()
    return job.run


def move(whole: Path, folder: Path) -> None:
    """Copy a finished run as it was after two steps."""
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "checkpoints" / "step=4.ckpt")


def worst_metric(whole: Path, moved: Path) -> tuple[float, str]:
    """The largest relative difference of a metric of any step, and which."""
    expected, found = (read_metrics(folder / "metrics.jsonl") for folder in (whole, moved))
    assert len(expected) == len(found) == 4
    return max(
        (abs(b[name] - a[name]) / max(abs(a[name]), 1e-6), f"{name} of step {a['step']}")
        for a, b in zip(expected, found, strict=True)
        for name in a
        if not name.startswith(TIMED)
    )


def worst_tensor(whole: Path, moved: Path) -> tuple[float, str]:
    """The largest difference, relative to the tensor's largest value, and where."""
    expected, found = (_tensors(folder) for folder in (whole, moved))
    assert expected.keys() == found.keys()
    return max((_difference(expected[name], found[name]), name) for name in expected)


def _difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    common = tuple(slice(min(sizes)) for sizes in zip(expected.shape, found.shape, strict=True))
    largest = float(expected.abs().max())
    return float((expected[common] - found[common]).abs().max()) / max(largest, 1e-12)


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        dcp_to_torch_save(folder / "checkpoints" / "step=4.ckpt", file.name)
        loaded = torch.load(file.name, weights_only=False)
    return {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}


def compare(model: Path, folder: Path, source: str, target: str) -> tuple[bool, str]:
    """Whether a move is within the bars, and how far it is."""
    whole = folder / source
    if not whole.exists():
        run(model, whole, source)
    moved = folder / f"{source}-{target}"
    move(whole / "run", moved / "run")
    run(model, moved, target)
    assert "continuing from" in (moved / "log.txt").read_text()
    metric, tensor = (
        worst_metric(whole / "run", moved / "run"),
        worst_tensor(whole / "run", moved / "run"),
    )
    line = f"{source} -> {target}: " + ", ".join(
        f"{kind} {worst:.1e} ({where})"
        for kind, (worst, where) in (("metrics", metric), ("tensors", tensor))
    )
    return metric[0] <= METRIC_BAR and tensor[0] <= TENSOR_BAR, line


def main() -> int:
    """The exit status."""
    good = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = write_chat_model(folder / "model")
        for one in sys.argv[1:] or MOVES:
            is_within, line = compare(model, folder, *one.split("-"))
            good &= is_within
            sys.stdout.write(f"{line}{'' if is_within else ': TOO FAR'}\n")
            sys.stdout.flush()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
