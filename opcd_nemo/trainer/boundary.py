"""What the ranks agree on between two steps: to publish a checkpoint, to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch

from opcd_nemo.distributed.launcher import STOP_SIGNALS, launcher_has_ended
from opcd_nemo.errors import StoppedByFile, StoppedBySignal
from opcd_nemo.storage import heartbeat
from opcd_nemo.trainer.strategy import MegatronStrategy

STOP_FILE = "STOP"  # in the run's folder, created by hand: the file ends the run for good


class StepBoundary(pl.Callback):
    """A signal on one rank, or a file, stops all ranks after the step, with a checkpoint.

    Saving and stopping are collective: a rank that did either alone would leave the others waiting
    in the next exchange for ever. A signal reaches ranks at different moments, some in one step and
    some in the next, and threads that write a checkpoint end at different moments. So ranks only
    take note, and decide together here, once a step, with the maximum of what they noted.
    """

    def __init__(self, strategy: MegatronStrategy) -> None:
        """Save to the checkpoints of the run's folder, under the name of the step."""
        self._strategy = strategy
        self._stop_file = strategy.run_folder.path / STOP_FILE
        self._outside = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._received = 0

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Take the signals, after Lightning, which would end the run on SIGTERM without a word."""
        if trainer.received_sigterm:  # in the moment between
            self._received = signal.SIGTERM
        for number in STOP_SIGNALS:
            signal.signal(number, self._remember)

    def on_train_end(self, *_: Any) -> None:
        """Let them end this rank from now on, when nothing that they would spoil is under way."""
        for number, handler in self._outside.items():
            signal.signal(number, handler)
        if self._received:  # after the last step
            os.kill(os.getpid(), self._received)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self._received = number

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Publish what every rank has written; stop when a rank has a signal. Collective."""
        strategy = self._strategy
        if launcher_has_ended():  # nobody would read how this rank ends, nor start the run again
            os.kill(os.getpid(), signal.SIGKILL)
        # rank 0 alone looks: a shared disk may show the file to one node a step before another
        # a disk that does not say is no file, and must not end this rank alone
        is_told = strategy.parallel.rank == 0 and os.path.exists(self._stop_file)  # noqa: PTH110
        state = torch.tensor(
            [strategy.is_writing, self._received, is_told], device=strategy.parallel.device
        )
        is_writing, number, told = strategy.parallel.max_over_world(state).tolist()
        if not is_writing:  # on no rank, so that nobody waits for a slow disk here
            strategy.finish_save()
        if number or told:
            path = strategy.checkpoint_path(trainer.global_step)
            trainer.save_checkpoint(path, weights_only=False)
            strategy.finish_save()
            self._stop(trainer.global_step, path, None if told else signal.Signals(number))
        if strategy.parallel.rank == 0:
            heartbeat.touch()

    def _stop(self, step: int, path: Path, received: signal.Signals | None) -> None:
        again = "continue with exp_manager=resumable"
        if received is None:
            raise StoppedByFile(
                f"stopped by {self._stop_file} after step {step}; saved {path}; {again}, without "
                "the file"
            )
        raise StoppedBySignal(
            f"stopped by {received.name} after step {step}; saved {path}; {again}"
        )
