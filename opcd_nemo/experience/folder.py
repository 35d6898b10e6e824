"""The folder of a pipeline.

<exp_dir>/<name>/              registry/, experience.yaml, digests.json; rounds > 1: round=1/, ...
extraction/wave=*.jsonl    records; turns.jsonl: the player's prompts
candidates.json            every prefix of every chain
scoring.jsonl, ranked.json
selected.json
teacher_data/seed=*/       what the teacher wrote for the off-policy methods
<method>-<seed>/           a training run
controls.json, summary.json, table.md, report.html
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from opcd_nemo.checkpoint.newest import of_step, step_of
from opcd_nemo.config.changes import RESULT_KEYS, differences
from opcd_nemo.config.renamed import former_method, present_method, present_pipeline
from opcd_nemo.config.secrets import recorded, without_secrets
from opcd_nemo.context.registry import Entry, Registry
from opcd_nemo.distributed.launcher import environment_world
from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.evaluation.answers_file import ANSWERS
from opcd_nemo.evaluation.evaluator import ANSWER
from opcd_nemo.evaluation.summary import SUMMARY
from opcd_nemo.experience.candidates import CANDIDATE, Candidate
from opcd_nemo.experience.config import Settings
from opcd_nemo.report.pipeline_page import CONTROLS, ORIGIN, RANKED, REGISTRY
from opcd_nemo.storage.attempt import is_first_node
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.storage.records import check_record, read_list, read_object, read_text

EXTRACTION, TURNS, CANDIDATES = "extraction", "turns.jsonl", "candidates.json"
SCORES, SELECTED = "scoring.jsonl", "selected.json"
TEACHER_DATA = "teacher_data"
TABLE = "table.md"
RUN_SUMMARY, RUN_ANSWERS = f"{{run}}/{SUMMARY}", f"{{run}}/{ANSWERS}"  # of every training run
_ODD = (LookupError, TypeError, ValueError, AttributeError, AssertionError)  # of other kinds
_REMEDY = "a copy of the file as it was; or no such file, and its stage is done again"
_COMPARED = (*RESULT_KEYS, "experience", "evaluation", "trainer.max_steps")
_NOT_COMPARED = (
    *("context_hash", "experience.rounds", "experience.controls"),
    # of single runs; folders from before have no such keys
    *(
        f"evaluation.{name}"
        for name in (
            "controls",
            "min_gap",
            "num_control_questions",
            "token_statistics_every_n_steps",
            "wrong_context",
        )
    ),
)


class PipelineFolder:
    """The files of a round of a pipeline.

    Attributes:
        settings: of the pipeline, with the number of the round.
        root: the folder of all rounds.
        path: the round's folder: `root` itself if the pipeline has a single round.
        registry: the experience that the pipeline has selected.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.root: Path = Path(settings.train.exp_manager.exp_dir) / settings.train.name
        has_rounds = settings.experience.rounds > 1
        self.path: Path = self.root / (f"round={settings.round}" if has_rounds else "")
        self.registry = Registry(self.root / REGISTRY)

    def of_round(self, number: int) -> PipelineFolder:
        """The folder of another round of the same pipeline."""
        return PipelineFolder(replace(self.settings, round=number, run=None))

    def run_name(self, run: str) -> str:
        """The name of a run's folder: the former name if a folder of that name exists."""
        former = former_method(run)
        return former if (self.path / former).is_dir() else run

    def of_run(self, name: str, run: str) -> Path:
        """A file of a training run."""
        return self.path / name.format(run=self.run_name(run))

    def files(self, name: str, run: str | None = None) -> list[Path]:
        """Where a file is; one that every training run has is in all runs, or in the run given."""
        if "{run}" not in name:
            return [self.path / name]
        return [self.of_run(name, each) for each in (self.settings.runs if run is None else [run])]

    def controls(self) -> dict[str, Any]:
        """The answers of the evaluation so far, by row and seed."""
        file = self.path / CONTROLS
        rows = read_object(file, {}, _REMEDY) if file.is_file() else {}
        for row, by_seed in rows.items():
            seeds = by_seed if isinstance(by_seed, dict) else {"": by_seed}
            for seed, parts in seeds.items():
                where = f"{row}, seed {seed}: "
                check_record(parts, {"task": list, "retention": list}, file, _REMEDY, where)
                for answer in (*parts["task"], *parts["retention"]):
                    check_record(answer, ANSWER, file, _REMEDY, where)
        return {present_method(row): by_seed for row, by_seed in rows.items()}

    def candidates(self) -> list[Candidate]:
        """What extraction has come to.

        Raises:
            UserError: the file is not as it was written.
        """
        records = read_list(self.path / CANDIDATES, CANDIDATE, _REMEDY)
        return [Candidate.from_record(record) for record in records]

    def ranking(self) -> dict[str, Any]:
        """The candidates in the order of their scores, and the score without any.

        Raises:
            UserError: the file is not as it was written.
        """
        file = self.path / RANKED
        ranking = read_object(file, {"without": float, "ranked": list}, _REMEDY)
        scored = {**CANDIDATE, "experience": str, "score": float, "questions": int}
        for number, record in enumerate(ranking["ranked"]):
            check_record(record, scored, file, _REMEDY, f"record {number}: ")
        if not ranking["ranked"]:
            raise UserError(file, allowed=_REMEDY, problem="ranks no candidate")
        return ranking

    def open(self) -> None:
        """Make the folder after all checks; refuse a folder that other settings have made.

        Raises:
            UserError: naming every key that differs.
        """
        self.check_unchanged()
        file = self.root / ORIGIN
        self.path.mkdir(parents=True, exist_ok=True)
        settled = file.exists() and not self._not_yet_used()
        rank, _ = environment_world()
        if rank == 0 and is_first_node() and not settled:  # two writers take each other's file
            write_whole(file, OmegaConf.to_yaml(OmegaConf.create(self._origin())))

    def check_unchanged(self) -> None:
        """Refuse a folder that other settings have made.

        Raises:
            UserError: naming every key that differs.
        """
        file = self.root / ORIGIN
        if not file.exists():
            return
        origin, remedy = self._origin(), "a copy of the file as it was, or another name="
        text = read_text(file, remedy)
        try:
            saved = present_pipeline(OmegaConf.to_container(OmegaConf.create(text)))
            before, now = (int(made["experience"]["rounds"]) for made in (saved, origin))
        except (YAMLError, OmegaConfBaseException, *_ODD) as error:
            problem = f"is not as it was written ({' '.join(str(error).split())})"
            raise UserError(file, ABSENT, remedy, problem=problem) from error
        saved = without_secrets(saved)
        if (before == 1) != (now == 1):
            raise self._changed(
                f"experience.rounds was {before}, is {now}: a pipeline of one round has no folders "
                "round=1, ..."
            )
        free = (*_NOT_COMPARED, *self._not_yet_used())
        if changed := differences(saved, origin, _COMPARED, free):
            raise self._changed("; ".join(changed.values()))

    def _changed(self, problem: str) -> UserError:
        allowed = f"the values in {self.root / ORIGIN}, or another name"
        return UserError("name", self.settings.train.name, allowed, problem=problem)

    def _not_yet_used(self) -> tuple[str, ...]:
        """`cap_tokens` may change until candidates exist: a trace may prove longer than the cap."""
        with_previous = self.settings.experience.extraction.with_previous
        made = any([*self.root.glob(CANDIDATES), *self.root.glob(f"round=*/{CANDIDATES}")])
        return () if with_previous or made else ("experience.extraction.cap_tokens",)

    def _origin(self) -> dict[str, Any]:
        """What made the folder."""
        origin = recorded(self.settings.train)
        origin["experience"] = OmegaConf.to_container(
            OmegaConf.structured(self.settings.experience)
        )
        made: dict[str, Any] = origin
        return made

    def selected(self) -> list[Entry]:
        """What this round has selected, whatever the registry has selected since.

        Raises:
            UserError: nothing yet.
        """
        file = self.path / SELECTED
        if not file.is_file():
            raise UserError(str(file), ABSENT, "after stage=select", problem="does not exist")
        hashes = read_object(file, {"experience": list[str]}, _REMEDY)["experience"]
        if not hashes:
            raise UserError(file, allowed=_REMEDY, problem="names no experience")
        return [self.registry.find(entry_hash) for entry_hash in hashes]

    def student(self, run: str) -> Path:
        """A run's student: its checkpoint of the best validation, else the last."""
        file = self.of_run(RUN_SUMMARY, run)
        summary = read_object(file, {"steps": int}, _REMEDY)
        step = summary.get("best_step", summary["steps"])
        return of_step(file.parent / "checkpoints", step)

    def is_last(self, run: str) -> bool:
        """Whether the run's scores, of its last checkpoint, are the scores of its student."""
        summary = read_object(self.of_run(RUN_SUMMARY, run), {"steps": int}, _REMEDY)
        return step_of(self.student(run)) == int(summary["steps"])

    def plug(self, name: str) -> dict[str, Any]:
        """The pipeline's task or retention."""
        plugs: Any = OmegaConf.to_container(self.settings.train, resolve=True)
        plug: dict[str, Any] = plugs[name]
        return plug
