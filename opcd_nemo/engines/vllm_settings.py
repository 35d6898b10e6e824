"""What `engine=vllm` takes, and the checks of it that need no model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from opcd_nemo.config.doc import Doc
from opcd_nemo.config.limits import MOST_RANKS
from opcd_nemo.config.train import MOST_WAIT_S
from opcd_nemo.distributed.groups import Parallel
from opcd_nemo.distributed.launcher import environment_number
from opcd_nemo.engines.vllm_launch import find_python
from opcd_nemo.engines.vllm_server import Served, Server
from opcd_nemo.errors import UserError
from opcd_nemo.formats.shape import ModelConfig

Seconds = Annotated[
    float,
    Doc(
        words="a server that finishes no answer for so many seconds is taken for hung",
        minimum=1,
        maximum=MOST_WAIT_S,
    ),
]
StartSeconds = Annotated[
    float,
    Doc(
        words="seconds that a server may take until it can be asked",
        minimum=1,
        maximum=MOST_WAIT_S,
    ),
]
Gpus = Annotated[
    int,
    Doc(
        words="GPUs of a machine that its server has for itself, the last ones; 0: those of the "
        "ranks",
        minimum=0,
        maximum=MOST_RANKS,
    ),
]
Restarts = Annotated[
    int,
    Doc(
        words="how often a run bears the loss of a server: with launch it starts the server again, "
        "else it waits for it",
        minimum=0,
        maximum=1000,
    ),
]
_URL = re.compile(r"http://[^/:\s]+:\d+|unix:/\S+")


def check_settings(
    arguments: Mapping[str, Any], models: Sequence[ModelConfig], longest: int, *, on_cpu: bool
) -> None:
    """Refuse servers that do not answer, or cannot be used, before a model loads.

    Args:
        arguments: of the engine's constructor, as YAML gives them.
        models: that the run samples from.
        longest: a prompt and its answer, in tokens.
        on_cpu: whether the run is on CPUs, and its servers with it.

    Raises:
        UserError: a line with the server, its answer and what to do.
    """
    _check_words(arguments)
    _check_gpus(arguments, on_cpu=on_cpu)
    folder = Path(arguments["folder"])
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise UserError(
            "engine.folder", str(folder), "a folder that is there and can be written to"
        )
    if arguments["launch"]:
        find_python(arguments["python"])
        return
    served = {url: Server(url).describe() for url in arguments["urls"]}
    for url, each in served.items():
        _check_served(url, each, models, longest, on_cpu)
    for model in models:
        if all(each.difference(model) for each in served.values()):
            problem = f"none serves a model of {model.num_layers} layers and {model.hidden_size}"
            raise UserError("engine.urls", list(served), "a server of each model", problem=problem)


def _check_words(arguments: Mapping[str, Any]) -> None:
    urls, launch = arguments["urls"], arguments["launch"]
    for name in ("urls", "flags"):
        value = arguments[name]
        if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
            raise UserError(f"engine.{name}", value, "a list of texts")
    for url in urls:
        if _URL.fullmatch(url) is None:
            raise UserError("engine.urls", urls, "http://host:port or unix:/path of a socket file")
        if url.startswith("http:") and not 0 < int(url.rpartition(":")[2][:6]) < 1 << 16:
            raise UserError("engine.urls", url, "a port from 1 to 65535")  # a larger one is cut
    if len(set(urls)) < len(urls):
        raise UserError("engine.urls", urls, "each server once")
    if launch == bool(urls):
        allowed = "false with engine.urls" if launch else "true, or engine.urls=[http://host:port]"
        raise UserError("engine.launch", launch, allowed)
    for name, off in (("python", None), ("flags", [])):
        if not launch and arguments[name] != off:
            allowed = f"{'null' if off is None else off} with engine.launch=false"
            raise UserError(f"engine.{name}", arguments[name], allowed)


def _check_gpus(arguments: Mapping[str, Any], *, on_cpu: bool) -> None:
    if not (gpus := arguments["gpus"]):
        return
    for key in ("launch", "colocated"):
        if arguments[key] == (key == "colocated"):
            allowed = f"0 with engine.{key}={str(arguments[key]).lower()}"
            raise UserError("engine.gpus", gpus, allowed)
    if on_cpu:
        raise UserError("engine.gpus", gpus, "0 where the run is on CPUs")


def first_of_machine(parallel: Parallel) -> int:
    """The first rank of this machine, which starts its server.

    Raises:
        UserError: a replica of the model lies on several machines, and so would its weights.
    """
    ranks, tp, pp = (
        environment_number("LOCAL_WORLD_SIZE", parallel.world_size),
        parallel.tp,
        parallel.pp,
    )
    if ranks < parallel.world_size and (pp > 1 or ranks % tp):
        key, size = ("pipeline", pp) if pp > 1 else ("tensor", tp)
        allowed = "1" if pp > 1 else f"a divisor of the {ranks} ranks of a machine"
        problem = "with engine.launch=true each machine has a server, for whole replicas"
        raise UserError(f"parallel.{key}_model_parallel_size", size, allowed, problem=problem)
    return parallel.rank - environment_number("LOCAL_RANK", 0)


def _check_served(
    url: str, served: Served, models: Sequence[ModelConfig], longest: int, on_cpu: bool
) -> None:
    differences = [served.difference(model) for model in models]
    if None not in differences:
        problem = f"serves another model, {served.folder}: {differences[0]}"
        raise UserError("engine.urls", url, "servers of the run's models", problem=problem)
    if on_cpu and served.model.tied_embeddings:
        # reloaded weights reach only what a file names: docs/engines.md
        problem = f"serves {served.folder}, whose head is its embedding: a CPU keeps the old head"
        allowed = "a folder with tie_word_embeddings=false and a head; or engine.launch=true"
        raise UserError("engine.urls", url, allowed, problem=problem)
    served.check_length(url, longest)
