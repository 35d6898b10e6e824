"""What a cluster's script says in the environment is read, or refused in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.storage import attempt as cluster
from opcd_nemo.storage import heartbeat

NODE = {cluster.RENDEZVOUS_ENV: "node1:2", cluster.NUM_NODES_ENV: "2", cluster.NODE_RANK_ENV: "1"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*NODE, cluster.ATTEMPT_ENV, heartbeat.HEARTBEAT_ENV, "RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_outside_a_cluster_there_is_nothing(environment: pytest.MonkeyPatch) -> None:
    assert cluster.this_attempt() is None
    assert cluster.this_node() is None
    heartbeat.touch()


def test_only_a_later_start_of_the_same_job_follows() -> None:
    first, second = (cluster.Attempt(job="7", number=number) for number in (0, 1))
    assert second.follows(first)
    assert not first.follows(second)
    assert not first.follows(first)
    assert not second.follows(cluster.Attempt(job="8", number=0))
    assert not second.follows(None)


@pytest.mark.parametrize("text", ["", "12", "12.", ".1", "12.x", "a b.1"])
def test_a_wrong_attempt_is_refused(text: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv(cluster.ATTEMPT_ENV, text)
    with pytest.raises(UserError) as caught:
        cluster.this_attempt()
    assert (caught.value.key, caught.value.value) == (cluster.ATTEMPT_ENV, text)


def test_a_node_knows_its_place_and_its_share(environment: pytest.MonkeyPatch) -> None:
    for name, value in NODE.items():
        environment.setenv(name, value)
    node = cluster.this_node()
    assert node == cluster.Nodes(count=2, rank=1, rendezvous="node1:2")
    assert node.ranks_per_node(4) == 2
    with pytest.raises(UserError) as caught:
        node.ranks_per_node(3)
    assert (caught.value.key, caught.value.value) == ("parallel.num_ranks", 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((cluster.RENDEZVOUS_ENV, wrong) for wrong in ("node1", "node1:0", "node1:65535")),
        *((cluster.RENDEZVOUS_ENV, wrong) for wrong in ("node1:99999", "no de:1", "::1:29500")),
        (cluster.NUM_NODES_ENV, ""),
        (cluster.NODE_RANK_ENV, "2"),
        (cluster.NODE_RANK_ENV, "-1"),
    ],
)
def test_a_wrong_node_is_refused(name: str, value: str, environment: pytest.MonkeyPatch) -> None:
    for key, right in NODE.items():
        environment.setenv(key, right)
    environment.setenv(name, value)
    with pytest.raises(UserError) as caught:
        cluster.this_node()
    assert (caught.value.key, str(caught.value.value)) == (name, value)


def test_rank_0_alone_touches_the_heartbeat(
    tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv(heartbeat.HEARTBEAT_ENV, str(tmp_path / "beat"))
    environment.setenv("RANK", "1")
    heartbeat.touch()
    assert not (tmp_path / "beat").exists()
    environment.setenv("RANK", "0")
    heartbeat.touch()
    assert (tmp_path / "beat").exists()


def test_a_heartbeat_that_no_disk_takes_is_a_warning(
    tmp_path: Path, environment: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    environment.setenv(heartbeat.HEARTBEAT_ENV, str(tmp_path / "gone" / "beat"))
    heartbeat.touch()
    assert "No such file or directory (errno 2)" in caplog.text
