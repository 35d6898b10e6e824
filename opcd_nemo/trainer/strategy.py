"""Lightning's view of Megatron: groups that exist already, steps that Megatron takes."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from nemo.utils.app_state import AppState

from opcd_nemo.checkpoint import save_load as checkpoint
from opcd_nemo.checkpoint.newest import checkpoint_name, step_of, surplus
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.distributed.launcher import environment_number
from opcd_nemo.evaluation.validations import ValidationHistory
from opcd_nemo.metrics import Stopwatch
from opcd_nemo.storage.ranks import on_rank_0
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.training.optim import StudentOptimizer
from opcd_nemo.training.step import Run

_log = logging.getLogger(__name__)

# reading these of Lightning's would unpickle classes; the configuration is stored as plain values
_NOT_PLAIN = ("hyper_parameters", "hparams_name", "hparams_type")


class LightningStepAdapter(torch.optim.Optimizer):
    """An optimizer for Lightning's eyes: its `step` runs a whole distillation step.

    Lightning counts global steps, and thereby checkpoints and the end of training, by the calls of
    an optimizer's `step`. The update itself is Megatron's, inside the closure; the one parameter
    here exists because torch refuses an optimizer without any.
    """

    def __init__(self, student_optimizer: StudentOptimizer) -> None:
        """Show Megatron's parameter groups (and learning rates) to Lightning's callbacks."""
        parameter = torch.nn.Parameter(torch.zeros(()))
        super().__init__([parameter], {"lr": 0.0})
        self.student_optimizer = student_optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Run the step that the closure holds."""
        self.param_groups[0]["lr"] = self.student_optimizer.optimizer.param_groups[0]["lr"]
        return closure() if closure is not None else None


@runtime_checkable
class HasRun(Protocol):
    """What the strategy needs of the model that Lightning gives it: `OPCDModel` has it."""

    run: Run
    validations: ValidationHistory


