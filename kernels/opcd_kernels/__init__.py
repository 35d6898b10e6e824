"""Vocabulary-parallel divergences and token log-probabilities, fused with their gradients."""

from opcd_kernels.divergence import divergence
from opcd_kernels.linear_divergence import linear_divergence
from opcd_kernels.linear_token_logprob import linear_token_logprob
from opcd_kernels.linear_topk import linear_topk_divergence
from opcd_kernels.options import Kind, LogitMap
from opcd_kernels.rows import NonFinite, count_nonfinite
from opcd_kernels.token_logprob import TokenScores, token_logprob
from opcd_kernels.topk import TopKDivergence, topk_divergence
from opcd_kernels.topk_classes import Tail

__all__ = [
    "Kind",
    "LogitMap",
    "NonFinite",
    "Tail",
    "TokenScores",
    "TopKDivergence",
    "count_nonfinite",
    "divergence",
    "linear_divergence",
    "linear_token_logprob",
    "linear_topk_divergence",
    "token_logprob",
    "topk_divergence",
]
