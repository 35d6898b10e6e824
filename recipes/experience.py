"""`opcd experience` or, where the first word is a command of it, `opcd registry`."""

import sys

from opcd_nemo.cli import main
from opcd_nemo.context.registry import COMMANDS

if __name__ == "__main__":
    words = sys.argv[1:]
    command = "registry" if words and words[0] in COMMANDS else "experience"
    sys.exit(main([command, *words]))
