"""The keys of Lightning's Trainer, NeMo's exp_manager and its loggers that a run follows.

Each of them takes many more. Most would change a run behind its back: another number of steps,
another optimizer step, files elsewhere. They are refused, with the key that a run has for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from opcd_nemo.config.doc import doc
from opcd_nemo.config.limits import MOST_STEPS
from opcd_nemo.errors import UserError

_STEPS = "trainer.max_steps"
_VALIDATION = "evaluation.every_n_steps"
_DEVICES = "parallel.device and parallel.num_ranks"
_CLIP = "optim.clip_grad"
_METRICS = "metrics.jsonl, which has the seconds of every step"
_SIGNAL = "SIGUSR1 before a cluster's time limit, or the file STOP in the run's folder"
_CURVES = "create_tensorboard_logger or create_wandb_logger"

_TRAINER = {
    "accelerator": _DEVICES,
    "strategy": "the keys of parallel",
    "devices": _DEVICES,
    "num_nodes": _DEVICES,
    "precision": "student.dtype and teacher.dtype",
    "logger": f"exp_manager.{_CURVES}".replace(" or ", " or exp_manager."),
    "fast_dev_run": _STEPS,
    "max_epochs": _STEPS,
    "min_epochs": _STEPS,
    "min_steps": f"{_STEPS}, with evaluation.min_retention=null",
    "max_time": _SIGNAL,
    "limit_train_batches": _STEPS,
    "limit_val_batches": "evaluation.num_questions",
    "limit_test_batches": "evaluation.num_questions",
    "limit_predict_batches": "evaluation.num_questions",
    "overfit_batches": "a task of few questions",
    "val_check_interval": _VALIDATION,
    "check_val_every_n_epoch": _VALIDATION,
    "num_sanity_val_steps": "evaluation.num_questions",
    "enable_checkpointing": "exp_manager.checkpoint_callback_params",
    "accumulate_grad_batches": "batching.global_batch_size and batching.micro_batch_size",
    "gradient_clip_val": _CLIP,
    "gradient_clip_algorithm": _CLIP,
    "profiler": _METRICS,
    "default_root_dir": "exp_manager.exp_dir",
}

_MANAGER = {
    "explicit_log_dir": "exp_manager.exp_dir and name",
    "name": "the key name",
    "version": "the key name",
    "use_datetime_version": "the key name",
    "resume_past_end": _STEPS,
    "resume_ignore_no_checkpoint": "exp_manager.resume_if_exists",
    "resume_from_checkpoint": "exp_manager.resume_if_exists; another run's checkpoint is a "
    "student.path",
    "create_mlflow_logger": _CURVES,
    "mlflow_logger_kwargs": _CURVES,
    "create_dllogger_logger": _CURVES,
    "dllogger_logger_kwargs": _CURVES,
    "create_clearml_logger": _CURVES,
    "clearml_logger_kwargs": _CURVES,
    "create_neptune_logger": _CURVES,
    "neptune_logger_kwargs": _CURVES,
    "create_checkpoint_callback": "checkpoint_callback_params.every_n_train_steps",
    "create_early_stopping_callback": "evaluation.min_retention",
    "early_stopping_callback_params": "evaluation.min_retention",
    "create_preemption_callback": _SIGNAL,
    "log_step_timing": _METRICS,
    "log_delta_step_timing": _METRICS,
    "step_timing_kwargs": _METRICS,
    "log_tflops_per_sec_per_gpu": f"opcd plan, and {_METRICS}",
    "ema": "teacher.update=ema",
    "max_time_per_run": _SIGNAL,
    "seconds_to_sleep": "no key: no rank sleeps",
}

_CHECKPOINT = {
    "dirpath": "exp_manager.exp_dir and name",
    "filepath": "exp_manager.exp_dir and name",
    "prefix": "filename",
    "postfix": "filename",
    "monitor": f"{_VALIDATION}, with which the best on validation is kept beside the last ones",
    "mode": f"{_VALIDATION}, with which the best on validation is kept beside the last ones",
    "save_best_model": f"{_VALIDATION}, with which the best on validation is kept",
    "save_last": "save_top_k: the last ones are kept, and the last one of all is saved",
    "save_last_n_optim_states": "save_weights_only",
    "every_n_epochs": "every_n_train_steps",
    "save_on_train_epoch_end": "every_n_train_steps",
    "train_time_interval": "every_n_train_steps",
    "always_save_nemo": "save_nemo_on_train_end",
    "model_parallel_size": "the keys of parallel",
    "auto_insert_metric_name": "filename",
}

_IN_FOLDER = "the folder nemo of the run, which no key moves"
_TENSORBOARD = dict.fromkeys(("save_dir", "log_dir", "name", "version", "sub_dir"), _IN_FOLDER)
_WANDB = {
    **dict.fromkeys(("save_dir", "dir"), _IN_FOLDER),
    "version": "id",
    "mode": "offline",
    "log_model": "exp_manager.checkpoint_callback_params",
}
_LOGIN = "a mapping of api_key and base_url to texts, or null"
_INSTEAD: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "trainer": ("Lightning's Trainer", _TRAINER),
    "exp_manager": ("NeMo's exp_manager", _MANAGER),
    "exp_manager.checkpoint_callback_params": ("NeMo's ModelCheckpoint", _CHECKPOINT),
    "exp_manager.summary_writer_kwargs": ("Lightning's TensorBoardLogger", _TENSORBOARD),
    "exp_manager.wandb_logger_kwargs": ("Lightning's WandbLogger", _WANDB),
}
"""The third party of a group's keys, and what a run has in place of keys that it ignores."""


