"""`python -m opcd_nemo.cli` is `opcd`; ranks are started so."""

import sys

from opcd_nemo.cli import main

if __name__ == "__main__":
    sys.exit(main())
