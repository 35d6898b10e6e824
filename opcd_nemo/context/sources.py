"""What the teacher sees and the student does not."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from opcd_nemo.context.items import as_text, shuffled_words
from opcd_nemo.context.registry import read_entry
from opcd_nemo.errors import UserError
from opcd_nemo.types import Message

_SLOTS = re.compile(r"\{(experience|question|opening|situation)\}")
_BY_A_PERSON = "a person, in the configuration"


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """A system message, then question and answer pairs, all put before the question.

    `wrap` stands around the question: `{experience}` is the experience in it, `{question}` the
    question; or `{opening}` its first paragraph and `{situation}` the others. Nothing here is ever
    cut: a context that does not fit the model is an error of its user.
    """

    system: str | None
    demonstrations: tuple[tuple[str, str], ...]
    experience: str | None = None
    wrap: str | None = None

    def messages(self, question: str) -> tuple[Message, ...]:
        """Return the chat that ends with `question`."""
        messages: list[Message] = []
        if self.system is not None:
            messages.append({"role": "system", "content": self.system})
        for problem, solution in self.demonstrations:
            messages.append({"role": "user", "content": problem})
            messages.append({"role": "assistant", "content": solution})
        messages.append({"role": "user", "content": self.wrapped(question)})
        return tuple(messages)

    def wrapped(self, question: str) -> str:
        """Return the question within the experience."""
        if self.wrap is None:
            return question
        opening, _, situation = question.partition("\n\n")
        texts = {
            "experience": self.experience or "",
            "question": question,
            "opening": opening,
            "situation": situation,
        }
        return _SLOTS.sub(lambda slot: texts[slot[1]], self.wrap)  # once: texts may hold braces

    def shuffled(self, seed: int) -> Context:
        """Return a control: the words in random places, as many in each text as before.

        The demonstrations' questions and the template around the question stay.
        """
        solutions = shuffled_words([solution for _, solution in self.demonstrations], seed)
        problems = (problem for problem, _ in self.demonstrations)
        lines = None if self.experience is None else self.experience.splitlines()
        return replace(
            self,
            system=None if self.system is None else shuffled_words([self.system], seed)[0],
            demonstrations=tuple(zip(problems, solutions, strict=True)),
            experience=None if lines is None else "\n".join(shuffled_words(lines, seed)),
        )

    @property
    def content_hash(self) -> str:
        """SHA-256, in hex, of the context's canonical JSON text."""
        parts = {
            "demonstrations": self.demonstrations,
            "system": self.system,
            **({} if self.wrap is None else {"experience": self.experience, "wrap": self.wrap}),
        }
        canonical = json.dumps(
            parts,
            ensure_ascii=True,
            separators=(",", ":"),
            sort_keys=True,
        )
        return hashlib.sha256(canonical.encode()).hexdigest()


class ContextSource(Protocol):
    """Chooses the context of an episode."""

    lineage: Mapping[str, Any]
    """Who wrote the contexts, from what."""

    def context(self, uid: str, step: int) -> Context:
        """Return the context of episode `uid` at `step`; pure in both."""
        ...

    def contexts(self) -> tuple[Context, ...]:
        """Return every context that `context` may give, without repetition."""
        ...

    def frozen(self) -> dict[str, Any] | None:
        """Return the plug that gives the same where no registry is; None: the plug as it is."""
        ...


class OneContext:
    """The same context for every episode."""

    def __init__(self, context: Context, lineage: Mapping[str, Any]) -> None:
        self._context, self.lineage = context, lineage

    def context(self, uid: str, step: int) -> Context:
        """Return the one context."""
        return self._context

    def contexts(self) -> tuple[Context, ...]:
        """Return the one context."""
        return (self._context,)

    def frozen(self) -> dict[str, Any] | None:
        """Return None: the configuration holds it all."""
        return None


class NoContext(OneContext):
    """Nothing: the teacher reads what the student reads."""

    def __init__(self) -> None:
        super().__init__(Context(system=None, demonstrations=()), {"written_by": "nobody"})


class ShuffledContext:
    """A control: another source's contexts with their words in random places."""

    def __init__(self, source: ContextSource, seed: int) -> None:
        self._source, self._seed = source, seed
        self.lineage: Mapping[str, Any] = {"written_by": "a shuffle", "seed": seed}

    def context(self, uid: str, step: int) -> Context:
        """Return the shuffled context of the episode."""
        return self._source.context(uid, step).shuffled(self._seed)

    def contexts(self) -> tuple[Context, ...]:
        """Return every context, shuffled."""
        return tuple(context.shuffled(self._seed) for context in self._source.contexts())

    def frozen(self) -> dict[str, Any] | None:
        """Return None: no configuration names it."""
        return None


class FixedContext(OneContext):
    """The same system prompt for every episode."""

    def __init__(self, *, system: str) -> None:
        """Raises: UserError when `system` is blank."""
        _require_text("context.system", system)
        super().__init__(Context(system=system, demonstrations=()), _lineage(type(self)))


