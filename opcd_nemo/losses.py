"""Distillation losses: a weighted sum over response tokens, from hidden states and output heads.

The divergences live in `opcd_kernels`; here are only their choice and their statistics.

Shape letters: `N` response tokens, `H` hidden, `V` vocabulary of this rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Protocol

import torch

from opcd_kernels import (
    Kind,
    Tail,
    count_nonfinite,
    linear_divergence,
    linear_token_logprob,
    linear_topk_divergence,
)
from opcd_kernels.checks import MAX_TOP_K
from opcd_nemo.config.doc import Doc
from opcd_nemo.config.limits import LEAST_TEMPERATURE, MOST_TEMPERATURE, MOST_TOKENS
from opcd_nemo.errors import UserError
from opcd_nemo.metrics import Stats
from opcd_nemo.model.head import Head

Share = Annotated[float, Doc(words="the student's share of the mixture in jsd", above=0, below=1)]
Temperature = Annotated[
    float,
    Doc(
        words="divides both models' logits; independent of the rollout's",
        minimum=LEAST_TEMPERATURE,
        maximum=MOST_TEMPERATURE,
    ),
]
ChunkTokens = Annotated[
    int,
    Doc(words="answer tokens whose logits exist at once", minimum=1, maximum=MOST_TOKENS),
]
BAD_TOKENS = ("loss/nan_tokens", "loss/infinite_tokens")
"""Counted in the statistics of a loss that is not finite."""
CAPTURED_MASS = "loss/captured_mass"
"""Probability on the k tokens of a top-k loss, under the model that chose them."""
MISMATCH, MISMATCH_K3 = "rollout/mismatch", "rollout/mismatch_k3"
"""Of what an engine sampled: see `mismatch`."""
_COMPARED_TOKENS = (
    32  # of a micro-batch: a head product of few rows; stale weights are 1.6 nats off
)
LossSum = tuple[torch.Tensor, Stats]
"""A weighted sum over response tokens, and its statistics, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenTargets:
    """The response tokens of a loss: which were sampled, and what each of them weighs."""

    target_ids_N: torch.Tensor
    weight_N: torch.Tensor


class Loss(Protocol):
    """What a student's head is trained by; a `needs_teacher` loss is given the teacher's too."""

    needs_teacher: bool

    def __call__(self, student: Head, teacher: Head | None, tokens: TokenTargets) -> LossSum:
        """Collective over tp."""


class DivergenceLoss:
    """Exact full-vocabulary divergence of student and teacher.

    Source: On-Policy Context Distillation (arXiv 2602.12275) eq. 1-2 for `reverse_kl`.
    """

    needs_teacher = True

    def __init__(
        self, kind: Kind, beta: Share, temperature: Temperature, chunk_tokens: ChunkTokens
    ) -> None:
        self._kind, self._beta = kind, beta
        self._temperature, self._chunk_tokens = temperature, chunk_tokens

    def __call__(self, student: Head, teacher: Head | None, tokens: TokenTargets) -> LossSum:
        """Sum of weight * divergence. Collective over tp."""
        assert teacher is not None
        loss_N = linear_divergence(
            student.hidden_NH,
            student.weight_VH,
            teacher.hidden_NH,
            teacher.weight_VH,
            kind=self._kind,
            beta=self._beta,
            temperature=self._temperature,
            group=student.group,
            chunk_tokens=self._chunk_tokens,
            num_valid_columns=student.num_valid_columns,
            weight_N=tokens.weight_N,
        )
        return _weighted(f"loss/{self._kind}", loss_N, tokens.weight_N)


