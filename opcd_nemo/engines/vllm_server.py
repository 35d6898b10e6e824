"""One vLLM server, spoken to over HTTP: what it is, its weights, its answers.

Nothing of vLLM is imported: the server has an environment of its own, with its versions of torch
and transformers. docs/engines.md has the calls, and the versions of vLLM that they are for.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import math
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from opcd_nemo.config import limits
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.errors import EngineError, UserError
from opcd_nemo.formats.huggingface import read_hf_config
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.types import Sample

logger = logging.getLogger(__name__)

VERSIONS = {"0.17": "read", "0.20": "read", "0.29": "read", "0.32": "run"}
"""The versions of vLLM whose calls are these: run against them, or only read in their sources."""
_CALL_S = 60.0  # of a call that computes nothing
_RELOAD_S = 1800.0  # 70B of weights out of a slow folder
_SHOWN = 200  # letters of what a server says
_SOCKET = "unix:"
_DEVELOPERS = "a vLLM server that VLLM_SERVER_DEV_MODE=1 lets take weights"
_RESTART = "; a server that does not take weights must be restarted"


class _Failure(EngineError):
    """What a call of a server came to; a copy of it is sent to other ranks."""

    def __init__(self, url: str, words: str) -> None:
        super().__init__(url, words)
        self.url, self.words = url, words

    def __str__(self) -> str:
        return f"{self.url}: {self.words}"


class ServerLost(_Failure):
    """The server does not answer, or cannot any more: a restart may help."""


class Refused(_Failure):
    """The server answers, and refuses."""


class _NoSuchCall(Refused):
    """This version of vLLM has no such call, or not without its developer's mode."""


@dataclass(frozen=True, slots=True)
class Served:
    """A server's facts about its model: name, longest sequence, folder and shape."""

    name: str
    max_tokens: int
    folder: Path
    model: ModelConfig

    def difference(self, model: ModelConfig) -> str | None:
        """Where another model computes in another way; a head of its own and ends do not count."""
        for field in fields(model):
            name, other = field.name, getattr(model, field.name)
            if name in ("tied_embeddings", "max_positions", "eos_token_ids"):
                continue
            if other != getattr(self.model, name):
                return f"{name}={getattr(self.model, name)}, the run's model has {other}"
        return None

    def check_length(self, url: str, longest: int) -> None:
        """Refuse sequences that the server would refuse; `UserError` names both lengths."""
        if longest > self.max_tokens:
            problem = f"takes {self.max_tokens} tokens, a prompt and its answer {longest}"
            allowed = f"--max-model-len {longest} or more"
            raise UserError("engine.urls", url, allowed, problem=problem)


class _SocketFile(http.client.HTTPConnection):
    """A connection to a server that listens at a socket file."""

    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


