"""Models on a layout, and their sharded tensors joined to full ones under Hugging Face names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from opcd_nemo.distributed.groups import Parallel, init_parallel
from opcd_nemo.formats.shape import keep_layers, tensor_shapes
from opcd_nemo.formats.sharding import hf_tensors, megatron_shard
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.training.optim import StudentOptimizer
from tests.distributed.cases import LAYOUTS

Tensors = dict[str, torch.Tensor]


def start(layout_name: str) -> Parallel:
    """Create the groups of a layout, in place of those of the layout before."""
    _leave_groups()
    layout = LAYOUTS[layout_name]
    settings = SimpleNamespace(
        device="cpu",
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        sequence_parallel=layout.sequence_parallel,
        layer_spec="auto",
        context_parallel_size=layout.cp,
        recompute_modules=list(layout.recompute_modules),
        fp8=None,
        threads_per_rank=1,
        timeout_s=120.0,
    )
    return init_parallel(settings, seed=0)


def _leave_groups() -> None:
    """Destroy every group but the world's: each holds threads, and layouts would add up to 2000."""
    if not parallel_state.model_parallel_is_initialized():
        return
    dist.barrier()  # no rank is still in a collective of a group that another one destroys
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def build(
    parallel: Parallel,
    path: Path,
    layers: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LanguageModel:
    """A model of a folder."""
    source = open_model(str(path))
    config = source.config if layers is None else keep_layers(source.config, layers)
    model = LanguageModel(config, parallel, dtype)
    model.load(source, layers)
    return model


def full_tensors(
    model: LanguageModel, read: Callable[[torch.nn.Parameter], torch.Tensor]
) -> tuple[Tensors, list[str]]:
    """Full tensors of all parameters, on every rank, and the names whose copies differ.

    Copies are: replicated parameters over tp, everything over dp, a tied head and its embedding.
    """
    parallel, mine, unequal = model.parallel, {}, []
    tied_head = None
    for name, parameter in model.module.named_parameters():
        shards = parallel.gather_tp_shards(read(parameter))
        if "norm" in name and any(not torch.equal(shard, shards[0]) for shard in shards):
            unequal.append(f"{name} over tp")
        if name == "output_layer.weight" and model.config.tied_embeddings:
            tied_head = torch.cat(shards)[: model.config.vocab_size]
        mine |= hf_tensors(
            shards, model.config, name, layer=model.global_layer(name), spec=parallel.layer_spec
        )
    joined: Tensors = {}
    for part, head in parallel.gather_objects((mine, tied_head)):
        for name, tensor in part.items():
            if not torch.equal(joined.setdefault(name, tensor), tensor):
                unequal.append(f"{name} over ranks")
        if head is not None and not torch.equal(head, joined["model.embed_tokens.weight"]):
            unequal.append("tied head")
    return joined, unequal


def gather_gradient_shards(optimizer: StudentOptimizer, parallel: Parallel) -> None:
    """Fill the buffers that the DistributedOptimizer reduce-scattered over dp."""
    for buffer in optimizer.ddp.buffers:
        for bucket in buffer.buckets:
            mine = bucket.grad_data.chunk(parallel.dp)[parallel.dp_rank].clone()
            parts = [torch.empty_like(mine) for _ in range(parallel.dp)]
            dist.all_gather(parts, mine, group=parallel.dp_group)
            bucket.grad_data.copy_(torch.cat(parts))


def largest_padding(
    model: LanguageModel, read: Callable[[torch.nn.Parameter], torch.Tensor | None]
) -> float:
    """Largest absolute value at the padding of this rank's parameters."""
    shapes = tensor_shapes(model.config)
    worst = 0.0
    for name, parameter in model.module.named_parameters():
        real = megatron_shard(
            lambda hf_name: torch.ones(shapes[hf_name]),
            model.config,
            name,
            layer=model.global_layer(name),
            tp_size=model.parallel.tp,
            tp_rank=model.parallel.tp_rank,
            spec=model.parallel.layer_spec,
        )
        values = read(parameter)
        if values is not None and bool((real == 0).any()):
            worst = max(worst, values[real == 0].abs().max().item())
    return worst
