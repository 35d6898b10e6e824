"""What a rollout engine must do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from opcd_nemo.config.plugs import plug_factory
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.types import Prompt, Sample


class RolloutEngine(Protocol):
    """Continues prompts with the weights that it loaded last."""

    @property
    def weights_version(self) -> int:
        """The version of the weights that are held."""

    def load_weights(self, version: int) -> None:
        """Take the model's present weights, under this version number."""

    def release_weights(self) -> None:
        """Free what `load_weights` holds, until `load_weights` is called again."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prefix_ids: Sequence[int] = (),
    ) -> list[Sample]:
        """One continuation a prompt, in order; prompts may share `prefix_ids` at their start."""


@runtime_checkable
class ThreadedEngine(RolloutEngine, Protocol):
    """An engine whose samples a thread may draw while the ranks train."""

    def speaker(self) -> RolloutEngine | None:
        """The engine at the weights that it holds, of which no call is collective.

        None on ranks that do not speak to it: they are given what the others have sampled.
        """


class Speaker:
    """An engine at the weights that are held, for a thread: no call is collective."""

    def __init__(self, sample: Callable[..., list[Sample]], weights_version: int) -> None:
        """Sample by a function that takes what `generate` takes, but for the prefix."""
        self._sample, self.weights_version = sample, weights_version

    def load_weights(self, version: int) -> None:
        """The version that is held, or the caller has a fault."""
        assert version == self.weights_version

    def release_weights(self) -> None:
        """Nothing: the engine that made this one releases."""

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        prefix_ids: Sequence[int] = (),
    ) -> list[Sample]:
        """One continuation a prompt, in order; `prefix_ids` are left to the sampling function."""
        return self._sample(prompts, sampling, seed=seed, step=step)


def check_engine(
    plug: Mapping[str, Any], models: Sequence[ModelConfig], longest: int, *, on_cpu: bool
) -> None:
    """Let an engine whose class has a `check` look for what it needs, before a model loads.

    Args:
        plug: the engine of a configuration.
        models: that it samples from.
        longest: a prompt and its answer, in tokens.
        on_cpu: whether the run is on CPUs.

    Raises:
        UserError: a server is not there, or does not fit.
    """
    check = getattr(plug_factory("engine", plug), "check", None)
    if check is not None:
        check(plug, models, longest, on_cpu=on_cpu)
