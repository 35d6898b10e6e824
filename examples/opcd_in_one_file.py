"""On-policy context distillation in one file: torch, transformers, and nothing else.

A student answers without a context. A frozen copy of it, the teacher, reads the context and says
how likely every token of the student's answer is. The student learns to agree, token by token:

    loss = mean over answers of 1/|y| sum_t KL( student(. | x, y_<t) || teacher(. | c, x, y_<t) )

    python examples/opcd_in_one_file.py --model HuggingFaceTB/SmolLM2-135M-Instruct

opcd_nemo computes the same loss and the same gradient (tests/recipes/test_examples.py compares
them) with what a large model needs beside them: parallelism, checkpoints, evaluation, chunked
logits. Paper: arXiv 2602.12275.
"""

from __future__ import annotations

import argparse
import copy
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

CONTEXT = "Answer in one short sentence."
THINGS = """accordion anchor balloon basket bell bicycle bridge broom bucket button camera candle
    canoe castle clock compass crane curtain drum eraser ferry flute fountain garden hammer
    helmet kettle ladder lamp lighthouse lock magnet map microscope mirror needle oven pencil
    piano pillow radiator river robot rope ruler saddle sandal satellite scarf school sled
    spoon stapler submarine swing telescope tent tractor trumpet tunnel umbrella valve violin
    volcano wagon wallet wheel whistle windmill zipper""".split()
TEST_THINGS = THINGS[::7]


@dataclass(frozen=True)
class Answer:
    """Token ids: the prompt of each model, and what the student has written after its own."""

    prompt: Sequence[int]
    teacher_prompt: Sequence[int]
    response: Sequence[int]


def response_logits(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]
) -> torch.Tensor:
    """What a model says before each token of the response: logits [N tokens, V vocabulary]."""
    ids = torch.tensor([[*prompt, *response[:-1]]], device=model.device)
    return model(ids).logits[0, len(prompt) - 1 :].float()


def reverse_kl(student_NV: torch.Tensor, teacher_NV: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) at every token, in nats, summed over the whole vocabulary."""
    student_logprobs_NV = student_NV.log_softmax(-1)
    teacher_logprobs_NV = teacher_NV.log_softmax(-1)
    return (student_logprobs_NV.exp() * (student_logprobs_NV - teacher_logprobs_NV)).sum(-1)


def accumulate_gradients(
    student: PreTrainedModel, teacher: PreTrainedModel, answers: Sequence[Answer]
) -> float:
    """Add the gradient of the loss to the student's parameters; returns the loss in nats.

    Every answer weighs the same, however long it is. The gradient goes through the student's
    probabilities alone: which tokens were sampled is taken as given.
    """
    total = 0.0
    for answer in answers:
        with torch.no_grad():
            teacher_NV = response_logits(teacher, answer.teacher_prompt, answer.response)
        student_NV = response_logits(student, answer.prompt, answer.response)
        loss = reverse_kl(student_NV, teacher_NV).mean() / len(answers)
        loss.backward()
        total += loss.item()
    return total


def generate(
    model: PreTrainedModel, prompt: Sequence[int], max_new_tokens: int, *, sample: bool
) -> list[int]:
    """Continue a prompt: drawn at temperature 1 from the whole vocabulary, or greedily."""
    ids = torch.tensor([prompt], device=model.device)
    drawn = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    written = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        **(drawn if sample else {"do_sample": False}),
    )
    return written[0, len(prompt) :].tolist()


class Prompts:
    """Renders questions as token ids, with the context and without it."""

    def __init__(self, tokenizer: object, context: str) -> None:
        self._tokenizer, self._context = tokenizer, context

    def ids(self, question: str, *, with_context: bool) -> list[int]:
        """The chat that ends where the answer begins."""
        system = [{"role": "system", "content": self._context}] if with_context else []
        chat = [*system, {"role": "user", "content": question}]
        text = self._tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return self._tokenizer.encode(text, add_special_tokens=False)

    def text(self, ids: Iterable[int]) -> str:
        """What a response says."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def train_step(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    prompts: Prompts,
    questions: Sequence[str],
    max_new_tokens: int,
) -> float:
    """Sample on-policy, score with the context, update once; returns the loss in nats."""
    answers = []
    for question in questions:
        prompt = prompts.ids(question, with_context=False)
        response = generate(student, prompt, max_new_tokens, sample=True)
        answers.append(Answer(prompt, prompts.ids(question, with_context=True), response))
    optimizer.zero_grad()
    loss = accumulate_gradients(student, teacher, answers)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return loss


def main(words: Sequence[str] | None = None) -> list[float]:
    """Train, and show answers before and after; returns the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--context", default=CONTEXT)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--lr", type=float, default=5e-5)
    given = parser.parse_args(words)
    torch.manual_seed(1234)
    student = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).eval()
    teacher = copy.deepcopy(student).requires_grad_(False)
    prompts = Prompts(AutoTokenizer.from_pretrained(given.model), given.context)
    optimizer = torch.optim.AdamW(student.parameters(), lr=given.lr, weight_decay=0.01)
    draw = random.Random(1234)
    train_things = [thing for thing in THINGS if thing not in TEST_THINGS]

    def show(title: str) -> None:
        print(title)
        for thing in TEST_THINGS[:3]:
            prompt = prompts.ids(f"Tell me about a {thing}.", with_context=False)
            answer = generate(student, prompt, given.max_new_tokens, sample=False)
            print(f"  {thing}: {prompts.text(answer)}")

    show("before, without the context:")
    losses = []
    for step in range(given.steps):
        questions = [
            f"Tell me about a {thing}." for thing in draw.sample(train_things, given.batch_size)
        ]
        losses.append(
            train_step(student, teacher, optimizer, prompts, questions, given.max_new_tokens)
        )
        print(f"step {step + 1}: loss {losses[-1]:.3f}")
    show("after, without the context:")
    return losses


if __name__ == "__main__":
    main()
