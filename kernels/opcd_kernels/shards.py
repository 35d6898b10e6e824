"""The only collectives of the package, and where a shard lies in the vocabulary.

All ranks of `group` call a collective with the same number of rows; `None` means that the
vocabulary is not sharded. Nothing is sent for zero rows, which every rank has at once.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def gather_parts(part_NX: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """[N, X] of every rank as [P, N, X] in rank order: all ranks then reduce the same bits.

    Collective over `group`.
    """
    if group is None or part_NX.numel() == 0:
        return part_NX.unsqueeze(0)
    parts = part_NX.new_empty((dist.get_world_size(group), *part_NX.shape))
    dist.all_gather(list(parts.unbind(0)), part_NX.contiguous(), group=group)
    return parts


def sum_over_shards(partial_NH: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the group, added in fp32, in the dtype of the input. Collective over `group`."""
    if group is None or partial_NH.numel() == 0:
        return partial_NH
    total = partial_NH.to(torch.float32, copy=True)
    dist.all_reduce(total, group=group)
    return total.to(partial_NH.dtype)


def vocab_start(num_columns: int, group: dist.ProcessGroup | None) -> int:
    """The vocabulary id of this rank's first column when all shards have that width."""
    return 0 if group is None else dist.get_rank(group) * num_columns


def local_columns(target_ids_N: Tensor, start: int, width: int) -> Tensor:
    """The ids' columns in a shard that holds [start, start + width), -1 for all other ids."""
    column = target_ids_N - start
    return column.masked_fill((column < 0) | (column >= width), -1)
