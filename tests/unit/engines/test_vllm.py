"""Rollouts by a vLLM server: what is sent, and how every failure ends."""

from __future__ import annotations

import os
import socket
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.engines import vllm as engine_module
from opcd_nemo.engines import vllm_server, vllm_settings, vllm_site, vllm_weights
from opcd_nemo.engines.vllm import VllmEngine
from opcd_nemo.engines.vllm_server import Server
from opcd_nemo.engines.vllm_site import Site
from opcd_nemo.errors import EngineError, UserError
from opcd_nemo.formats.locate import write_json
from opcd_nemo.formats.shape import hf_config
from opcd_nemo.types import Prompt, Sample
from tests.tiny import model_config
from tests.unit.engines.conftest import SETTINGS, Shards, make_engine
from tests.unit.engines.fake_vllm import FakeVllm, Listening

SAMPLING = Sampling(temperature=0.7, top_p=0.9, top_k=5, max_new_tokens=4)
PROMPTS = [Prompt(token_ids=(5, 6, 7 + index), index=index) for index in range(6)]


@pytest.fixture
def engine(model: Shards, url: str, tmp_path: Path) -> VllmEngine:
    made = make_engine(model, tmp_path, urls=[url])
    made.load_weights(0)
    return made


def sample(engine: VllmEngine, prompts: list[Prompt] = PROMPTS, step: int = 1) -> list[Sample]:
    return engine.generate(prompts, SAMPLING, seed=3, step=step)


def check(urls: list[str], folder: Path, *configs: Any, longest: int = 60, **changes: Any) -> None:
    arguments = SETTINGS | {"urls": urls, "folder": str(folder)} | changes
    VllmEngine.check(arguments, configs or (model_config(),), longest, on_cpu=True)


# ---------------------------------------------------------------------------------- what is sent


def test_answers_come_in_order_and_belong_to_their_prompt_seed_and_step(engine: VllmEngine) -> None:
    answers = sample(engine)
    assert sample(engine, PROMPTS[::-1])[::-1] == answers == sample(engine)
    assert sample(engine, PROMPTS[2:3]) == answers[2:3]
    assert sample(engine, step=2) != answers
    assert sample(engine, []) == []


def test_every_field_of_a_request_is_said(engine: VllmEngine, vllm: FakeVllm) -> None:
    sample(engine, PROMPTS[:1])
    (body,) = vllm.requests
    assert 0 <= body.pop("seed") < 2**63
    assert body == {
        "model": "opcd", "prompt": [5, 6, 7], "max_tokens": 4, "temperature": 0.7, "top_p": 0.9,
        "top_k": 5, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "repetition_penalty": 1.0, "stop_token_ids": [2], "ignore_eos": True, "logprobs": 0,
        "return_token_ids": True, "return_tokens_as_token_ids": True,
        "skip_special_tokens": False, "add_special_tokens": False,
    }  # fmt: skip


def test_a_long_answer_does_not_hold_the_others(engine: VllmEngine, vllm: FakeVllm) -> None:
    held, arrived = threading.Event(), threading.Semaphore(0)
    complete = vllm.complete

    def slow_first(body: Any) -> Any:
        if body["prompt"][-1] == 7:
            assert held.wait(10)
        arrived.release()
        return complete(body)

    vllm.complete = slow_first  # type: ignore[method-assign]
    answers: list[Sample] = []
    asking = threading.Thread(target=lambda: answers.extend(sample(engine)))
    asking.start()
    for _ in PROMPTS[1:]:  # all the others, through three places
        assert arrived.acquire(timeout=10)
    held.set()
    asking.join()
    assert len(answers) == len(PROMPTS)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("tp", [1, 2])
