"""`.nemo` files of NeMo's API: `OPCDModel.save_to`, `OPCDModel.restore_from`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from nemo.core.classes.common import (  # pinned: NeMo offers no public way to name a third party
    ALLOWED_TARGET_PREFIXES,
    _get_allowed_target_class,
)
from nemo.core.connectors.save_restore_connector import SaveRestoreConnector
from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config import limits
from opcd_nemo.config.renamed import present_name
from opcd_nemo.config.secrets import HIDDEN, hidden_keys
from opcd_nemo.config.stored import parse_stored
from opcd_nemo.config.train import ParallelConfig, load_config
from opcd_nemo.distributed.groups import Parallel, init_parallel
from opcd_nemo.errors import UserError
from opcd_nemo.export.convert import nemo_config
from opcd_nemo.export.package import write_package
from opcd_nemo.export.provenance import Provenance, base_licence, describe_context
from opcd_nemo.formats.locate import NEMO_CONFIG, resolve_model_path
from opcd_nemo.formats.nemo import EVALUATION, open_package, read_record
from opcd_nemo.storage.archive import Files, read_whole
from opcd_nemo.trainer.strategy import MegatronStrategy, trainer_settings

OWN_TARGETS = "opcd_nemo."
if OWN_TARGETS not in ALLOWED_TARGET_PREFIXES:
    ALLOWED_TARGET_PREFIXES.append(OWN_TARGETS)  # NeMo's guard stays on for everybody else


_NEMO_KEYS = ("target", "nemo_version")


class OPCDConnector(SaveRestoreConnector):  # type: ignore[misc]  # nemo is untyped
    """The student as a reshardable package, written by all ranks, read in place by each."""

    def save_to(self, model: Any, save_path: str) -> None:
        """Write the model's student and its provenance. Collective over the world.

        Raises:
            UserError: another ending than `.nemo`.
            SaveError: on every rank, when the file cannot be written.
        """
        config: Any = OmegaConf.to_container(model.cfg, resolve=True)
        if Path(save_path).suffix != ".nemo":
            raise UserError("save_path", save_path, "a name ending in .nemo")
        write_package(
            Path(save_path),
            model.run.student,
            config_yaml=OmegaConf.to_yaml(OmegaConf.create(nemo_config(config))),
            tokenizer_path=config["student"]["path"],
            provenance=Provenance(
                context=describe_context(config["context"]),
                evaluation=model.summary,
                licence=base_licence(config["student"]["path"]),
            ),
            run_folder=model.run_folder,
        )

    def restore_from(
        self,
        calling_cls: type[Any],
        restore_path: str,
        override_config_path: DictConfig | str | Path | None = None,
        map_location: Any = None,
        strict: bool = True,
        return_config: bool = False,
        trainer: pl.Trainer | None = None,
        validate_access_integrity: bool = True,
    ) -> Any:
        """The model of a package on the layout of `trainer`, or of the configuration without one.

        A frozen teacher is again the base model; an updated teacher starts as the student.

        Args:
            calling_cls: a class of OPCDModel's.
            restore_path: a `.nemo`, or a folder that a `.nemo` was unpacked to.
            override_config_path: a whole configuration (or its file), in place of the stored one.
            map_location: None, or the device of the layout.
            strict: True: every tensor of the model, and no other.
            return_config: return the configuration and build nothing.
            trainer: one with a MegatronStrategy.
            validate_access_integrity: NeMo's; archives are always checked.

        Raises:
            UserError: a damaged or hostile package, or a setting that does not fit.
            UnsafeTargetError: the configuration names a class outside NeMo's allow-list.
        """
        if not strict:
            raise UserError("strict", strict, "true")
        path = str(self.model_extracted_dir or restore_path)
        files = open_package(resolve_model_path(path))
        config = _stored_config(files)
        if override_config_path is not None:
            config = _given_config(override_config_path)
        if return_config:
            return config
        _refuse_hidden(config, files.where)
        load_config(run_config(config))  # says what is wrong with an override
        name = present_name(config.get("target", f"{OWN_TARGETS}trainer.model.OPCDModel"))
        if not issubclass(calling_cls, _get_allowed_target_class(name)):
            raise UserError("target", name, f"{calling_cls.__name__} or a base of it")
        if trainer is not None and not isinstance(trainer.strategy, MegatronStrategy):
            given = type(trainer.strategy).__name__
            raise UserError("trainer.strategy", given, "a MegatronStrategy, or no trainer")
        with open_dict(config):
            if config.teacher.path is None and config.teacher["update"] == "never":
                config.teacher.path = config.student.path  # any other starts as the student
            config.student.path, config.student.keep_layers = path, None
            # of the run that wrote the package; a registry of notes may not be here
            config.evaluation.controls, config.evaluation.wrong_context = [], None
            if override_config_path is None:
                config.exp_manager.exp_dir = "runs"  # a stranger does not say where to write
        trainer = trainer or _default_trainer(config)
        strategy = trainer.strategy
        assert isinstance(strategy, MegatronStrategy)
        device = strategy.parallel.device
        if map_location is not None and torch.device(map_location).type != device.type:
            raise UserError("map_location", map_location, f"the layout's device, {device}")
        with open_dict(config):
            config.parallel = {**config.parallel, **_layout(strategy.parallel)}
        model = calling_cls(config, trainer)
        if EVALUATION in files.sizes():
            model.describe_weights(read_record(files, EVALUATION))
        return model


def _given_config(given: DictConfig | str | Path) -> DictConfig:
    config = given.copy() if isinstance(given, DictConfig) else OmegaConf.load(given)
    assert isinstance(config, DictConfig)
    return config


def _refuse_hidden(config: DictConfig, where: str) -> None:
    """Refuse to build from a configuration whose secrets were left out when it was written."""
    for key in hidden_keys(OmegaConf.to_container(config)):
        if not key.startswith("exp_manager."):  # a restored model has no logger
            allowed = "the whole configuration, with this value, as override_config_path"
            raise UserError(key, HIDDEN, allowed, where=where)


def run_config(config: DictConfig) -> DictConfig:
    """Without the two keys that NeMo adds to a model's configuration."""
    return OmegaConf.masked_copy(config, [str(key) for key in config if key not in _NEMO_KEYS])


def _stored_config(files: Files) -> DictConfig:
    stored = parse_stored(
        read_whole(files, NEMO_CONFIG, limits.CONFIGURATION_BYTES), f"{files.where}: {NEMO_CONFIG}"
    )
    config: DictConfig = OmegaConf.create(stored)
    return config


def _default_trainer(config: DictConfig) -> pl.Trainer:
    parallel = init_parallel(ParallelConfig(**config.parallel), config.seed)
    settings = trainer_settings(MegatronStrategy(parallel, async_save=False))
    trainer = pl.Trainer(**settings, max_steps=config.trainer.max_steps)
    trainer.strategy.setup_environment()
    return trainer


def _layout(parallel: Parallel) -> dict[str, Any]:
    return {
        "num_ranks": parallel.world_size,
        "tensor_model_parallel_size": parallel.tp,
        "pipeline_model_parallel_size": parallel.pp,
        "context_parallel_size": parallel.cp,
        "sequence_parallel": parallel.sequence_parallel,
    }
