"""Which account the scripts of `slurm/` refuse before sbatch is asked."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
CONFIG = "AccountingStorageEnforce = associations,limits"


def check(
    folder: Path, allowed: str, sacctmgr: str, account: str = "", partition: str = "batch"
) -> subprocess.CompletedProcess[str]:
    """`opcd_check_account` beside a Slurm of two stand-ins; `sacctmgr` is the body of one."""
    scontrol = f'[ "$2" = config ] && echo "{CONFIG}" || echo "AllowAccounts={allowed} X=1"'
    for name, body in {"scontrol": scontrol, "sacctmgr": sacctmgr}.items():
        program = folder / name
        program.write_text(f"#!/bin/sh\n{body}\n")
        program.chmod(0o755)
    command = f"PATH={folder}:$PATH; . slurm/lib.sh; opcd_check_account {partition}"
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "OPCD_ACCOUNT": account},
        capture_output=True,
        text=True,
        check=False,
    )


MINE = 'case "$*" in *defaultaccount*) echo science ;; *) echo science; echo arts ;; esac'


@pytest.mark.parametrize("allowed", ["ALL", "science,law"])
def test_the_default_account_counts(tmp_path: Path, allowed: str) -> None:
    assert check(tmp_path, allowed, MINE).returncode == 0


@pytest.mark.parametrize(
    ("allowed", "account", "listed"),
    [("law", "", "law"), ("law", "science", "law"), ("ALL", "law", "arts,science")],
)
def test_an_account_that_is_not_listed_is_refused(
    tmp_path: Path, allowed: str, account: str, listed: str
) -> None:
    refused = check(tmp_path, allowed, MINE, account)
    assert refused.returncode == 2
    name = account or "science"
    line = f"error: OPCD_ACCOUNT={name}: no account of partition batch; allowed: {listed}\n"
    assert refused.stderr == line


@pytest.mark.parametrize("allowed", ["ALL", "science"])
def test_a_sacctmgr_that_does_not_answer_refuses_nobody(tmp_path: Path, allowed: str) -> None:
    broken = "echo broken >&2; exit 1"
    assert check(tmp_path, allowed, broken).returncode == 0
    assert check(tmp_path, allowed, broken, "science").returncode == 0


def test_several_partitions_are_left_to_sbatch(tmp_path: Path) -> None:
    assert check(tmp_path, "law", MINE, "science", "batch,high").returncode == 0
