"""One throw-away cluster for all tests of this folder; they are skipped where none can be."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.jobs import Site
from tests.cluster.minicluster import MiniCluster, missing
from tests.recipes.conftest import ROOT
from tests.tiny import write_chat_model

NUM_NODES = 8


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
        with MiniCluster(place / "slurm", NUM_NODES, [ROOT, place]) as cluster:
            yield Site(cluster=cluster, model=model, output=output)
    finally:
        shutil.rmtree(place)
