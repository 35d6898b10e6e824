"""What a check says, and the table of all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from opcd_nemo.errors import CheckFailed, UserError

Status = Literal["pass", "warn", "fail", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One row: what was looked at, what was found, and what mends it unless it passed."""

    name: str
    status: Status
    found: str
    mend: str = ""

    def __post_init__(self) -> None:
        """Check that who must act is told how."""
        assert self.mend or self.status in ("pass", "skip"), self.name


def judge(name: str, good: bool, found: str, mend: str, otherwise: Status = "fail") -> Check:
    """A row that passes when `good`, and is `otherwise` if not."""
    return (
        Check(name=name, status="pass", found=found)
        if good
        else Check(name=name, status=otherwise, found=found, mend=mend)
    )


def refusal(name: str, error: UserError) -> Check:
    """A row that fails with what a refusal says is wrong and what it allows."""
    return Check(name=name, status="fail", found=error.found, mend=f"use {error.allowed}")


def attempt(name: str, look: Callable[[], Check]) -> Check:
    """What `look` returns, or a failed row if `look` refuses."""
    try:
        return look()
    except UserError as error:
        return refusal(name, error)


def failed(checks: Sequence[Check]) -> list[str]:
    """Names of the checks that failed."""
    return [check.name for check in checks if check.status == "fail"]


def table(checks: Sequence[Check]) -> str:
    """The rows, with a line of what mends it under each that did not pass."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{check.status.upper()}  {check.name:{width}}  {check.found}")
        if check.mend:
            lines.append(f"      {'':{width}}  -> {check.mend}")
    counts = {status: sum(check.status == status for check in checks) for status in _ORDER}
    return "\n".join([*lines, ", ".join(f"{n} {status}" for status, n in counts.items())])


_ORDER: tuple[Status, ...] = ("pass", "warn", "fail", "skip")


def stop_if_failed(checks: Sequence[Check]) -> None:
    """Raises: CheckFailed naming the failed checks."""
    names = failed(checks)
    if names:
        raise CheckFailed(f"{len(names)} of {len(checks)} checks failed: {', '.join(names)}")
