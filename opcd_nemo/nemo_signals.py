"""SIGTERM and SIGUSR1 end a run at the next step boundary, with a checkpoint to continue from."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from opcd_nemo.parallel import Parallel
from opcd_nemo.types import StoppedBySignal

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopOnSignal(pl.Callback):
    """Holds the signals while steps run; one rank's signal stops all."""

    def __init__(self, parallel: Parallel, checkpoints: Path) -> None:
        """Save to `checkpoints`, under the name of the step."""
        self._parallel, self._checkpoints = parallel, checkpoints
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
        """Save and stop when any rank has received a signal. Collective over the world."""
        received = torch.tensor(self._received, device=self._parallel.device)
        number = int(self._parallel.max_over_world(received))
        if number:
            path = self._checkpoints / f"step={trainer.global_step}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            raise StoppedBySignal(
                f"stopped by {signal.Signals(number).name} after step {trainer.global_step}; "
                f"saved {path}; continue with exp_manager.resume_if_exists=true"
            )
