"""Which kernel tests run: slow ones on request, the interpreter's in a process of their own."""

import os
from collections.abc import Iterator

import pytest
import torch

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = ["test_*.py"] if INTERPRETING else ["interpreter/*"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: real widths and compilers, `-m slow` runs them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in str(config.option.markexpr):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Blocks of a few thousand elements lose time to a thread pool on busy machines."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
