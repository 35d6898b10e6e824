"""What fails on one rank fails on every rank: nobody waits for a rank that has ended."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.storage.ranks import on_every_rank, on_first_of_model, on_rank_0


class Together:
    """Ranks in threads, whose values travel as between processes."""

    def __init__(self, count: int) -> None:
        self._values: list[Any] = [None] * count
        self._barrier = Barrier(count, timeout=10)

    def of(self, rank: int) -> Any:
        together = self

        class Rank:
            def __init__(self) -> None:
                self.rank = rank

            def gather_objects(self, value: Any) -> list[Any]:
                together._values[rank] = pickle.dumps(value)
                together._barrier.wait()
                values = [pickle.loads(each) for each in together._values]
                together._barrier.wait()
                return values

        return Rank()

    def do(self, work: Callable[[Any], Any]) -> list[Any]:
        """What the work of each rank gives, or raises."""
        found: list[Any] = [None] * len(self._values)

        def run(rank: int) -> None:
            try:
                found[rank] = work(self.of(rank))
            except Exception as error:
                found[rank] = error

        threads = [Thread(target=run, args=(rank,)) for rank in range(len(found))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def test_what_rank_0_finds_is_known_to_all() -> None:
    done = []

    def work() -> str:
        done.append(1)
        return "found"

    assert Together(3).do(lambda rank: on_rank_0(rank, work)) == ["found"] * 3
    assert done == [1]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device", "/a/b"),
        UserError("name", "x", "another", problem="in use", where="here"),
        KeyError("a bug"),
    ],
)
def test_what_rank_0_raises_every_rank_raises(error: Exception) -> None:
    def refuse() -> None:
        raise error

    found = Together(3).do(lambda rank: on_rank_0(rank, refuse))
    assert [type(one) for one in found] == [type(error)] * 3
    assert {str(one) for one in found} == {str(error)}
    assert found[0] is error, "with its traceback"


def test_what_any_rank_raises_every_rank_raises() -> None:
    def work(rank: Any) -> Any:
        def fail_on_2() -> int:
            if rank.rank == 2:
                raise OSError(5, "Input/output error", "file")
            return int(rank.rank)

        return on_every_rank(rank, fail_on_2)

    assert {str(one) for one in Together(3).do(work)} == {"[Errno 5] Input/output error: 'file'"}
    ranks = Together(3).do(lambda rank: on_every_rank(rank, lambda: rank.rank))
    assert ranks == [[0, 1, 2]] * 3


class Sharer:
    """A rank of a group in which the first has said something."""

    def __init__(self, said: Any = None) -> None:
        self._said = said

    def from_first_of_model(self, value: Any) -> Any:
        return value if self._said is None else self._said


def test_a_group_has_what_its_first_rank_has_found_or_its_error() -> None:
    assert on_first_of_model(Sharer(), lambda: "found") == "found"
    assert on_first_of_model(Sharer(("found", None)), None) == "found"
    for sharer, work in ((Sharer(), lambda: [][0]), (Sharer((None, IndexError())), None)):
        with pytest.raises(IndexError):
            on_first_of_model(sharer, work)
