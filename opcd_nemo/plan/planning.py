"""`opcd plan`: the configuration of a training run, on a named accelerator."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

from omegaconf import DictConfig, OmegaConf

from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import PlanConfig
from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.outline import outline
from opcd_nemo.plan.report import plan_report, sweep_report
from opcd_nemo.plan.servers import servers_of

logger = logging.getLogger(__name__)

_NOT_NEEDED = "not-needed-for-a-plan"


def plan(raw: DictConfig) -> None:
    """Say what a run takes, or rank the layouts of its ranks.

    Raises:
        UserError: a key is wrong, or something that the arithmetic needs is missing.
    """
    raw, settings = split_settings(raw, "plan", PlanConfig)
    raw, accelerator = split_settings(raw, "accelerator", Accelerator)
    if settings.prompt_tokens is not None and settings.context_tokens is not None:
        fill_missing(raw)
    config = load_config(raw)
    work, origin = outline(config, settings)
    work = replace(work, servers=servers_of(config, accelerator))
    for dtype in (work.student_dtype, work.teacher_dtype, *(["fp8"] if work.fp8 else [])):
        if dtype not in accelerator.tflops:
            known = ", ".join(accelerator.tflops)
            raise UserError(
                "accelerator.tflops", allowed=f"one of {known} as dtype", problem=f"no {dtype}"
            )
    logger.info("%s", plan_report(work, accelerator, origin))
    if settings.sweep:
        logger.info("")
        logger.info("%s", sweep_report(work, accelerator, settings.show))


def fill_missing(node: Any) -> None:
    """Put a word where files of data are missing: lengths are given, no file is opened."""
    for key in list(node):
        if OmegaConf.is_missing(node, key):
            node[key] = _NOT_NEEDED
        elif not OmegaConf.is_interpolation(node, key) and isinstance(node[key], DictConfig):
            fill_missing(node[key])
