"""The machine: packages, devices, disk and folders."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement

from opcd_nemo.distributed.devices import backend_version, choose_device
from opcd_nemo.doctor.checks import Check, attempt, judge
from opcd_nemo.evaluation.report import versions

_PACKAGE = "opcd-nemo"
_GIB = 2**30
_NO_CPU = "use a GPU, or an environment without transformer-engine, which cannot work on a CPU"


def environment_checks(
    device: str, ranks_per_node: int, folder: Path, needed_gib: float
) -> list[Check]:
    """Rows about this machine; `needed_gib` of disk are wanted where `folder` is."""
    found = installed_versions()
    return [
        packages(found),
        imports(),
        attempt("device", lambda: _device(device, ranks_per_node)),
        disk(folder, needed_gib),
        *(writable(one) for one in (folder, Path(tempfile.gettempdir()))),
    ]


def installed_versions() -> dict[str, str | None]:
    """Versions of what the project requires; None where a package is missing."""
    found: dict[str, str | None] = {}
    for requirement in _requirements():
        try:
            found[requirement.name] = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            found[requirement.name] = None
    return found


def _requirements() -> list[Requirement]:
    """What the project's metadata requires here; nothing if the project is not installed."""
    try:
        lines = importlib.metadata.requires(_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(line) for line in lines]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def packages(found: Mapping[str, str | None]) -> Check:
    """Whether what is installed is what the project requires."""
    wanted = _requirements()
    shown = ", ".join(f"{name} {version}" for name, version in versions().items())
    if not wanted:
        mend = "pip install --no-deps --editable ."
        return Check(name="packages", status="warn", found=f"not installed; {shown}", mend=mend)
    wrong = [
        f"{one} (found {found.get(one.name) or 'none'})"
        for one in wanted
        if not _satisfies(found.get(one.name), one)
    ]
    mend = f"install {', '.join(wrong)}"
    return judge("packages", not wrong, shown, mend)


def _satisfies(version: str | None, requirement: Requirement) -> bool:
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def imports() -> Check:
    """Whether megatron-core can be imported; it imports Transformer Engine if that is installed."""
    try:
        importlib.import_module("megatron.core")
    except Exception as error:  # of any kind: a vendor's package fails in its own way
        has_engine = importlib.util.find_spec("transformer_engine") is not None
        mend = _NO_CPU if has_engine else "install megatron-core anew"
        return judge("imports", False, f"megatron-core: {error!r}", mend)
    return judge("imports", True, "megatron-core", "")


def _device(device: str, ranks_per_node: int) -> Check:
    chosen, reason = choose_device(device, ranks_per_node)
    extensions = {
        name: importlib.util.find_spec(name) is not None
        for name in ("transformer_engine", "apex", "triton")
    }
    return extensions_fit(chosen.type, f"{reason}; {backend_version(chosen)}", extensions)


def extensions_fit(device: str, reason: str, installed: Mapping[str, bool]) -> Check:
    """Whether the optional packages are those that this device needs.

    Args:
        device: `cpu` or `cuda`.
        reason: why it was chosen, and its communication library.
        installed: by the import names transformer_engine, apex and triton.
    """
    present = ", ".join(
        f"{name} {'yes' if importable else 'no'}" for name, importable in installed.items()
    )
    found = f"{device} ({reason}; {present})"
    if device == "cpu":
        return judge("device", not installed["transformer_engine"], found, _NO_CPU)
    missing = [name for name, importable in installed.items() if not importable]
    mend = f"without {', '.join(missing)} it is slower: start from the image of the Dockerfile"
    return judge("device", not missing, found, mend, otherwise="warn")


def disk(folder: Path, needed_gib: float) -> Check:
    """Whether the checkpoints that a run keeps will fit."""
    existing = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    free = shutil.disk_usage(existing).free / _GIB
    found = f"{free:.1f} GiB free for {folder}, {needed_gib:.1f} needed"
    mend = "free some, choose another exp_manager.exp_dir, or keep fewer checkpoints (save_top_k)"
    return judge("disk", free >= needed_gib, found, mend)


def writable(folder: Path) -> Check:
    """Whether files can be made in a folder (which is made, too)."""
    name = f"writable {folder}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        return judge(name, False, str(error.strerror), "give its user the right to write")
    return judge(name, True, "yes", "")
