"""The folder of a pipeline and the configurations of the runs in it.

<exp_dir>/<name>/              registry/, experience.yaml; rounds > 1: round=1/, round=2/, ...
extraction/wave=*.jsonl    records; turns.jsonl: what the player was asked
candidates.json            every prefix of every chain
scoring.jsonl, ranked.json
selected.json
teacher_data/seed=*/       what the teacher wrote for the off-policy methods
<method>-<seed>/           a training run
controls.json, summary.json, table.md
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from opcd_nemo.config.changes import RESULT_KEYS, differences
from opcd_nemo.config.stored import escaped
from opcd_nemo.context.registry import Entry, Registry
from opcd_nemo.context.sources import ExperienceContext
from opcd_nemo.experience.config import Settings, load_experience
from opcd_nemo.formats.locate import read_json
from opcd_nemo.storage.attempt import is_first_node
from opcd_nemo.storage.durable import write_whole

EXTRACTION, TURNS = "extraction", "turns.jsonl"
CANDIDATES, SCORES, RANKED = "candidates.json", "scoring.jsonl", "ranked.json"
SELECTED, CONTROLS, SUMMARY, TABLE = "selected.json", "controls.json", "summary.json", "table.md"
_ORIGIN = "experience.yaml"
_COMPARED = (*RESULT_KEYS, "experience", "evaluation", "trainer.max_steps")
_NOT_COMPARED = ("context_hash", "experience.rounds", "experience.controls")
_NO_CONTEXT = {"_target_": "opcd_nemo.context.NoContext"}


class Workplace:
    """One round of a pipeline on disk."""

    def __init__(self, settings: Settings) -> None:
        """Take the round that the settings name."""
        self.settings = settings
        self.root: Path = Path(settings.train.exp_manager.exp_dir) / settings.train.name
        one = settings.experience.rounds == 1
        self._round = "" if one else f"round={settings.round}"
        self.folder: Path = self.root / self._round
        self.registry = Registry(self.root / "registry")

    def open(self) -> None:
        """Make the folder, once all is checked; refuse one that other settings have made.

        Raises:
            ValueError: naming every key that differs.
        """
        self.check_unchanged()
        file = self.root / _ORIGIN
        self.folder.mkdir(parents=True, exist_ok=True)
        settled = file.exists() and not self._not_yet_used()
        if is_first_node() and not settled:
            write_whole(file, OmegaConf.to_yaml(OmegaConf.create(self._origin())))

    def check_unchanged(self) -> None:
        """Refuse a folder that other settings have made.

        Raises:
            ValueError: naming every key that differs.
        """
        file = self.root / _ORIGIN
        if not file.exists():
            return
        saved: Any = OmegaConf.to_container(OmegaConf.load(file))
        before, now = (int(made["experience"]["rounds"]) for made in (saved, self._origin()))
        if (before == 1) != (now == 1):
            raise ValueError(
                f"name={self.settings.train.name}: experience.rounds was {before}, is {now}: a "
                f"pipeline of one round has no folders round=1, ...; allowed: the value in {file}, "
                "or another name"
            )
        free = (*_NOT_COMPARED, *self._not_yet_used())
        if changed := differences(saved, self._origin(), _COMPARED, free):
            raise ValueError(
                f"name={self.settings.train.name}: {'; '.join(changed.values())}; allowed: the "
                f"values in {file}, or another name"
            )

    def _not_yet_used(self) -> tuple[str, ...]:
        """The cap, until there are candidates: a trace that is too long for it shows late."""
        with_previous = self.settings.experience.extraction.with_previous
        made = any([*self.root.glob(CANDIDATES), *self.root.glob(f"round=*/{CANDIDATES}")])
        return () if with_previous or made else ("experience.extraction.cap_tokens",)

    def _origin(self) -> dict[str, Any]:
        """What made the folder."""
        origin: Any = OmegaConf.to_container(self.settings.train, resolve=True)
        origin["experience"] = OmegaConf.to_container(
            OmegaConf.structured(self.settings.experience)
        )
        made: dict[str, Any] = origin
        return made

    def stage_config(self) -> DictConfig:
        """The configuration of stages that train nothing: this round's models, no context."""
        config = self.settings.train.copy()
        with open_dict(config):
            self._set_student(config)
            config.seed += self.settings.round - 1  # other problems in every round
            config.context = _NO_CONTEXT
        return config

    def run_config(self, run: str) -> DictConfig:
        """The configuration of the training run `<method>-<seed>`.

        Raises:
            ValueError: nothing is selected yet.
        """
        return self._run_config(run, self._selected_context())

    def unselected_run_config(self, run: str) -> DictConfig:
        """The same before anything is selected: without a context."""
        return self._run_config(run, _NO_CONTEXT)

    def _run_config(self, run: str, context: dict[str, Any]) -> DictConfig:
        experience = self.settings.experience
        method, _, seed = run.partition("-")
        config = self.settings.train.copy()
        with open_dict(config):
            config.name = str(Path(config.name) / self._round / run)
            config.seed = int(seed)
            self._set_student(config)
            config.context = context
            if method != "opcd":
                changes = experience.consolidation.settings[method]
                config.loss = changes["loss"]
                config.rollout.merge_with(changes["rollout"])
                config.warmup.merge_with(changes["warmup"])
                config.rollout.teacher_data = str(self.folder / "teacher_data" / f"seed={seed}")
            if experience.replay:
                config.task = {
                    "_target_": "opcd_nemo.tasks.replay.ReplayTask",
                    "path": str(self.folder / TURNS),
                    "of": config.task,
                    "seed": int(seed),
                }
        return config

    def finished(self, run: str) -> bool:
        """Whether a run has its summary, which it writes last."""
        return (self.folder / run / SUMMARY).is_file()

    def student(self, run: str) -> Path:
        """A run's student: its checkpoint of the best validation, else the last."""
        summary = read_json(self.folder / run / SUMMARY)
        step = summary.get("best_step", summary["steps"])
        return self.folder / run / "checkpoints" / f"step={step}.ckpt"

    def is_last(self, run: str) -> bool:
        """Whether the run's own scores, of its last checkpoint, are its student's."""
        steps = read_json(self.folder / run / SUMMARY)["steps"]
        return self.student(run).name == f"step={steps}.ckpt"

    def experience(self, items: Sequence[str]) -> ExperienceContext:
        """Items as the teacher reads them.

        Raises:
            ValueError: `context` is not one that holds experience.
        """
        template = self.settings.train.context.get("template")
        if template is None:
            raise ValueError(
                f"context._target_={self.settings.train.context.get('_target_')}: allowed: "
                "context=experience, or one of its like with a template"
            )
        return ExperienceContext(path=None, items=items, lineage=None, template=template)

    def selected(self) -> list[Entry]:
        """What this round has selected, whatever the registry has selected since.

        Raises:
            ValueError: nothing yet.
        """
        file = self.folder / SELECTED
        if not file.is_file():
            raise ValueError(f"stage={self.settings.stage}: no {file}; allowed: after stage=select")
        return [self.registry.find(one) for one in read_json(file)["experience"]]

    def _selected_context(self) -> dict[str, Any]:
        template, entries = self.settings.train.context.template, self.selected()
        if self.settings.experience.selection.count == 1:
            (entry,) = entries
            lineage = {**entry.lineage, "experience": entry.hash}
            source = ExperienceContext(
                path=None, items=entry.items, lineage=lineage, template=template
            )
            plug: dict[str, Any] = escaped(source.frozen())
            return plug
        return {
            "_target_": "opcd_nemo.context.ExperiencePool",
            "paths": [str(self.registry.add(entry)) for entry in entries],
            "pool": None,
            "template": template,
            "seed": "${seed}",
        }

    def _set_student(self, config: DictConfig) -> None:
        """From the second round on, the student of the first seed of the round before."""
        number = self.settings.round
        if number == 1:
            return
        before = Workplace(replace(self.settings, round=number - 1, run=None))
        config.student.path = str(before.student(before.settings.first_run))
        config.student.keep_layers = None

    def plug(self, name: str) -> dict[str, Any]:
        """The pipeline's task or retention."""
        plugs: Any = OmegaConf.to_container(self.settings.train, resolve=True)
        plug: dict[str, Any] = plugs[name]
        return plug


def stage_to_check(raw: DictConfig) -> DictConfig:
    """The training configuration that a launch of the stage is checked by.

    Raises:
        ValueError: a key of the pipeline is wrong, or its folder was made with other settings.
    """
    place = Workplace(load_experience(raw))
    _check_place(place)
    settings = place.settings
    if settings.stage == "consolidate" and settings.run is None:
        raise ValueError(f"run=None: allowed: one of {', '.join(settings.runs)}")
    return place.stage_config() if settings.run is None else place.run_config(settings.run)


def configs_before_start(raw: DictConfig) -> list[DictConfig]:
    """The training configurations of the pipeline, checked as far as its first stage can be.

    Raises:
        ValueError: a key of the pipeline is wrong, or its folder was made with other settings.
    """
    return checked_configs(Workplace(load_experience(raw)))


def checked_configs(place: Workplace) -> list[DictConfig]:
    """`configs_before_start` of settings that are read.

    Raises:
        ValueError: as there.
    """
    _check_place(place)
    return [place.stage_config(), *map(place.unselected_run_config, place.settings.runs)]


def _check_place(place: Workplace) -> None:
    """Check that the context takes items, and that the folder is of these settings."""
    place.experience(("an item",))
    place.check_unchanged()
