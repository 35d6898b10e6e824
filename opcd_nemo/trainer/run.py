"""A whole training run on this rank: evaluate, distil, evaluate, report."""

from __future__ import annotations

import gc
import json
import logging
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import WandbLogger
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import exp_manager
from omegaconf import DictConfig, OmegaConf

from opcd_nemo.checkpoint import save_load as checkpoint
from opcd_nemo.checkpoint.newest import of_step
from opcd_nemo.config.secrets import recorded, words_without_secrets
from opcd_nemo.config.stored import escaped
from opcd_nemo.config.third_parties import CHECKPOINT_FIXED, MANAGER_FIXED
from opcd_nemo.config.train import TrainConfig
from opcd_nemo.distributed.groups import Parallel, init_parallel
from opcd_nemo.distributed.launcher import (
    LAUNCHER_PID_ENV,
    environment_number,
    environment_world,
)
from opcd_nemo.errors import MismatchError, NonFiniteError, ReadError
from opcd_nemo.evaluation.forecast import Forecast
from opcd_nemo.evaluation.report import gib, peak_rss_kib, peak_rss_of
from opcd_nemo.evaluation.summary import Outcome, summary_lines, write_report
from opcd_nemo.metrics import METRICS, read_metrics
from opcd_nemo.report.run_page import PAGE, write_run_page
from opcd_nemo.storage.durable import describe, naming
from opcd_nemo.storage.ranks import on_every_rank, on_rank_0
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.trainer.boundary import StepBoundary
from opcd_nemo.trainer.controls import add_controls, prepare_controls
from opcd_nemo.trainer.evaluations import RunEvaluations
from opcd_nemo.trainer.model import OPCDModel
from opcd_nemo.trainer.resume import DONE, continue_from, make_way
from opcd_nemo.trainer.strategy import MegatronStrategy, trainer_settings
from opcd_nemo.training.prepared import COMMITS, PreparedRun, prepare_run, with_digests

logger = logging.getLogger(__name__)


def train(raw: DictConfig) -> Path:
    """Run the configured training. Collective over the world.

    Returns:
        The run's folder: metrics.jsonl, summary.json, curves.png, samples.md, answers.jsonl,
        config.yaml and checkpoints.

    Raises:
        UserError: a key is wrong, before a model loads.
        NonFiniteError, MismatchError: a loss or gradient is not finite, or what was sampled is not
            the student's; the last checkpoint is intact.
        EngineError: a rollout engine's server is lost; the last checkpoint is intact.
        SaveError: a checkpoint could not be written; earlier checkpoints are intact.
        StoppedBySignal: SIGTERM or SIGUSR1 came; a checkpoint is saved.
        StoppedByFile: the folder has a file STOP; a checkpoint is saved.
    """
    started = time.perf_counter()
    _, world_size = environment_world()
    prepared = prepare_run(raw, world_size)
    config = prepared.config
    controls = prepare_controls(raw, config, world_size)
    parallel = init_parallel(config.parallel, config.seed)
    logger.info("%s; student: %s", _first_line(parallel), config.student.dtype)
    if (every := config.evaluation.every_n_steps) > (steps := config.trainer["max_steps"]):
        words = "no validation: evaluation.every_n_steps=%d is above trainer.max_steps=%d"
        logger.info(words, every, steps)
    folder = Path(config.exp_manager["exp_dir"]) / config.name
    with RunFolder.hold(folder, parallel) as run_folder:
        digest = _train(prepared, parallel, run_folder, started)
        if controls:
            _train_controls(controls, parallel, run_folder)
        # a cluster's script takes this file, no exit code, for success
        on_rank_0(parallel, lambda: run_folder.write(DONE, f"{digest}\n"))
    return folder


def _train_controls(
    controls: Mapping[str, PreparedRun], parallel: Parallel, run_folder: RunFolder
) -> None:
    """Do the runs of the controls, each alone in memory, and add their rows to the report."""
    for name, control in controls.items():
        gc.collect()  # trainer and model name each other, and hold gigabytes
        parallel.give_back_memory()
        logger.info("training the control %s", name)
        with RunFolder.hold(run_folder.path / name, parallel) as of_control:
            _train(control, parallel, of_control, time.perf_counter())
    unit = next(iter(controls.values())).inputs.task.unit_of
    on_rank_0(parallel, lambda: add_controls(run_folder, controls, unit))


def _train(prepared: PreparedRun, parallel: Parallel, run_folder: RunFolder, started: float) -> str:
    """One run from its first evaluation to its report; returns the weights' digest on rank 0."""
    checkpoints = prepared.config.exp_manager["checkpoint_callback_params"]
    strategy = MegatronStrategy(
        parallel,
        run_folder,
        async_save=checkpoints["async_save"],
        filename=checkpoints["filename"],
        num_kept=checkpoints["save_top_k"],
    )
    trainer = _trainer(prepared.config, strategy, StepBoundary(strategy))
    try:
        make_way(run_folder, prepared.config, parallel)
        prepared = with_digests(prepared, parallel)
        loops = trainer.fit_loop.state_dict()
        continued = continue_from(run_folder, prepared, parallel, loops)
    except OSError as error:
        raise ReadError(f"{run_folder.path} cannot be used: {describe(error)}") from error
    if prepared.commits:
        commits = json.dumps(prepared.commits, indent=1)
        on_rank_0(parallel, lambda: run_folder.write(COMMITS, commits))
    on_every_rank(parallel, lambda: _start_exp_manager(trainer, prepared.raw, run_folder.path))
    strategy.setup_environment()
    model = OPCDModel(prepared.raw, trainer, prepared)
    evaluations = RunEvaluations(model, prepared)
    law = evaluations.before()
    _fit(trainer, model, strategy, continued)
    _save_final(trainer, strategy, checkpoints["save_weights_only"])
    evaluations.after()
    _report(model, prepared, evaluations, law, started)
    if checkpoints["save_nemo_on_train_end"]:
        package = run_folder.path / f"{run_folder.path.name}.nemo"
        model.save_to(str(package))  # after the report, which goes along
        logger.info("written: %s", package)
    model.run.optimizer.end()
    return "" if model.summary is None else str(model.summary["weights_sha256"])


