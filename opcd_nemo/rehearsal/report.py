"""What a rehearsal shows: memory, launches and syncs by phase, mismatches, and its limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PHASES = ("build", "rollout", "teacher", "student", "optimizer", "save", "resume")
_GIB = 2**30
NOT_SHOWN = (
    "not shown: values (tensors have none), NCCL, races, speed, FP8, fragments of memory and the "
    "libraries' buffers. Nothing has run on a GPU."
)

_LAYERS = {
    "local": "layers: Megatron's local ones; rehearse.transformer_engine=2.16.1 plays others",
    "te": "layers: Transformer Engine's",
}


def rehearsal_report(
    results: Sequence[dict[str, Any]],
    memory_gib: float,
    mismatches: Sequence[str],
    planned: Mapping[str, float],
) -> str:
    """The whole text.

    Args:
        results: of the ranks, as `rank.py` writes them.
        memory_gib: of a GPU.
        mismatches: lines of `compare.mismatches`.
        planned: bytes of the fullest rank by phase, as `planned_bytes` gives them.
    """
    lines = ["peak GiB a phase, as the operations ask for them:"]
    lines.append(f"{'rank':>6} {'tp pp dp cp':>11}" + "".join(f"{name:>10}" for name in PHASES))
    for result in results:
        place = " ".join(f"{result['place'][axis][0]:2}" for axis in ("tp", "pp", "dp", "cp"))
        peaks = "".join(f"{_gib(result['peak_bytes'].get(name, 0)):>10}" for name in PHASES)
        lines.append(f"{result['rank']:>6} {place:>11}{peaks}   {result['seconds']:.0f} s")
    cells = "".join(f"{_gib(planned[name]) if name in planned else '-':>10}" for name in PHASES)
    lines.append(f"{'opcd plan':>18}{cells}")
    most = fullest_gib(results)
    lines.append(f"highest: {most:.2f} GiB of {memory_gib:g} GiB")
    lines.append(_LAYERS[results[0]["layer_spec"]])
    if most > memory_gib:
        lines.append(f"DOES NOT FIT: {most - memory_gib:.2f} GiB more than a GPU has")
    lines += ["", *_counts(results[0]), ""]
    total = sum(len(result["collectives"]) for result in results)
    if mismatches:
        lines += ["the ranks would wait for each other for ever, or do not wait:", *mismatches]
    elif len(results) == 1:
        rank = results[0]["rank"]
        lines.append(f"collectives of rank {rank}: {total}, compared with no other rank")
    else:
        ranks = ", ".join(str(result["rank"]) for result in results)
        lines.append(f"collectives of ranks {ranks}: {total}, the same on all ranks of each group")
    return "\n".join([*lines, NOT_SHOWN])


def fullest_gib(results: Sequence[dict[str, Any]]) -> float:
    """The highest peak of all ranks and phases."""
    most: int = max(max(result["peak_bytes"].values()) for result in results)
    return most / _GIB


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def _counts(result: dict[str, Any]) -> list[str]:
    """Launches and host syncs of one rank, in a line a phase, and where the syncs are."""
    lines = [f"rank {result['rank']}, launches / host syncs / copies to the GPU:"]
    for phase in PHASES:
        kinds = (result[kind].get(phase, {}) for kind in ("launches", "syncs", "copies"))
        launches, syncs, copies = (sum(counts.values()) for counts in kinds)
        if launches or syncs or copies:
            lines.append(f"  {phase:10} {launches:8} / {syncs} / {copies}")
            most = sorted(result["syncs"].get(phase, {}).items(), key=lambda item: -item[1])[:3]
            lines += [f"      {count:6} {name}" for name, count in most]
    return lines
