"""A whole training run on this rank: evaluate, distil, evaluate, report."""

from __future__ import annotations

import inspect
import json
import os
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from nemo.utils import logging as nemo_logging
from nemo.utils.exp_manager import ExpManagerConfig, exp_manager
from omegaconf import DictConfig, OmegaConf

from opcd_nemo.checkpoint import save_load as checkpoint
from opcd_nemo.config.changes import check_unchanged, run_origin
from opcd_nemo.config.renamed import present_config
from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.distributed.groups import (
    LAUNCHER_PID_ENV,
    Parallel,
    environment_world,
    init_parallel,
)
from opcd_nemo.errors import NonFiniteError
from opcd_nemo.evaluation import report
from opcd_nemo.evaluation.evaluator import Evaluation
from opcd_nemo.export.provenance import freeze_context
from opcd_nemo.metrics import METRICS, drop_metrics_from, read_metrics
from opcd_nemo.storage.durable import clean
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.trainer.boundary import STOP_FILE, StepBoundary
from opcd_nemo.trainer.model import OPCDModel
from opcd_nemo.trainer.strategy import MegatronStrategy, trainer_settings
from opcd_nemo.training.inputs import open_inputs

Say = Callable[[str], None]
DONE = "DONE"  # in the run's folder when nothing is left to do; holds the digest of the weights


def train(raw: DictConfig, say: Say) -> Path:
    """Run the configured training; `say` prints on rank 0. Collective over the world.

    Returns:
        The run's folder: metrics.jsonl, summary.json, curves.png, samples.md, answers.jsonl,
        config.yaml and checkpoints.

    Raises:
        ValueError: a key is wrong, before a model loads.
        NonFiniteError: a loss or gradient is not finite; the last checkpoint is intact.
        SaveError: a checkpoint could not be written; those before it are intact.
        StoppedBySignal: SIGTERM or SIGUSR1 came; a checkpoint is saved.
        StoppedByFile: the folder has a file STOP; a checkpoint is saved.
    """
    started = time.perf_counter()
    load_config(raw)
    raw = freeze_context(raw)
    config = load_config(raw)
    rank, world_size = environment_world()
    origin = run_origin(raw, open_inputs(config, world_size).context_hash)
    parallel = init_parallel(config.parallel, config.seed)
    quiet = say if rank == 0 else _silent
    folder = Path(config.exp_manager["exp_dir"]) / config.name
    quiet(_first_line(parallel))
    with RunFolder.hold(folder, parallel) as run_folder:
        _train(config, raw, origin, parallel, run_folder, started, quiet)
    return folder


def _train(
    config: TrainConfig,
    raw: DictConfig,
    origin: Mapping[str, Any],
    parallel: Parallel,
    run_folder: RunFolder,
    started: float,
    quiet: Say,
) -> None:
    checkpoints = config.exp_manager["checkpoint_callback_params"]
    strategy = MegatronStrategy(parallel, run_folder, async_save=checkpoints["async_save"])
    trainer = _trainer(config, strategy, StepBoundary(strategy))
    folder = run_folder.path
    _set_aside_old_run(run_folder, config, parallel)
    continued = _continue_from(folder, config, origin, parallel, quiet)
    _start_exp_manager(trainer, raw, folder)
    strategy.setup_environment()
    model = OPCDModel(raw, trainer)
    before = _scores_before(model, quiet)
    model.retention_before = before["base"][1].score
    _fit(trainer, model, strategy, continued)
    _save_final(trainer, strategy, config, folder / "checkpoints")
    scores = {**before, "student": model.scores("student", with_context=False)}
    _report(config, raw, model, folder, scores, started, quiet)
    if checkpoints["save_nemo_on_train_end"]:
        package = folder / f"{folder.name}.nemo"
        model.save_to(str(package))  # after the report, which goes along
        quiet(f"written: {package}")
    parallel.barrier()
    if model.summary is not None:  # on rank 0
        # a cluster's script takes this file, no exit code, for success
        run_folder.write(DONE, f"{model.summary['weights_sha256']}\n")


def _fit(
    trainer: pl.Trainer, model: OPCDModel, strategy: MegatronStrategy, continued: Path | None
) -> None:
    try:
        trainer.fit(model, ckpt_path=continued)
    except NonFiniteError:  # met by every rank, which can still publish together
        strategy.finish_save()
        raise
    strategy.finish_save()


