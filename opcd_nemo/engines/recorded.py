"""Samples on disk: drawn once, read ever after. Text, not pickles.

<folder>/step=0003.index=0-4000001.jsonl    a sample a line, written when the call has all
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import UserError
from opcd_nemo.rollout.engine import RolloutEngine
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.types import Prompt, Sample


class RecordedEngine:
    """An engine whose samples are kept; only for weights that never change.

    A sample belongs to its step and index, its prompt and the sampling: when any of these differs,
    it is drawn anew. Any layout reads what any other has written. Only files that existed when the
    run began are read, so that ranks agree on who draws without exchanging a word.
    """

    def __init__(self, engine: RolloutEngine, folder: Path, parallel: Parallel) -> None:
        self._engine, self._folder = engine, folder
        self._writes = parallel.tp_rank == parallel.pp_rank == 0
        folder.mkdir(parents=True, exist_ok=True)
        self._files = sorted(folder.glob("step=*.jsonl"))

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
        """The recorded samples, or new ones, which are recorded. Collective over tp and pp."""
        keys = [_key(prompt, sampling, seed) for prompt in prompts]
        known = self._read(step)
        if all(key in known for key in keys):
            return [known[key] for key in keys]
        samples = self._engine.generate(
            prompts, sampling, seed=seed, step=step, prefix_ids=prefix_ids
        )
        if prompts and self._writes:
            name = f"step={step:04d}.index={prompts[0].index}-{prompts[-1].index}.jsonl"
            lines = [json.dumps(_line(*pair)) for pair in zip(keys, samples, strict=True)]
            write_whole(self._folder / name, "".join(f"{line}\n" for line in lines))
        return samples

    def _read(self, step: int) -> dict[str, Sample]:
        """What is on disk of a step.

        Raises:
            UserError: a file is damaged.
        """
        found: dict[str, Sample] = {}
        for file in self._files:
            if not file.name.startswith(f"step={step:04d}."):
                continue
            for number, text in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
                try:
                    key, sample = _parse(json.loads(text))
                except (ValueError, LookupError, TypeError) as error:
                    raise UserError(
                        "rollout.teacher_data",
                        self._folder,
                        "the file as it was written, or no such file",
                        problem=f"{file.name}, line {number} cannot be read ({error!r})",
                    ) from error
                found[key] = sample
        return found


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
        response_ids=tuple(int(token) for token in line["response_ids"]),
        logprobs=tuple(float(value) for value in line["logprobs"]),
        finish_reason=reason,
    )
    if not 1 <= len(sample.response_ids) == len(sample.logprobs):
        raise ValueError(f"{len(sample.logprobs)} logprobs")
    return str(line["key"]), sample
