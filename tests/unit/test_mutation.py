"""What `make mutation-test` changes, and that those it leaves out are there at all."""

from __future__ import annotations

from pathlib import Path

from tests.mutation import equivalents
from tests.mutation_operators import compiled, mutants_of
from tests.tree import ROOT

SOURCE = '''\
"""A module of 1 function."""
LIMIT: int = 3


def f(a: int, b: bool = True) -> int:
    """Of 2 numbers."""
    if a < LIMIT and not b:
        raise ValueError(f"{a + 1}")
    a += 1
    return max(a, 0 * a, key=abs)
'''


def test_every_operator_makes_a_module_that_does_something_else(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    path.write_text(SOURCE)
    mutants = mutants_of("opcd_nemo.m", str(path))
    assert [(mutant.kind, mutant.function, mutant.in_function) for mutant in mutants] == [
        ("constant", "module", False),
        ("constant", "f", False),
        *((kind, "f", True) for kind in ("never", "bool", "compare", "not", "drop", "drop")),
        *((kind, "f", True) for kind in ("constant", "return", "keyword", "arithmetic")),
        ("constant", "f", True),
    ]
    assert mutants[-2].change == "max(a, 0 * a, key=abs) -> max(a, 0 // a, key=abs)"
    assert len({mutant.change for mutant in mutants}) == len(mutants)
    assert len({compiled(mutant) for mutant in mutants}) == len(mutants)


def test_what_is_listed_as_equivalent_is_a_change_of_the_code() -> None:
    for name, reason in equivalents().items():
        module = name.partition(" ")[0]
        path = ROOT / f"{module.replace('.', '/')}.py"
        assert reason
        assert name in map(str, mutants_of(module, str(path))), name
