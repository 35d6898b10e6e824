"""The same training, generation and losses from transformers and plain torch, in float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from opcd_nemo.types import Prompt
from tests.distributed import cases
from tests.distributed.cases import TrainCase


def divergence(
    student_NV: torch.Tensor, teacher_NV: torch.Tensor, kind: str, beta: float = 0.5
) -> torch.Tensor:
    """Per-token divergence of two sets of logits, in nats."""
    s, t = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    if kind.startswith("top4"):  # of the student's; the choice is no part of the gradient
        chosen = s.topk(4).indices
        s, t = s.gather(-1, chosen), t.gather(-1, chosen)
        if kind == "top4_renorm":
            s, t = s.log_softmax(-1), t.log_softmax(-1)
    if kind == "reverse_kl" or kind.startswith("top4"):
        return (s.exp() * (s - t)).sum(-1)
    if kind == "forward_kl":
        return (t.exp() * (t - s)).sum(-1)
    m = (beta * s.exp() + (1 - beta) * t.exp()).log()
    return (beta * s.exp() * (s - m) + (1 - beta) * t.exp() * (t - m)).sum(-1)


def negative_logprob(student_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """Per-token -log p(target), in nats."""
    return -student_NV.log_softmax(-1).gather(-1, targets_N[:, None])[:, 0]


def train(student: Any, teacher: Any, case: TrainCase) -> dict[str, Any]:
    """Three steps, one sequence at a time, without packing, held prefixes or shards."""
    student, teacher = copy.deepcopy(student).double(), copy.deepcopy(teacher).double()
    named = dict(student.named_parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in named.values() if p.ndim > 1]},
            {"params": [p for p in named.values() if p.ndim == 1], "weight_decay": 0.0},
        ],
        lr=case.adam.lr,
        betas=cases.BETAS,
        eps=case.adam.eps,
        weight_decay=case.adam.weight_decay,
    )
    losses, norms, gradients = [], [], {}
    for step in range(cases.STEPS):
        optimizer.zero_grad()
        loss = _step_loss(student, teacher, case, step)
        loss.backward()
        losses.append(loss.item())
        if not gradients:
            gradients = {name: p.grad.clone() for name, p in named.items()}
        norms.append(torch.nn.utils.clip_grad_norm_(named.values(), case.adam.clip).item())
        optimizer.step()
    return {
        "losses": losses,
        "norms": norms,
        "gradients": gradients,
        "parameters": {name: p.detach() for name, p in named.items()},
    }


def _step_loss(
    student: Any,
    teacher: Any,
    case: TrainCase,
    step: int,
) -> torch.Tensor:
    places = [
        (place, turn)
        for place, turns in enumerate(cases.TURNS[step])
        for turn in range(turns if case.games else 1)
    ]
    pairs = [cases.training_turn(step, place, turn) for place, turn in places]
    num_tokens = sum(len(response) for _, response in pairs)
    total = torch.zeros((), dtype=torch.float64)
    for (place, _), (prompt, response) in zip(places, pairs, strict=True):
        is_anchor = place >= cases.NUM_PROMPTS - cases.NUM_ANCHORS
        context = () if is_anchor else cases.teacher_context(prompt)
        s = _response_logits(student, prompt, response)
        if case.loss == "hard":
            loss_N = negative_logprob(s, torch.tensor(response))
        else:
            with torch.no_grad():
                t = _response_logits(teacher, (*context, *prompt), response)
            loss_N = divergence(s, t, case.loss)
        total = total + (
            loss_N.sum() / num_tokens if case.token_mean else loss_N.mean() / len(pairs)
        )
    return total


def _response_logits(
    model: Any,
    prompt: Sequence[int],
    response: Sequence[int],
) -> torch.Tensor:
    ids = torch.tensor([[*prompt, *response]])
    logits: torch.Tensor = model(ids).logits[0, len(prompt) - 1 : -1]
    return logits


def generate(
    model: Any,
    prompts: Sequence[Prompt],
    ends: Sequence[int],
) -> list[tuple[int, ...]]:
    """transformers' greedy continuation of all prompts in one left-padded batch."""
    width = max(len(prompt.token_ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids)
        mask[row, width - len(prompt.token_ids) :] = 1
    # transformers refuses an empty list of ends
    out = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=cases.NEW_TOKENS,
        eos_token_id=list(ends) or None,
        pad_token_id=0,
    )
    rows = out[:, width:].tolist()
    return [_until_end(row, ends) for row in rows]


def _until_end(row: Sequence[int], ends: Sequence[int]) -> tuple[int, ...]:
    last = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
    return tuple(row[: last + 1])


def choose_ends(model: Any) -> list[int]:
    """Three tokens that, as ends, let the rows finish at many different times."""
    model.generation_config.eos_token_id = None
    rows = generate(model, cases.generation_prompts(led=False), ())
    chosen: list[int] = []
    for _ in range(3):
        chosen.append(
            max(
                range(model.config.vocab_size),
                key=lambda token: len({len(_until_end(row, [*chosen, token])) for row in rows}),
            )
        )
    return chosen