def _save_final(
    trainer: pl.Trainer, strategy: MegatronStrategy, config: TrainConfig, folder: Path
) -> None:
    """Save the last step where the interval of checkpoints has not. Collective over the world."""
    path = folder / f"step={trainer.global_step}.ckpt"
    if strategy.parallel.gather_objects(path.exists())[0]:
        return
    weights_only = config.exp_manager["checkpoint_callback_params"]["save_weights_only"]
    trainer.save_checkpoint(path, weights_only)
    strategy.finish_save()


def _silent(_: str) -> None: ...


def _first_line(parallel: Parallel) -> str:
    shared = f" (cp {parallel.cp} of them)" if parallel.cp > 1 else ""
    return (
        f"device {parallel.device.type} ({parallel.device_reason}); {parallel.world_size} ranks: "
        f"tp {parallel.tp} x pp {parallel.pp} x dp {parallel.dp}{shared}; "
        f"layers: {parallel.layer_spec}"
    )


def _trainer(config: TrainConfig, strategy: MegatronStrategy, boundary: pl.Callback) -> pl.Trainer:
    warnings.filterwarnings("ignore", module="lightning")
    fixed = {**trainer_settings(strategy), "callbacks": [boundary]}
    names = inspect.signature(pl.Trainer).parameters
    _check_names("trainer", config.trainer, [name for name in names if name not in fixed])
    return pl.Trainer(**fixed, **config.trainer)


def _check_names(group: str, settings: Mapping[str, Any], allowed: Collection[str]) -> None:
    for name, value in settings.items():
        if name not in allowed:
            raise ValueError(f"{group}.{name}={value}: no such key; allowed: {', '.join(allowed)}")


def _start_exp_manager(trainer: pl.Trainer, raw: DictConfig, folder: Path) -> None:
    # on several nodes it complains that Slurm did not start every rank; nothing depends on that
    with nemo_logging.temp_verbosity(nemo_logging.CRITICAL):
        exp_manager(trainer, _exp_manager_config(raw, folder))


def _exp_manager_config(raw: DictConfig, folder: Path) -> DictConfig:
    settings: Any = OmegaConf.to_container(raw.exp_manager, resolve=True)
    settings.pop("exp_dir")
    settings["resume_if_exists"] = False  # NeMo's search knows no manifests: see `_continue_from`
    _check_names("exp_manager", settings, list(ExpManagerConfig.__dataclass_fields__))
    # NeMo sets the files of its folder aside when a run is continued, metrics.jsonl too
    settings["explicit_log_dir"] = str(folder / "nemo")
    settings["checkpoint_callback_params"]["save_nemo_on_train_end"] = False  # see `train`
    settings["checkpoint_callback_params"]["dirpath"] = str(folder / "checkpoints")
    settings["checkpoint_callback_params"]["async_save"] = False  # NeMo's own; ours: the strategy
    created: DictConfig = OmegaConf.create(settings)
    return created


def _set_aside_old_run(run_folder: RunFolder, config: TrainConfig, parallel: Parallel) -> None:
    """Keep an earlier run of the same name under the next free number; nothing is lost."""
    folder = run_folder.path
    parallel.barrier()
    if not config.exp_manager["resume_if_exists"]:
        run_folder.set_aside()
    if parallel.rank == 0:
        (folder / DONE).unlink(missing_ok=True)
    parallel.barrier()
    folder.mkdir(parents=True, exist_ok=True)
    stop = folder / STOP_FILE
    if stop.exists():
        raise ValueError(f"name: {stop} stops this run; allowed: a folder without that file")


def _continue_from(
    folder: Path, config: TrainConfig, origin: Mapping[str, Any], parallel: Parallel, say: Say
) -> Path | None:
    """The checkpoint to continue from, when that is asked for. Collective over the world.

    Raises:
        ValueError: a key that matters has changed since.
    """
    if not config.exp_manager["resume_if_exists"]:
        return None
    if parallel.rank == 0:
        clean(folder / "checkpoints")
        for marker in (folder / "checkpoints").glob("*-unfinished"):  # NeMo's, of a killed run
            marker.unlink()
    path = checkpoint.newest(folder / "checkpoints", parallel, say)
    metrics, step = folder / METRICS, 0
    if path is not None:
        common = checkpoint.read_common(path)
        check_unchanged(
            present_config(common["opcd"]["config"]), origin, config.resume.allow_changes
        )
        step = common["global_step"]
        say(f"continuing from {path}")
    if parallel.rank == 0 and metrics.exists():
        drop_metrics_from(metrics, step)
    parallel.barrier()
    return path


