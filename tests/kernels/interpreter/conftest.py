"""Interpreter tests run the public functions on the Triton kernels, in small blocks."""

import pytest

from opcd_kernels.triton_backend import TritonBackend


@pytest.fixture(autouse=True)
def triton_on_cpu_tensors(monkeypatch: pytest.MonkeyPatch) -> TritonBackend:
    """Small blocks and many programs, so that rows have splits, several blocks and a tail."""
    engine = TritonBackend(statistics_block=256, gradient_block=128, min_programs=12)
    monkeypatch.setattr("opcd_kernels.backend.choose", lambda _tensor, **_options: engine)
    return engine
