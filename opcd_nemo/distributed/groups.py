"""Process groups and collectives, for CPU and GPU alike.

`init_parallel` decides device and backend, creates Megatron's groups over tensor (tp), pipeline
(pp), data (dp) and context (cp) axes, seeds, and returns a frozen `Parallel` for everybody.
"""

from __future__ import annotations

import ctypes
import datetime
import logging
import math
import os
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist

from opcd_nemo.config.train import ParallelConfig
from opcd_nemo.distributed import _megatron_cpu
from opcd_nemo.distributed.devices import choose_device, choose_layer_spec
from opcd_nemo.distributed.launcher import environment_number, environment_world
from opcd_nemo.errors import UserError
from opcd_nemo.types import Fp8Format, LayerSpec

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallel:
    """Where this process stands on the axes, and the collectives over them.

    Context parallelism is a part of data parallelism: each of the dp ranks samples its own prompts,
    and cp neighbours among them share the passes that train and score.
    """

    device: torch.device
    device_reason: str
    layer_spec: LayerSpec
    rank: int
    world_size: int
    tp: int
    pp: int
    dp: int
    cp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    cp_rank: int
    sequence_parallel: bool
    recompute_modules: tuple[str, ...]
    fp8: Fp8Format | None
    tp_group: Any
    pp_group: Any
    dp_group: Any
    cp_group: Any
    return_group: Any  # of the pipeline's ranks, for what the last stage sends back
    in_flight: deque[tuple[Any, torch.Tensor]] = field(default_factory=deque)

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output head and computes the loss."""
        return self.pp_rank == self.pp - 1

    def share(self, count: int) -> range:
        """This rank's contiguous share of `count` global indices, over dp."""
        return range(count * self.dp_rank // self.dp, count * (self.dp_rank + 1) // self.dp)

    def sum_over_dp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over data-parallel ranks. Collective over dp."""
        if self.dp > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def sum_over_cp(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum in place over context-parallel ranks. Collective over cp."""
        if self.cp > 1:
            dist.all_reduce(tensor, group=self.cp_group)
        return tensor

    def max_over_world(self, tensor: torch.Tensor) -> torch.Tensor:
        """Maximum in place over every rank. Collective over the world."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def gather_vocabulary(self, local_BV: torch.Tensor) -> torch.Tensor:
        """Concatenate equal vocabulary shards on the last dim. Collective over tp."""
        if self.tp == 1:
            return local_BV
        parts = [torch.empty_like(local_BV) for _ in range(self.tp)]
        dist.all_gather(parts, local_BV.contiguous(), group=self.tp_group)
        return torch.cat(parts, dim=-1)

    def gather_tp_shards(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The equally shaped tensors of all tensor-parallel ranks. Collective over tp."""
        parts = [torch.empty_like(tensor) for _ in range(self.tp)]
        dist.all_gather(parts, tensor.contiguous(), group=self.tp_group)
        return parts

    def send_to_stage(self, tensor: torch.Tensor, stage: int) -> None:
        """Start sending to the rank of `stage` with the same tp and dp rank; see `flush`."""
        self._send(tensor, dist.get_global_rank(self.pp_group, stage))

    def send_back(self, tensor: torch.Tensor, stage: int) -> None:
        """Start sending from the last stage to an earlier one; see `flush`.

        NCCL runs what two ranks exchange in a group in one order. The first stage may be sending
        the next hidden states while the last sends tokens back: in one group each would wait for
        the other's receive, unless NCCL happens to buffer a message.
        """
        rank = dist.get_global_rank(self.pp_group, stage)
        self._send(tensor, rank, self.return_group)

    def send_over_dp(self, tensor: torch.Tensor, dp_rank: int) -> None:
        """Start sending to a data-parallel rank with the same tp and pp rank; see `flush`."""
        self._send(tensor, dist.get_global_rank(self.dp_group, dp_rank))

    def _send(self, tensor: torch.Tensor, rank: int, group: Any = None) -> None:
        tensor = tensor.contiguous()
        self.in_flight.append((dist.isend(tensor, rank, group=group), tensor))
        while len(self.in_flight) > 8:
            self.in_flight.popleft()[0].wait()

    def flush(self) -> None:
        """Wait until everything sent has left."""
        while self.in_flight:
            self.in_flight.popleft()[0].wait()

    def receive_from_stage(self, buffer: torch.Tensor, stage: int) -> torch.Tensor:
        """Fill `buffer` from the rank of `stage` with the same tp and dp rank."""
        dist.recv(buffer, dist.get_global_rank(self.pp_group, stage))
        return buffer

    def receive_back(self, buffer: torch.Tensor) -> torch.Tensor:
        """Fill `buffer` with what the last stage has sent back."""
        rank = dist.get_global_rank(self.pp_group, self.pp - 1)
        dist.recv(buffer, rank, group=self.return_group)
        return buffer

    def receive_over_dp(self, buffer: torch.Tensor, dp_rank: int) -> torch.Tensor:
        """Fill `buffer` from a data-parallel rank with the same tp and pp rank."""
        dist.recv(buffer, dist.get_global_rank(self.dp_group, dp_rank))
        return buffer

    def gather_objects(self, value: object) -> list[Any]:
        """Every rank's picklable `value`, in rank order. Collective over the world."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_over_dp(self, values: Sequence[Any]) -> list[Any]:
        """The concatenation of every data-parallel rank's `values`. Collective over dp."""
        return _gather_values(values, self.dp, self.dp_group)

    def gather_over_cp(self, values: Sequence[Any]) -> list[Any]:
        """The concatenation of every context-parallel rank's `values`. Collective over cp."""
        return _gather_values(values, self.cp, self.cp_group)

    def from_first_of_model(self, value: Any) -> Any:
        """The picklable value of the first rank of the ranks that share a model. Over tp and pp."""
        for size, group in ((self.tp, self.tp_group), (self.pp, self.pp_group)):
            if size > 1:
                held = [value]
                dist.broadcast_object_list(held, dist.get_global_rank(group, 0), group)
                value = held[0]
        return value

    def give_back_memory(self) -> None:
        """Return freed memory to the system: between phases of a step, large pieces lie idle."""
        if self.device.type == "cpu":
            ctypes.CDLL(None).malloc_trim(0)
        else:
            torch.cuda.empty_cache()

    def barrier(self) -> None:
        """Wait for every rank. Collective over the world."""
        if self.world_size > 1:
            dist.barrier()


def _gather_values(values: Sequence[Any], size: int, group: Any) -> list[Any]:
    if size == 1:
        return list(values)
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, list(values), group=group)
    return [value for part in parts for value in part]


