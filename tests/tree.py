"""Where this tree is: programs that tests start import from it, whatever is installed."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONPATH = os.pathsep.join(map(str, (ROOT, ROOT / "kernels")))
