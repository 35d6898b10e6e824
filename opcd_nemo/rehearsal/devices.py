"""Stands in for CUDA: fake tensors live on the device `cuda`, and `torch.cuda` answers as H100s do.

`load_guard` comes before the first import of torch, `answer_as_gpus` before that of megatron-core.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from opcd_nemo.errors import ABSENT, UserError
from opcd_nemo.storage.durable import check_writable

_SOURCE = Path(__file__).with_name("fake_cuda.cpp")
_GIB = 2**30


def cache_folder() -> Path:
    """Where compiled and downloaded parts stay."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "opcd_nemo" / "rehearsal"


def compiled_guard() -> Path:
    """`fake_cuda` as a module of this Python and this torch, compiled where it is not yet.

    Raises:
        UserError: g++ is not installed or cannot compile the library, or no folder can hold it.
    """
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    torch = Path(spec.submodule_search_locations[0])
    version = (torch / "version.py").read_bytes()
    built_for = f"{sys.version} {torch}"  # the module finds torch's libraries in this folder alone
    digest = hashlib.sha256(_SOURCE.read_bytes() + version + built_for.encode()).hexdigest()
    module = cache_folder() / f"fake_cuda-{digest[:16]}.so"
    if module.exists():
        return module
    compiler = shutil.which("g++")
    if compiler is None:
        allowed = "g++ on PATH, as `apt-get install g++` puts it there"
        raise UserError("opcd rehearse", ABSENT, allowed, problem="g++ is not there")
    check_writable("XDG_CACHE_HOME", module.parent)
    module.parent.mkdir(parents=True, exist_ok=True)
    partial = module.with_suffix(f".{os.getpid()}")
    flags = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", "-Wl,--no-as-needed"]
    include = [f"-I{torch}/include", f"-I{sysconfig.get_paths()['include']}"]
    libraries = [f"-L{torch}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch}/lib"]
    command = [compiler, *flags, *include, str(_SOURCE), *libraries, "-o", str(partial)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        line = next((line for line in done.stderr.splitlines() if "error" in line), "no output")
        allowed = "a g++ of C++20 and Python's headers"
        raise UserError("opcd rehearse", ABSENT, allowed, problem=f"g++: {line.strip()}")
    partial.replace(module)
    return module


def load_guard() -> None:
    """Register the guard; torch must not be imported yet."""
    assert "torch" not in sys.modules
    path = str(compiled_guard())
    spec = importlib.util.spec_from_file_location(
        "fake_cuda", loader=ExtensionFileLoader("fake_cuda", path)
    )
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))


class _Idle:
    """A stream or an event."""

    cuda_stream = device_index = 0

    def __init__(self, *_: object, **__: object) -> None:
        import torch

        self.device = torch.device("cuda", 0)

    def record(self, *_: object) -> None:
        """Do nothing, as everything that waits."""

    wait = synchronize = wait_stream = wait_event = record

    def record_event(self, *_: object) -> _Idle:
        return self

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: object) -> float:
        return 0.0

    def __enter__(self) -> _Idle:
        return self

    def __exit__(self, *_: object) -> None: ...


def answer_as_gpus(name: str, memory_gib: float, per_node: int) -> None:
    """Let `torch.cuda` answer like a node of these GPUs, of NVIDIA's Hopper architecture."""
    import torch

    cuda: Any = torch.cuda
    torch.version.cuda = torch.version.cuda or "13.0"
    properties = SimpleNamespace(
        major=9,
        minor=0,
        multi_processor_count=132,
        total_memory=int(memory_gib * _GIB),
        name=name,
        warp_size=32,
    )
    state = torch.zeros(16, dtype=torch.uint8)
    generator = SimpleNamespace(
        get_state=lambda: state,
        set_state=lambda _: None,
        clone_state=lambda: None,
        graphsafe_get_state=lambda: state,
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": per_node,
        "current_device": 0,
        "get_device_capability": (9, 0),
        "get_device_name": name,
        "get_device_properties": properties,
        "is_current_stream_capturing": False,
        "is_bf16_supported": True,
        "current_stream": _Idle(),
        "default_stream": _Idle(),
        "get_rng_state": state,
        **dict.fromkeys(
            ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"),
            0,
        ),
        **dict.fromkeys(
            (
                "set_device", "synchronize", "init", "_lazy_init", "_lazy_call", "empty_cache",
                "manual_seed", "manual_seed_all", "set_rng_state", "reset_peak_memory_stats",
            ),
        ),
    }  # fmt: skip
    for function, answer in answers.items():
        setattr(cuda, function, _always(answer))
    cuda.random.get_rng_state, cuda.random.set_rng_state = cuda.get_rng_state, cuda.set_rng_state
    cuda.stream = lambda *_, **__: contextlib.nullcontext()
    cuda.Stream = cuda.Event = _Idle
    cuda.default_generators = [generator] * per_node
    cuda.nccl.version = _always((2, 28, 0))


def _always(answer: Any) -> Any:
    return lambda *_, **__: answer
