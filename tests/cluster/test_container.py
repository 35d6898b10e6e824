"""The container options of the scripts, read by the real srun with a stand-in for pyxis.

The stand-in gives the task a folder for a root file system: see pyxis_double.c for what it does not
show.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cluster.jobs import Site

IMAGE = "registry.example#team/opcd:1"


@pytest.fixture(scope="module")
def image(site: Site) -> Path:
    """A root file system that has what it is given: programs by mount, and a file of its own."""
    root = site.output.parent / "images/registry.example+team+opcd+1"
    for name in ("usr", "etc", "tmp"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc/in_the_image").touch()
    return root


def test_the_command_runs_in_the_image_with_its_mounts(site: Site, image: Path) -> None:
    data = site.output.parent / "data"
    data.mkdir()
    (data / "prompts").write_text("from outside\n")
    environment = {
        "OPCD_IMAGE": IMAGE,
        "OPCD_MOUNTS": f"/usr:/usr:ro,{data}:/data:ro",
        "OPCD_TEST_COMMAND": "ls /etc/in_the_image; cat /data/prompts; touch /data/x; echo $HOME; "
        "ls /root /work 2>/dev/null || echo no home",
        "NCCL_SOCKET_IFNAME": "ib0",
    }
    job = site.submit_stage("container", environment=environment)
    job.wait_for_end()
    assert job.state == "COMPLETED", job.story()
    said = job.ranks_log(0)
    assert said.count("/etc/in_the_image") == 2
    assert said.count("from outside") == 2
    assert said.count("Read-only file system") == 2
    assert said.count("no home") == 2
    options = (site.output.parent / "pyxis.log").read_text()
    assert f"image={IMAGE} " in options
    assert "no_home=yes" in options
    assert "NCCL_SOCKET_IFNAME" in options
    assert "OPCD_ATTEMPT" in options


@pytest.mark.parametrize(("num_mib", "what"), [("0", "command"), ("1", "all-reduce probe")])
def test_an_image_that_cannot_start_ends_the_job_with_its_name(
    site: Site, num_mib: str, what: str
) -> None:
    environment = {"OPCD_IMAGE": "registry.example#nobody:1", "OPCD_PROBE_MIB": num_mib}
    job = site.submit_stage(f"no_image_{num_mib}", environment=environment)
    job.wait_for_end()
    assert (job.state, job.exit_code(), job.restarts) == ("FAILED", 2, 0), job.story()
    line = job.log.splitlines()[-1]
    assert f"the {what} started on no node: error: pyxis_double: image registry" in line
    assert "example#nobody:1: No such file or directory; allowed: an OPCD_IMAGE" in line


def test_a_python_without_torch_is_no_sick_node(site: Site) -> None:
    bare = site.output.parent / "bare_python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # without site-packages
    bare.chmod(0o755)
    environment = {"OPCD_PYTHON": str(bare), "OPCD_PROBE_MIB": "1"}
    job = site.submit_stage("no_torch", environment=environment)
    job.wait_for_end()
    assert (job.state, job.exit_code(), job.restarts) == ("FAILED", 2, 0), job.story()
    line = job.log.splitlines()[-1]
    assert "started on no node: ModuleNotFoundError: No module named 'torch'; allowed" in line
