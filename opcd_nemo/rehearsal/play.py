"""What a rank plays, on fake GPUs and on real ones: a run without files, its samples, its steps.

The weights are whatever `weights` makes, the tokens mean nothing: shapes, memory and the order of
operations are a run's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from opcd_nemo.config.train import TrainConfig
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.engines.vllm_weights import stage_tensors
from opcd_nemo.formats.shape import ModelConfig, tensor_shapes
from opcd_nemo.formats.sharding import padded_query_groups
from opcd_nemo.formats.stored_model import StoredModel
from opcd_nemo.model.cache import DecodeAttention, KVCache
from opcd_nemo.model.packing import Stream
from opcd_nemo.rehearsal.names import MICRO_BATCHES, SHARED
from opcd_nemo.training.build import build_run
from opcd_nemo.training.inputs import Inputs
from opcd_nemo.training.step import Run
from opcd_nemo.types import Prompt, Rollout, Sample

EOS = 2
_START, _QUESTION, _CONTEXT, _ANSWER = 3, 4, 7, 5  # token ids; only their number matters


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a prompt, of the context before it, and of the longest answer."""

    prompt: int
    context: int
    response: int


class _Made:
    """Tensors of a model in bf16, made when they are read."""

    def __init__(self, config: ModelConfig, make: Callable[[Sequence[int]], torch.Tensor]) -> None:
        self._shapes, self._make = tensor_shapes(config), make

    def names(self) -> tuple[str, ...]:
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return torch.bfloat16

    def tensor(self, name: str) -> torch.Tensor:
        return self._make(self._shapes[name])


def unwritten(shape: Sequence[int]) -> torch.Tensor:
    """A weight without values."""
    return torch.empty(shape, dtype=torch.bfloat16)


def stored(config: ModelConfig, weights: Callable[[Sequence[int]], torch.Tensor]) -> StoredModel:
    """A model of this shape that no file holds."""
    return StoredModel(Path("rehearsed"), config, _Made(config, weights))


def open_run(
    config: TrainConfig,
    shapes: tuple[ModelConfig, ModelConfig],
    parallel: Parallel,
    lengths: Lengths,
    weights: Callable[[Sequence[int]], torch.Tensor] = unwritten,
) -> Run:
    """A run whose models, of these shapes, no file holds. Collective over the world.

    Args:
        config: the run's.
        shapes: of student and teacher.
        parallel: where this rank stands.
        lengths: the context's is that of the teacher's held prefix.
        weights: makes a weight of a shape.
    """
    student, teacher = shapes
    nothing: Any = SimpleNamespace(tokenizer=SimpleNamespace(eos_ids=(EOS,)))
    inputs = Inputs(
        student=stored(student, weights),
        student_config=student,
        teacher=stored(teacher, weights),
        teacher_config=teacher,
        task=nothing,
        retention=nothing,
        conversation=nothing,
        samples_of=None,
        prefix_ids=_tokens(_CONTEXT, lengths.context),
    )
    # what was sampled is made up, and would be taken for another model's
    return replace(build_run(config, inputs, parallel), max_mismatch=None)


def rows_together(run: Run, max_batch_size: int) -> int:
    """How many sequences of a step this rank decodes together."""
    return min(max_batch_size * run.parallel.pp, max(1, run.prompts_per_step // run.parallel.dp))


def sample(run: Run, lengths: Lengths, rows: int) -> list[Sample]:
    """One answer to each of so many prompts. Collective over tp and pp."""
    engine: Any = run.engines["student"]
    engine.load_weights(0)
    asked = prompts(lengths, rows)
    samples: list[Sample] = engine.generate(asked, run.sampling, seed=run.seed, step=0)
    engine.release_weights()
    return samples


def push(run: Run) -> None:
    """What a rank does for servers that sample: it gives them its weights. Collective over tp."""
    for _ in stage_tensors(run.student, writes=run.parallel.tp_rank == 0, with_head=False):
        pass


def prompts(lengths: Lengths, rows: int) -> list[Prompt]:
    """So many prompts, some of them a little shorter."""
    return [
        Prompt(token_ids=_prompt(lengths.prompt - row % 7, row), index=row) for row in range(rows)
    ]


def decode_the_last_token(run: Run, lengths: Lengths, rows: int) -> None:
    """A decoding step of rows whose answers are all but whole. Collective over tp and pp."""
    model, parallel = run.student, run.parallel
    rows = -(-rows // parallel.pp)  # of a group
    tokens = lengths.prompt + run.sampling.max_new_tokens
    cache = KVCache(tokens, parallel.device)
    groups = padded_query_groups(model.config, parallel.tp) // parallel.tp
    empty = torch.zeros(
        rows, 1, groups, model.config.head_dim, dtype=model.dtype, device=parallel.device
    )
    for layer in model.module.decoder.layers:
        cache.fill(layer.layer_number, empty, empty)
    cache.start([tokens - 1] * rows)
    padding = -rows % model.stream_multiple
    state = DecodeAttention(model.rotary_tables(F.pad(cache.lengths_R, (0, padding))), cache)
    ids = torch.zeros(rows + padding, dtype=torch.long, device=parallel.device)
    model.module.eval()
    model.stage_forward(Stream(ids, state))
    parallel.flush()


def rollouts(run: Run, lengths: Lengths, micro_batches: int = MICRO_BATCHES) -> list[Rollout]:
    """So many micro-batches of whole answers, the first of them the longest that a run can meet.

    On other data-parallel ranks answers are shorter.
    """
    read = _tokens(_CONTEXT, lengths.context)
    made = []
    for index in range(micro_batches * run.micro_batch_size):
        shorter = 97 * (index // run.micro_batch_size * (1 + index) + run.parallel.dp_rank)
        length = max(1, lengths.response - shorter % max(1, lengths.response // 4))
        ids = _prompt(lengths.prompt - index // run.micro_batch_size * 5 * index, index)
        made.append(
            Rollout(
                uid=str(index),
                question="",
                episode_index=index,
                turn_index=0,
                prompt_ids=ids,
                teacher_prompt_ids=(*read, *ids),
                response_ids=(_ANSWER,) * length,
                sampled_logprobs=(-1.0,) * length,
                weights_version=0,
                finish_reason="eos",
            )
        )
    return made


def _prompt(length: int, number: int) -> tuple[int, ...]:
    """A prompt: the start that all share, then a token of its own, then the rest."""
    length = max(1, length)
    shared = _tokens(_START, min(SHARED, length - 1))
    return (*shared, _QUESTION + number % 50, *_tokens(_QUESTION, length - len(shared) - 1))


def _tokens(first: int, count: int) -> tuple[int, ...]:
    """So many token ids, all of which even a small vocabulary has."""
    return tuple(first + number % 50 for number in range(count))
