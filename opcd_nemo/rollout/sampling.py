"""How a token is drawn from logits, reproducibly.

Shape letters: `R` rows (sequences), `V` vocabulary.
"""

from __future__ import annotations

import hashlib

import torch

from opcd_nemo.config.sampling import Sampling


def row_seed(seed: int, step: int, index: int) -> int:
    """What one sequence's random numbers are made from, below 2 ** 63."""
    digest = hashlib.sha256(f"{seed}/{step}/{index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def row_uniforms(seed: int, step: int, index: int, count: int) -> torch.Tensor:
    """The `count` uniform numbers of one sequence: a pure function of (seed, step, index)."""
    generator = torch.Generator().manual_seed(row_seed(seed, step, index))
    return torch.rand(count, generator=generator, dtype=torch.float64)


def sample_tokens(
    logits_RV: torch.Tensor, uniform_R: torch.Tensor, sampling: Sampling
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their log-probabilities (nats, before top-k and top-p) by inverse CDF.

    The log-probability is that of the tempered distribution; greedy reports temperature 1.
    """
    logits_RV = logits_RV.float()
    if sampling.temperature == 0:
        token_R = logits_RV.argmax(-1)
    else:
        logits_RV = logits_RV / sampling.temperature
        kept_RV = _nucleus(_top_k(logits_RV, sampling.top_k), sampling.top_p)
        cdf_RV = kept_RV.softmax(-1).double().cumsum(-1)
        threshold_R1 = uniform_R.to(cdf_RV)[:, None] * cdf_RV[:, -1:]
        token_R = torch.searchsorted(cdf_RV, threshold_R1, right=True)[:, 0]
        token_R = token_R.clamp(max=logits_RV.shape[-1] - 1)
    chosen_R = logits_RV.gather(-1, token_R[:, None])[:, 0]
    return token_R, chosen_R - logits_RV.logsumexp(-1)


def _top_k(logits_RV: torch.Tensor, top_k: int) -> torch.Tensor:
    if top_k == 0 or top_k >= logits_RV.shape[-1]:
        return logits_RV
    kept = logits_RV.topk(top_k, dim=-1)
    return torch.full_like(logits_RV, -torch.inf).scatter(-1, kept.indices, kept.values)


def _nucleus(logits_RV: torch.Tensor, top_p: float) -> torch.Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches `top_p`."""
    if top_p >= 1:
        return logits_RV
    ordered = logits_RV.sort(dim=-1, descending=True)
    mass_RV = ordered.values.softmax(-1).double().cumsum(-1)
    before_RV = mass_RV - ordered.values.softmax(-1)
    values = ordered.values.masked_fill(before_RV >= top_p, -torch.inf)
    return torch.empty_like(logits_RV).scatter(-1, ordered.indices, values)
