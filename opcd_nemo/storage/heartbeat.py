"""The sign of life that a cluster's script watches: the age of a file."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from opcd_nemo.storage.durable import describe

logger = logging.getLogger(__name__)

HEARTBEAT_ENV = "OPCD_HEARTBEAT"


def touch() -> None:
    """Show the script's watchdog that the run goes on; rank 0 speaks for all.

    Whatever may take long calls it: a step, a block of generated tokens, a wave of extraction. A
    script that sees no touch for `OPCD_HEARTBEAT_TIMEOUT_S` takes the run for hung and kills it.
    A disk that refuses ends nothing by itself: rank 0 would leave the others in an exchange.
    """
    path = os.environ.get(HEARTBEAT_ENV)
    if path and os.environ.get("RANK", "0") == "0":
        try:
            Path(path).touch()
        except OSError as error:
            logger.warning("no sign of life for the cluster's script: %s", describe(error))
