"""Tasks for `task._target_` that give a test of the cluster time to strike."""

from __future__ import annotations

import os
import signal
import socket
import time

from opcd_nemo.tasks import Episode
from opcd_nemo.tasks.system_prompt import StyleTask
from opcd_nemo.types import Split

PAUSE_ENV = "OPCD_TEST_PAUSE_S"
HANG_ENV = "OPCD_TEST_HANG"


class SlowTask(StyleTask):
    """A first attempt pauses before each step, or hangs at step 15 as in a dead lock."""

    def episodes(self, split: Split, step: int, n: int) -> list[Episode]:
        if split == "train" and os.environ["OPCD_ATTEMPT"].endswith(".0"):
            time.sleep(float(os.environ.get(PAUSE_ENV, "0")))
            if step == 15 and os.environ.get("RANK") == os.environ.get(HANG_ENV):
                print(f"{socket.gethostname()} hangs", flush=True)
                signal.pause()
        return super().episodes(split, step, n)
