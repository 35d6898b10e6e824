"""What ends a program: a mistake that its user can mend, and the other ways a run ends early."""

from __future__ import annotations

import re
from pathlib import PurePath

# what moves a terminal's cursor or colours it, reorders what is read, or is no character at all
_UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    r"""A stranger's text as a terminal may show it: `\x1b` in place of an escape character."""
    return _UNSEEN.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


class _Absent:
    """The value of a key that has none, or of a key that is a file or a package."""

    def __repr__(self) -> str:
        return "ABSENT"

    def __reduce__(self) -> str:
        return "ABSENT"  # in another process, too, there is one


ABSENT = _Absent()
_LONGEST = 300  # letters of a value that an error shows


class UserError(ValueError):
    """A mistake that the user can mend, told in one line.

    Programs print the line and end with exit code 2; every other exception gets a traceback.

    Attributes:
        key: the configuration key, environment variable, file or command that is wrong.
        value: its value; `ABSENT` where the line should not show one.
        allowed: what is accepted instead, in words.
        problem: what is wrong with the value, where that is not plain from `allowed`.
        where: the file or server in which the key was found, where that is not the configuration.
    """

    def __init__(
        self,
        key: str | PurePath,
        value: object = ABSENT,
        allowed: str = "",
        *,
        problem: str | None = None,
        where: str | None = None,
    ) -> None:
        assert allowed, "a user must be told what is accepted"
        self.key, self.value, self.allowed = str(key), value, allowed
        self.problem, self.where = problem, where
        super().__init__(key, value, allowed)

    @property
    def found(self) -> str:
        """`[where: ]key=value[: problem]`, what is wrong, in one line."""
        shown = self.key if self.value is ABSENT else f"{self.key}={_in_words(self.value)}"
        parts = (self.where, shown, self.problem)
        return visible(" ".join(": ".join(part for part in parts if part is not None).split()))

    def __str__(self) -> str:
        """What is wrong and what is allowed, in one line."""
        return f"{self.found}; allowed: {visible(' '.join(self.allowed.split()))}"

    def said_of(self, key: str, value: object) -> UserError:
        """The same mistake, said of the configuration key whose value led to it.

        A reader of files knows the file that is wrong, not the key that named the file.
        """
        names_the_value = self.where is None and self.key == str(value)
        problem = self.problem if names_the_value else self.found
        return UserError(key, value, self.allowed, problem=problem)

    def __reduce__(self) -> tuple[object, ...]:
        """Copy all fields to another process."""
        return _rebuilt, (self.key, self.value, self.allowed, self.problem, self.where)


def _rebuilt(
    key: str, value: object, allowed: str, problem: str | None, where: str | None
) -> UserError:
    return UserError(key, value, allowed, problem=problem, where=where)


def _in_words(value: object) -> str:
    """A value as YAML would write it, as far as a user must recognise it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = str(value)
    if len(text) > _LONGEST:
        return f"{text[:_LONGEST]}... ({len(text)} letters)"
    return text


class StoppedBySignal(Exception):
    """A run ended early, at a step boundary, with a checkpoint."""


class StoppedByFile(Exception):
    """A run ended early because its folder has the file STOP; it is not to be started again."""


class NonFiniteError(RuntimeError):
    """A loss or gradient is not finite; nothing was updated."""


class MismatchError(RuntimeError):
    """What was sampled is not what the student would sample; nothing was updated."""


class EngineError(RuntimeError):
    """A rollout engine's server is lost, or answers what cannot be; nothing was updated."""


class SaveError(RuntimeError):
    """A checkpoint could not be written; those before it are intact."""


class ReadError(RuntimeError):
    """A disk does not give what it holds; nothing was changed, and a later start may succeed."""


class RunFailed(RuntimeError):
    """Processes that a function of `opcd_nemo.api` has started ended with an error.

    Attributes:
        code: their exit code.
        line: what they said last.
    """

    def __init__(self, code: int, line: str) -> None:
        self.code, self.line = code, line
        super().__init__(code, line)

    def __str__(self) -> str:
        """The line, with the exit code."""
        return f"{self.line} (exit code {self.code})"


class CheckFailed(RuntimeError):
    """The doctor found what would go wrong in a run, and has said what mends it."""
