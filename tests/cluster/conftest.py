"""One throw-away cluster for all tests of this folder; they are skipped where none can be."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.jobs import Site
from tests.cluster.minicluster import MiniCluster, missing
from tests.recipes.conftest import ROOT
from tests.tiny import write_chat_model

NUM_NODES = 8
_running: list[MiniCluster] = []


def pytest_keyboard_interrupt() -> None:
    for cluster in _running:  # else threads that wait for jobs would go on waiting
        cluster.abandon()


@pytest.fixture(scope="session")
def site() -> Iterator[Site]:
    """A running cluster, its shared folder and a tiny model."""
    if reason := missing():
        pytest.skip(f"no cluster: {reason}")
    place = Path(tempfile.mkdtemp(prefix="opcd-cluster-"))
    place.chmod(0o755)
    output = place / "output"
    output.mkdir()
    try:
        model = write_chat_model(place / "model")
        spank = f"{build_pyxis_double(place)} {place / 'images'} {place / 'pyxis.log'}"
        with MiniCluster(place / "slurm", NUM_NODES, [ROOT, place], spank) as cluster:
            _running.append(cluster)
            yield Site(cluster=cluster, model=model, output=output)
    finally:
        shutil.rmtree(place)


def build_pyxis_double(place: Path) -> Path:
    """Compile the plugin that stands in for pyxis."""
    library = place / "pyxis_double.so"
    source = ROOT / "tests/cluster/pyxis_double.c"
    flags = ["-shared", "-fPIC", "-Wall", "-Wextra", "-Werror"]
    subprocess.run(["cc", *flags, "-o", str(library), str(source)], check=True)
    return library
