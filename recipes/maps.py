"""`opcd maps`, for scripts that name this file."""

import sys

from opcd_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main(["maps", *sys.argv[1:]]))
