"""A run before any model loads: its configuration checked and its inputs opened, once a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config.changes import Digests, run_origin
from opcd_nemo.config.plugs import build_plug
from opcd_nemo.config.stored import escaped
from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.context.sources import ContextSource
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.formats.locate import read_json
from opcd_nemo.storage.hub import addresses, at_commit
from opcd_nemo.storage.ranks import on_rank_0
from opcd_nemo.training.digests import input_digests
from opcd_nemo.training.inputs import Inputs, open_inputs

COMMITS = "hub.json"  # in a run's folder


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """A configuration in every form that a run needs, and the opened inputs that it names.

    `raw` is the configuration as composed, but with the context written out, so that what is stored
    with the weights needs no registry. `config` is the same, typed and checked. `origin` is what a
    checkpoint holds to compare a continued run with: plain values and the context's hash.
    `commits` are the hub's addresses as they were given, each with the commit that this run reads;
    the run's folder keeps them (`COMMITS`), so that a continued run reads the same. `digests` tell
    the content of models and files of data, by key; empty until `with_digests` has read them.
    """

    raw: DictConfig
    config: TrainConfig
    inputs: Inputs
    origin: Mapping[str, Any]
    commits: Mapping[str, str]
    digests: Digests = field(default_factory=dict)


def prepare_run(raw: DictConfig, world_size: int | None = None) -> PreparedRun:
    """Check a composed configuration and open what it names.

    Args:
        raw: the configuration of `train`.
        world_size: the number of ranks; None: `parallel.num_ranks`.

    Raises:
        UserError: a key is wrong, or what it names does not exist or does not fit.
    """
    config = load_config(raw)
    commits = _commits(raw, config)
    if commits:
        raw = _at_commits(raw, commits)
        config = load_config(raw)
    frozen = freeze_context(raw)
    if frozen is not raw:
        # the rest was checked just now, and this program has written the context
        context: Any = OmegaConf.to_container(frozen.context, resolve=True)
        config = replace(config, context=context)
    inputs = open_inputs(config, world_size or config.parallel.num_ranks)
    origin = run_origin(frozen, inputs.context_hash, getattr(inputs.task, "draw_version", 1))
    return PreparedRun(raw=frozen, config=config, inputs=inputs, origin=origin, commits=commits)


def with_digests(prepared: PreparedRun, parallel: Parallel) -> PreparedRun:
    """The run with the digests of its inputs; rank 0 reads. Collective over the world.

    Raises:
        UserError, OSError: on every rank, when a file cannot be read any more.
    """
    config, tokenizer = prepared.config, prepared.inputs.tokenizer
    digests = on_rank_0(parallel, lambda: input_digests(config, tokenizer))
    return replace(prepared, digests=digests)


def _commits(raw: DictConfig, config: TrainConfig) -> dict[str, str]:
    """The commit that each address of the hub means: as when the run began, else today's."""
    given = dict(addresses(OmegaConf.to_container(raw, resolve=True)))
    if not given:
        return {}
    known: dict[str, str] = {}
    file = Path(config.exp_manager["exp_dir"]) / config.name / COMMITS
    if config.exp_manager["resume_if_exists"] and file.is_file():
        known = {key: str(value) for key, value in read_json(file).items()}
    return {text: known.get(text) or at_commit(text) for text in given.values()}


def _at_commits(raw: DictConfig, commits: Mapping[str, str]) -> DictConfig:
    changed = raw.copy()
    for key, text in addresses(OmegaConf.to_container(raw, resolve=True)):
        OmegaConf.update(changed, key, commits[text])
    return changed


def freeze_context(raw: DictConfig) -> DictConfig:
    """The configuration with its experience written out, so that no registry is needed."""
    plug: Any = OmegaConf.to_container(raw.context, resolve=True)
    source: ContextSource = build_plug(plug)
    frozen = source.frozen()
    if frozen is None:
        return raw
    changed = raw.copy()
    with open_dict(changed):
        changed.context = escaped(frozen)
    return changed
