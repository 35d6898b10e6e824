"""Compiles the kernels and compares their resources with the committed table.

    python -m opcd_kernels.aot --table kernels/aot_resources.json [--write] [--targets sm_90a ...]

Exit status 1 names every limit that is broken and every number that is worse than the table's.
TRITON_INTERPRET must not be set: a process is either interpreter or compiler.
"""

import argparse
import json
import sys
from pathlib import Path

import triton

from opcd_kernels.aot.limits import broken_limits, regressions
from opcd_kernels.aot.resources import Resources, read_resources
from opcd_kernels.aot.variants import TARGETS, variants_for


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="resources of the Triton kernels, without a GPU")
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--write", action="store_true", help="write the table, compare nothing")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    options = parser.parse_args()
    rows: dict[str, Resources] = {}
    faults: list[str] = []
    for target in options.targets:
        for variant in variants_for(target):
            title = f"{target} {variant.title}"
            rows[title] = read_resources(variant, variant.compile(target))
            faults += broken_limits(title, target, variant, rows[title])
            sys.stdout.write(_line(title, rows[title]))
            sys.stdout.flush()
    if options.write:
        table = {"triton": triton.__version__, "rows": rows}
        options.table.write_text(json.dumps(table, indent=1) + "\n")
    else:
        faults += regressions(json.loads(options.table.read_text()), triton.__version__, rows)
    sys.stdout.write("".join(f"FAULT {fault}\n" for fault in faults))
    return 1 if faults else 0


def _line(title: str, row: Resources) -> str:
    spills = row["spill_loads"] + row["spill_stores"] + row["stack_bytes"]
    loads, stores = row["loop_loads_128"], row["loop_stores_128"]
    return (
        f"{title:46s} registers {row['registers']:3d}  spills {spills}  "
        f"shared {row['shared_bytes']:5d}  per element {row['instructions_per_element']:5.2f}  "
        f"loop loads {loads} wide {row['loop_loads_narrow']} narrow  "
        f"stores {stores} wide {row['loop_stores_narrow']} narrow\n"
    )


if __name__ == "__main__":
    sys.exit(main())
