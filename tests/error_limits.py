"""Measured errors against their bars; the worst of each bar is printed when the session ends."""

from __future__ import annotations

from collections.abc import Mapping

import torch

WORST: dict[str, tuple[float, float, str]] = {}


def check(bar: str, error: float, limit: float, where: str = "") -> None:
    """Record an error under its bar and fail when it is above the limit (or not a number)."""
    if not error <= WORST.get(bar, (-1.0, limit, ""))[0]:
        WORST[bar] = (error, limit, where)
    assert error <= limit, f"{bar}: {error:.3g} > {limit:.3g} {where}"


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest absolute expected value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    difference = (actual.double() - expected.double()).abs().max().item()
    scale = expected.double().abs().max().item()
    return difference / scale if scale else difference


def check_tensors(
    bar: str,
    actual: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    limit: float,
) -> None:
    """Check every tensor, each relative to the largest absolute value of that tensor."""
    assert actual.keys() == expected.keys(), actual.keys() ^ expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    for name in sorted(errors, key=errors.__getitem__):
        check(bar, errors[name], limit, name)
