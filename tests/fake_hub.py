"""A server on this machine that speaks as much of the hub's protocol as the client asks for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub:
    """Repositories by name (`datasets/owner/name` for data), each a mapping of files to bytes."""

    def __init__(self, repositories: Mapping[str, Mapping[str, bytes]]) -> None:
        self.repositories = {name: dict(files) for name, files in repositories.items()}
        self.requests: list[str] = []
        self.private: dict[str, bool] = {}
        self.url = ""

    def commit(self, name: str) -> str:
        """The commit that `main` of a repository is, a function of its files."""
        files = sorted(self.repositories[name].items())
        return hashlib.sha1(repr(files).encode(), usedforsecurity=False).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of one request."""
        path = path.partition("?")[0]
        self.requests.append(f"{method} {path}")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
            return self._api(found, body)
        if path == "/api/validate-yaml":  # of a model card
            return 200, {}, json.dumps({"errors": [], "warnings": []}).encode()
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(f"{found[1] or ''}{found[2]}", found[3], found[4])
        return 404, {}, b"{}"

    def _api(self, found: re.Match[str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        name = found[2] if found[1] == "models" else f"datasets/{found[2]}"
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        rest = found[3] or ""
        files = self.repositories[name]
        if rest.startswith("preupload/"):
            asked = json.loads(body)["files"]
            modes = [
                {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                for one in asked
            ]
            return 200, {}, json.dumps({"files": modes}).encode()
        if rest.startswith("commit/"):
            return self._commit(name, body)
        kind, _, revision = rest.partition("/")
        if revision not in ("", "main", self.commit(name)):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if kind == "tree":
            tree = [
                {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}
                for path, data in files.items()
            ]
            return 200, {}, json.dumps(tree).encode()
        info: dict[str, Any] = {
            "id": found[2],
            "sha": self.commit(name),
            "private": self.private.get(name, False),
            "siblings": [{"rfilename": path} for path in files],
        }
        return 200, {}, json.dumps(info).encode()

    def _file(self, name: str, revision: str, file: str) -> tuple[int, dict[str, str], bytes]:
        if name not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = self.commit(name)
        if revision not in ("main", commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if file not in self.repositories[name]:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, b""
        data = self.repositories[name][file]
        return 200, {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}, data

    def _create(self, asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        self.repositories.setdefault(name, {})
        self.private[name] = bool(asked.get("private")) or asked.get("visibility") == "private"
        return 200, {}, json.dumps({"url": f"{self.url}/{name}", "id": name}).encode()

    def _commit(self, name: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        import base64

        for line in body.splitlines():
            said = json.loads(line)
            if said["key"] == "file":
                data = base64.b64decode(said["value"]["content"])
                self.repositories[name][said["value"]["path"]] = data
        commit = self.commit(name)
        url = f"{self.url}/{name}/commit/{commit}"
        return 200, {}, json.dumps({"commitUrl": url, "commitOid": commit}).encode()


@contextmanager
def serving(hub: FakeHub) -> Iterator[str]:
    """Serve on a free port of this machine; yields the address for HF_ENDPOINT."""

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            status, headers, body = hub.answer(self.command, self.path, self.rfile.read(length))
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_POST = _serve  # http.server's names

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub.url
    finally:
        server.shutdown()
        thread.join()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data, usedforsecurity=False).hexdigest()
