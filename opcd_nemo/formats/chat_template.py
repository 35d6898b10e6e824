"""A chat template, rendered in a separate process under limits of CPU time and memory."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from opcd_nemo.config import limits
from opcd_nemo.errors import UserError
from opcd_nemo.formats import template_process
from opcd_nemo.storage.answering_process import AnsweringProcess
from opcd_nemo.types import Message

_CHATS = "a task and a context whose messages the model's chat template takes"
_BOUNDED = (
    f"a template that renders a chat within {limits.TEMPLATE_CPU_S:g} CPU-seconds, "
    f"{limits.TEMPLATE_MEMORY_BYTES >> 20} MiB and {limits.TEMPLATE_GROWTH} times its length"
)


class ChatTemplate(AnsweringProcess):
    """Renders chats to text; the process that does starts with the first chat."""

    def __init__(self, source: str, where: str) -> None:
        """Parse the template.

        Raises:
            UserError: the text is no Jinja template, or too long for a template.
        """
        self.source, self._where = source, where
        if len(source) > limits.TEMPLATE_BYTES:
            raise UserError(
                where,
                allowed=f"at most {limits.TEMPLATE_BYTES} letters",
                problem=f"chat template has {len(source)} letters",
            )
        try:
            template_process.template_environment().parse(source)
        except Exception as error:  # jinja's lexer and parser raise more than they say
            raise UserError(
                where, allowed="Jinja", problem=f"chat template does not compile ({error!s:.300})"
            ) from error
        super().__init__()
        self._beyond_limits: UserError | None = None

    def render(self, messages: Sequence[Message], variables: Mapping[str, Any]) -> str:
        """The text of a chat.

        Raises:
            UserError: the template refuses the messages, or takes too much time or memory.
        """
        given = {"messages": [dict(message) for message in messages], **variables}
        length = len(json.dumps(given)) + len(self.source)
        longest = limits.TEMPLATE_GROWTH * length + limits.KIB
        answer = self._ask({"variables": given, "longest": longest}, in_words(messages))
        return str(answer["text"])

    def names(self) -> set[str]:
        """The variables that the template reads."""
        return set(self._ask({}, "its own variables")["names"])

    def _ask(self, request: Mapping[str, Any], what: str) -> dict[str, Any]:
        if self._beyond_limits is not None:
            raise self._beyond_limits
        with self._lock:
            process = self._running() or self._start()
            try:
                answer: dict[str, Any] = _exchange(process, request)
            except (EOFError, OSError):
                answer = {"error": _of_its_death(process.wait()), "limit": True}
                self._end()
            except BaseException:  # an interrupt: the next chat must not read this answer
                self._end()
                raise
        if "error" not in answer:
            return answer
        problem = f"the chat template refuses {what}: {answer['error']}"
        if "limit" not in answer:
            raise UserError(self._where, allowed=_CHATS, problem=problem)
        self._beyond_limits = UserError(self._where, allowed=_BOUNDED, problem=problem)
        raise self._beyond_limits

    def _start(self) -> subprocess.Popen[bytes]:
        script = str(Path(template_process.__file__))
        limit = str(limits.TEMPLATE_CPU_S), str(limits.TEMPLATE_MEMORY_BYTES)
        folders = ":".join(map(_folder_of, ("jinja2", "markupsafe")))
        process = self._launch(
            [sys.executable, "-I", "-S", script, folders, *limit],
            stderr=subprocess.DEVNULL,  # a template's words are no output of this program
        )
        _write(process, self.source)
        return process


def _folder_of(package: str) -> str:
    found = find_spec(package)
    assert found is not None
    assert found.origin is not None
    return str(Path(found.origin).parents[1])


def in_words(messages: Sequence[Message]) -> str:
    """Who speaks in a chat, for an error: `a chat of system, user`."""
    return f"a chat of {', '.join(message['role'] for message in messages)}"


def _write(process: subprocess.Popen[bytes], value: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(value).encode() + b"\n")
    process.stdin.flush()


def _exchange(process: subprocess.Popen[bytes], request: object) -> Any:
    assert process.stdout is not None
    _write(process, request)
    line = process.stdout.readline()
    if not line.endswith(b"\n"):
        raise EOFError
    return json.loads(line)


def _of_its_death(code: int) -> str:
    if -code == signal.SIGPROF:
        return f"it takes more than {limits.TEMPLATE_CPU_S:g} CPU-seconds"
    return f"the process that renders died (exit code {code})"