def test_the_server_reads_the_models_tensors(
    tied: bool, tp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_weights, "BUCKET_BYTES", 5000)
    model = Shards(model_config(tied_embeddings=tied), tp=tp)
    found = vllm_weights.write_stage(model, tmp_path, writes=True, with_head=True)  # type: ignore[arg-type]
    files = [load_file(file) for file in tmp_path.iterdir()]
    assert len(files) > 2
    written = {name: tensor for tensors in files for name, tensor in tensors.items()}
    head = {"lm_head.weight": model.tensors["model.embed_tokens.weight"]} if tied else {}
    assert written.keys() == set(found) == (model.tensors | head).keys()
    assert vllm_weights.names_of(model, with_head=True) == set(found)  # type: ignore[arg-type]
    assert all(written[name].equal(tensor) for name, tensor in (model.tensors | head).items())


def test_weights_are_sent_once_a_version_and_again_after_a_release(
    engine: VllmEngine, vllm: FakeVllm
) -> None:
    engine.load_weights(0)
    assert len(vllm.pushes) == 1
    engine.load_weights(1)
    engine.release_weights()
    engine.load_weights(1)
    assert len(vllm.pushes) == 3
    assert not vllm.asleep
    order = [call for call in vllm.calls if call.startswith(("/coll", "/reset", "/update"))]
    assert order == ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"] * 3


def test_only_the_last_push_stays_in_memory(engine: VllmEngine, tmp_path: Path) -> None:
    engine.load_weights(1)
    (folder,) = tmp_path.glob(f"opcd-{os.getpid()}-*/")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert len(list((folder / "replica=0").iterdir())) == 1


def test_two_models_of_a_run_share_a_server(
    engine: VllmEngine, vllm: FakeVllm, url: str, tmp_path: Path, model: Shards
) -> None:
    other = Shards(model.config, seed=1)
    teacher = make_engine(other, tmp_path, urls=[url])
    first = sample(engine)
    teacher.load_weights(0)
    assert sample(teacher) != first
    with pytest.raises(EngineError, match="holds weights"):
        sample(engine)
    engine.load_weights(0)  # the version that it thinks it holds
    assert sample(engine) == first


def test_a_colocated_server_sleeps_and_is_woken(
    model: Shards, url: str, vllm: FakeVllm, tmp_path: Path
) -> None:
    engine = make_engine(model, tmp_path, urls=[url], colocated=True)
    engine.load_weights(0)
    engine.release_weights()
    assert vllm.asleep
    engine.load_weights(1)
    assert not vllm.asleep
    assert len(sample(engine)) == len(PROMPTS)


def test_a_server_that_tells_no_version_is_used(
    model: Shards, url: str, vllm: FakeVllm, tmp_path: Path
) -> None:
    vllm.tells_label, vllm.version = False, "0.17.1"
    engine = make_engine(model, tmp_path, urls=[url])
    engine.load_weights(0)
    engine.load_weights(0)
    assert len(vllm.pushes) == 1
    assert len(sample(engine)) == len(PROMPTS)


def test_a_rank_that_does_not_speak_gets_the_answers(
    engine: VllmEngine, model: Shards, tmp_path: Path
) -> None:
    answers = sample(engine)
    silent = make_engine(Shards(model.config), tmp_path)
    second: Any = SimpleNamespace(tp_rank=1, pp_rank=0)
    silent._parallel = second
    second.from_first_of_model = lambda _: (answers, None)
    assert sample(silent) == answers
    second.from_first_of_model = lambda _: ([], EngineError("lost"))
    with pytest.raises(EngineError, match="lost"):
        sample(silent)


def test_blocks_of_replicas_have_blocks_of_servers() -> None:
    assert engine_module.users_of(1, 3) == [[0, 1, 2]]
    assert engine_module.users_of(2, 4) == [[0, 1], [2, 3]]
    assert engine_module.users_of(4, 2) == [[0], [0], [1], [1]]
    assert engine_module.users_of(2, 3) == [[0, 1], [1, 2]]


@pytest.mark.parametrize(
    ("local_world", "tp", "pp", "found"),
    [
        (8, 4, 2, 0),  # one machine
        (4, 4, 1, 4),
        (4, 1, 2, "parallel.pipeline_model_parallel_size=2: .*; allowed: 1$"),
        (4, 8, 1, "parallel.tensor_model_parallel_size=8: .*; allowed: a divisor of the 4 ranks"),
    ],
)
def test_the_first_rank_of_each_machine_starts_a_server(
    local_world: int, tp: int, pp: int, found: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parallel: Any = SimpleNamespace(rank=5, world_size=8, tp=tp, pp=pp)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world))
    monkeypatch.setenv("LOCAL_RANK", str(5 % local_world))
    if isinstance(found, int):
        assert vllm_settings.first_of_machine(parallel) == found
    else:
        with pytest.raises(UserError, match=found):
            vllm_settings.first_of_machine(parallel)


