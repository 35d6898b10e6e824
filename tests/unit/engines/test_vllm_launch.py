"""A server that the run starts, brings back and ends; a script stands in for vLLM's environment."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.distributed.devices import last_devices
from opcd_nemo.engines import keeper, vllm_launch
from opcd_nemo.errors import EngineError, UserError
from opcd_nemo.types import Prompt
from tests.tiny import model_config
from tests.unit.engines.conftest import Shards, make_engine

FAKE = Path(__file__).with_name("fake_vllm.py")
GREEDY = Sampling(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=4)
PROMPTS = [Prompt(token_ids=(5, 6, 7 + index), index=index) for index in range(3)]


@pytest.fixture
def python(tmp_path: Path) -> str:
    """A Python with a vLLM, in which the server is the fake."""
    script = tmp_path / "python"
    script.write_text(
        f'#!/bin/sh\ntest "$1" = -m && shift 2\nexec {sys.executable} -S -E {FAKE} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


@pytest.fixture
def start(
    python: str, tmp_path: Path, model: Shards, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    monkeypatch.setattr(vllm_launch.tempfile, "gettempdir", lambda: str(tmp_path))
    settings = {"launch": True, "python": python, "start_timeout_s": 20.0}

    def start(*flags: str, **changes: Any) -> Any:
        return make_engine(model, tmp_path, **(settings | {"flags": list(flags)} | changes))

    return start


def until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + 20
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.02)


def end_keeper(folder: Path) -> None:
    os.kill(int((folder / "keeper.pid").read_text()), 15)


def test_a_server_is_started_asked_and_started_again_with_the_same_answers(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    engine = start("--dies-after-two", max_restarts=2)
    engine.load_weights(0)
    (folder,) = tmp_path.glob("opcd-*/")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # so is the socket file within
    try:
        one, two = engine.generate(PROMPTS[:2], GREEDY, seed=0, step=0)
        until(lambda: (folder / keeper.ENDED).exists())
        assert engine.generate(PROMPTS[:2], GREEDY, seed=0, step=0) == [one, two]
        assert (folder / "server=0" / "restarts").read_text() == "1"
        until(lambda: (folder / keeper.ENDED).exists())
        assert engine.generate(PROMPTS[1:2], GREEDY, seed=0, step=0) == [two]
        assert engine.generate(PROMPTS[:1], GREEDY, seed=0, step=0) == [one]
        until(lambda: (folder / keeper.ENDED).exists())
        with pytest.raises(EngineError, match=r"lost 3 times, engine.max_restarts=2\); see .*log"):
            engine.generate(PROMPTS, GREEDY, seed=0, step=0)
        assert len(list(tmp_path.glob("*.log"))) == 1
    finally:
        end_keeper(folder)


def test_a_server_that_does_not_start_is_a_line_with_its_log(start: Callable[..., Any]) -> None:
    engine = start("--ends-at-once")
    with pytest.raises(UserError, match=r"engine.launch=true: .*exit code 3; see .*log") as caught:
        engine.load_weights(0)
    assert "INFO started" in Path(str(caught.value).split("see ")[1].split(";")[0]).read_text()


@pytest.mark.parametrize(
    ("given", "said"),
    [("/none", "No such file"), (sys.executable, "has no vLLM"), ("0.14.1", "has vLLM 0.14.1")],
)
def test_an_environment_without_a_known_vllm_is_refused(
    given: str, said: str, tmp_path: Path
) -> None:
    if given[0].isdigit():
        script = tmp_path / "old"
        script.write_text(f"#!/bin/sh\necho {given}\n")
        script.chmod(0o755)
        given = str(script)
    with pytest.raises(UserError, match=f"engine.python=.*{said}.*make vllm"):
        vllm_launch.find_python(given)


def test_the_words_for_a_cpu_avoid_what_ends_an_engine_there() -> None:
    words = vllm_launch.server_words(Shards(model_config()), 4, gpus=0, sleeps=True)  # type: ignore[arg-type]
    assert "--enable-sleep-mode" not in words
    assert "--no-enable-chunked-prefill" in words
    assert words[words.index("--logprobs-mode") + 1] == "processed_logprobs"
    assert words[words.index("--generation-config") + 1] == "vllm"
    assert words[words.index("--max-model-len") + 1] == "64"


def test_a_server_on_gpus_has_the_last_ones_of_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Shards(model_config())
    model.parallel.device = torch.device("cuda")
    words = vllm_launch.server_words(model, 4, gpus=2, sleeps=False)
    assert words[words.index("--tensor-parallel-size") + 1] == "2"
    assert not {"--enable-sleep-mode", "--enforce-eager"} & set(words)
    assert "--enable-sleep-mode" in vllm_launch.server_words(model, 4, gpus=0, sleeps=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,GPU-a,7")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert last_devices(2) == "GPU-a,7"
    with pytest.raises(UserError, match=r"engine\.gpus=3: this machine has 4 GPUs and 2 ranks"):
        last_devices(3)


def keeper_of(folder: Path, *words: str) -> subprocess.Popen[bytes]:
    """A process that starts a keeper and waits: the keeper's rank."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(keeper.__file__).parent)!r}); import keeper\n"
        "from pathlib import Path\n"
        f"print(keeper.start_keeper(Path({str(folder)!r}), {list(words)!r}), flush=True)\n"
        "import time; time.sleep(60)"
    )
    return subprocess.Popen([sys.executable, "-S", "-E", "-c", code], stdout=subprocess.PIPE)


def test_a_keeper_ends_all_of_a_server_when_its_rank_is_killed(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    folder.mkdir()
    worker = 'sleep 60 & echo $! >"$0"; wait'  # as a server's worker, which outlives it
    rank = keeper_of(folder, str(log), "/bin/sh", "-c", worker, str(tmp_path / "worker"))
    until(lambda: (tmp_path / "worker").exists() and bool((tmp_path / "worker").read_text()))
    rank.kill()
    rank.wait()
    pid = int((tmp_path / "worker").read_text())
    until(lambda: vllm_launch.has_ended(pid))
    until(lambda: not folder.exists())
    assert not log.exists()


def test_a_server_ends_when_its_keeper_is_killed(tmp_path: Path) -> None:
    worker = 'echo $$ >"$0"; exec sleep 60'
    words = (str(tmp_path / "log"), "/bin/sh", "-c", worker, str(tmp_path / "server"))
    with keeper_of(tmp_path, *words) as rank:
        until(lambda: (tmp_path / "server").exists() and bool((tmp_path / "server").read_text()))
        os.kill(int(rank.stdout.readline()), 9)  # type: ignore[union-attr]
        until(lambda: vllm_launch.has_ended(int((tmp_path / "server").read_text())))
        rank.kill()


def test_a_log_keeps_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "LOG_BYTES", 200_000)
    _, logging = keeper._start(["/bin/sh", "-c", "seq 200000"], tmp_path, tmp_path / "log")
    logging.join(20)
    assert (tmp_path / keeper.ENDED).read_text() == "exit code 0"
    assert (tmp_path / "log").read_text().endswith("\n200000\n")
    assert sum(file.stat().st_size for file in tmp_path.glob("log*")) <= 400_000


def test_zeros_to_start_with_take_no_room(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    vllm_launch.write_zeros(file, {"a": (1000, 1000), "b": (3,)}, torch.bfloat16)
    assert file.stat().st_blocks * 512 < 100_000
    found = load_file(file)
    assert found["a"].shape == (1000, 1000)
    assert found["b"].equal(torch.zeros(3, dtype=torch.bfloat16))
