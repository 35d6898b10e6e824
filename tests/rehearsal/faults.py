"""A rehearsed rank with a fault in the project: `python -m tests.rehearsal.faults NAME`."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from opcd_nemo.rehearsal import rank


def cpu_tensor_in_the_loss() -> None:
    import torch

    from opcd_nemo import losses

    real = losses._weighted

    def weighted(name: str, loss_N: Any, *rest: Any) -> Any:
        return real(name, loss_N * torch.ones(len(loss_N)), *rest)

    losses._weighted = weighted


def collective_left_out() -> None:
    """The gradient's norm is not summed over the ranks."""
    from megatron.core.optimizer import clip_grads

    clip_grads.torch.distributed.all_reduce = lambda *_, **__: None


def collectives_swapped() -> None:
    """The rank tells its statistics after the update; the others do so before."""
    from opcd_nemo.training import step
    from opcd_nemo.training.optim import StudentOptimizer

    gather, update, waiting = step.over_ranks, StudentOptimizer.step, list[Any]()

    def keep(parallel: Any, stats: Any) -> Any:
        waiting.append((parallel, stats))
        return stats

    def update_first(self: StudentOptimizer) -> Any:
        stats = update(self)
        gather(*waiting.pop())
        return stats

    step.over_ranks = keep
    StudentOptimizer.step = update_first  # type: ignore[method-assign]


def tokens_sent_back_among_hidden_states() -> None:
    """As before they had a group of their own: two ranks both send, and wait for a receive."""
    from opcd_nemo.distributed.groups import Parallel

    def receive(self: Parallel, buffer: Any) -> Any:
        return self.receive_from_stage(buffer, self.pp - 1)

    Parallel.send_back = Parallel.send_to_stage  # type: ignore[method-assign]
    Parallel.receive_back = receive  # type: ignore[method-assign]


def forgotten_wait() -> None:
    """What was sent is let go of while it is on its way."""
    from opcd_nemo.distributed.groups import Parallel

    Parallel.flush = lambda self: self.in_flight.clear()  # type: ignore[method-assign]


def transposed_output_is_viewed() -> None:
    """As where torch takes its memory-efficient kernel for a decoding step."""
    from torch.nn.functional import scaled_dot_product_attention

    from opcd_nemo.model import cache

    def masked(q_RAD: Any, k_RGSD: Any, v_RGSD: Any, visible_RS: Any) -> Any:
        rows, heads, size = q_RAD.shape
        q = q_RAD.view(rows, k_RGSD.shape[1], -1, size)
        mask = visible_RS[:, None, None, :]
        out = scaled_dot_product_attention(q, k_RGSD, v_RGSD, attn_mask=mask)
        return out.view(rows, heads, size)

    cache.masked_attention = masked


def wrong_type_into_a_product() -> None:
    from opcd_nemo.model import attention

    real = attention.CoreAttention.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs).float()

    attention.CoreAttention.forward = forward  # type: ignore[method-assign]


def unknown_parameter() -> None:
    from opcd_nemo.formats import sharding

    real = sharding.megatron_shard

    def shard(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **{**kwargs, "spec": "local"})

    import opcd_nemo.model.language_model as models

    models.megatron_shard = shard


def main() -> None:
    fault: Callable[[], None] = globals()[sys.argv[1]]
    real = rank._play

    def play(*words: Any) -> Any:
        fault()
        return real(*words)

    rank._play = play
    sys.exit(rank.main())


if __name__ == "__main__":
    main()
