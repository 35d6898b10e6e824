"""The Dockerfile built for real, without a container engine, on a stand-in for NVIDIA's image.

The stand-in is a minimal Debian with a Python whose torch and megatron-core are copied from this
environment, with records of a Transformer Engine and an apex, and a constraint file for pip, as
NVIDIA's images have. So this shows the steps of the Dockerfile; nothing of CUDA, and no image of
NVIDIA's.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.recipes.conftest import ROOT
from tests.tiny import write_chat_model

TOOLS = ("buildah", "debootstrap", "tar")
CACHE = ROOT / "build" / "stand_in_base.tar"  # the minimal Debian: minutes to make, the same always
PACKAGES = "python3,python3-venv,ca-certificates"
VENDORS = {"transformer_engine": "2.16.0+4220403e", "apex": "0.1"}  # records alone
CERTIFICATES = Path("/etc/ssl/certs")  # a build host may have authorities of its own


@dataclass(frozen=True)
class Image:
    """The built image, as a container that commands run in."""

    storage: tuple[str, ...]
    name: str
    container: str
    model: Path

    def run(self, *command: str, volumes: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
        """Run a command as the image's user, in its folder."""
        mounts = [f"--volume={one}" for one in (f"{CERTIFICATES}:{CERTIFICATES}:ro", *volumes)]
        return subprocess.run(
            ["buildah", *self.storage, "run", "--isolation", "chroot", *mounts, self.container,
             "--", *command],
            capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip

    def inspect(self) -> dict[str, object]:
        """The image's configuration in Docker's format."""
        shown = _call("buildah", *self.storage, "inspect", "--type", "image", self.name)
        described: dict[str, object] = json.loads(shown)["Docker"]["config"]
        return described


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (
        f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done.stdout


@pytest.fixture(scope="session")
def image() -> Iterator[Image]:
    """Build the stand-in base and the Dockerfile on it."""
    if os.geteuid() != 0:
        pytest.skip("no image: needs root (chroot, mounts)")
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"no image: not installed: {', '.join(absent)}")
    place = Path(tempfile.mkdtemp(prefix="opcd-image-"))
    place.chmod(0o755)
    storage = ("--root", f"{place}/storage", "--runroot", f"{place}/run")
    try:
        _build_base(place, storage)
        _call(
            "buildah", *storage, "bud", "--format=docker", "--isolation=chroot", "--pull-never",
            f"--volume={CERTIFICATES}:{CERTIFICATES}:ro", "--build-arg=BASE_IMAGE=localhost/base:1",
            "--build-arg=REVISION=test", "--tag=localhost/opcd:1", str(ROOT),
        )  # fmt: skip
        container = _call("buildah", *storage, "from", "--pull-never", "localhost/opcd:1").strip()
        model = write_chat_model(place / "model")
        yield Image(storage, "localhost/opcd:1", container, model)
    finally:
        subprocess.run(["buildah", *storage, "umount", "--all"], capture_output=True, check=False)
        shutil.rmtree(place, ignore_errors=True)


def _build_base(place: Path, storage: Sequence[str]) -> None:
    root = place / "base"
    root.mkdir()
    if not CACHE.exists():
        _make_debian(root)
        CACHE.parent.mkdir(exist_ok=True)
        temporary = CACHE.with_suffix(".partial")
        _call("tar", "-C", str(root), "--numeric-owner", "-cf", str(temporary), ".")
        temporary.replace(CACHE)
    else:
        _call("tar", "-C", str(root), "--numeric-owner", "-xf", str(CACHE))
    _copy_vendor(root / "usr/local/lib/python3.11/dist-packages")
    (root / "etc/pip").mkdir()
    (root / "etc/pip/constraint.txt").write_text("packaging<25\n")
    container = _call("buildah", *storage, "from", "scratch").strip()
    _call("buildah", *storage, "copy", "--quiet", container, str(root), "/")
    certificate = f"--env=PIP_CERT={CERTIFICATES}/ca-certificates.crt"
    constraint = "--env=PIP_CONSTRAINT=/etc/pip/constraint.txt"
    _call("buildah", *storage, "config", constraint, certificate, container)
    _call("buildah", *storage, "commit", "--quiet", "--rm", container, "localhost/base:1")
    shutil.rmtree(root)


def _make_debian(root: Path) -> None:
    """Unpack Debian's packages; to configure them takes minutes, and only users are missed."""
    packages = f"--include={PACKAGES}"
    _call("debootstrap", "--foreign", "--variant=minbase", packages, "bookworm", str(root))
    for archive in sorted((root / "var/cache/apt/archives").glob("*.deb")):
        unpack = f"dpkg-deb --fsys-tarfile {archive} | tar -x --keep-directory-symlink -C {root}"
        _call("bash", "-c", f"set -o pipefail; {unpack}")
        archive.unlink()
    (root / "proc").unlink()  # a link to the machine's
    (root / "proc").mkdir()
    for name in ("passwd", "group"):
        shutil.copy(root / f"usr/share/base-passwd/{name}.master", root / f"etc/{name}")
    _call("chroot", str(root), "ldconfig")


def _copy_vendor(target: Path) -> None:
    """Torch and megatron-core of this environment, and records of what it does not have."""
    here = Path(sysconfig.get_path("purelib"))
    target.mkdir(parents=True, exist_ok=True)
    for pattern in ("torch", "torchgen", "functorch", "torch-*", "megatron", "megatron_core-*"):
        for source in here.glob(pattern):
            shutil.copytree(source, target / source.name, symlinks=True)
    for name, version in VENDORS.items():
        info = target / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
