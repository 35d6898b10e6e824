"""The process that renders a stranger's chat template, and dies of a template that takes long.

Run as a file, without the site's packages, so that it starts in a twentieth of a second. A template
can loop (`range` in `range`) or make gigabytes (`'a' * 10**9`) in ways that no list of constructs
would name; the kernel limits CPU time and memory instead. Lines of JSON go in and out: the answer
of a template that breaks out of Jinja's sandbox is still no more than a text.

    template_process.py FOLDERS_OF_JINJA2_AND_MARKUPSAFE CPU_S MEMORY_BYTES
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn


def template_environment() -> Any:
    """What chat templates are written for: the settings and functions of transformers."""
    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.nodes import Scope
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks what training masks; here it only has to parse."""

        tags = {"generation"}  # noqa: RUF012 - jinja's interface

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def strftime_now(layout: str) -> str:
        return datetime.now().strftime(layout)

    def tojson(value: Any, ensure_ascii: bool = False, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", GenerationTag]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


class _Renderer:
    """One template, compiled at its first use."""

    def __init__(self, source: str) -> None:
        self._source, self._environment = source, template_environment()
        self._template: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """`text` of a chat, or the `names` of the template's variables."""
        if "variables" not in request:
            from jinja2.meta import find_undeclared_variables

            tree = self._environment.parse(self._source)
            return {"names": sorted(find_undeclared_variables(tree))}
        if self._template is None:
            self._template = self._environment.from_string(self._source)
        text = self._template.render(**request["variables"])
        if len(text) > request["longest"]:
            return {"error": f"it makes {len(text)} letters of a chat", "limit": True}
        return {"text": text}


def main() -> None:
    """Answer each line with a line; the first line is the template."""
    # whoever started this process ends it; Ctrl-C and a cluster's signals to all processes do not
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(ignored, signal.SIG_IGN)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.path += sys.argv[1].split(":")
    cpu_s, memory = float(sys.argv[2]), int(sys.argv[3])
    renderer = _Renderer(json.loads(sys.stdin.readline()))
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - pathlib takes 10 ms
        memory += int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        try:
            answer = json.dumps(renderer.answer(json.loads(line)))
        except MemoryError:
            answer = json.dumps({"error": "it takes more memory than a chat needs", "limit": True})
        except Exception as error:  # a template can fail as any program
            answer = json.dumps({"error": _first_words(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


def _first_words(error: Exception) -> str:
    try:
        words = str(error) or type(error).__name__
    except Exception:
        words = type(error).__name__
    return words[:300]


if __name__ == "__main__":
    main()
