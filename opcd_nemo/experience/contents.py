"""What a pipeline's models and files of data hold: it goes on with the same, or says so.

<exp_dir>/<name>/digests.json    size and SHA-256 of every file, by the key that names the file
"""

from __future__ import annotations

import json
import logging
from typing import Any

from opcd_nemo.config.changes import changed_contents
from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.experience.folder import PipelineFolder
from opcd_nemo.experience.run_configs import stage_config
from opcd_nemo.formats.locate import read_json
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.storage.plain_file import is_there
from opcd_nemo.training.digests import input_digests, model_digests

logger = logging.getLogger(__name__)
_FILE = "digests.json"
_WRITER = "experience.extraction.model"


def check_contents(folder: PipelineFolder) -> None:
    """Refuse a folder whose pipeline began with other models or data of the same names.

    Raises:
        UserError: naming every key whose files differ.
    """
    file = folder.root / _FILE
    if not is_there(file):
        if folder.root.is_dir():
            logger.info(
                "%s is of an earlier version: whether models and data have changed in place since "
                "is not known",
                folder.root,
            )
        return
    saved = {key: files for key, files in read_json(file).items() if isinstance(files, dict)}
    if changed := changed_contents(saved, _contents(folder), ()):
        raise UserError(
            "name",
            folder.settings.train.name,
            "the files that the pipeline began with, or another name",
            problem="; ".join(changed.values()),
        )


def keep_contents(folder: PipelineFolder) -> None:
    """Write the digests of a pipeline's models and data, when the pipeline begins."""
    file = folder.root / _FILE
    if not is_there(file):
        write_whole(file, json.dumps(_contents(folder), indent=1))


def _contents(folder: PipelineFolder) -> dict[str, Any]:
    config = load_config(stage_config(folder.of_round(1)))
    model = folder.settings.experience.extraction.model
    writer = {} if model is None else {_WRITER: model_digests(model)}
    return {**input_digests(config), **writer}
