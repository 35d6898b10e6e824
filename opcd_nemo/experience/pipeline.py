"""The whole pipeline: each stage a launch of its own, every finished one left as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace

from opcd_nemo.config.train import load_config
from opcd_nemo.context.items import content_hash
from opcd_nemo.context.registry import Entry
from opcd_nemo.experience.config import STAGES, Settings
from opcd_nemo.experience.extraction import Candidate
from opcd_nemo.experience.scoring import Scored, select
from opcd_nemo.experience.table import summarise, table_text
from opcd_nemo.experience.workplace import (
    CANDIDATES,
    CONTROLS,
    RANKED,
    SELECTED,
    SUMMARY,
    TABLE,
    Workplace,
    checked_configs,
)
from opcd_nemo.formats.locate import read_json
from opcd_nemo.launch.exits import EXIT_BAD_INPUT
from opcd_nemo.storage.attempt import is_first_node
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.storage.run_folder import RunFolder

Say = Callable[[str], None]
Launch = Callable[[Sequence[str]], int]
"""Runs ranks with these overrides after the command's; returns their exit code."""


def run_pipeline(settings: Settings, launch: Launch, say: Say) -> int:
    """Do what is not done of the stages asked for; returns the exit code of the first failure.

    Raises:
        ValueError: a key is wrong, or what a stage reads is not there.
    """
    for config in checked_configs(Workplace(settings)):
        load_config(config)
    rounds = range(1, settings.experience.rounds + 1)
    if settings.stage != "all":
        return _run_stage(Workplace(settings), settings.stage, launch, say)
    for number in rounds:
        place = Workplace(replace(settings, round=number))
        for stage in STAGES:
            if code := _run_stage(place, stage, launch, say):
                return code
        if number < settings.experience.rounds and not _retained(place, say):
            break
    return 0


def _run_stage(place: Workplace, stage: str, launch: Launch, say: Say) -> int:
    place.check_unchanged()
    here = f"round={place.settings.round}"
    if stage == "select":
        if is_first_node():
            # a stage's ranks take the folder themselves; this process, only for what it writes
            with RunFolder.hold(place.folder):
                select_experience(place, say)
        return 0
    if stage == "consolidate":
        return _consolidate(place, here, launch, say)
    if stage == "evaluate":
        _require_finished_runs(place)
    done = {"extract": CANDIDATES, "score": RANKED, "evaluate": CONTROLS}[stage]
    if (place.folder / done).is_file() and stage != "evaluate":
        say(f"{stage}: finished before ({place.folder / done})")
    elif code := launch([f"stage={stage}", here]):
        return _failed(stage, code, say)
    if stage == "evaluate" and is_first_node():
        with RunFolder.hold(place.folder):
            write_results(place, say)
    return 0


def _failed(what: str, code: int, say: Say) -> int:
    if code != EXIT_BAD_INPUT:
        say(f"{what} failed with exit code {code}; the same command goes on from here")
    return code


def _consolidate(place: Workplace, here: str, launch: Launch, say: Say) -> int:
    runs = place.settings.runs if place.settings.run is None else [place.settings.run]
    for run in runs:
        if place.finished(run):
            say(f"consolidate: {run} finished before")
            continue
        say(f"consolidate: {run}")
        if code := launch(["stage=consolidate", here, f"run={run}"]):
            return _failed(run, code, say)
    return 0


def select_experience(place: Workplace, say: Say) -> None:
    """Put the candidates of the settings' choice into the registry.

    Raises:
        ValueError: nothing is scored, or there are fewer candidates than wanted.
    """
    if (place.folder / SELECTED).is_file():
        say(f"select: finished before ({place.folder / SELECTED})")
        return
    file = place.folder / RANKED
    if not file.is_file():
        raise ValueError(f"stage=select: no {file}; allowed: after stage=score")
    ranking = read_json(file)
    settings = place.settings.experience.selection
    chosen = select(
        [_scored(one) for one in ranking["ranked"]], settings, place.settings.train.seed
    )
    by_hash = {one["experience"]: one for one in ranking["ranked"]}
    hashes = []
    for one in chosen:
        candidate, record = one.candidate, by_hash[content_hash(one.candidate.items)]
        entry = Entry(
            items=candidate.items,
            num_tokens=candidate.num_tokens,
            lineage=_lineage(place, candidate),
            scores={
                "validation": one.score,
                "validation_questions": record["questions"],
                "validation_without": ranking["without"],
            },
        )
        place.registry.add(entry)
        hashes.append(entry.hash)
        say(
            f"select: {entry.hash[:12]}, chain {candidate.chain} step {candidate.step}, "
            f"{len(entry.items)} items, validation {one.score:.3f} ({ranking['without']:.3f} "
            "without)"
        )
    place.registry.select(hashes[0], f"{settings.rule}, round {place.settings.round}")
    write_whole(place.folder / SELECTED, json.dumps({"experience": hashes}))


def write_results(place: Workplace, say: Say) -> None:
    """Write and show the table; that of the last round stands in the pipeline's own folder too."""
    summary = summarise(place)
    text = table_text(summary)
    for folder in {place.folder, place.root}:
        write_whole(folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False))
        write_whole(folder / TABLE, f"{text}\n")
    say(text)
    say(f"written: {place.folder}")


def _require_finished_runs(place: Workplace) -> None:
    missing = [run for run in place.settings.runs if not place.finished(run)]
    if missing:
        raise ValueError(
            f"stage=evaluate: {', '.join(missing)} not finished; allowed: after stage=consolidate"
        )


def _retained(place: Workplace, say: Say) -> bool:
    """Whether the next round may start from this round's student."""
    rows = read_json(place.folder / SUMMARY)["rows"]
    first = Workplace(replace(place.settings, round=1))
    base = read_json(first.folder / SUMMARY)["rows"]["base"]["retention"]["value"]
    seed = place.settings.first_run.removeprefix("opcd-")  # whose student goes on
    now = rows["opcd"]["retention_by_seed"][seed]
    share = place.settings.experience.next_round_retention
    assert share is not None  # with several rounds
    if now >= share * base:
        return True
    say(
        f"stopped after round {place.settings.round}: retention {now:.2f} is below "
        f"experience.next_round_retention={share} of the base's {base:.2f}"
    )
    return False


def _scored(one: dict[str, object]) -> Scored:
    names = Candidate.__dataclass_fields__
    fields = {name: one[name] for name in names}
    fields["items"] = tuple(one["items"])  # type: ignore[arg-type]
    return Scored(candidate=Candidate(**fields), scores=(one["score"],))  # type: ignore[arg-type]


def _lineage(place: Workplace, candidate: Candidate) -> dict[str, object]:
    train, extraction = place.stage_config(), place.settings.experience.extraction
    return {
        "written_by": "a model",
        "model": extraction.model or train.teacher.path or train.student.path,
        "round": place.settings.round,
        "seed": train.seed,
        "chain": candidate.chain,
        "step": candidate.step,
        "prompt_version": extraction.prompt_version,
        "problems": list(candidate.problems),
        "kept": extraction.keep,
    }