def check_layout(world_size: int, tp: int, pp: int, cp: int) -> None:
    """Refuse a world that the sizes do not divide.

    Raises:
        UserError: naming the keys and the world size.
    """
    if world_size % (tp * pp):
        raise UserError(
            "parallel.tensor_model_parallel_size",
            tp,
            "a world size that is a multiple of their product",
            problem=f"with parallel.pipeline_model_parallel_size={pp} a model takes {tp * pp} "
            f"ranks, which do not divide the {world_size} ranks of the run",
        )
    dp = world_size // (tp * pp)
    if dp % cp:
        raise UserError(
            "parallel.context_parallel_size",
            cp,
            f"a divisor of the {dp} data-parallel ranks of world size {world_size}",
        )


def check_batch(global_batch_size: int, micro_batch_size: int, dp: int, cp: int) -> None:
    """Refuse a batch that does not come out even over ranks and micro-batches.

    Raises:
        UserError: naming the keys and the data-parallel ranks.
    """
    ranks = f"{dp} data-parallel ranks"
    unit = micro_batch_size * dp
    if cp > 1:  # neighbours share micro-batches
        unit = math.lcm(micro_batch_size * dp // cp, dp)
        ranks = f"{dp // cp} groups of context-parallel ranks, and of {ranks}"
    if global_batch_size % unit:
        raise UserError(
            "batching.global_batch_size",
            global_batch_size,
            f"a multiple of batching.micro_batch_size={micro_batch_size} x {ranks}",
        )


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, alike on every rank."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def init_parallel(settings: ParallelConfig, seed: int) -> Parallel:
    """Start the process group and Megatron's groups. Collective over the world.

    Raises:
        UserError: the layout does not fit the world, or the rendezvous port is in use.
    """
    rank, world_size = environment_world()
    check_layout(
        world_size,
        settings.tensor_model_parallel_size,
        settings.pipeline_model_parallel_size,
        settings.context_parallel_size,
    )
    local_world = environment_number("LOCAL_WORLD_SIZE", world_size, least=1)
    device, reason = choose_device(settings.device, local_world)
    spec = choose_layer_spec(settings.layer_spec, device)
    torch.set_num_threads(settings.threads_per_rank)
    if device.type == "cpu":
        _megatron_cpu.install()
    else:
        torch.cuda.set_device(device)
    _start_process_group(device, rank, world_size, settings.timeout_s)
    return _create_groups(settings, device, reason, spec, seed)


def end_parallel() -> None:
    """Close the process group, if any; gloo aborts if the interpreter closes the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def keep_on_loopback() -> None:
    """Let the ranks of this machine, which has them all, listen where no other machine reaches."""
    for library in ("GLOO", "NCCL"):
        os.environ[f"{library}_SOCKET_IFNAME"] = "lo"


def _start_process_group(
    device: torch.device, rank: int, world_size: int, timeout_s: float
) -> None:
    if dist.is_initialized():
        return
    backend = "gloo" if device.type == "cpu" else "nccl"
    if world_size == 1:
        keep_on_loopback()
        store = dist.HashStore()  # type: ignore[attr-defined]  # documented, but not in its stubs
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    environment_number("MASTER_PORT", 29500, least=1)
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            "MASTER_PORT",
            os.environ["MASTER_PORT"],
            "a free port, or parallel.port=0 to take any",
            problem="the port is in use",
        ) from error


def _create_groups(
    settings: ParallelConfig, device: torch.device, reason: str, spec: LayerSpec, seed: int
) -> Parallel:
    from megatron.core import parallel_state, tensor_parallel

    tp, pp = settings.tensor_model_parallel_size, settings.pipeline_model_parallel_size
    return_group = _megatron_groups(tp, pp, settings.context_parallel_size, settings.timeout_s)
    seed_everything(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Parallel(
        device=device,
        device_reason=reason,
        layer_spec=spec,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp=tp,
        pp=pp,
        dp=parallel_state.get_data_parallel_world_size(with_context_parallel=True),
        cp=parallel_state.get_context_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(with_context_parallel=True),
        cp_rank=parallel_state.get_context_parallel_rank(),
        sequence_parallel=settings.sequence_parallel,
        recompute_modules=tuple(settings.recompute_modules),
        fp8=cast(Fp8Format | None, settings.fp8),  # its choices are checked with the schema
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
        cp_group=parallel_state.get_context_parallel_group(),
        return_group=return_group,
    )


_made: list[Any] = []  # the world, the layout and the return group of this process's last run


def _megatron_groups(tp: int, pp: int, cp: int, timeout_s: float) -> Any:
    """Make Megatron's groups; returns the return group. Collective over the world.

    A run after another in one process, of the same layout, has the groups of the run before: nobody
    ends a group's threads, of which a run makes fifty.
    """
    from megatron.core import parallel_state

    world, layout = dist.group.WORLD, (tp, pp, cp, timeout_s)
    is_made = parallel_state.model_parallel_is_initialized()
    if is_made and _made and _made[0] is world and _made[1] == layout:
        return _made[2]
    if is_made:
        parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        distributed_timeout_minutes=timeout_s / 60,
    )
    group = _second_group(parallel_state.get_pipeline_model_parallel_group(), timeout_s)
    _made[:] = world, layout, group
    return group


def _second_group(group: Any, timeout_s: float) -> Any:
    """Another group of the same ranks, with a separate communicator. Collective over the world.

    Groups of a single rank exchange nothing: they are left as they are.
    """
    if dist.get_world_size(group) == 1:
        return group
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, tuple(dist.get_process_group_ranks(group)))
    created, _ = dist.new_subgroups_by_enumeration(
        [list(each) for each in sorted({*ranks})], datetime.timedelta(seconds=timeout_s)
    )
    return created
