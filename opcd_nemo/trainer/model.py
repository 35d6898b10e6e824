"""The NeMo model: student and teacher under one trainer, one distillation step a batch."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from nemo.core import ModelPT
from omegaconf import DictConfig, OmegaConf

from opcd_nemo.checkpoint.newest import step_of
from opcd_nemo.config.secrets import recorded
from opcd_nemo.config.stored import escaped
from opcd_nemo.evaluation import report
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.evaluation.validations import Validation, ValidationHistory
from opcd_nemo.export.provenance import describe_context
from opcd_nemo.losses import CAPTURED_MASS
from opcd_nemo.metrics import METRICS, Stats, metric_line
from opcd_nemo.rollout.collect import SamplerName
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.storage.ranks import on_rank_0
from opcd_nemo.trainer.connector import OPCDConnector, run_config
from opcd_nemo.trainer.strategy import LightningStepAdapter, MegatronStrategy
from opcd_nemo.training.build import build_evaluator, build_run
from opcd_nemo.training.prepared import PreparedRun, prepare_run
from opcd_nemo.training.step import distill_step
from opcd_nemo.training.token_scores import MOST_ANSWERS, score_answers, token_statistics
from opcd_nemo.types import Rollout, Split

_log = logging.getLogger(__name__)


class OPCDModel(ModelPT):  # type: ignore[misc]  # nemo is untyped
    """On-policy context distillation of a Megatron student from a Megatron teacher."""

    def __init__(
        self, cfg: DictConfig, trainer: pl.Trainer, prepared: PreparedRun | None = None
    ) -> None:
        """Load both models into this rank's shards.

        Args:
            cfg: a run's configuration; NeMo may have added its keys.
            trainer: one with a `MegatronStrategy`.
            prepared: what `prepare_run` made of `cfg`; without it, as when NeMo restores a model,
                the inputs are opened here.

        Raises:
            UserError: a key is wrong, before anything is loaded.
        """
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        if prepared is None:
            prepared = prepare_run(run_config(cfg), strategy.parallel.world_size)
        config, inputs = prepared.config, prepared.inputs
        # `.nemo` files and loggers get it, the latter by this very name; NeMo resolves what it is
        # given, and takes the result for a configuration
        cfg = OmegaConf.create(escaped(escaped(recorded(prepared.raw))))
        super().__init__(cfg=cfg, trainer=trainer)
        self._save_restore_connector = OPCDConnector()
        self.automatic_optimization = False
        self.run = build_run(config, inputs, strategy.parallel)
        self.evaluator = build_evaluator(config, inputs, strategy.parallel)
        self.student_module = self.run.student.module
        self.run_folder = strategy.run_folder
        self.context = describe_context(config.context)
        self.validations = ValidationHistory(config.evaluation.min_retention)
        self._origin, self._digests = prepared.origin, prepared.digests
        self._summary: dict[str, Any] | None = None
        self._callback_states: dict[str, Any] = {}
        self._max_steps = config.trainer["max_steps"]
        self._every_n_steps = config.evaluation.every_n_steps
        self._token_steps = config.evaluation.token_statistics_every_n_steps
        self._best_on_disk: Validation | None = None

    @property
    def summary(self) -> dict[str, Any] | None:
        """What is known of these weights' scores, on rank 0; None when they were not evaluated."""
        return self._summary

    @property
    def _strategy(self) -> MegatronStrategy:
        strategy = self.trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        return strategy

    def describe_weights(self, summary: dict[str, Any]) -> None:
        """Keep the summary of an evaluation until a step changes the weights."""
        self._summary = summary

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """What Lightning steps and counts, in place of Megatron's optimizer."""
        return LightningStepAdapter(self.run.optimizer)

    def train_dataloader(self) -> Any:
        """Step numbers: episodes are a pure function of (seed, step)."""
        steps: Any = range(self._max_steps)  # any sequence is a dataset
        return torch.utils.data.DataLoader(steps, batch_size=None)

    def training_step(self, batch: int, batch_idx: int) -> None:
        """One distillation step: rollout, teacher, student and optimizer, in `distill_step`.

        Lightning must count the step, or it would neither save a checkpoint nor stop. Under manual
        optimization it counts the calls of `optimizer.step` and nothing else. Therefore the whole
        step, in which Megatron's optimizer makes the update, is the closure of an optimizer that
        only calls it: see `LightningStepAdapter`.
        """
        started, cpu = time.perf_counter(), time.process_time()
        self._summary = None
        strategy = self._strategy
        step = self.trainer.global_step  # the loader counts from 0 in a continued run
        watch = self.run.watch
        before = (dict(watch.wall_s), dict(watch.cpu_s))
        kept: list[Rollout] = []
        stats: Stats = self.optimizers().step(closure=lambda: distill_step(self.run, step, kept))
        seconds = time.perf_counter() - started
        values = stats.means()
        response_tokens = stats.sums["rollout/response_tokens"][0]
        values["perf/tokens_per_s"] = response_tokens / seconds
        values["time/step_s"] = seconds
        values |= strategy.save_times(time.monotonic() - seconds)
        for phase in watch.wall_s:
            values[f"time/{phase}_s"] = watch.wall_s[phase] - before[0].get(phase, 0.0)
        if self.run.ahead is not None:
            values["time/ahead_s"] = self.run.ahead.sampled_s
        values.update(self._cpu_seconds(before[1], time.process_time() - cpu))
        if self._token_steps and (step + 1) % self._token_steps == 0:
            values |= self._token_statistics(kept)
        self._show(values)
        if self._every_n_steps and (step + 1) % self._every_n_steps == 0:
            values.update(self._validate(step + 1))
        line = metric_line(step, values)
        on_rank_0(self.run.parallel, lambda: self.run_folder.append(METRICS, line))
        if (step + 1) % self.trainer.log_every_n_steps == 0:
            for logger in self.loggers:  # TensorBoard, wandb: on rank 0
                logger.log_metrics(values, step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put beside the weights what a continued run is compared with."""
        checkpoint["opcd"] = {
            "config": dict(self._origin),
            "digests": {key: dict(files) for key, files in self._digests.items()},
            "versions": report.versions(),
            "validations": self.validations.records(),
            "context": self.context,
        }

        if self.run.ahead is not None:
            rollouts = self.run.ahead.record(self.run.parallel)
            checkpoint["opcd"] |= {} if rollouts is None else {"rollouts": rollouts}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember what `on_train_start` needs, and the scores until then."""
        self._callback_states = checkpoint["callbacks"]
        self.validations.load(checkpoint["opcd"].get("validations", ()))
        self._best_on_disk = self.validations.best
        rollouts = checkpoint["opcd"].get("rollouts")
        ahead, parallel = self.run.ahead, self.run.parallel
        if ahead is not None and rollouts is not None:
            ahead.restore(rollouts, parallel.share(self.run.prompts_per_step))

    def on_train_start(self) -> None:
        """Tell the checkpoint callback what it keeps: NeMo's forgets folders named `.ckpt`.

        A run that retention has stopped stays stopped when it is continued.
        """
        self.trainer.should_stop = self.validations.stopped_by_retention is not None
        for callback in self.trainer.checkpoint_callbacks:
            state = self._callback_states.get(callback.state_key)
            if state is not None:
                ModelCheckpoint.load_state_dict(callback, state)

    def _validate(self, num_steps: int) -> dict[str, float]:
        """The student's scores on the validation split, after so many steps. Collective."""
        started = time.perf_counter()
        task, retention = self.scores("student", with_context=False, split="validation")
        self.validations.add(
            Validation(step=num_steps, score=task.score, retention=retention.score)
        )
        if self.validations.stopped_by_retention is not None:
            self.trainer.should_stop = True
        shown = {"validation/score": task.score, "validation/retention": retention.score}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        return {
            **shown,
            **report.evaluation_metrics(task),
            "time/validation_s": time.perf_counter() - started,
        }

    def on_train_batch_end(self, *_: Any) -> None:
        """Save a new best where the checkpoint callback has not; remove the best before it.

        The callback, which ran just before, keeps the last ones: `MegatronStrategy` refuses to
        remove the best for it.
        """
        best, before = self.validations.best, self._best_on_disk
        callback = self.trainer.checkpoint_callback
        if best is None or best == before or callback is None:
            return
        assert isinstance(callback, ModelCheckpoint)
        assert callback.dirpath is not None
        folder, held = Path(callback.dirpath), {Path(path) for path in callback.best_k_models}
        if best.step not in map(step_of, held):
            path = self._strategy.checkpoint_path(best.step)
            self.trainer.save_checkpoint(path, callback.save_weights_only)
        self._best_on_disk = best
        for path in set(folder.glob("*.ckpt")) - held:
            if before is not None and step_of(path) == before.step:
                self._strategy.remove_checkpoint(path)

    def _cpu_seconds(self, before: dict[str, float], total: float) -> dict[str, float]:
        """CPU seconds of the step over all ranks, in all and by phase."""
        spent = {phase: s - before.get(phase, 0.0) for phase, s in self.run.watch.cpu_s.items()}
        sums = Stats()
        for values in self.run.parallel.gather_objects({**spent, "step": total}):
            sums.add(Stats({f"cpu/{phase}_s": (s, 1.0) for phase, s in values.items()}))
        return {name: value for name, (value, _) in sums.sums.items()}

    def _token_statistics(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Of a few of the step's answers, after its update; on rank 0. Collective."""
        shown = self.run.parallel.gather_over_dp(rollouts[:MOST_ANSWERS])
        records = score_answers(self.run, shown)
        statistics = token_statistics(records) if records else {}
        return {f"tokens/{name}": value for name, value in statistics.items()}

    def _show(self, values: dict[str, float]) -> None:
        loss = next(name for name in values if name.startswith("loss/") and name != CAPTURED_MASS)
        for name, value in (("loss", values[loss]), ("tokens/s", values["perf/tokens_per_s"])):
            self.log(name, value, prog_bar=True, logger=False, batch_size=1)

    def scores(
        self, who: str, *, with_context: bool, split: Split = "test"
    ) -> tuple[Evaluation, Evaluation]:
        """Task and retention scores of `student` or `teacher`. Collective over the world."""
        engine = self.load_engine("student" if who == "student" else "teacher")
        task = self.evaluator.task_score(engine, split, with_context=with_context)
        retention = self.evaluator.retention(engine, with_context=with_context)
        engine.release_weights()
        return task, retention

    def load_engine(self, who: SamplerName) -> RolloutEngine:
        """The engine of student or teacher, with its present weights. Collective."""
        engine = self.run.engines[who]
        engine.load_weights(self.run.optimizer.scheduler.num_steps)
        return engine

    def setup_training_data(self, train_data_config: Any) -> None:
        """Nothing: see `train_dataloader`."""

    def setup_validation_data(self, val_data_config: Any) -> None:
        """Nothing: see `scores`."""

    @classmethod
    def restore_from(cls, restore_path: str, *args: Any, **keywords: Any) -> Any:
        """The model of a `.nemo`, on any layout; arguments as of `OPCDConnector.restore_from`."""
        if keywords.get("save_restore_connector") is None:
            keywords["save_restore_connector"] = OPCDConnector()
        return super().restore_from(restore_path, *args, **keywords)

    @classmethod
    def list_available_models(cls) -> list[Any]:
        """None are published."""
        return []