def _fit(
    trainer: pl.Trainer, model: OPCDModel, strategy: MegatronStrategy, continued: Path | None
) -> None:
    try:
        trainer.fit(model, ckpt_path=continued)
    except (MismatchError, NonFiniteError):  # met by every rank, which can still publish together
        strategy.finish_save()
        raise
    finally:
        _close_loggers(trainer)
    strategy.finish_save()


def _close_loggers(trainer: pl.Trainer) -> None:
    """Write what wandb holds: it waits for Python's exit handlers, which no rank runs."""
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.finish()


def _save_final(trainer: pl.Trainer, strategy: MegatronStrategy, weights_only: bool) -> None:
    """Save the last step where the interval of checkpoints has not. Collective over the world."""
    path = strategy.checkpoint_path(trainer.global_step)
    # a run of an earlier version may have given it another name
    if on_rank_0(strategy.parallel, of_step(path.parent, trainer.global_step).exists):
        return
    trainer.save_checkpoint(path, weights_only)
    strategy.finish_save()


def _first_line(parallel: Parallel) -> str:
    shared = f" (cp {parallel.cp} of them)" if parallel.cp > 1 else ""
    return (
        f"device {parallel.device.type} ({parallel.device_reason}); {parallel.world_size} ranks: "
        f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp}{shared}; "
        f"layers: {parallel.layer_spec}"
    )


def _trainer(config: TrainConfig, strategy: MegatronStrategy, boundary: pl.Callback) -> pl.Trainer:
    warnings.filterwarnings("ignore", module="lightning")
    return pl.Trainer(**trainer_settings(strategy), callbacks=[boundary], **config.trainer)


def _start_exp_manager(trainer: pl.Trainer, raw: DictConfig, folder: Path) -> None:
    # NeMo writes the command's words into a file, and wandb sends them
    sys.argv[1:] = words_without_secrets(sys.argv[1:], raw)
    # on several nodes it complains that Slurm did not start every rank; nothing depends on that
    with nemo_logging.temp_verbosity(nemo_logging.CRITICAL), naming(folder / "nemo"):
        exp_manager(trainer, _exp_manager_config(raw, folder))


def _exp_manager_config(raw: DictConfig, folder: Path) -> DictConfig:
    settings = recorded(raw)["exp_manager"]  # loggers store and send what they are given
    given: Any = OmegaConf.to_container(raw.exp_manager, resolve=True)
    wandb = given.get("wandb_logger_kwargs") or {}
    if "settings" in wandb:  # how it logs in
        settings["wandb_logger_kwargs"]["settings"] = wandb["settings"]
    settings.pop("exp_dir")
    settings |= MANAGER_FIXED
    # NeMo sets the files of its folder aside when a run is continued, metrics.jsonl too
    settings["explicit_log_dir"] = str(folder / "nemo")
    settings["checkpoint_callback_params"] |= {
        **CHECKPOINT_FIXED,
        "dirpath": str(folder / "checkpoints"),
        "model_parallel_size": raw.parallel.tensor_model_parallel_size,
    }
    created: DictConfig = OmegaConf.create(settings)
    return created


def _report(
    model: OPCDModel,
    prepared: PreparedRun,
    evaluations: RunEvaluations,
    law: Forecast,
    started: float,
) -> None:
    """Write the run's files on rank 0 and show the table. Collective over the world."""
    parallel = model.run.parallel
    peaks = parallel.gather_objects(peak_rss_kib())
    weights_sha256 = checkpoint.weights_digest(model.run.student)
    costs = evaluations.costs()

    def write() -> dict[str, Any]:
        if (launcher := environment_number(LAUNCHER_PID_ENV, 0)) > 0:
            peaks.append(peak_rss_of(launcher))
        facts = {
            "seconds_total": round(time.perf_counter() - started, 1),
            "peak_rss_gib": gib(peaks),
            **evaluations.facts(costs, read_metrics(model.run_folder.path / METRICS)),
            "device": f"{parallel.device.type} ({parallel.device_reason})",
            "command": _command(prepared.raw),
            "seed": prepared.config.seed,
            "context_hash": prepared.inputs.context_hash,
            "context_lineage": model.context["lineage"],
            "context": model.context,
            "weights_sha256": weights_sha256,
        }
        outcome = Outcome(
            scores=evaluations.scores,
            controls=evaluations.controls,
            forecast=law,
            validations=model.validations,
            parallel=parallel,
            units=evaluations.units,
            facts=facts,
        )
        record = OmegaConf.create(escaped(recorded(prepared.raw)))
        config_yaml = OmegaConf.to_yaml(record, resolve=True)
        summary = write_report(model.run_folder, outcome, config_yaml)
        write_run_page(model.run_folder)
        return summary

    summary = on_rank_0(parallel, write)
    if parallel.rank != 0:
        return
    model.describe_weights(summary)
    for line in summary_lines(summary, model.validations):
        logger.info("%s", line)
    logger.info("written: %s; open %s", model.run_folder.path, model.run_folder.path / PAGE)


def _command(raw: DictConfig) -> list[str] | None:
    """The words that started the run, without secrets; None where no command line did."""
    if not HydraConfig.initialized():
        return None
    words = list(HydraConfig.get().overrides.task)
    return words_without_secrets(words, raw)
