"""Keeps what an image's vendor built: its packages are pinned for pip, and compared afterwards.

vendor.py paths                            the vendor's folders of packages (run by its Python)
vendor.py purelib                          where this Python installs packages
vendor.py record                           the vendor's packages, as JSON
vendor.py constraints RECORD PINS          constraints for pip: the vendor's, then our pins
vendor.py requirements PYPROJECT           what the project needs, without the project
vendor.py check RECORD                     exit status 1 names each that is another now
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sys
import sysconfig
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path

# built by the vendor for its GPUs and CUDA; a package from an index would replace them with others
_PROTECTED = re.compile(
    r"(torch|torchvision|torchaudio|torchao|triton|pytorch-triton|megatron-core|megatron-bridge|"
    r"transformer-engine.*|apex|flash-attn.*|nvidia-.*|cuda-.*|vllm|tensorrt.*)"
)
Record = dict[str, list[str]]  # name -> version, folder


def normalised(name: str) -> str:
    """A package's name as PEP 503 compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> Record:
    """Every package that this Python sees; the first on the path counts."""
    found: Record = {}
    for one in importlib.metadata.distributions():
        place = str(one.locate_file("")).rstrip("/")
        found.setdefault(normalised(one.metadata["Name"]), [one.version, place])
    return found


def record() -> Record:
    """The protected packages among them."""
    return {name: found for name, found in installed().items() if _PROTECTED.fullmatch(name)}


def _pins(lines: Iterable[str]) -> dict[str, str]:
    wanted = (line.split("#")[0].strip() for line in lines)
    return {normalised(re.split(r"[^\w.-]", line)[0]): line for line in wanted if line}


def constraints(saved: Record, ours: Iterable[str], vendors: Iterable[str]) -> list[str]:
    """The vendor's packages at their versions, its own constraints, and our pins of the rest.

    Args:
        saved: the protected packages of the image.
        ours: lines of constraints.txt.
        vendors: lines of the constraint file that the image has for pip.
    """
    kept = {name: f"{name}=={version}" for name, (version, _) in saved.items()}
    theirs = _pins(vendors)
    free = {name: pin for name, pin in _pins(ours).items() if name not in installed()}
    return sorted({**free, **theirs, **kept}.values())


def changed(saved: Record, now: Record) -> list[str]:
    """A line for each of the vendor's packages that is another, or elsewhere, now."""
    lines = []
    for name, (version, place) in sorted(saved.items()):
        found = now.get(name)
        if found != [version, place]:
            seen = "gone" if found is None else f"{found[0]} in {found[1]}"
            lines.append(f"{name}: was {version} in {place}, is {seen}")
    return lines


def _read(path: str) -> Record:
    saved: Record = json.loads(Path(path).read_text(encoding="utf-8"))
    return saved


def _constraints(saved: str, pins: str) -> str:
    file = os.environ.get("PIP_CONSTRAINT", "")
    vendors = Path(file).read_text(encoding="utf-8").splitlines() if file else []
    ours = Path(pins).read_text(encoding="utf-8").splitlines()
    return "\n".join(constraints(_read(saved), ours, vendors))


def _requirements(pyproject: str) -> str:
    project = tomllib.loads(Path(pyproject).read_text(encoding="utf-8"))["project"]
    return "\n".join(project["dependencies"])


def _check(saved: str) -> str:
    if lines := changed(_read(saved), record()):
        sys.exit("\n".join(["error: the vendor's packages were replaced:", *lines]))
    return "the vendor's packages are as they were"


def _paths() -> str:
    places = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    return "\n".join(places)


COMMANDS: dict[str, Callable[..., str]] = {
    "paths": _paths,
    "purelib": lambda: sysconfig.get_path("purelib"),
    "record": lambda: json.dumps(record(), indent=0, sort_keys=True),
    "constraints": _constraints,
    "requirements": _requirements,
    "check": _check,
}

if __name__ == "__main__":
    print(COMMANDS[sys.argv[1]](*sys.argv[2:]))
