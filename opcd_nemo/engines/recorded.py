"""Samples on disk: drawn once, read ever after. Text, not pickles.

<folder>/samples_of.json                    whose samples they are, and how they were drawn
<folder>/step=0003.index=0-4000001.jsonl    a sample a line, written when the call has all
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from opcd_nemo.config.limits import SAMPLES_BYTES, SETTINGS_BYTES
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import parse_json
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.storage.durable import check_writable, write_whole
from opcd_nemo.storage.plain_file import is_there, read_bounded
from opcd_nemo.storage.ranks import on_every_rank, on_first_of_model, on_rank_0
from opcd_nemo.types import Prompt, Sample

_MADE_OF = "samples_of.json"
_KEY = "rollout.teacher_data"
_SHOWN = 60


def check_samples(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Refuse a folder whose samples are another teacher's, or were drawn differently.

    Args:
        folder: of the samples; it may not exist yet.
        made_of: what a sample of this run is a function of, besides its prompt and its number.

    Raises:
        UserError: naming what differs.
    """
    check_writable(_KEY, folder)
    if folder.exists() and not folder.is_dir():
        raise UserError(_KEY, folder, "a folder, or one that is made", problem="is no folder")
    file, another = folder / _MADE_OF, "another folder: a run draws its samples anew, and the same"
    if not is_there(file):
        if any(folder.glob("step=*.jsonl")):
            problem = f"has samples and no {_MADE_OF}, which says whose they are"
            raise UserError(_KEY, folder, another, problem=problem)
        return
    saved = parse_json(read_bounded(file, SETTINGS_BYTES), str(file))
    if changed := [
        f"{name} was {_short(saved.get(name))}, is {_short(value)}"
        for name, value in made_of.items()
        if saved.get(name) != value
    ]:
        problem = f"its samples are others: {'; '.join(changed)}"
        raise UserError(_KEY, folder, another, problem=problem)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class RecordedEngine:
    """An engine that keeps its samples; only for weights that never change.

    A sample belongs to its step and index, its prompt and the sampling: when any of these differs,
    it is drawn anew. Any layout reads what any other has written. The first rank of a replica reads
    and writes for the replica, so its ranks agree on who draws, and a disk that fails there fails
    on all of them.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        folder: Path,
        parallel: Parallel,
        *,
        made_of: Mapping[str, Any],
        vocab_size: int,
    ) -> None:
        """Read and write a folder that `check_samples` has let pass.

        Args:
            engine: draws what is not recorded.
            folder: of the samples.
            parallel: the first rank of a replica writes samples, rank 0 whose they are.
            made_of: written beside the first samples.
            vocab_size: a sample has no token beyond.
        """
        self._engine, self._folder, self._vocab_size = engine, folder, vocab_size
        self._parallel = parallel
        self._writes = parallel.tp_rank == parallel.pp_rank == 0
        self._files: list[Path] = []
        on_every_rank(parallel, self._open)
        # replicas that write the same file at once take each other's unfinished file away
        on_rank_0(parallel, lambda: self._say_whose(made_of))

    def _open(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files = sorted(self._folder.glob("step=*.jsonl"))

    def _say_whose(self, made_of: Mapping[str, Any]) -> None:
        if not (self._folder / _MADE_OF).exists():
            write_whole(self._folder / _MADE_OF, json.dumps(made_of, indent=1))

    @property
    def weights_version(self) -> int:
        """The engine's."""
        return self._engine.weights_version

    def load_weights(self, version: int) -> None:
        """Take the model's present weights."""
        self._engine.load_weights(version)

    def release_weights(self) -> None:
        """Give back what `load_weights` holds."""
        self._engine.release_weights()

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prefix_ids: Sequence[int] = (),
    ) -> list[Sample]:
        """The recorded samples, or new samples, which are recorded. Collective over tp and pp.

        Raises:
            UserError, OSError: on every rank of the group, what the first has met on the disk.
        """
        keys = [_key(prompt, sampling, seed) for prompt in prompts]

        def read() -> list[Sample] | None:
            known = self._read(step)
            return [known[key] for key in keys] if all(key in known for key in keys) else None

        recorded: list[Sample] | None = self._on_first(read)
        if recorded is not None:
            return recorded
        samples = self._engine.generate(
            prompts, sampling, seed=seed, step=step, prefix_ids=prefix_ids
        )

        def write() -> None:
            name = f"step={step:04d}.index={prompts[0].index}-{prompts[-1].index}.jsonl"
            lines = [json.dumps(_line(*pair)) for pair in zip(keys, samples, strict=True)]
            write_whole(self._folder / name, "".join(f"{line}\n" for line in lines))

        self._on_first(write)
        return samples

    def _on_first(self, work: Callable[[], Any]) -> Any:
        return on_first_of_model(self._parallel, work if self._writes else None)

    def _read(self, step: int) -> dict[str, Sample]:
        """What is on disk of a step.

        Raises:
            UserError: a file is damaged.
        """
        found: dict[str, Sample] = {}
        for file in self._files:
            if not file.name.startswith(f"step={step:04d}."):
                continue
            lines = read_bounded(file, SAMPLES_BYTES).splitlines()
            for number, text in enumerate(lines, start=1):
                try:
                    key, sample = _parse(json.loads(text))
                    self._check_ids(sample)
                except (ValueError, LookupError, TypeError, RecursionError) as error:
                    raise UserError(
                        _KEY,
                        self._folder,
                        "the file as it was written, or no such file",
                        problem=f"{file.name}, line {number} cannot be read ({error!r})",
                    ) from error
                found[key] = sample
        return found

    def _check_ids(self, sample: Sample) -> None:
        beyond = [one for one in sample.response_ids if not 0 <= one < self._vocab_size]
        if beyond:
            raise ValueError(f"token {beyond[0]} is not in the vocabulary of {self._vocab_size}")


def _key(prompt: Prompt, sampling: Sampling, seed: int) -> str:
    """What a sample is a function of, besides the weights and the step."""
    # folders that exist hash this text, with the name that the class had
    drawn = repr(sampling).replace("Sampling(", "SamplingParams(")
    text = f"({prompt.token_ids!r}, {prompt.index!r}, {drawn}, {seed!r})"
    return hashlib.sha256(text.encode()).hexdigest()


def _line(key: str, sample: Sample) -> dict[str, Any]:
    return {
        "key": key,
        "response_ids": sample.response_ids,
        "logprobs": sample.logprobs,
        "finish_reason": sample.finish_reason,
    }


def _parse(line: Any) -> tuple[str, Sample]:
    reason = line["finish_reason"]
    if reason not in ("eos", "length"):
        raise ValueError(f"finish_reason={reason}")
    sample = Sample(
        response_ids=tuple(_numbers(line["response_ids"], int)),
        logprobs=tuple(map(float, _numbers(line["logprobs"], float))),
        finish_reason=reason,
    )
    if not 1 <= len(sample.response_ids) == len(sample.logprobs):
        raise ValueError(f"{len(sample.logprobs)} logprobs")
    return str(line["key"]), sample


def _numbers(values: Any, kind: type) -> list[Any]:
    """A list of numbers of this kind, none of them written as something else, none infinite."""
    if not isinstance(values, list):
        raise TypeError(f"{type(values).__name__} in place of a list")
    for value in values:
        if type(value) not in (int, kind) or not math.isfinite(value):
            raise ValueError(f"{value!r} in place of a number")
    return values
