"""A decoder on megatron-core, sharded over tp and pp: build, load, score, forward and backward.

Its forward passes:

    stream            a packed micro-batch, whole on this rank, with the state of its attention
    split_stream      this rank's share of a micro-batch that context parallelism splits
    stage_forward     a stream through all pipeline stages, without gradient; used by the next three
    prefix            keys and values of tokens that many prompts start with
    score             hidden states that predict response tokens: what the teacher says
    prefill           the prompts of a rollout, whose keys and values fill a cache
    forward_backward  Megatron's schedule over all micro-batches of a step: what the student learns

A decoding step of a rollout is a `Stream` of the engine's through `stage_forward`.

Shape letters: `T` stream tokens, `N` predicted (response) tokens, `H` hidden, `V` vocabulary of
this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.errors import UserError
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.sharding import (
    megatron_shard,
    padded_vocab_size,
)
from opcd_nemo.formats.stored_model import StoredModel
from opcd_nemo.metrics import Stats
from opcd_nemo.model.attention import PackedAttention, Rotary
from opcd_nemo.model.cache import ExtendAttention, KVCache
from opcd_nemo.model.context_parallel import Indices, SplitAttention, StreamShare
from opcd_nemo.model.gpt import build_module, transformer_config
from opcd_nemo.model.head import Head
from opcd_nemo.model.layers import PackedWeight, pack_weights, unpack_weights
from opcd_nemo.model.packing import Stream, TokenBatch
from opcd_nemo.model.varlen import KeyValue, Packing, Rows

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}  # of weights, by their words in conf/

_FP8_ROWS = 16
_STREAM_STEP = 128  # tokens
HeadLoss = Callable[[Head, Indices, int], tuple[torch.Tensor, Stats]]


def choose_dtype(word: str | None, stored: torch.dtype) -> torch.dtype:
    """The type that `bf16` or `fp32` names; None is the type of the stored weights.

    Raises:
        UserError: another word.
    """
    if word is None:
        return stored
    if word not in DTYPES:
        raise UserError("dtype", word, f"{', '.join(DTYPES)}, or null for what is stored")
    return DTYPES[word]


class LanguageModel:
    """This rank's shard of a model, with the forward passes that distillation needs."""

    def __init__(self, config: ModelConfig, parallel: Parallel, dtype: torch.dtype) -> None:
        """Build the module; its weights are uninitialised until `load`."""
        self.config, self.parallel, self.dtype = config, parallel, dtype
        self.megatron_config = transformer_config(config, parallel, dtype)
        self.module = build_module(config, self.megatron_config, parallel).to(parallel.device)
        for name, parameter in self.module.named_parameters():
            # Megatron marks only what it initialises; unmarked shards are left out of the norm
            parameter.tensor_model_parallel = "norm" not in name
        self._rotary = Rotary(config, parallel.device)

    @torch.no_grad()
    def load(self, checkpoint: StoredModel, layers: Sequence[int] | None = None) -> None:
        """Fill every parameter of this shard; `layers` are the checkpoint's layers to keep.

        Raises:
            UserError: a weight is infinite or no number.
        """
        kept = range(self.config.num_layers) if layers is None else layers
        for name, parameter in self.module.named_parameters():
            layer = self.global_layer(name)
            shard = megatron_shard(
                checkpoint.tensor,
                self.config,
                name,
                layer=None if layer is None else kept[layer],
                tp_size=self.parallel.tp,
                tp_rank=self.parallel.tp_rank,
                spec=self.parallel.layer_spec,
            )
            assert shard.shape == parameter.shape, (name, shard.shape, parameter.shape)
            parameter.copy_(shard)
            if not parameter.isfinite().all():
                raise UserError(
                    checkpoint.path,
                    allowed=f"finite weights, also in {self.dtype}",
                    problem=f"{name} has values that are infinite or no numbers",
                )

    def global_layer(self, name: str) -> int | None:
        """The 0-based layer of a local parameter name; None outside the layers."""
        if not name.startswith("decoder.layers."):
            return None
        number: int = self.module.decoder.layers[int(name.split(".")[2])].layer_number
        return number - 1

    @property
    def head_weight_VH(self) -> torch.Tensor:
        """This rank's vocabulary shard of the output head (last stage only)."""
        if self.config.tied_embeddings:
            weight: torch.Tensor = self.module.shared_embedding_or_output_weight()
        else:
            weight = self.module.output_layer.weight
        return weight

    @property
    def num_valid_columns(self) -> int:
        """How many of this rank's vocabulary columns are real; the rest is padding."""
        local = padded_vocab_size(self.config.vocab_size, self.parallel.tp) // self.parallel.tp
        return max(0, min(local, self.config.vocab_size - self.parallel.tp_rank * local))

    def head(self, hidden_NH: torch.Tensor) -> Head:
        """The output head over these hidden states."""
        return Head(
            hidden_NH=hidden_NH,
            weight_VH=self.head_weight_VH,
            num_valid_columns=self.num_valid_columns,
            group=self.parallel.tp_group if self.parallel.tp > 1 else None,
        )

    @property
    def stream_multiple(self) -> int:
        """Lengths of streams that a rank has whole are multiples of this.

        Sequence parallelism splits them over tp; FP8 products take rows by the 16.
        """
        rows = 1 if self.parallel.fp8 is None else _FP8_ROWS
        return rows * (self.parallel.tp if self.parallel.sequence_parallel else 1)

    @property
    def split_multiple(self) -> int:
        """Lengths of streams that are trained or scored, over all of cp, are multiples of this.

        On a GPU there are few lengths then: freed memory fits the next stream, and what libraries
        and compilers make for a shape serves again.
        """
        cp = self.parallel.cp
        multiple = self.stream_multiple
        if self.parallel.device.type != "cpu":
            multiple = math.lcm(multiple, _STREAM_STEP)
        return multiple if cp == 1 else cp * math.lcm(2, multiple)

    def share(self, batch: TokenBatch) -> StreamShare:
        """What this rank has of a stream that is trained or scored."""
        parallel = self.parallel
        return StreamShare(
            stream_tokens=len(batch.token_ids_T), cp=parallel.cp, cp_rank=parallel.cp_rank
        )

    @contextmanager
    def _without_fp8(self) -> Iterator[None]:
        """Compute in the type of the weights: decoding has any number of rows."""
        fp8, self.megatron_config.fp8 = self.megatron_config.fp8, None
        try:
            yield
        finally:
            self.megatron_config.fp8 = fp8

    def logits(self, hidden_NH: torch.Tensor, packed: PackedWeight | None = None) -> torch.Tensor:
        """Logits [N, vocabulary] without padding, alike on all tp ranks. Collective over tp."""
        if packed is None:
            local = torch.nn.functional.linear(hidden_NH, self.head_weight_VH)
        else:
            local = packed.linear(hidden_NH)
        return self.parallel.gather_vocabulary(local)[:, : self.config.vocab_size]

    def pack_weights(self) -> PackedWeight | None:
        """Reorder the weights for decoding on a CPU; returns the head's, on the last stage."""
        pack_weights(self.module)
        return PackedWeight(self.head_weight_VH) if self.parallel.is_last_stage else None

    def unpack_weights(self) -> None:
        """Forget the packed weights: they are stale after an optimizer step."""
        unpack_weights(self.module)

    def rotary_tables(self, positions_T: torch.Tensor) -> KeyValue:
        """Rotary tables in the model's dtype."""
        return self._rotary.tables(positions_T, self.dtype)

    def stream(self, batch: TokenBatch, **attention: Any) -> Stream:
        """A packed batch with its attention state; keywords as of `PackedAttention`."""
        tables = self.rotary_tables(batch.position_ids_T)
        return Stream(batch.token_ids_T, PackedAttention(tables, batch.packing, **attention))

    def local_response_indices(self, batch: TokenBatch) -> Indices:
        """Which of a batch's response tokens are predicted by tokens of this rank."""
        return batch.predicted_by(self.share(batch))[0]

    def split_stream(self, batch: TokenBatch, prefix: dict[int, KeyValue] | None = None) -> Stream:
        """This rank's share of a packed batch, whose attention is collective over cp."""
        if self.parallel.cp == 1:
            return self.stream(batch, prefix=prefix)
        share = self.share(batch)
        gather = partial(gather_from_sequence_parallel_region, group=self.parallel.cp_group)
        tables = self.rotary_tables(share.take(batch.position_ids_T))
        state = SplitAttention(tables, batch.packing, share, gather, prefix=prefix)
        return Stream(share.take(batch.token_ids_T), state)

    @torch.no_grad()
    def stage_forward(self, stream: Stream) -> torch.Tensor | None:
        """Forward through all stages; hidden [T, H] on the last, None elsewhere.

        Collective over tp and pp: every stage calls with the same stream.
        """
        parallel = self.parallel
        if not parallel.is_first_stage:
            shards = parallel.tp if parallel.sequence_parallel else 1
            tokens = len(stream.token_ids_T) // shards
            buffer = torch.empty(
                tokens, 1, self.config.hidden_size, dtype=self.dtype, device=parallel.device
            )
            self.module.set_input_tensor(parallel.receive_from_stage(buffer, parallel.pp_rank - 1))
        with self._without_fp8():
            out = self.module(stream.token_ids_T, stream.state)
        if not parallel.is_last_stage:
            parallel.send_to_stage(out, parallel.pp_rank + 1)
            return None
        return self._whole_stream(out)

    def _whole_stream(self, out: torch.Tensor) -> torch.Tensor:
        """Hidden states [T, H] of all tokens of tp, which sequence parallelism has split."""
        if self.parallel.sequence_parallel:
            # losses give the full gradient on every rank: split it, do not sum it
            out = gather_from_sequence_parallel_region(out, tensor_parallel_output_grad=False)
        return out[:, 0]

    def prefix(self, token_ids: Sequence[int]) -> dict[int, KeyValue]:
        """Keys and values of a prefix, for this stage's layers. Collective over tp and pp."""
        record: dict[int, KeyValue] = {}
        count = len(token_ids)
        padded = -(-count // self.stream_multiple) * self.stream_multiple
        ids = torch.zeros(padded, dtype=torch.long, device=self.parallel.device)
        ids[:count] = torch.tensor(token_ids)
        packing = Packing(count, (), padded, self.parallel.device)
        tables = self.rotary_tables(torch.arange(padded, device=self.parallel.device))
        self.stage_forward(Stream(ids, PackedAttention(tables, packing, record=record)))
        return {layer: (k[:count], v[:count]) for layer, (k, v) in record.items()}

    def score(
        self, batches: Sequence[TokenBatch], prefixes: Sequence[dict[int, KeyValue] | None]
    ) -> list[torch.Tensor]:
        """Hidden states [N, H] at the predicting tokens of each batch; last stage only.

        Without gradient. Collective over tp, pp and cp: all ranks of cp get all of them.
        """
        self.module.eval()
        scores = []
        for batch, prefix in zip(batches, prefixes, strict=True):
            hidden = self.stage_forward(self.split_stream(batch, prefix))
            if hidden is not None:
                scores.append(self._predicting(hidden, batch))
        return scores

    def _predicting(self, hidden_TH: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """Hidden states [N, H], of this rank's tokens and the others'. Collective over cp."""
        if self.parallel.cp == 1:
            return hidden_TH[batch.predict_index_N]
        responses, tokens = batch.predicted_by(self.share(batch))
        hidden_NH = hidden_TH.new_zeros(len(batch.predict_index_N), hidden_TH.shape[1])
        hidden_NH[responses] = hidden_TH[tokens]
        return self.parallel.sum_over_cp(hidden_NH)

    def prefill(
        self, batch: TokenBatch, cache: KVCache, prefix: dict[int, KeyValue] | None
    ) -> torch.Tensor | None:
        """Fill the cache with the prompts; hidden [N, H] of their last tokens on the last stage."""
        self.module.eval()
        hidden = self.stage_forward(self.stream(batch, cache=cache, prefix=prefix))
        return None if hidden is None else hidden[batch.predict_index_N]

    def extend(self, rows: Sequence[Sequence[int]], cache: KVCache) -> torch.Tensor | None:
        """Fill the cache with its rows' next tokens; hidden [R, H] of the last, on the last stage.

        Collective over tp and pp.
        """
        self.module.eval()
        device, lengths = self.parallel.device, tuple(map(len, rows))
        padding = -sum(lengths) % self.stream_multiple
        ids = [token for row in rows for token in row] + [0] * padding
        ends = [held + added for held, added in zip(cache.lengths, lengths, strict=True)]
        places = map(range, cache.lengths, ends)
        positions = [place for row in places for place in row]
        tables = self.rotary_tables(torch.tensor(positions + [0] * padding, device=device))
        state = ExtendAttention(tables, cache, Rows(0, lengths, device))
        hidden = self.stage_forward(Stream(torch.tensor(ids, device=device), state))
        cache.start(ends)
        last = torch.tensor(list(accumulate(lengths)), device=device) - 1
        return None if hidden is None else hidden[last]

    def forward_backward(
        self, wrapped: torch.nn.Module, batches: Sequence[TokenBatch], loss: HeadLoss
    ) -> Stats:
        """Accumulate the gradient of the summed loss into the wrapped module's buffers.

        Args:
            wrapped: Megatron's DistributedDataParallel around `module`.
            batches: a packed stream for each micro-batch, all padded alike when pp > 1.
            loss: (head, which of the micro-batch's response tokens its rows predict, index of the
                micro-batch) -> (weighted sum, Stats).

        Returns:
            This rank's summed statistics; empty on every stage but the last.
        """
        total = Stats()
        self.module.train()

        # Megatron's schedule decides when a micro-batch goes forward and when backward: with pp > 1
        # several are in flight, so each call takes the next micro-batch of an iterator and its loss
        # is a closure over it. Only the last stage calls `loss_of`.
        def forward_step(batches: Iterator[tuple[int, TokenBatch]], model: Any) -> Any:
            index, batch = next(batches)
            out = model(*self.split_stream(batch))

            def loss_of(out: torch.Tensor) -> Any:
                responses, predicting = batch.predicted_by(self.share(batch))
                hidden = self._whole_stream(out)[predicting]
                value, stats = loss(self.head(hidden), responses, index)
                total.add(stats)
                # 0 tokens: the weights are normalised over the global batch, so the schedule must
                # not divide; the statistics do not travel through Megatron's report ({})
                return value, torch.zeros((), dtype=torch.int, device=value.device), {}

            return out, loss_of

        # the schedule sizes the tensors that stages exchange by seq_length, the same for all
        # micro-batches: with pp > 1 they are padded alike
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(list(enumerate(batches))),
            model=wrapped,
            num_microbatches=len(batches),
            seq_length=len(batches[0].token_ids_T),  # Megatron divides by cp and tp
            micro_batch_size=1,
            forward_only=False,
        )
        return total


def reduce_gradients(model: list[Any], _num_tokens: object = None, **keywords: Any) -> None:
    """Megatron's `finalize_model_grads` without a division: weights are normalised already."""
    finalize_model_grads(model, None, **keywords)
