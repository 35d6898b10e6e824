"""malloc keeps what a phase has freed, so the next phase takes no page of the kernel's."""

import resource
import subprocess
import sys

import pytest

from opcd_nemo.distributed import devices

CODE = """
import resource, torch
from opcd_nemo.distributed.devices import keep_freed_memory, return_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(64 << 20, dtype=torch.uint8)  # above the largest size that malloc would keep
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

keep_freed_memory()
first, again = faults(), faults()
held = resident()
return_freed_memory()
print(first, again, held - resident())
"""
PAGES = (64 << 20) // resource.getpagesize()


def test_a_phase_takes_what_the_phase_before_has_freed_and_the_end_returns_it() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True)
    first, again, returned = map(int, done.stdout.split())
    assert first > PAGES / 20  # pages may be large
    assert again < PAGES / 100
    assert returned > PAGES / 2


def test_another_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda *_: object())
    devices.keep_freed_memory()
    devices.return_freed_memory()