def refuse_unfollowed_key(key: str, value: object) -> None:
    """Name what a run has in place of a key of Lightning or NeMo.

    Raises:
        UserError: a run does not follow the key.
    """
    group, _, name = key.rpartition(".")
    whose, instead = _INSTEAD.get(group, ("", {}))
    if name in instead:
        problem = f"a run does not follow this key of {whose}"
        raise UserError(key, value, instead[name], problem=problem)


@dataclass(kw_only=True)
class TrainerKeys:
    """Lightning's Trainer."""

    max_steps: int = doc("optimizer steps of the run", minimum=1, maximum=MOST_STEPS)
    log_every_n_steps: int = doc(
        "steps between two points of the curves in TensorBoard or Weights & Biases",
        minimum=1,
        maximum=MOST_STEPS,
        default=1,
    )
    enable_progress_bar: bool = doc("show a bar of the steps", default=True)


@dataclass(kw_only=True)
class CheckpointKeys:
    """NeMo's ModelCheckpoint."""

    every_n_train_steps: int = doc(
        "steps between two checkpoints; the last step is always saved",
        minimum=1,
        maximum=MOST_STEPS,
    )
    save_top_k: int = doc(
        "how many of the last checkpoints are kept, whoever saved them: this job, one before it, a "
        "signal or a validation; the best on validation is kept besides; -1: all",
        minimum=-1,
        maximum=MOST_STEPS,
        takes="a whole number >= 1, or -1",
    )
    filename: str = doc("name of a checkpoint", takes="a file name with {step} in it, as '{step}'")
    save_weights_only: bool = doc(
        "leave out the optimizer, which takes most of the room; such a run cannot be continued"
    )
    save_nemo_on_train_end: bool = doc("pack the student into a .nemo file at the end")
    async_save: bool = doc("write a copy while training goes on")


@dataclass(kw_only=True)
class TensorBoardKeys:
    """Lightning's TensorBoardLogger."""

    flush_secs: int | None = doc(
        "seconds between two writes", minimum=1, maximum=86_400, default=None
    )
    max_queue: int | None = doc(
        "points that are held back between two writes", minimum=1, maximum=1_000_000, default=None
    )
    prefix: str | None = doc("put before the name of every curve", default=None)


@dataclass(kw_only=True)
class WandbKeys:
    """Lightning's WandbLogger."""

    project: str | None = doc("project of the run", default=None)
    name: str | None = doc("name of the run as it is shown", default=None)
    entity: str | None = doc("user or team of the project", default=None)
    group: str | None = doc("name of the runs that belong together", default=None)
    job_type: str | None = doc("kind of the run", default=None)
    notes: str | None = doc("what the run is about", default=None)
    tags: list[str] | None = doc("words to find the run by", default=None)
    id: str | None = doc("id of the run, to go on with its curves", default=None)
    resume: str | None = doc(
        "with id: whether a run of this id may, must or must not exist",
        choices=("allow", "must", "never", "auto"),
        default=None,
    )
    offline: bool | None = doc("keep the curves in the folder nemo of the run", default=None)
    settings: Any = doc("how wandb logs in, and where", takes=_LOGIN, default=None)
    prefix: str | None = doc("put before the name of every curve", default=None)

    def check(self, prefix: str) -> None:
        """Refuse other settings of wandb, which move files or turn curves off.

        Raises:
            UserError: `prefix` stands before the key.
        """
        settings = {} if self.settings is None else self.settings
        known = isinstance(settings, Mapping) and settings.keys() <= {"api_key", "base_url"}
        if not known or not all(isinstance(value, str) for value in settings.values()):
            raise UserError(f"{prefix}settings", allowed=_LOGIN, problem="has another key or value")


@dataclass(kw_only=True)
class ManagerKeys:
    """NeMo's exp_manager."""

    exp_dir: str = doc("folder of all runs; a run is in the folder `name` of it", example="runs")
    resume_if_exists: bool = doc("continue from the newest whole checkpoint of the run's folder")
    create_tensorboard_logger: bool = doc(
        "write curves for TensorBoard into the folder nemo of the run", default=False
    )
    summary_writer_kwargs: Any = doc(
        "Lightning's TensorBoardLogger",
        keys=TensorBoardKeys,
        default=None,
    )
    create_wandb_logger: bool = doc(
        "send curves to Weights & Biases; with WANDB_MODE=offline they stay in the folder nemo",
        default=False,
    )
    wandb_logger_kwargs: Any = doc("Lightning's WandbLogger", keys=WandbKeys, default=None)
    checkpoint_callback_params: Any = doc("NeMo's ModelCheckpoint", keys=CheckpointKeys)


MANAGER_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "resume_if_exists": False,  # NeMo's search knows no manifests
        "create_preemption_callback": False,
        "log_step_timing": False,
        "log_tflops_per_sec_per_gpu": False,
        "seconds_to_sleep": 0,
    }
)
"""What NeMo's exp_manager is told in every run."""
CHECKPOINT_FIXED: Mapping[str, Any] = MappingProxyType(
    {
        "every_n_epochs": None,
        "monitor": "step",
        "mode": "max",
        "save_last": False,
        "save_nemo_on_train_end": False,  # the run packs the student itself, with its scores
        "async_save": False,  # NeMo's value; the strategy has ours
    }
)
"""What NeMo's ModelCheckpoint is told in every run: the last `save_top_k` steps are kept."""