class Server:
    """A server at an address: `http://host:port`, or `unix:/path` of its socket file."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet."""
        self.url = url
        self._open: set[socket.socket] = set()

    def ask(self, path: str, body: Any = None, *, timeout_s: float | None = _CALL_S) -> Any:
        """What the server answers to a call: JSON, or None where the answer is empty.

        Args:
            path: of the call.
            body: None: GET, else POST with this as JSON (`{}`: without any).
            timeout_s: between two bytes of the answer; None: for ever.

        Raises:
            ServerLost: no answer, half an answer, or a failure inside the server.
            Refused: any other status than 200.
            EngineError: an answer that is no JSON, or has no end.
        """
        try:
            with self._connected(timeout_s) as link:
                link.request(
                    "GET" if body is None else "POST",
                    path,
                    json.dumps(body) if body else None,
                    {"Content-Type": "application/json"} if body else {},
                )
                answer = link.getresponse()
                data = answer.read(limits.RECORD_BYTES + 1)
                if answer.length and len(data) <= limits.RECORD_BYTES:  # of which `read` is silent
                    raise OSError(f"ends {answer.length} bytes too soon")
        except (OSError, http.client.HTTPException) as error:
            words = str(error) or type(error).__name__
            raise ServerLost(self.url, f"{path}: {words}") from error
        if len(data) > limits.RECORD_BYTES:
            words = f"answers more than {limits.RECORD_BYTES} bytes, as no vLLM is known to"
            raise EngineError(f"{self.url}{path}: {words}")
        text = data.decode(errors="replace")
        if (status := answer.status) != http.client.OK:
            kind: type[_Failure] = _NoSuchCall if status == http.client.NOT_FOUND else Refused
            kind = ServerLost if status >= http.client.INTERNAL_SERVER_ERROR else kind
            raise kind(self.url, f"{path} answers {status}: {' '.join(text.split())[:_SHOWN]}")
        if not text.strip():
            return None
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"{self.url}{path}: answers no JSON: {text[:_SHOWN]!r}") from error

    @contextlib.contextmanager
    def _connected(self, timeout_s: float | None) -> Iterator[http.client.HTTPConnection]:
        if self.url.startswith(_SOCKET):
            link: http.client.HTTPConnection
            link = _SocketFile(self.url.removeprefix(_SOCKET), timeout_s)
        else:
            link = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=timeout_s)
        with contextlib.closing(link):
            link.connect()
            connected = link.sock  # which the link forgets when its answer begins
            self._open.add(connected)
            try:
                yield link
            finally:
                self._open.discard(connected)

    def give_up(self) -> None:
        """End every call that is connected: who waits for its answer gets `ServerLost`."""
        for connected in list(self._open):
            with contextlib.suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until the server answers.

        Raises:
            ServerLost: the server is absent, or not ready, after `timeout_s`.
        """
        ends = time.monotonic() + timeout_s
        while True:
            try:
                self.ask("/health")
                return
            except (ServerLost, Refused) as error:
                if time.monotonic() >= ends:
                    raise ServerLost(self.url, error.words) from error
            time.sleep(min(1.0, max(0.0, ends - time.monotonic())))

    # ------------------------------------------------------------------ what it is

    def describe(self, wait_s: float = 0.0) -> Served:
        """What is served, once the server is ready, by a vLLM whose calls are known.

        Raises:
            UserError: it does not answer, has another version, or is no server for this.
        """
        try:
            self.wait_until_ready(wait_s)
            self._check_version()
            _ = self.is_asleep  # without the developer's mode the server has no such call
            models = self._field("/v1/models", "data")
        except ServerLost as lost:
            allowed = "a vLLM server that runs (docs/engines.md has the command)"
            raise self._bad(lost.words, f"{allowed}, or engine.launch=true") from lost
        except Refused as refused:
            raise self._bad(refused.words, _DEVELOPERS) from None
        try:
            name, folder = str(models[0]["id"]), Path(str(models[0]["root"]))
            longest = int(models[0]["max_model_len"])
        except (LookupError, TypeError, ValueError) as error:
            raise self._bad(f"/v1/models answers no model ({error!r})", _DEVELOPERS) from None
        if not (folder / "config.json").is_file():
            allowed = "a server whose model is a folder that this machine sees"
            raise self._bad(f"serves {folder}, which is no folder here", allowed)
        return Served(name, longest, folder, read_hf_config(folder))

    def _check_version(self) -> None:
        version = str(self._field("/version", "version"))
        known = VERSIONS.get(".".join(version.split(".")[:2]))
        if known is None:
            raise self._bad(f"is vLLM {version}", f"vLLM {', '.join(VERSIONS)}")
        if known == "read":
            logger.warning("%s: the calls of vLLM %s were read, never run", self.url, version)

    def _bad(self, problem: str, allowed: str) -> UserError:
        return UserError("engine.urls", self.url, allowed, problem=problem)

    def _field(self, path: str, name: str, answer: Any = None) -> Any:
        """A field of an answer, which is asked for where it is not given."""
        answer = self.ask(path) if answer is None else answer
        if not isinstance(answer, dict) or name not in answer:
            raise EngineError(f"{self.url}{path}: answers without {name}: no vLLM is known to")
        return answer[name]

    @property
    def is_asleep(self) -> bool:
        """Whether a request would wait for ever; `ServerLost`, `Refused` as of `ask`."""
        return bool(self._field("/is_sleeping", "is_sleeping"))

    @property
    def held(self) -> str | None:
        """The version of the weights that the server holds; None: this vLLM does not tell."""
        try:
            return str(self._field("/weight_info", "weight_version"))
        except _NoSuchCall:
            return None

    # ------------------------------------------------------------------ weights

    def take(self, folder: Path, version: str) -> None:
        """Read the weights of a folder, forget what was computed with others, take the version.

        Raises:
            ServerLost: it refuses them; what it holds now ends it at the next request.
            EngineError: it still answers requests of others.
        """
        asleep = self.is_asleep
        try:
            if asleep:
                self.ask("/wake_up?tags=weights", {}, timeout_s=_RELOAD_S)
            arguments = {"weights_path": str(folder)}
            body = {"method": "reload_weights", "kwargs": arguments}
            self.ask("/collective_rpc", body, timeout_s=_RELOAD_S)
            if asleep:
                self.ask("/wake_up", {}, timeout_s=_RELOAD_S)
        except (ServerLost, Refused) as failed:
            raise ServerLost(self.url, f"{failed.words}{_RESTART}") from None
        answer = self.ask("/reset_prefix_cache", {})
        if answer is not None and not self._field("/reset_prefix_cache", "success", answer):
            raise EngineError(
                f"{self.url}: new weights were sent while it answers the requests of another "
                "program; let each run have servers of its own"
            )
        with contextlib.suppress(Refused):  # versions before 0.29 have no such call
            self.ask("/update_weight_version", {"new_version": version})
        self.expect(version)

    def expect(self, version: str) -> None:
        """Make sure that the server holds these weights, where it can tell.

        Raises:
            EngineError: others.
        """
        held = self.held
        if held not in (None, version):
            raise EngineError(
                f"{self.url}: holds weights {held}, not {version}: another run gave it its own, or "
                "it was started anew; let each run have servers of its own"
            )

    def sleep(self) -> None:
        """Give the device's memory back until the next `take`."""
        self.ask("/sleep?level=2&mode=wait", {}, timeout_s=_RELOAD_S)

    # ------------------------------------------------------------------ answers

    def answer(
        self,
        served: Served,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        seed: int,
        eos_ids: Sequence[int],
    ) -> Sample:
        """Continue a prompt by what is served; the call waits as long as the server computes.

        Raises:
            EngineError: the server refuses the prompt, or answers what cannot be; `ServerLost`:
                it has ended.
        """
        body = {
            "model": served.name,
            "prompt": list(prompt_ids),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "repetition_penalty": 1.0,
            "seed": seed,
            "stop_token_ids": list(eos_ids),
            "ignore_eos": True,  # the run's ends alone, not the ends of the server's folder
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # the server may have no tokenizer
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }
        answer = self.ask("/v1/completions", body, timeout_s=None)
        try:
            choice, vocab_size = answer["choices"][0], served.model.vocab_size
            return _sample(choice, list(prompt_ids), eos_ids, vocab_size)
        except (LookupError, TypeError, ValueError) as error:
            raise EngineError(f"{self.url}: the answer cannot be: {error}") from error


def _sample(choice: Any, prompt_ids: list[int], eos_ids: Sequence[int], vocab_size: int) -> Sample:
    """The sample in an answer; ValueError says what is wrong with it."""
    if choice["prompt_token_ids"] != prompt_ids:
        raise ValueError("it is another prompt's (prompt_token_ids)")
    ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length"):
        raise ValueError(f"finish_reason={reason}")
    if not 1 <= len(ids) == len(logprobs):
        raise ValueError(f"{len(ids)} tokens and {len(logprobs)} log-probabilities")
    for token in ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ValueError(f"token {token!r} is not in the vocabulary of {vocab_size}")
    if not all(type(each) in (int, float) and math.isfinite(each) for each in logprobs):
        raise ValueError("a log-probability is no number, as where weights are not finite")
    ended = reason == "stop"
    if ended != (ids[-1] in eos_ids) or any(token in eos_ids for token in ids[:-1]):
        raise ValueError(f"finish_reason={reason} beside the end tokens {list(eos_ids)}")
    return Sample(
        response_ids=tuple(ids),
        logprobs=tuple(map(float, logprobs)),
        finish_reason="eos" if ended else "length",
    )