class TopKLoss:
    """Divergence over the k likeliest tokens: the student's for reverse_kl, else the teacher's.

    Source: On-Policy Context Distillation (arXiv 2602.12275) sums eq. 2 over the student's k = 256;
    its code drops the tail, whose other treatments are in kernels/README.md.
    """

    needs_teacher = True

    def __init__(
        self,
        kind: Literal["reverse_kl", "forward_kl"],
        k: int,
        tail: Tail,
        temperature: Temperature,
        chunk_tokens: ChunkTokens,
    ) -> None:
        """Check what the annotations do not say.

        Raises:
            UserError: k is out of range, or the tail does not belong to the kind.
        """
        if not 1 <= k <= MAX_TOP_K:
            raise UserError("loss.k", k, f"1 to {MAX_TOP_K}")
        if kind == "forward_kl" and tail == "stop_gradient":
            raise UserError("loss.tail", tail, "bucket, renorm or drop with loss.kind=forward_kl")
        self.k = k
        self._kind, self._tail = kind, tail
        self._temperature, self._chunk_tokens = temperature, chunk_tokens

    def __call__(self, student: Head, teacher: Head | None, tokens: TokenTargets) -> LossSum:
        """Sum of weight * divergence. Collective over tp."""
        assert teacher is not None
        result = linear_topk_divergence(
            student.hidden_NH,
            student.weight_VH,
            teacher.hidden_NH,
            teacher.weight_VH,
            kind=self._kind,
            k=self.k,
            tail=self._tail,
            temperature=self._temperature,
            group=student.group,
            chunk_tokens=self._chunk_tokens,
            num_valid_columns=student.num_valid_columns,
            weight_N=tokens.weight_N,
        )
        # the mass under the model whose top k was taken
        mass_N = result.student_mass_N if self._kind == "reverse_kl" else result.teacher_mass_N
        return _weighted(f"loss/{self._kind}", result.loss_N, tokens.weight_N, mass_N)


class HardLabelLoss:
    """Negative log-likelihood of the sampled tokens: SFT on the teacher's samples."""

    needs_teacher = False

    def __init__(self, temperature: Temperature, chunk_tokens: ChunkTokens) -> None:
        self._temperature, self._chunk_tokens = temperature, chunk_tokens

    def __call__(self, student: Head, teacher: Head | None, tokens: TokenTargets) -> LossSum:
        """Sum of weight * -log p(target). Collective over tp."""
        loss_N = -linear_token_logprob(
            student.hidden_NH,
            student.weight_VH,
            tokens.target_ids_N,
            temperature=self._temperature,
            group=student.group,
            chunk_tokens=self._chunk_tokens,
            num_valid_columns=student.num_valid_columns,
            weight_N=tokens.weight_N,
        )
        return _weighted("loss/nll", loss_N, tokens.weight_N)


@torch.no_grad()
def mismatch(
    head: Head, target_ids_N: torch.Tensor, sampled_logprob_N: torch.Tensor, temperature: float
) -> Stats:
    """How far an engine's log-probabilities are from the trainer's, in nats a token.

    `rollout/mismatch` is the mean of the trainer's less the engine's, `rollout/mismatch_k3` of
    r - 1 - log r with r = p_trainer / p_engine, which estimates KL(engine || trainer). At most
    `_COMPARED_TOKENS` of the tokens are looked at, evenly apart. Collective over tp.
    """
    some = slice(None, None, max(1, -(-len(target_ids_N) // _COMPARED_TOKENS)))
    trainer_N = linear_token_logprob(
        head.hidden_NH[some],
        head.weight_VH,
        target_ids_N[some],
        temperature=temperature or 1.0,  # greedy answers have the plain distribution's
        group=head.group,
        num_valid_columns=head.num_valid_columns,
    )
    gap_N = trainer_N.double() - sampled_logprob_N[some].double()
    gap, k3 = torch.stack([gap_N.sum(), (gap_N.exp() - 1 - gap_N).sum()]).tolist()
    count = float(len(gap_N))
    return Stats({MISMATCH: (gap, count), MISMATCH_K3: (k3, count)})


def _weighted(
    name: str, loss_N: torch.Tensor, weight_N: torch.Tensor, mass_N: torch.Tensor | None = None
) -> LossSum:
    """The sum of weighted losses, logged as a mean over the weights; what went wrong is counted."""
    total = loss_N.sum()
    sums = [total.detach(), weight_N.sum()]
    if mass_N is not None:
        sums.append((mass_N * weight_N).sum())
    # together: each value that the host reads makes it wait for the GPU
    value, weight, *captured = torch.stack([each.double() for each in sums]).tolist()
    stats = Stats({name: (value, weight)})
    if captured:
        stats.add(Stats({CAPTURED_MASS: (captured[0], weight)}))
    if not math.isfinite(value):
        counts = zip(BAD_TOKENS, count_nonfinite(loss_N), strict=True)
        stats.add(Stats({key: (float(count), 1.0) for key, count in counts}))
    return total, stats
