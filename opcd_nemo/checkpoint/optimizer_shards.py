"""DistributedOptimizer's state as whole parameters, spread over the data-parallel ranks.

Megatron lays the parameters end to end in flat buckets and gives every data-parallel rank one
stretch of each bucket. Its `fully_reshardable` checkpoints hold whole parameters, for which
megatron-core gathers everything on every rank. But a rank already holds most parameters whole; only
parameters that cross the border of two stretches need an exchange. With 2 ranks and 3 parameters:

    bucket   | a a a a | b b b b b b | c c |
    rank 0   |---------------|                 a whole, the first 2 of b
    rank 1                   |-------------|   the last 4 of b, c whole

b belongs to rank 1, which has more elements of b; rank 0 sends its 2 elements.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

from opcd_nemo.distributed.groups import Parallel

_KEYS = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stretch:
    """The elements of a parameter that one data-parallel rank updates."""

    dp_rank: int
    start: int
    stop: int


def whole_parameters(
    optimizer: Any, weights: Mapping[str, Any], parallel: Parallel
) -> dict[int, dict[str, Any]]:
    """This rank's share of the state, in megatron-core's `fully_reshardable` form.

    Args:
        optimizer: a DistributedOptimizer.
        weights: the student's sharded state.
        parallel: a parameter belongs to the data-parallel rank with most of it.

    Returns:
        Master weight and moments of the parameters that belong to this rank, by their place in the
        buffers. Collective over dp.
    """
    sharded = {part.data: part for part in weights.values() if hasattr(part, "replica_id")}
    # every rank walks over all parameters in the same order: a send and its receive then meet
    found: dict[int, dict[str, Any]] = {}
    for number, (parameter, stretches) in enumerate(_stretches(optimizer, parallel.dp)):
        owner = max(stretches, key=lambda stretch: stretch.stop - stretch.start).dp_rank
        held = {}
        if any(stretch.dp_rank == parallel.dp_rank for stretch in stretches):
            held = optimizer._get_main_param_and_optimizer_states(parameter)
        whole = {
            key: _assemble(held.get(key), parameter.shape, stretches, owner, parallel)
            for key in _KEYS
        }
        if owner == parallel.dp_rank:
            found[number] = {key: _like(sharded[parameter], key, whole[key]) for key in _KEYS}
    parallel.flush()
    return found


def _stretches(optimizer: Any, dp: int) -> Iterator[tuple[torch.nn.Parameter, list[_Stretch]]]:
    """Every parameter in the order of the buffers, and the part of each that each rank holds."""
    for buffer in optimizer.buffers:
        for parameter, (start, stop, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            share = bucket.grad_data.numel() // dp  # Megatron pads buckets to a multiple of dp
            borders = [bucket.offset + rank * share for rank in range(dp + 1)]
            yield (
                parameter,
                [
                    _Stretch(
                        dp_rank=rank,
                        start=max(start, borders[rank]) - start,
                        stop=min(stop, borders[rank + 1]) - start,
                    )
                    for rank in range(dp)
                    if max(start, borders[rank]) < min(stop, borders[rank + 1])
                ],
            )


def _assemble(
    held: torch.Tensor | None,
    shape: torch.Size,
    stretches: list[_Stretch],
    owner: int,
    parallel: Parallel,
) -> torch.Tensor | None:
    """The whole tensor on its owner."""
    me = parallel.dp_rank
    if owner != me:
        if held is not None:
            parallel.send_over_dp(held.detach(), owner)
        return None
    assert held is not None
    if len(stretches) == 1:
        return held.detach().view(shape)
    whole = held.new_empty(shape.numel())
    for stretch in stretches:
        part = whole[stretch.start : stretch.stop]
        if stretch.dp_rank == me:
            part.copy_(held.detach())
        else:
            parallel.receive_over_dp(part, stretch.dp_rank)
    return whole.view(shape)


def _like(weight: Any, key: str, data: torch.Tensor | None) -> Any:
    """Sharded as the weight is; its only copy among the data-parallel ranks."""
    assert data is not None
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{key}.{weight.key}",
        "data": data,
        "replica_id": (*weight.replica_id[:-1], 0),
    }
    if not isinstance(weight, ShardedTensorFactory):
        changes["dtype"] = data.dtype
    return replace(weight, **changes)
