"""From any kind of model to a Hugging Face folder, a `.nemo` file or what that holds, unpacked."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from safetensors import SafetensorError

from opcd_nemo.config import limits
from opcd_nemo.config.programs import ExportConfig
from opcd_nemo.config.renamed import present_config
from opcd_nemo.config.schema import read_schema
from opcd_nemo.config.secrets import without_secrets
from opcd_nemo.config.stored import check_stored, escaped, parse_stored
from opcd_nemo.distributed.groups import init_parallel
from opcd_nemo.errors import SaveError, UserError
from opcd_nemo.export.card import CARD, model_card
from opcd_nemo.export.package import write_package
from opcd_nemo.export.provenance import read_provenance
from opcd_nemo.formats.huggingface import write_hf_folder
from opcd_nemo.formats.locate import NEMO_CONFIG, model_kind, resolve_model_path, write_json
from opcd_nemo.formats.nemo import open_package, read_checkpoint
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer, write_tokenizer
from opcd_nemo.model.language_model import DTYPES, LanguageModel, choose_dtype
from opcd_nemo.storage.archive import read_whole
from opcd_nemo.storage.durable import check_writable, describe
from opcd_nemo.storage.hub import SCHEME, at_commit, parse_address, upload_model
from opcd_nemo.storage.run_folder import RunFolder

_NAME_BYTES = 200  # file systems take 255; what is not whole yet has a longer name
# perhaps the user's classes, which restoring refuses
_PLUGS = ("task", "retention", "context", "engine", "loss")

# a stranger's file names neither a server nor a program to start: it is sampled from in process
_BY_SERVER = "opcd_nemo.engines.vllm.VllmEngine"
_IN_PROCESS = {
    "_target_": "opcd_nemo.engines.megatron.MegatronEngine",
    "max_batch_size": 32,
    "pack": True,
}


def export(settings: DictConfig, default_config: Callable[[], DictConfig]) -> str:
    """Convert a model; the file, folder or repository is complete, or does not exist.

    Args:
        settings: `conf/export.yaml`.
        default_config: what a package of a model that was not trained here is configured as.

    Returns:
        What was written: a path, or the page of the hub's commit.

    Raises:
        UserError: a key is wrong, the source is damaged, or the target exists.
        SaveError: a disk refuses; nothing is left behind.
    """
    config = read_schema(ExportConfig, settings)
    address = parse_address(config.to) if config.to.startswith(SCHEME) else None
    if address is None:
        return str(_export(config, _target(config), default_config))
    if config.format != "hf":
        raise UserError("format", config.format, f"hf with to={config.to}")
    if address.dataset or address.file is not None:
        raise UserError("to", config.to, "hf://owner/name[@revision]")
    with tempfile.TemporaryDirectory() as folder:
        local = replace(config, to=str(Path(folder) / "model"))
        made = _export(local, _target(local), default_config, repository=address.repository)
        return upload_model(made, address)


def _export(
    settings: ExportConfig,
    target: Path,
    default_config: Callable[[], DictConfig],
    *,
    repository: str | None = None,
) -> Path:
    source = at_commit(settings.from_)
    checkpoint = open_model(source)
    dtype = choose_dtype(settings.dtype, checkpoint.dtype)
    ChatTokenizer.from_path(source)  # refuses now what could not be written later
    provenance = read_provenance(source)
    if settings.format == "hf":

        def write_others(folder: Path) -> None:
            write_tokenizer(source, folder)
            for name, values in provenance.files().items():
                write_json(folder / name, values)
            (folder / CARD).write_text(model_card(provenance, repository), encoding="utf-8")

        try:
            write_hf_folder(
                target,
                checkpoint.config,
                checkpoint.tensors(),
                dtype,
                max_file_bytes=settings.max_file_bytes,
                write_others=write_others,
            )
        except (OSError, SafetensorError) as error:  # a full disk, for one
            reason = describe(error) if isinstance(error, OSError) else error
            raise SaveError(f"{target} is not written: {reason}") from error
        return target
    if dtype not in DTYPES.values():
        raise UserError("from", source, "dtype=bf16 or dtype=fp32", problem=f"is stored in {dtype}")
    parallel = init_parallel(settings.parallel, seed=0)
    student = LanguageModel(checkpoint.config, parallel, dtype)
    student.load(checkpoint)
    write_package(
        target,
        student,
        config_yaml=package_config(source, default_config),
        tokenizer_path=source,
        provenance=provenance,
        run_folder=RunFolder(target.parent),
    )
    return target


def package_config(source: str, default_config: Callable[[], DictConfig]) -> str:
    """The text of `model_config.yaml` for the model at `source`."""
    found = resolve_model_path(source)
    kind = model_kind(found)
    if kind == "nemo":
        text = read_whole(open_package(found), NEMO_CONFIG, limits.CONFIGURATION_BYTES)
        values = parse_stored(text, f"{found}: {NEMO_CONFIG}")
        kept = without_secrets(values)  # files of earlier versions hold them
        return text.decode() if kept == values else OmegaConf.to_yaml(OmegaConf.create(kept))
    if kind == "checkpoint":
        config = present_config(read_checkpoint(found).config)
        check_stored({key: value for key, value in config.items() if key not in _PLUGS}, str(found))
        return OmegaConf.to_yaml(OmegaConf.create(nemo_config(config)))
    made: Any = OmegaConf.to_container(default_config(), resolve=True)
    made["student"]["path"] = source
    return OmegaConf.to_yaml(OmegaConf.create(nemo_config(made)))


def nemo_config(config: dict[str, Any]) -> dict[str, Any]:
    """From a run's resolved values, the configuration with the class that NeMo builds."""
    plain = {key: value for key, value in config.items() if key != "context_hash"}
    plain = without_secrets(plain)  # files of earlier versions hold them
    if plain.get("engine", {}).get("_target_") == _BY_SERVER:
        plain["engine"] = _IN_PROCESS
    written: dict[str, Any] = escaped({**plain, "target": "opcd_nemo.trainer.model.OPCDModel"})
    return written


def _target(settings: ExportConfig) -> Path:
    for key, value in (("from", settings.from_), ("to", settings.to)):
        if not value:
            raise UserError(key, value, "a path")
    path = Path(settings.to)
    if (path.suffix == ".nemo") != (settings.format == "nemo"):
        ending = "a name that ends" if settings.format == "nemo" else "a folder that does not end"
        raise UserError("to", path, f"{ending} in .nemo with format={settings.format}")
    if Path(settings.from_).absolute() in path.absolute().parents:
        raise UserError("to", path, f"a place outside {settings.from_}")
    name = path.name
    if len(name.encode()) > _NAME_BYTES or not name.isprintable() or name.strip() != name:
        allowed = f"a name of at most {_NAME_BYTES} bytes that can be printed, no blank at its ends"
        raise UserError("to", path, allowed)
    if ".." in path.parts:
        raise UserError("to", path, "a path without ..")
    check_writable("to", path.parent)
    if path.exists() or path.is_symlink():
        raise UserError("to", path, "a new path", problem="is already there")
    return path
