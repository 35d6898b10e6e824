"""A vLLM server's calls, with answers that are a function of weights, prompt and seed.

As a program (`engine.python`) it answers what `engine.launch` asks of a Python with vLLM, and
serves at a socket file. Standard library alone.
"""

from __future__ import annotations

import hashlib
import json
import os
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any


class FakeVllm:
    """What a server knows; a test changes `trouble` to make it misbehave."""

    def __init__(self, root: str, *, vocab_size: int = 67, max_tokens: int = 64) -> None:
        self.root, self.vocab_size, self.max_tokens = root, vocab_size, max_tokens
        self.version, self.weights, self.label = "0.32.0", "", "default"
        self.tells_label, self.asleep, self.trouble = True, False, ""
        self.requests: list[dict[str, Any]] = []
        self.pushes: list[list[str]] = []
        self.calls: list[str] = []
        self.checked = 0  # requests before the last question for the version

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a call."""
        self.calls.append(path)
        if self.trouble in ("500", "503"):
            return int(self.trouble), {"error": "EngineCore encountered an issue"}
        if path == "/weight_info":
            self.checked = len(self.requests)
            return (200, {"weight_version": self.label}) if self.tells_label else (404, {})
        if path == "/update_weight_version":
            self.label = body["new_version"]
            return 200, {"success": True}
        if path == "/collective_rpc":
            return self.reload(body["kwargs"]["weights_path"])
        if path.startswith(("/sleep", "/wake_up")):
            self.asleep = path.startswith("/sleep")
            return 200, {}
        known = {
            "/health": None,
            "/version": {"version": self.version},
            "/is_sleeping": {"is_sleeping": self.asleep},
            "/reset_prefix_cache": {"success": self.trouble != "busy"},
            "/v1/models": {
                "data": [{"id": "opcd", "root": self.root, "max_model_len": self.max_tokens}]
            },
        }
        if path in known and not (path == "/is_sleeping" and self.trouble == "no developer mode"):
            return 200, known[path]
        return self.complete(body) if path == "/v1/completions" else (404, {"detail": "Not Found"})

    def reload(self, folder: str) -> tuple[int, Any]:
        """Take the weights."""
        if self.trouble == "refuses weights":
            return 500, {"error": "shape mismatch"}
        names, digest = [], hashlib.sha256()
        for file in sorted(Path(folder).glob("*.safetensors")):
            data = file.read_bytes()
            size = int.from_bytes(data[:8], "little")
            names += [name for name in json.loads(data[8 : 8 + size]) if name != "__metadata__"]
            digest.update(data)
        self.pushes.append(sorted(names))
        self.weights = digest.hexdigest()
        return 200, {"results": [None]}

    def complete(self, body: Any) -> tuple[int, Any]:
        """Continue a prompt: some tokens, END the last of some."""
        self.requests.append(body)
        prompt, trouble = body["prompt"], self.trouble
        if trouble == "hangs":
            time.sleep(5)
        if trouble == "too long":
            return 400, {"error": {"message": f"maximum context length is {self.max_tokens}"}}
        if trouble == "another run pushes":
            self.label = "ffffffff:7"
        key = hashlib.sha256(f"{self.weights}{prompt}{body['seed']}".encode()).digest()
        ends = body["stop_token_ids"]
        words = [3 + byte % (self.vocab_size - 3) for byte in key[: 1 + key[0] % 5]]
        ids = [word for word in words if word not in ends][: body["max_tokens"] - 1]
        ended = len(ids) < 3 or body["max_tokens"] < 3
        ids += [ends[0] if ended else 1] * (ended or not ids)
        if not ended:
            ids = (ids * body["max_tokens"])[: body["max_tokens"]]
        logprobs: list[Any] = [-1.0] * len(ids)
        logprobs[0] = {"NaN": float("nan"), "null": None}.get(trouble, -1.0)
        ids[0] = {"vocabulary": self.vocab_size, "words": "a", "end": ends[0]}.get(trouble, ids[0])
        reason = {"abort": "abort", "reason": "length" if ended else "stop"}.get(trouble)
        choice = {
            "token_ids": ids[1:] if trouble == "lengths" else ids,
            "prompt_token_ids": [*prompt, 1] if trouble == "another prompt" else prompt,
            "logprobs": None if trouble == "no logprobs" else {"token_logprobs": logprobs},
            "finish_reason": reason or ("stop" if ended else "length"),
        }
        return 200, {} if trouble == "no choices" else {"choices": [choice]}


class Listening:
    """A server at a port of the loopback, or at a socket file; a context manager."""

    def __init__(self, vllm: FakeVllm, socket_file: str | None = None) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(None)

            def do_POST(self) -> None:
                size = int(self.headers.get("Content-Length", 0))
                self.reply(json.loads(self.rfile.read(size) or b"null"))

            def reply(self, body: Any) -> None:
                if self.path == "/v1/completions" and vllm.trouble == "dies":
                    return self.connection.close()
                status, value = vllm.answer(self.path, body)
                text = b"" if value is None else json.dumps(value).encode()
                if vllm.trouble == "no JSON":
                    text = b"<html>"
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                if self.path == "/v1/completions" and vllm.trouble == "stalls":
                    time.sleep(5)
                self.wfile.write(text)
                return None

            def log_message(self, *_: Any) -> None: ...

            def address_string(self) -> str:
                return ""

        class Quiet:
            daemon_threads = True
            request_queue_size = 64

            def handle_error(self, *_: Any) -> None: ...

        class Port(Quiet, socketserver.ThreadingTCPServer): ...

        class File(Quiet, socketserver.ThreadingUnixStreamServer): ...

        at: Any = socket_file or ("127.0.0.1", 0)
        self._server: Any = (File if socket_file else Port)(at, Handler)
        where = self._server.server_address
        self.url = f"unix:{at}" if socket_file else f"http://{where[0]}:{where[1]}"

    def __enter__(self) -> Listening:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def main(words: list[str]) -> None:
    """Tell the version, or serve; words of `engine.flags` say how to end."""
    if words[0] == "-I":
        sys.stdout.write("0.32.0\n")
        return
    at, root = (words[words.index(name) + 1] for name in ("--uds", "--model"))
    sys.stderr.write("INFO started\n")
    if "--ends-at-once" in words:
        sys.exit(3)
    config = json.loads((Path(root) / "config.json").read_text())
    longest = config["max_position_embeddings"]
    vllm = FakeVllm(root, vocab_size=config["vocab_size"], max_tokens=longest)
    with Listening(vllm, at):
        while True:
            time.sleep(0.02)
            # after nine requests, in the middle of a rollout; after two answers that were checked
            num_done = {
                "--dies-after-two": vllm.checked // 2,
                "--dies-after-nine": len(vllm.requests) // 9,
            }
            if any(word in words and num_done[word] for word in num_done):
                time.sleep(0.1)  # an answer that was begun is sent
                sys.stderr.write("x" * 100_000)
                os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