class FewShotContext(OneContext):
    """The same demonstrations, and perhaps a system prompt, for every episode."""

    def __init__(self, *, system: str | None, demonstrations: Sequence[Mapping[str, str]]) -> None:
        """Take demonstrations as mappings with the keys `question` and `answer`.

        Raises:
            UserError: no demonstration, other keys, or a blank text.
        """
        if system is not None:
            _require_text("context.system", system)
        if not demonstrations:
            raise UserError("context.demonstrations", [], "one demonstration or more")
        pairs = tuple(_pair(index, one) for index, one in enumerate(demonstrations))
        super().__init__(Context(system=system, demonstrations=pairs), _lineage(type(self)))


class ExperienceContext(OneContext):
    """Experience items, of a registry or given, around every question."""

    def __init__(
        self,
        *,
        path: str | None,
        items: Sequence[str] | None,
        lineage: Mapping[str, Any] | None,
        template: str,
    ) -> None:
        """Take items, or read an entry.

        Args:
            path: an entry's file, or a registry's folder (its selected entry), as
                `context.path=runs/demo_games/registry`.
            items: the items themselves, in place of a path, with their `lineage`.
            lineage: as of an entry; null with a path.
            template: `Context.wrap`.

        Raises:
            UserError: both or neither of path and items, or an entry that cannot be read.
        """
        _check_template(template)
        if (path is None) == (items is None):
            raise UserError(
                "context.path",
                path,
                "one of context.path and context.items, the other null",
                problem=f"context.items={items}",
            )
        if path is not None:
            entry = read_entry(Path(path))
            items, lineage = entry.items, {**entry.lineage, "experience": entry.hash}
        assert items is not None
        self.items = tuple(str(item) for item in items)
        if not all(item.strip() for item in self.items) or not self.items:
            raise UserError("context.items", items, "one item or more, none blank")
        self.template = template
        context = Context(
            system=None, demonstrations=(), experience=as_text(self.items), wrap=template
        )
        super().__init__(context, lineage or _lineage(type(self)))

    def frozen(self) -> dict[str, Any]:
        """Return the plug that gives the same where no registry is."""
        return {
            "_target_": _name(type(self)),
            "path": None,
            "items": list(self.items),
            "lineage": dict(self.lineage),
            "template": self.template,
        }


class ExperiencePool:
    """Several experiences; every episode draws an experience, anew at each step.

    Source: Online Experiential Learning (arXiv 2603.16856), several knowledge files.
    """

    def __init__(
        self,
        *,
        paths: Sequence[str] | None,
        pool: Sequence[Mapping[str, Any]] | None,
        template: str,
        seed: int,
    ) -> None:
        """Read the entries, or take `pool`: mappings with the keys `items` and `lineage`.

        Raises:
            UserError: both or neither, none in it, or an entry that cannot be read.
        """
        if (paths is None) == (pool is None) or not (paths or pool):
            raise UserError(
                "context.paths",
                paths,
                "a list of one or more, with context.pool=null; or the other way round",
                problem=f"context.pool={pool}",
            )
        given: list[dict[str, Any]]
        if pool is None:
            given = [{"path": str(path), "items": None, "lineage": None} for path in paths or ()]
        else:
            given = [{"path": None, **one} for one in pool]
        self._sources = [ExperienceContext(**one, template=template) for one in given]
        self._contexts = tuple(dict.fromkeys(source.context("", 0) for source in self._sources))
        self.lineage: Mapping[str, Any] = {"pool": [dict(one.lineage) for one in self._sources]}
        self._template, self._seed = template, seed

    def context(self, uid: str, step: int) -> Context:
        """Return the context that (seed, step, uid) draws."""
        digest = hashlib.sha256(f"{self._seed}/{step}/{uid}".encode()).digest()
        return self._contexts[int.from_bytes(digest[:8], "little") % len(self._contexts)]

    def contexts(self) -> tuple[Context, ...]:
        """Return the pool."""
        return self._contexts

    def frozen(self) -> dict[str, Any]:
        """Return the plug that gives the same where no registry is."""
        return {
            "_target_": _name(type(self)),
            "paths": None,
            "pool": [{"items": list(s.items), "lineage": dict(s.lineage)} for s in self._sources],
            "template": self._template,
            "seed": self._seed,
        }


def content_hash(source: ContextSource) -> str:
    """SHA-256, in hex, of all that a source may give."""
    hashes = [context.content_hash for context in source.contexts()]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("/".join(hashes).encode()).hexdigest()


def _lineage(kind: type) -> dict[str, str]:
    return {"written_by": _BY_A_PERSON, "source": _name(kind)}


def _name(kind: type) -> str:
    module = "opcd_nemo.context" if kind.__module__ == __name__ else kind.__module__
    return f"{module}.{kind.__qualname__}"  # the name under which configurations know it


def _check_template(template: str) -> None:
    _require_text("context.template", template)
    slots = sorted(_SLOTS.findall(template))
    if slots not in (["experience", "question"], ["experience", "opening", "situation"]):
        raise UserError(
            "context.template",
            repr(template),
            "{experience} and {question}, or {experience}, {opening} and {situation}, each once",
        )


def _pair(index: int, demonstration: Mapping[str, str]) -> tuple[str, str]:
    key = f"context.demonstrations[{index}]"
    if set(demonstration) != {"question", "answer"}:
        raise UserError(key, sorted(demonstration), "the keys question and answer")
    _require_text(f"{key}.question", demonstration["question"])
    _require_text(f"{key}.answer", demonstration["answer"])
    return demonstration["question"], demonstration["answer"]


def _require_text(key: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise UserError(key, repr(value), "a text that is not blank")
