"""The teacher reads the context and scores the student's tokens; its weights may follow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from opcd_nemo.config.train import TeacherConfig
from opcd_nemo.model.head import Head
from opcd_nemo.model.language_model import LanguageModel
from opcd_nemo.model.varlen import KeyValue
from opcd_nemo.training.batches import DistillBatch


class Teacher:
    """Scores without gradient; what is cached of its weights goes when they change.

    What `update` makes of the weights: `never` keeps those it was given. `every_n_steps` takes the
    student's every n steps. `ema` is `decay * teacher + (1 - decay) * student` after each step, in
    fp32, of the weights that the student's forward reads (not of its optimizer's masters). `shared`
    is the student itself.
    """

    def __init__(
        self, model: LanguageModel, prefix_ids: Sequence[int], settings: TeacherConfig
    ) -> None:
        """Take the model.

        Args:
            model: of the teacher, without gradient; for `shared` the student's model.
            prefix_ids: the tokens that the teacher's prompts share (the context).
            settings: how the weights follow the student.
        """
        self.model, self.prefix_ids, self.update = model, tuple(prefix_ids), settings.update
        self._every, self._decay = settings.sync_every_n_steps or 0, settings.ema_decay or 0.0
        self._prefix: dict[int, KeyValue] | None = None
        self._averages: list[torch.Tensor] = []
        self.version = 0
        """How many steps the student had taken when the weights were last set."""
        if self.update != "shared":
            model.module.requires_grad_(False)
        if self.update == "ema":  # of an fp32 model these are its parameters, else copies
            self._averages = [p.detach().float() for p in model.module.parameters()]

    @property
    def is_updated(self) -> bool:
        """Whether the weights change while the student learns."""
        return self.update != "never"

    def head(self, hidden_NH: torch.Tensor) -> Head:
        """The output head over these hidden states, without gradient."""
        head = self.model.head(hidden_NH)
        return replace(head, weight_VH=head.weight_VH.detach())

    def score(self, batches: Sequence[DistillBatch]) -> list[torch.Tensor]:
        """Hidden states [N, H] of each micro-batch's response tokens, in the student's order.

        Empty on every pipeline stage but the last. Collective over tp, pp and cp.
        """
        streams = [stream for batch in batches for stream in batch.teacher]
        if self._prefix is None and any(stream.has_prefix for stream in streams):
            # the keys and values of the context are the same for every prompt until the weights
            # change: `_mark_updated` drops them
            self._prefix = self.model.prefix(self.prefix_ids)
        prefixes = [self._prefix if stream.has_prefix else None for stream in streams]
        hidden = self.model.score([stream.batch for stream in streams], prefixes)
        if not hidden:
            return []
        parts = iter(hidden)
        return [self._in_order(batch, [next(parts) for _ in batch.teacher]) for batch in batches]

    @torch.no_grad()
    def after_step(self, num_steps: int, student: LanguageModel) -> None:
        """Follow the student, whose optimizer has taken `num_steps` steps."""
        if self.update == "never" or (self.update == "every_n_steps" and num_steps % self._every):
            return
        mine, theirs = self.model.module.parameters(), student.module.parameters()
        if self.update == "every_n_steps":
            for parameter, other in zip(mine, theirs, strict=True):
                parameter.copy_(other)
        elif self.update == "ema":
            for average, other in zip(self._averages, theirs, strict=True):
                average.mul_(self._decay).add_(other, alpha=1 - self._decay)
            self._take_averages()
        self._mark_updated(num_steps)

    def state(self) -> dict[str, torch.Tensor]:
        """This rank's shard of what a checkpoint must hold, by parameter name; often nothing."""
        names = [name for name, _ in self.model.module.named_parameters()]
        if self.update == "ema":
            return dict(zip(names, self._averages, strict=True))
        if self.update == "every_n_steps":
            return {name: p.detach() for name, p in self.model.module.named_parameters()}
        return {}

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], num_steps: int) -> None:
        """Become what `state` gave after `num_steps` steps."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])
        self._take_averages()
        if self.is_updated:
            self._mark_updated(num_steps)

    def _take_averages(self) -> None:
        if self._averages:
            for parameter, average in zip(
                self.model.module.parameters(), self._averages, strict=True
            ):
                parameter.copy_(average)

    def _mark_updated(self, num_steps: int) -> None:
        self.version, self._prefix = num_steps, None

    def _in_order(self, batch: DistillBatch, parts: list[torch.Tensor]) -> torch.Tensor:
        indices = torch.cat([stream.tokens_N for stream in batch.teacher])
        hidden = torch.cat(parts)
        return torch.empty_like(hidden).index_copy_(0, indices, hidden)
