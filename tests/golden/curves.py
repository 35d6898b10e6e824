"""Short training runs of a tiny model, and the record of their curves.

`python -m tests.golden.curves` (`make golden`) rewrites the record; a commit that does says why.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from opcd_nemo.metrics import read_metrics
from tests.recipes.conftest import SMOKE, run_python
from tests.tiny import write_chat_model

RECORD = Path(__file__).with_name("curves.json")
RUNS = {
    "opcd": "recipe=demo_brevity parallel=dp2 rollout.anchor_fraction=0.25",
    "opcd after a warm-up": "recipe=demo_json parallel=pp2 warmup.steps=3",
    "sft": "recipe=demo_bullets method=sft parallel=tp2",
}
# At this rate Adam's usual epsilon blows up the rounding of gradients near zero: curves of two
# layouts then differ by 5e-4, with 1e-6 by 6e-6
SETTINGS = (
    "trainer.max_steps=6 rollout.sampling.max_new_tokens=8 optim.lr=1e-3 optim.eps=1e-6".split()
)
CURVES = ("loss/", "optim/", "rollout/")
ROUNDING = "rollout/mismatch"  # of fp32: 1e-14, of which no digit is alike on two machines
Curves = dict[str, list[float]]


def train(name: str, folder: Path) -> Curves:
    """The curves of a run in `folder`: every metric that is not a time."""
    model = write_chat_model(folder / "model")
    paths = [f"student.path={model}", f"exp_manager.exp_dir={folder}", "name=run"]
    done = run_python("recipes/train.py", *SMOKE, *SETTINGS, *RUNS[name].split(), *paths)
    assert done.returncode == 0, done.stderr
    curves: Curves = {}
    for line in read_metrics(folder / "run" / "metrics.jsonl"):
        for metric, value in line.items():
            if metric.startswith(CURVES) and not metric.startswith(ROUNDING):
                curves.setdefault(metric, []).append(value)
    return curves


def machine() -> dict[str, str]:
    """What the last bits of a curve depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = [line for line in lines if line.startswith(("model", "stepping", "flags"))]
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "processor": hashlib.sha256("\n".join(sorted(set(processor))).encode()).hexdigest()[:12],
    }


def main() -> None:
    """Run everything and write the record."""
    record: dict[str, Any] = {"machine": machine(), "runs": {}}
    for name in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            record["runs"][name] = train(name, Path(folder))
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