# ---------------------------------------------------------------------- what is not there or wrong

BAD_ANSWERS = {
    "another prompt": "the answer cannot be: it is another prompt's",
    "NaN": "a log-probability is no number",
    "null": "a log-probability is no number",
    "vocabulary": "token 67 is not in the vocabulary of 67",
    "words": "token 'a' is not in the vocabulary",
    "abort": "finish_reason=abort",
    "reason": "beside the end tokens",
    "lengths": "log-probabilities",
    "no logprobs": "the answer cannot be",
    "no choices": "the answer cannot be",
    "no JSON": "answers no JSON",
    "too long": "answers 400: .*maximum context length",
    "another run pushes": "holds weights ffffffff:7, not .*let each run have servers",
}


@pytest.mark.parametrize("trouble", BAD_ANSWERS)
def test_a_wrong_answer_is_a_line_with_the_server(
    trouble: str, engine: VllmEngine, vllm: FakeVllm, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if trouble == "no JSON":
        monkeypatch.setattr(engine_module.Site, "check_awake", lambda _: None)
    vllm.trouble = trouble
    with pytest.raises(EngineError, match=BAD_ANSWERS[trouble]) as caught:
        sample(engine)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_sleeping_server_is_not_waited_for(engine: VllmEngine, vllm: FakeVllm) -> None:
    vllm.asleep = True
    with pytest.raises(EngineError, match=r"sleeps, .*POST /wake_up"):
        sample(engine)
    assert not vllm.requests


def test_a_server_that_came_back_without_its_mode_is_a_line(
    engine: VllmEngine, vllm: FakeVllm, url: str
) -> None:
    vllm.trouble = "no developer mode"
    with pytest.raises(EngineError, match=f"{url}: /is_sleeping answers 404"):
        sample(engine)


@pytest.mark.parametrize("trouble", ["dies", "503", "500"])
def test_a_lost_server_ends_the_run_when_no_restart_is_left(
    trouble: str, engine: VllmEngine, vllm: FakeVllm
) -> None:
    vllm.trouble = trouble
    with pytest.raises(EngineError, match=r"lost 1 times, engine.max_restarts=0.*start the server"):
        sample(engine)


def test_a_server_that_comes_back_is_given_its_weights_and_asked_again(
    model: Shards, url: str, vllm: FakeVllm, tmp_path: Path
) -> None:
    engine = make_engine(model, tmp_path, urls=[url], max_restarts=1)
    engine.load_weights(0)
    first, complete = sample(engine), vllm.complete

    def dies_once(body: Any) -> Any:
        vllm.label = "default"  # started anew
        vllm.complete = complete  # type: ignore[method-assign]
        return 500, {}

    vllm.complete = dies_once  # type: ignore[method-assign]
    assert sample(engine) == first
    assert len(vllm.pushes) == 2
    vllm.trouble = "500"
    with pytest.raises(EngineError, match="lost 2 times"):
        sample(engine)


@pytest.mark.parametrize("trouble", ["hangs", "stalls"])
def test_a_server_that_hangs_is_given_up(
    trouble: str,
    model: Shards,
    url: str,
    vllm: FakeVllm,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(engine_module, "_TICK_S", 0.05)
    engine = make_engine(model, tmp_path, urls=[url], timeout_s=0.12)
    engine.load_weights(0)
    vllm.trouble = trouble
    with pytest.raises(EngineError, match=r"no answer for 0 s \(engine.timeout_s=0.12\)"):
        sample(engine)


def test_a_request_that_connects_after_another_has_failed_is_given_up_too(
    engine: VllmEngine, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_up, answer = Server.give_up, Site.answer
    given_up, end, ended = threading.Event(), threading.Event(), []

    def noted(server: Server) -> None:
        give_up(server)
        given_up.set()

    def late(site: Site, prompt_ids: Any, *rest: Any, **more: Any) -> Sample:
        assert prompt_ids == (5, 6, 7) or given_up.wait(10)
        try:
            return answer(site, prompt_ids, *rest, **more)
        finally:
            ended.append(prompt_ids)

    def complete(body: Any) -> Any:
        return (500, {}) if body["prompt"] == [5, 6, 7] else (end.wait(10), {})

    monkeypatch.setattr(Server, "give_up", noted)
    monkeypatch.setattr(Site, "answer", late)
    vllm.complete = complete  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="answers 500"):
        sample(engine, PROMPTS[:2])
    assert len(ended) == 2
    end.set()


def test_an_answer_without_an_end_is_a_line(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_server.limits, "RECORD_BYTES", 100)
    with pytest.raises(EngineError, match="/v1/completions: answers more than 100 bytes"):
        sample(engine)


def test_what_killed_runs_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    mine, other, far = (tmp_path / f"opcd-{name}" for name in ("1-2x8", "2-2x8", "3-2x8"))
    assert vllm_site.claim(mine)
    assert not vllm_site.claim(mine)
    for folder in (other, far, tmp_path / "opcd-slurm-1"):
        folder.mkdir()
    (other / "machine").write_text(socket.gethostname())
    (other / "replica=0").mkdir()
    (far / "machine").write_text("elsewhere")
    assert not vllm_site.claim(mine)
    assert {file.name for file in tmp_path.iterdir()} == {mine.name, far.name, "opcd-slurm-1"}


def test_a_refused_reload_means_a_restart(engine: VllmEngine, vllm: FakeVllm) -> None:
    vllm.trouble = "refuses weights"
    with pytest.raises(EngineError, match=r"shape mismatch.*must be restarted.*lost 1 times"):
        engine.load_weights(1)
    assert engine.weights_version == 0


def test_a_server_that_answers_others_takes_no_weights(engine: VllmEngine, vllm: FakeVllm) -> None:
    vllm.trouble = "busy"
    with pytest.raises(EngineError, match="the requests of another program"):
        engine.load_weights(1)


def test_a_part_of_the_weights_is_never_sent(
    engine: VllmEngine, vllm: FakeVllm, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = engine_module.write_stage
    monkeypatch.setattr(engine_module, "write_stage", lambda *a, **k: write(*a, **k)[1:])
    with pytest.raises(EngineError, match=r"1 tensors are not written once.*no server was given"):
        engine.load_weights(1)
    assert len(vllm.pushes) == 1


def test_weights_that_are_not_finite_are_never_sent(
    engine: VllmEngine, vllm: FakeVllm, model: Shards
) -> None:
    dict(model.module.named_parameters())["decoder.final_layernorm.weight"][0] = torch.nan
    with pytest.raises(
        EngineError, match=r"model\.norm\.weight has values that are infinite or no"
    ):
        engine.load_weights(1)
    assert len(vllm.pushes) == 1


def test_a_full_folder_is_said_with_the_bytes_needed(
    model: Shards, url: str, vllm: FakeVllm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_weights.shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
    with pytest.raises(
        UserError, match=r"engine.folder=.*has 0.00 GiB free, the weights take \d+ b"
    ):
        make_engine(model, tmp_path, urls=[url]).load_weights(0)
    assert not vllm.pushes


def test_a_prompt_that_the_server_cannot_take_is_not_sent(
    engine: VllmEngine, vllm: FakeVllm
) -> None:
    long = Prompt(token_ids=tuple(range(3, 64)), index=0)
    with pytest.raises(UserError, match="takes 64 tokens, a prompt and its answer 65"):
        sample(engine, [long])
    assert not vllm.requests


def test_a_server_of_another_run_is_refused(
    engine: VllmEngine, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engine.weights_version == 0
    monkeypatch.setattr(os, "getpid", lambda: 1)  # as another process would find it
    with pytest.raises(UserError, match=r"engine.urls=.*another run uses it, process \d+"):
        make_engine(Shards(model_config()), tmp_path, urls=[url]).load_weights(0)


def test_the_lock_of_another_user_is_said(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_site.os, "open", Mock(side_effect=PermissionError(13, "denied")))
    with pytest.raises(UserError, match=r"engine.folder=.*\.lock: denied"):
        vllm_site.hold(url, tmp_path)


# ---------------------------------------------------------------------------- before a model loads


def test_servers_that_fit_are_let_pass(url: str, tmp_path: Path) -> None:
    check([url], tmp_path)


def test_a_server_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Connection refused.*docs/engines.md") as caught:
        check(["http://127.0.0.1:1"], tmp_path)
    assert str(caught.value).count("http://127.0.0.1:1") == 1
    with pytest.raises(UserError, match="No such file"):
        check([f"unix:{tmp_path}/none.sock"], tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("trouble", "503", "answers 503"),
        ("trouble", "no JSON", "answers no JSON"),
        ("trouble", "no developer mode", "VLLM_SERVER_DEV_MODE=1"),
        ("version", "0.14.1", r"is vLLM 0.14.1; allowed: vLLM 0.17, 0.20, 0.29, 0.32"),
        ("root", "Qwen/Qwen3-8B", "serves Qwen/Qwen3-8B, which is no folder here"),
        ("max_tokens", 59, "takes 59 tokens, a prompt and its answer 60; .*--max-model-len 60"),
    ],
)
def test_a_server_that_does_not_fit_is_refused(
    name: str, value: Any, said: str, vllm: FakeVllm, url: str, tmp_path: Path
) -> None:
    setattr(vllm, name, value)
    with pytest.raises((UserError, EngineError), match=said):
        check([url], tmp_path)


def test_a_server_of_another_model_is_refused(
    vllm: FakeVllm, url: str, tmp_path: Path, model: Shards
) -> None:
    other = replace(model.config, num_layers=4)
    with pytest.raises(
        UserError, match=r"serves another model.*num_layers=2, the run's model has 4"
    ):
        check([url], tmp_path, other)
    with pytest.raises(UserError, match="none serves a model of 4 layers"):
        check([url], tmp_path, model.config, other)
    write_json(Path(vllm.root) / "config.json", hf_config(other, torch.float32))
    with Listening(FakeVllm(vllm.root)) as second:
        check([second.url], tmp_path, other)


def test_a_tied_head_on_a_cpu_is_refused_with_the_remedy(
    vllm: FakeVllm, url: str, tmp_path: Path
) -> None:
    tied = model_config(tied_embeddings=True)
    write_json(Path(vllm.root) / "config.json", hf_config(tied, torch.float32))
    with pytest.raises(UserError, match=r"a CPU keeps the old head; .*tie_word_embeddings=false"):
        check([url], tmp_path, tied)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"urls": []}, "engine.launch=false; allowed: true, or engine.urls="),
        ({"launch": True}, "engine.launch=true; allowed: false with engine.urls"),
        ({"urls": ["localhost:80"]}, "http://host:port or unix:/path"),
        ({"urls": ["http://localhost:65537"]}, "a port from 1 to 65535"),
        ({"urls": ["unix:/a", "unix:/a"]}, "each server once"),
        ({"urls": "unix:/a"}, "a list of texts"),
        ({"flags": ["--x"]}, r"engine.flags=\['--x'\]; allowed: \[\] with engine.launch=false"),
        ({"gpus": 1}, "engine.gpus=1; allowed: 0 with engine.launch=false"),
        ({"launch": True, "urls": [], "gpus": 1}, "engine.gpus=1; allowed: 0 where the run is on"),
        (
            {"launch": True, "urls": [], "gpus": 1, "colocated": True},
            "engine.gpus=1; allowed: 0 with engine.colocated=true",
        ),
        ({"python": "p"}, "engine.python=p; allowed: null with engine.launch=false"),
        ({"folder": "/none"}, "engine.folder=/none; allowed: a folder"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    arguments = {"urls": ["unix:/a"], "folder": tmp_path} | changes
    with pytest.raises(UserError, match=said):
        check(**arguments)
