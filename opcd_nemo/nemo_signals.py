"""What the ranks agree on between two steps: to publish a checkpoint, to stop on a signal."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from opcd_nemo.nemo_strategy import MegatronStrategy
from opcd_nemo.types import StoppedBySignal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StepBoundary(pl.Callback):
    """SIGTERM or SIGUSR1 on one rank stops all after the step, with a checkpoint."""

    def __init__(self, strategy: MegatronStrategy, checkpoints: Path) -> None:
        """Save to `checkpoints`, under the name of the step."""
        self._strategy, self._checkpoints = strategy, checkpoints
        self._received = 0
        self._before: dict[signal.Signals, Any] = {}

    def on_train_start(self, *_: Any) -> None:
        """Take the signals, after Lightning, which would end the run on SIGTERM without a word."""
        self._before = {one: signal.signal(one, self._remember) for one in STOP_SIGNALS}

    def on_train_end(self, *_: Any) -> None:
        """Give them back."""
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = number

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Publish what every rank has written; stop when one has a signal. Collective."""
        strategy = self._strategy
        state = torch.tensor([strategy.is_writing, self._received], device=strategy.parallel.device)
        is_writing, number = strategy.parallel.max_over_world(state).tolist()
        if not is_writing:
            strategy.finish_save()
        if number:
            path = self._checkpoints / f"step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            strategy.finish_save()
            raise StoppedBySignal(
                f"stopped by {signal.Signals(number).name} after step {trainer.global_step}; "
                f"saved {path}; continue with exp_manager.resume_if_exists=true"
            )
