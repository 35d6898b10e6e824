"""What a rollout engine must do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opcd_nemo.config.sampling import Sampling
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