def _scores_before(model: OPCDModel, say: Say) -> dict[str, tuple[Evaluation, Evaluation]]:
    before = {
        "base": model.scores("student", with_context=False),
        "in_context": model.scores("teacher", with_context=True),
    }
    say(
        f"in-context gap before training: without context {before['base'][0].score:.2f}, "
        f"with context {before['in_context'][0].score:.2f}"
    )
    return before


def _report(
    config: TrainConfig,
    raw: DictConfig,
    model: OPCDModel,
    folder: Path,
    scores: Mapping[str, tuple[Evaluation, Evaluation]],
    started: float,
    say: Say,
) -> None:
    """Write the run's files on rank 0 and show the table. Collective over the world."""
    parallel = model.run.parallel
    peaks = parallel.gather_objects(report.peak_rss_kib())
    weights_sha256 = checkpoint.weights_digest(model.run.student)
    if parallel.rank != 0:
        return
    run_folder = model.run_folder
    run_folder.check_held()
    launcher = os.environ.get(LAUNCHER_PID_ENV)
    if launcher is not None:
        peaks.append(report.peak_rss_of(int(launcher)))
    lines = read_metrics(folder / METRICS)
    summary: dict[str, Any] = {name: pair[0].score for name, pair in scores.items()}
    for name, pair in zip(("before", "in_context", "after"), scores.values(), strict=True):
        summary[f"retention_{name}"] = pair[1].score
    summary["evaluation"] = {
        name: {"task": pair[0].record(), "retention": pair[1].record()}
        for name, pair in scores.items()
    }
    summary |= {
        "steps": len(lines),
        "seconds_total": round(time.perf_counter() - started, 1),
        **_cpu_seconds(lines),
        "peak_rss_gib": report.gib(peaks),
        "world_size": parallel.world_size,
        "tp": parallel.tp,
        "pp": parallel.pp,
        "dp": parallel.dp,
        "cp": parallel.cp,
        "seed": config.seed,
        "context_hash": model.context_hash,
        "context_lineage": model.context["lineage"],
        "weights_sha256": weights_sha256,
        "versions": report.versions(),
    }
    if model.best is not None:
        summary |= {"best_step": model.best.step, "best_validation": model.best.score}
        summary["validations"] = list(map(asdict, model.validations))
    stopped = model.stopped_by_retention
    summary["stopped_by_retention"] = stopped.step if stopped else None
    model.summary = summary
    report.write_curves(folder / "curves.png", folder / METRICS)
    report.write_samples(folder / "samples.md", {name: pair[0] for name, pair in scores.items()})
    report.write_answers(folder / "answers.jsonl", scores)
    run_folder.write("config.yaml", OmegaConf.to_yaml(raw, resolve=True))
    run_folder.write("summary.json", json.dumps(summary, indent=2, ensure_ascii=False))  # last
    names = {"base": "base", "in_context": "in-context (teacher)", "student": "after training"}
    table = {names[name]: (a.score, b.score) for name, (a, b) in scores.items()}
    say(report.results_table(table))
    if stopped is not None:
        say(
            f"stopped by retention after step {stopped.step}: {stopped.retention:.2f} is below "
            f"evaluation.min_retention={config.evaluation.min_retention} of "
            f"{summary['retention_before']:.2f}, the score before training"
        )
    if model.best is not None:
        say(f"best on validation: {model.best.score:.2f} after {model.best.step} steps")
    say(_costs(summary))
    say(f"written: {folder}")


def _cpu_seconds(lines: list[dict[str, float]]) -> dict[str, Any]:
    """CPU seconds a step over all ranks, in all and by phase."""

    def mean(name: str) -> float:
        return round(sum(line[name] for line in lines) / len(lines), 2)

    phases = [name for name in lines[0] if name.startswith("cpu/") and name != "cpu/step_s"]
    return {
        "cpu_seconds_per_step": mean("cpu/step_s"),
        "cpu_seconds_by_phase": {name[4:-2]: mean(name) for name in phases},
    }


def _costs(summary: Mapping[str, Any]) -> str:
    phases = ", ".join(f"{k} {v:.2f}" for k, v in summary["cpu_seconds_by_phase"].items())
    return (
        f"{summary['steps']} steps, {summary['cpu_seconds_per_step']:.2f} CPU-seconds a step over "
        f"all ranks ({phases}); peak RSS {summary['peak_rss_gib']:.2f} GiB; "
        f"{summary['seconds_total']:.0f} s in all"
    )
