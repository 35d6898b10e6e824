"""Rollouts inside the training process: live Megatron weights, KV cache, tp and pp.

With pp > 1 the prompts are split into pp groups that follow each other through the stages, so that
no stage waits for a token. Finished sequences leave their group's cache and stop costing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from typing import TYPE_CHECKING, Annotated

import torch
import torch.nn.functional as F

from opcd_nemo.config.doc import Doc
from opcd_nemo.config.limits import MOST_SEQUENCES
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines.held_turns import HeldTurn, HeldTurns
from opcd_nemo.model.cache import DecodeAttention, KVCache
from opcd_nemo.model.packing import Stream, pack, starts_with
from opcd_nemo.model.varlen import KeyValue
from opcd_nemo.rollout.sampling import row_uniforms, sample_tokens
from opcd_nemo.storage import heartbeat
from opcd_nemo.types import Prompt, Sample

if TYPE_CHECKING:  # megatron-core: what checks or plans a run imports this module, and not that
    from opcd_nemo.model.language_model import LanguageModel
    from opcd_nemo.model.layers import PackedWeight

BatchSize = Annotated[
    int, Doc(words="sequences decoded together", minimum=1, maximum=MOST_SEQUENCES)
]
_TOKENS_PER_BEAT = 256  # seconds: whatever generates shows that it goes on


class _Group:
    """Sequences that decode together.

    `indices` are those of its prompts in the call of `generate`, `rows` those of its prompts that
    are not finished, in the order of the cache. What a step reads of them lies on the device:
    `uniforms_RM` for every token that may be sampled, `last_R` the tokens sampled last. `pending`
    says that a token was sampled on the last stage which this stage has not received yet.
    """

    def __init__(
        self, prompts: Sequence[Prompt], indices: Sequence[int], uniforms_RM: torch.Tensor
    ) -> None:
        self.prompts, self.indices, self.uniforms_RM = prompts, indices, uniforms_RM
        self.last_R = torch.zeros(0, dtype=torch.long, device=uniforms_RM.device)
        self.rows = list(range(len(prompts)))
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.logprobs: list[list[float]] = [[] for _ in prompts]
        self.finished_by_eos = [False] * len(prompts)
        self.cache = KVCache(0, uniforms_RM.device)
        self.pending = False

    def keep(self, slots: Sequence[int]) -> None:
        """Forget every live row but those in these slots of the cache."""
        chosen = torch.tensor(slots, dtype=torch.long, device=self.last_R.device)
        self.cache.keep(chosen)
        self.last_R, self.uniforms_RM = self.last_R[chosen], self.uniforms_RM[chosen]
        self.rows = [self.rows[slot] for slot in slots]


class MegatronEngine:
    """The engine of `conf/engine/megatron.yaml`."""

    def __init__(
        self,
        model: LanguageModel,
        eos_ids: Sequence[int],
        *,
        max_batch_size: BatchSize,
        pack: bool,
        keep_turns: bool = False,
    ) -> None:
        """Generate with `model`.

        Args:
            model: whose present weights are used.
            eos_ids: token ids that end a response.
            max_batch_size: sequences decoded together.
            pack: reorder the weights once per `load_weights` for small products (CPU only).
            keep_turns: hold the keys and values of a game's turn for its next turn (CPU only; a
                GPU's time goes into decoding, and its memory is short).

        `on_finished` is told how many answers have ended, as they do.
        """
        self._model, self._eos = model, frozenset(eos_ids)
        self._max_batch_size = max_batch_size
        on_cpu = model.parallel.device.type == "cpu"
        self._pack, self._keep_turns = pack and on_cpu, keep_turns and on_cpu
        self._turns: list[HeldTurn] = []  # of the last call of `generate`
        self._head: PackedWeight | None = None
        self._prefixes: dict[tuple[int, ...], dict[int, KeyValue]] = {}
        self.weights_version = -1
        self.on_finished: Callable[[int], None] | None = None

    def load_weights(self, version: int) -> None:
        """Take the model's present weights; nothing to do when this version is held."""
        if version == self.weights_version:
            return
        self.weights_version = version
        self._forget()
        if self._pack:
            self._head = self._model.pack_weights()

    def release_weights(self) -> None:
        """Give back the packed copies; `load_weights` makes them anew."""
        self.weights_version = -1
        self._model.unpack_weights()
        self._head = None
        self._forget()
        self._model.parallel.give_back_memory()

    def _forget(self) -> None:
        self._prefixes.clear()
        self._turns.clear()

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prefix_ids: Sequence[int] = (),
    ) -> list[Sample]:
        """One continuation a prompt, in order. Collective over tp and pp."""
        self._model.module.eval()
        samples: list[Sample | None] = [None] * len(prompts)
        held, self._turns = HeldTurns(self._turns), []
        by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index].token_ids))
        width = self._max_batch_size * self._model.parallel.pp
        for start in range(0, len(prompts), width):
            groups = self._groups(prompts, by_length[start : start + width], sampling, seed, step)
            self._decode(groups, sampling, prefix_ids, held)
            for group in groups:
                for row, index in enumerate(group.indices):
                    samples[index] = Sample(
                        response_ids=tuple(group.tokens[row]),
                        logprobs=tuple(group.logprobs[row]),
                        finish_reason="eos" if group.finished_by_eos[row] else "length",
                    )
        return [sample for sample in samples if sample is not None]

    def _groups(
        self,
        prompts: Sequence[Prompt],
        indices: Sequence[int],
        sampling: Sampling,
        seed: int,
        step: int,
    ) -> list[_Group]:
        count, device = min(self._model.parallel.pp, len(indices)), self._model.parallel.device
        groups = []
        for first in range(count):
            chosen = indices[first::count]
            rows = [prompts[index] for index in chosen]
            uniforms = [row_uniforms(seed, step, p.index, sampling.max_new_tokens) for p in rows]
            groups.append(_Group(rows, chosen, torch.stack(uniforms).to(device)))
        return groups

    def _decode(
        self,
        groups: list[_Group],
        sampling: Sampling,
        prefix_ids: Sequence[int],
        held: HeldTurns,
    ) -> None:
        # Only the last stage samples, and all stages need the token for the group's next step. It
        # is sent at once and received as late as possible, when its group's turn comes again: the
        # other groups keep the stages busy while it travels. A send and its receive have no name
        # that could be matched, so every stage goes through the groups in the same order.
        for group in groups:
            self._finish_step(group, self._prefill(group, sampling, prefix_ids, held), sampling)
        for step in count():
            if step % _TOKENS_PER_BEAT == 0:
                heartbeat.touch()
            if not any(group.rows for group in groups):
                break
            for group in groups:
                self._receive_tokens(group, sampling)
                if group.rows:
                    self._finish_step(group, self._step(group), sampling)
        self._model.parallel.flush()

    def _prefill(
        self, group: _Group, sampling: Sampling, prefix_ids: Sequence[int], held: HeldTurns
    ) -> torch.Tensor | None:
        """Hidden states at the prompts' last tokens, on the last stage."""
        ids = [prompt.token_ids for prompt in group.prompts]
        has_prefix = bool(prefix_ids) and all(starts_with(row, prefix_ids) for row in ids)
        skipped = len(prefix_ids) if has_prefix else 0
        longest, device = max(map(len, ids)), self._model.parallel.device
        group.cache = KVCache(longest + sampling.max_new_tokens, device)
        batch = pack(
            [row[skipped:] for row in ids],
            [1] * len(ids),
            device=device,
            first_position=skipped,
            multiple=self._model.stream_multiple,
        )
        before = held.before(ids)
        if before is not None:
            rest = [row[count:] for row, (_, count) in zip(ids, before, strict=True)]
            if sum(map(len, rest)) < batch.packing.stream_tokens:
                group.cache.start_from(before)
                return self._model.extend(rest, group.cache)
        prefix = self._prefix(tuple(prefix_ids)) if has_prefix else None
        hidden = self._model.prefill(batch, group.cache, prefix)
        group.cache.start([len(row) for row in ids])
        return hidden

    def _prefix(self, ids: tuple[int, ...]) -> dict[int, KeyValue]:
        if ids not in self._prefixes:
            self._prefixes[ids] = self._model.prefix(ids)
        return self._prefixes[ids]

    def _step(self, group: _Group) -> torch.Tensor | None:
        """Feed each live row's last token; hidden states on the last stage."""
        padding = -len(group.rows) % self._model.stream_multiple
        positions = F.pad(group.cache.lengths_R, (0, padding))
        state = DecodeAttention(self._model.rotary_tables(positions), group.cache)
        hidden = self._model.stage_forward(Stream(F.pad(group.last_R, (0, padding)), state))
        group.cache.advance()
        return None if hidden is None else hidden[: len(group.rows)]

    def _finish_step(self, group: _Group, hidden: torch.Tensor | None, sampling: Sampling) -> None:
        """Sample on the last stage and send the tokens to the others, which receive them later."""
        parallel = self._model.parallel
        group.pending = True
        if hidden is None:
            return
        logits = self._model.logits(hidden, self._head)
        num_sampled = len(group.tokens[group.rows[0]])  # alike for all rows that are live
        tokens, logprobs = sample_tokens(logits, group.uniforms_RM[:, num_sampled], sampling)
        drawn = torch.stack((tokens.double(), logprobs.double()))
        for stage in range(parallel.pp - 1):
            parallel.send_back(drawn, stage)
        self._record_tokens(group, drawn, sampling)

    def _receive_tokens(self, group: _Group, sampling: Sampling) -> None:
        """Receive the tokens of the group's last step, if this stage does not know them yet."""
        if group.pending:  # never on the last stage, which recorded them when it sampled
            parallel = self._model.parallel
            drawn = torch.empty(2, len(group.rows), dtype=torch.float64, device=parallel.device)
            self._record_tokens(group, parallel.receive_back(drawn), sampling)

    def _record_tokens(self, group: _Group, drawn: torch.Tensor, sampling: Sampling) -> None:
        """Append a token to each live row and drop the rows that it finishes.

        Every stage does it with the same tokens, so all stages know the rows of the next step.
        """
        group.pending = False
        group.last_R = drawn[0].long()
        unfinished = []
        for slot, (row, token, logprob) in enumerate(zip(group.rows, *drawn.tolist(), strict=True)):
            group.tokens[row].append(int(token))
            group.logprobs[row].append(logprob)
            group.finished_by_eos[row] = int(token) in self._eos
            if not (
                group.finished_by_eos[row] or len(group.tokens[row]) == sampling.max_new_tokens
            ):
                unfinished.append(slot)
            elif self._keep_turns and group.prompts[row].goes_on:
                ids = (*group.prompts[row].token_ids, *group.tokens[row][:-1])
                self._turns.append(HeldTurn(token_ids=ids, layers=group.cache.row(slot)))
        if finished := len(group.rows) - len(unfinished):
            group.keep(unfinished)
            if self.on_finished is not None:
                self.on_finished(finished)
