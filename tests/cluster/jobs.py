"""The real scripts of `slurm/`, submitted to a throw-away cluster with a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.minicluster import MiniCluster
from tests.recipes.conftest import ROOT, SMOKE

STEPS, SAVED_EVERY = 60, 10
NODES, RANKS_PER_NODE = 2, 2
PATIENCE_S = 900  # with what takes a minute when the machine is idle
STAGE_COMMAND = "tests/cluster/stage.sh"
TRAINING = [
    *SMOKE,
    f"trainer.max_steps={STEPS}",
    "parallel.tensor_model_parallel_size=2",
    "task._target_=tests.cluster.slow_task.SlowTask",
    "optim.lr=1e-3",
    "parallel.timeout_s=120",
    f"exp_manager.checkpoint_callback_params.every_n_train_steps={SAVED_EVERY}",
]


@dataclass(frozen=True)
class Site:
    """A cluster, a tiny model, and a shared folder for what jobs leave."""

    cluster: MiniCluster
    model: Path
    output: Path

    def environment(self, name: str, **changes: str) -> dict[str, str]:
        """What a user of this site exports."""
        settings = {
            "OPCD_RECIPE": "demo_brevity",
            "OPCD_NAME": name,
            "OPCD_OUTPUT": str(self.output),
            "OPCD_PYTHON": sys.executable,
            "OPCD_RANKS_PER_NODE": str(RANKS_PER_NODE),
            "OPCD_MIN_FREE_GIB": "1",
            "OPCD_PROBE_MIB": "0",
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }
        return settings | changes

    def submit(
        self,
        name: str,
        *overrides: str,
        flags: Sequence[str] = (),
        script: str = "slurm/opcd_math.sh",
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """`sbatch slurm/opcd_math.sh` from the repository's root, as a tiny training."""
        overrides = (*TRAINING, f"student.path={self.model}", *overrides)
        return self.sbatch(name, script, *overrides, flags=flags, environment=environment)

    def submit_stage(
        self, name: str, *, flags: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> Job:
        """`sbatch slurm/opcd_extract.sh` with a command of milliseconds."""
        stand_in = {"OPCD_STAGE_COMMAND": STAGE_COMMAND, **(environment or {})}
        script = "slurm/opcd_extract.sh"
        flags = [f"--nodes={NODES}", *flags]
        return self.sbatch(name, script, flags=flags, environment=stand_in)

    def sbatch(
        self,
        name: str,
        script: str,
        *arguments: str,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> Job:
        """Submit a script past its front door."""
        log = self.output / f"{name}.log"
        fixed = ["--parsable", "--gpus-per-node=0", "--time=30", f"--output={log}"]
        command = ["sbatch", *fixed, *flags, script, *arguments]
        done = self.cluster.run(command, self.environment(name, **(environment or {})), ROOT)
        assert done.returncode == 0, done.stderr
        return Job(self, done.stdout.strip(), name, log)

    def front_door(
        self, script: str, *arguments: str, environment: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        """Run a script by hand."""
        settings = self.environment("front", **{"OPCD_GPUS_PER_NODE": "0"} | environment)
        return self.cluster.run([script, *arguments], settings, ROOT)


@dataclass(frozen=True)
class Job:
    """A submitted job."""

    site: Site
    id: str
    name: str
    log_path: Path

    @property
    def run(self) -> Path:
        return self.site.output / self.name

    @property
    def lock(self) -> str:
        return (self.site.output / f".{self.name}.lock").read_text()

    @property
    def nodes(self) -> list[str]:
        """The nodes it runs on, in the order of its ranks."""
        listed = self.site.cluster.job(self.id)["NodeList"]
        return self.site.cluster.run(["scontrol", "show", "hostnames", listed]).stdout.split()

    @property
    def state(self) -> str:
        return self.site.cluster.job(self.id)["JobState"]

    @property
    def restarts(self) -> int:
        return int(self.site.cluster.job(self.id)["Restarts"])

    def run_time_s(self) -> int:
        """How long the attempt runs, or ran."""
        hours, minutes, seconds = self.site.cluster.job(self.id)["RunTime"].split(":")
        return int(hours) * 3600 + int(minutes) * 60 + int(seconds)

    @property
    def log(self) -> str:
        return self.log_path.read_text() if self.log_path.exists() else ""

    def ranks_log(self, attempt: int) -> str:
        path = self.site.output / f"slurm/{self.id}/attempt-{attempt}/ranks.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def steps(self) -> int:
        metrics = self.run / "metrics.jsonl"
        return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

    def wait_for_step(self, step: int) -> None:
        self.site.cluster.wait_for(
            lambda: self.steps() >= step or self._has_failed(),
            PATIENCE_S,
            f"step {step}\n{self.log}",
        )
        assert self.steps() >= step, self.story()

    def wait_for_state(self, *states: str, seconds: float = PATIENCE_S) -> None:
        self.site.cluster.wait_for(lambda: self.state in states, seconds, f"{states}\n{self.log}")

    def wait_for_end(self) -> None:
        self.wait_for_state("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")

    def _has_failed(self) -> bool:
        return self.state in ("FAILED", "CANCELLED", "TIMEOUT")

    def exit_code(self) -> int:
        return int(self.site.cluster.job(self.id)["ExitCode"].split(":")[0])

    def digest(self) -> str:
        """The digest of the final weights of a job that is done, in both places that have it."""
        assert self.state == "COMPLETED", self.story()
        digest = str(json.loads((self.run / "summary.json").read_text())["weights_sha256"])
        assert (self.run / "DONE").read_text().strip() == digest
        assert (self.run / f"{self.name}.nemo").exists()
        assert self.steps() == STEPS
        return digest

    def continued_from(self, attempt: int) -> int:
        """The step that an attempt continued from."""
        found = re.search(r"continuing from .*step=(\d+)\.ckpt", self.ranks_log(attempt))
        assert found, self.story()
        return int(found[1])

    def story(self) -> str:
        """Everything the job said."""
        parts = [self.log]
        parts += [self.ranks_log(attempt)[-3000:] for attempt in range(self.restarts + 1)]
        return "\n----\n".join(parts)


Scenario = Callable[[Site], Job]


@contextmanager
def started(site: Site, scenarios: Sequence[Scenario]) -> Iterator[dict[str, Future[Job]]]:
    """Jobs by the names of their scenarios, two at a time."""
    with ThreadPoolExecutor(2) as threads:
        futures = {each.__name__: threads.submit(each, site) for each in scenarios}
        yield futures
        for future in futures.values():
            future.cancel()
