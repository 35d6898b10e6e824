"""A loss of your own: the total variation distance between student and teacher."""

from opcd_nemo.losses import LossSum, TokenTargets
from opcd_nemo.metrics import Stats
from opcd_nemo.model.head import Head


class TotalVariation:
    """Half the sum over the vocabulary of |p - q|: bounded, so no token can dominate a step."""

    needs_teacher = True

    def __call__(self, student: Head, teacher: Head | None, tokens: TokenTargets) -> LossSum:
        """Return the weighted sum over response tokens, and what metrics.jsonl shows of it."""
        assert teacher is not None
        assert student.group is None, "tensor parallelism shares the vocabulary among ranks"
        p_NV, q_NV = (
            (head.hidden_NH @ head.weight_VH.T).float()[:, : head.num_valid_columns].softmax(-1)
            for head in (student, teacher)
        )
        loss = (0.5 * (p_NV - q_NV).abs().sum(-1) * tokens.weight_N).sum()
        return loss, Stats({"loss/total_variation": (loss.item(), tokens.weight_N.sum().item())})
