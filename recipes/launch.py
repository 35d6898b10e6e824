"""`opcd launch`, for scripts that name this file."""

import sys

from opcd_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["launch", *sys.argv[1:]]))