class MegatronStrategy(DDPStrategy):
    """Runs on the process groups of a `Parallel`; checkpoints are Megatron's torch_dist folders."""

    def __init__(
        self,
        parallel: Parallel,
        run_folder: RunFolder | None = None,
        *,
        async_save: bool,
        filename: str = "{step}",
        num_kept: int = -1,
    ) -> None:
        """Take the groups; Lightning must neither start nor wrap anything.

        Args:
            parallel: the groups.
            run_folder: must be held for checkpoints to be published. None: a program that saves
                what it wants where it wants, and keeps no record of steps.
            async_save: write checkpoints while training goes on.
            filename: of checkpoints, with `{step}` in it.
            num_kept: how many of the last checkpoints stay, besides the best; -1: all.
        """
        super().__init__(
            accelerator=None,
            cluster_environment=TorchElasticEnvironment() if parallel.world_size > 1 else None,
        )
        self.parallel = parallel
        self.run_folder = run_folder or RunFolder(Path(), writes=False)
        self._async_save, self._filename, self._num_kept = async_save, filename, num_kept
        self._watch = Stopwatch()
        self._save: checkpoint.Save | None = None
        self._to_remove: list[Path] = []
        self._best_at_save: set[int] = set()

    def connect(self, model: pl.LightningModule) -> None:
        """Take the model, whose run is what checkpoints are made of."""
        super().connect(model)
        assert isinstance(model, HasRun), type(model)
        self._trained: HasRun = model

    def setup_distributed(self) -> None:
        """Tell NeMo about the groups that exist."""
        super().setup_distributed()
        parallel, state = self.parallel, AppState()
        state.tensor_model_parallel_size = parallel.tp
        state.pipeline_model_parallel_size = parallel.pp
        state.context_parallel_size = parallel.cp
        state.model_parallel_size = parallel.tp * parallel.pp
        state.tensor_model_parallel_rank = parallel.tp_rank
        state.pipeline_model_parallel_rank = parallel.pp_rank
        state.data_parallel_size = parallel.dp
        state.data_parallel_rank = parallel.dp_rank
        state.tensor_model_parallel_group = parallel.tp_group
        state.pipeline_model_parallel_group = parallel.pp_group
        state.data_parallel_group = parallel.dp_group

    def _configure_launcher(self) -> None:
        """Nothing: no rank is Lightning's to start; a launcher of its would refuse a notebook."""

    def configure_ddp(self) -> None:
        """Nothing: Megatron's own data parallelism wraps the student."""

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing: weights go into the distributed checkpoint."""
        return {}

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        """Nothing: the optimizer goes into the distributed checkpoint."""
        return {}

    def save_checkpoint(
        self, checkpoint_: dict[str, Any], filepath: str | Path, storage_options: Any = None
    ) -> None:
        """Write a folder named `filepath`, or begin to. Collective over the world."""
        run = self._trained.run
        plain = {key: value for key, value in checkpoint_.items() if key not in _NOT_PLAIN}
        if self.is_writing and self.parallel.rank == 0:
            _log.warning("a save waits for the one before; save less often, or to a faster disk")
        self.finish_save()
        self._best_at_save = self._best_steps()
        with self._watch.phase("save"):
            self._save = checkpoint.start_save(
                Path(filepath),
                plain,
                run.student,
                run.optimizer,
                run.teacher,
                self.parallel,
                background=self._async_save,
            )
        if not self._async_save:
            self.finish_save()

    def checkpoint_path(self, step: int) -> Path:
        """The path of a step's checkpoint in the run's folder, whoever saves the checkpoint."""
        return self.run_folder.path / "checkpoints" / checkpoint_name(self._filename, step)

    @property
    def is_writing(self) -> bool:
        """Whether this rank still writes a checkpoint in the background."""
        return self._save is not None and self._save.shards.is_running

    def finish_save(self) -> None:
        """Wait for the save in flight, publish it, then remove what it replaces.

        Collective over the world.
        """
        if self._save is None:
            return
        save, self._save = self._save, None
        with self._watch.phase("save"):
            checkpoint.publish(save, self.parallel, self.run_folder)
            for path in self._to_remove:
                self._remove(path)
            self._to_remove.clear()
            on_rank_0(self.parallel, lambda: self._remove_surplus(save.path.parent))

    def _remove_surplus(self, folder: Path) -> None:
        """Let the last checkpoints stay, and the best; others are removed.

        The callback knows neither those of a signal or a validation, nor, in a run that is
        continued, those that an earlier job saved after its own last one. What a start would take
        for the best is that of the checkpoint which has just been published; training may have met
        a better one, which is not published yet.
        """
        for path in surplus(folder, self._num_kept, self._best_at_save | self._best_steps()):
            self._remove(path)

    def _best_steps(self) -> set[int]:
        best = self._trained.validations.best
        return set() if best is None else {best.step}

    def save_times(self, step_started_s: float) -> dict[str, float]:
        """What saves cost the step that began at this `time.monotonic()`.

        Returns:
            `time/save_s`: for how long training stood still since the last call. `time/saving_s`:
            for how many seconds of the step files were written beside it.
        """
        values = {"time/save_s": self._watch.wall_s.pop("save", 0.0), "time/saving_s": 0.0}
        if self._save is not None:
            start, end = self._save.shards.started_s, self._save.shards.ended_s or time.monotonic()
            values["time/saving_s"] = max(0.0, end - max(start, step_started_s))
        return values

    def load_checkpoint(
        self, checkpoint_path: str | Path, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Fill the student, its optimizer and the teacher; returns Lightning's own part."""
        run = self._trained.run
        common = checkpoint.load(Path(checkpoint_path), run.student, run.optimizer, run.teacher)
        _reopen_epoch(common["loops"]["fit_loop"])
        return common

    def load_model_state_dict(self, checkpoint_: Any, strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has filled the student."""

    def load_optimizer_state_dict(self, checkpoint_: Any) -> None:
        """Nothing: `load_checkpoint` has filled the optimizer."""

    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Delete a checkpoint folder, but none before the save in flight is published.

        The best on validation stays.
        """
        best = self._trained.validations.best
        if best is not None and step_of(Path(filepath)) == best.step:
            return
        if self._save is None:
            self._remove(Path(filepath))
        else:
            self._to_remove.append(Path(filepath))

    def _remove(self, path: Path) -> None:
        if self.parallel.rank == 0:
            shutil.rmtree(path, ignore_errors=True)

    def teardown(self) -> None:
        """Keep the groups: evaluation follows training."""


def _reopen_epoch(fit_loop: dict[str, Any]) -> None:
    """Let a finished run continue when it is given more steps.

    A whole run is one epoch of Lightning's. A checkpoint that is saved after the last step counts
    that epoch as done, and Lightning would train nothing.
    """
    for counts in fit_loop["epoch_progress"].values():
        counts |= {name: 0 for name in ("processed", "completed") if name in counts}


def trainer_settings(strategy: MegatronStrategy) -> dict[str, Any]:
    """What every Lightning trainer on these groups has in common."""
    parallel = strategy.parallel
    local_ranks = environment_number("LOCAL_WORLD_SIZE", 1, least=1)
    return {
        "accelerator": parallel.device.type,
        "devices": local_ranks,
        "num_nodes": parallel.world_size // local_ranks,
        "strategy": strategy,
        "max_epochs": 1,
        "logger": False,  # exp_manager brings logger and checkpoints
        "enable_checkpointing": False,
        "use_distributed_sampler": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
