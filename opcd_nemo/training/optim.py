"""Megatron's data parallelism, optimizer and learning-rate schedule around one student."""

from __future__ import annotations

import math

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from opcd_nemo.config.train import OptimConfig
from opcd_nemo.errors import NonFiniteError
from opcd_nemo.metrics import Stats
from opcd_nemo.model.language_model import LanguageModel, reduce_gradients


def ddp_config(settings: OptimConfig) -> DistributedDataParallelConfig:
    """How gradients are summed over data-parallel ranks: in fp32."""
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        overlap_grad_reduce=settings.overlap_grad_reduce,
    )


def optimizer_config(settings: OptimConfig, dtype: torch.dtype) -> OptimizerConfig:
    """Megatron's AdamW; bf16 weights have fp32 masters."""
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_eps=settings.eps,
        weight_decay=settings.weight_decay,
        clip_grad=settings.clip_grad,
        use_distributed_optimizer=settings.use_distributed_optimizer,
    )


class StudentOptimizer:
    """AdamW with fp32 master weights over gradients summed across data-parallel ranks."""

    def __init__(self, model: LanguageModel, settings: OptimConfig, max_steps: int) -> None:
        """Wrap the model's module; its parameters move into Megatron's buffers."""
        self._clip_grad = settings.clip_grad
        self.ddp = DistributedDataParallel(
            model.megatron_config, ddp_config(settings), model.module
        )
        config = optimizer_config(settings, model.dtype)
        self.optimizer = get_megatron_optimizer(config, [self.ddp])
        for group in self.optimizer.param_groups:
            group["fused"] = True  # one pass over memory, where torch's AdamW is the backend
        self.scheduler = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0 if settings.warmup_steps else settings.lr,
            max_lr=settings.lr,
            min_lr=settings.min_lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(max_steps, settings.warmup_steps + 1),
            lr_decay_style=settings.schedule,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=max_steps,
            wd_incr_style="constant",
        )
        model.megatron_config.no_sync_func = self.ddp.no_sync  # reduce after the last micro-batch
        model.megatron_config.grad_scale_func = self.optimizer.scale_loss
        model.megatron_config.finalize_model_grads_func = reduce_gradients
        self.release_gradients()  # the first step samples before it trains, as every other

    def release_gradients(self) -> None:
        """Free the gradient buffers, 4 bytes a parameter, until `zero_grad` makes them anew."""
        self.ddp.offload_grad_buffers(synchronize=False, empty_cache=False)

    def end(self) -> None:
        """Let the student, its gradients and moments be freed once nobody else names them.

        Autograd's nodes hold Megatron's hooks, these the student, its configuration the optimizer,
        and the optimizer's views of parameters the nodes: references of which Python's collector
        does not see all.
        """
        self.ddp.grad_accs.clear()
        self.ddp.config.grad_scale_func = self.ddp.config.no_sync_func = None

    def zero_grad(self) -> None:
        """Clear the gradient buffers before accumulation."""
        self.ddp.restore_grad_buffers(synchronize=False)
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self) -> Stats:
        """Clip and update, once. Collective over the world.

        Raises:
            NonFiniteError: on every rank, before any parameter changes.
        """
        lr = float(self.optimizer.param_groups[0]["lr"])
        self.optimizer.prepare_grads()
        norm = float(self.optimizer.clip_grad_norm(self._clip_grad))
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient norm is {norm}: stopped before the optimizer step")
        self.optimizer.step_with_ready_grads()
        self.scheduler.step(increment=1)
        return Stats({"optim/grad_norm": (norm, 1.0), "optim/lr": (lr, 1.0)})
