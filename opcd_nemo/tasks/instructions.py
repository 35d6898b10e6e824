"""Prompts with up to three instructions that a program can check, against forgetting to obey.

After the idea of IF-Eval (arXiv 2311.07911): kinds, wordings, questions and checks are this
project's own, so scores compare with themselves alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.draws import digest, shuffled
from opcd_nemo.tasks.instruction_kinds import KINDS, compatible
from opcd_nemo.tasks.questions import Question, QuestionTask
from opcd_nemo.tasks.thinking import spoken
from opcd_nemo.types import Split

MOST_INSTRUCTIONS = 3
MAX_PROMPTS = 2000

_QUESTION_TEXT = """
    Describe a rainy day in a small harbour town.
    Explain why bread rises in the oven.
    Tell me how a bicycle stays upright.
    Describe the work of a lighthouse keeper.
    Explain how rainbows form.
    Give advice to someone who starts a vegetable garden.
    Tell me what makes a good teacher.
    Describe a walk through a forest in autumn.
    Explain why the sea tastes of salt.
    Tell me how to make a cup of tea.
    Describe a busy railway station at noon.
    Explain how birds find their way south.
    Give advice to someone who cannot sleep.
    Tell me why cats purr.
    Describe a kitchen in which a feast was cooked.
    Explain how a mirror works.
    Tell me how to learn a new language.
    Describe an old library at night.
    Explain why leaves change their colour.
    Give advice to someone who moves to another city.
    Tell me what a good friend does.
    Describe a storm over a wide plain.
    Explain how cheese is made.
    Tell me how to wrap a present.
    Describe a market on a Saturday.
    Explain why ice floats on water.
    Give advice to someone who writes a first letter.
    Tell me why people like music.
    Describe the first snow of a winter.
    Explain how a clock with a pendulum keeps time.
    Tell me how to fold a paper boat.
    Describe a night train that crosses a border.
    Explain why the moon seems to change its shape.
    Give advice to someone who speaks before a crowd.
    Tell me what a river does to a valley.
    Describe a workshop full of tools.
    Explain how soap cleans hands.
    Tell me how to plan a picnic.
    Describe a village between two mountains.
    Explain why honey keeps for years.
    Give advice to someone who wants to run farther.
    Tell me why stories are told to children.
    Describe a boat that returns from fishing.
    Explain how seeds travel.
    Tell me how to repair a torn page.
    Describe a garden after rain.
    Explain why metal feels colder than wood.
    Give advice to someone who has lost a key.
"""
QUESTIONS = tuple(line.strip() for line in _QUESTION_TEXT.strip().splitlines())
_QUESTIONS_OF: dict[Split, slice] = {
    "test": slice(0, 24),
    "validation": slice(24, 32),
    "train": slice(32, 48),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Instruction:
    """One instruction of a prompt: its kind, and what was chosen for the kind's slots."""

    kind: str
    arguments: Mapping[str, Any]

    @property
    def text(self) -> str:
        """What the prompt says."""
        return KINDS[self.kind].wording.format(**self.arguments)

    def followed(self, answer: str) -> bool:
        """True when the answer does what the instruction says; an empty answer follows nothing."""
        answer = answer.strip()
        return bool(answer) and KINDS[self.kind].check(answer, **self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class InstructionPrompt:
    """A question, and how its answer is to be written."""

    question: str
    instructions: tuple[Instruction, ...]

    @property
    def kinds(self) -> list[str]:
        """The kinds of its instructions."""
        return [instruction.kind for instruction in self.instructions]

    @property
    def text(self) -> str:
        """The question and the instructions."""
        return " ".join([self.question, *(instruction.text for instruction in self.instructions)])

    def followed(self, reply: str) -> list[bool]:
        """Whether what the reply says after any thinking follows each instruction."""
        return [instruction.followed(spoken(reply)) for instruction in self.instructions]


def draw_prompts(split: Split, n: int, prompt_seed: int) -> list[InstructionPrompt]:
    """The first `n` prompts of a split, no two alike: more do not change the first ones.

    Every kind comes first in turn; 1, 2 and 3 instructions take turns. The splits share no
    question.
    """
    prompts: dict[str, InstructionPrompt] = {}
    index = 0
    while len(prompts) < n:
        prompt = _draw_prompt(split, index, prompt_seed)
        prompts.setdefault(prompt.text, prompt)
        index += 1
    return list(prompts.values())


def _draw_prompt(split: Split, index: int, prompt_seed: int) -> InstructionPrompt:
    key = (prompt_seed, "instructions", split, index)
    names = list(KINDS)
    kinds = [names[index % len(names)]]
    wanted = 1 + (index // len(names) + index) % MOST_INSTRUCTIONS
    for name in shuffled(names, str, *key):
        if len(kinds) < wanted and all(compatible(name, kind) for kind in kinds):
            kinds.append(name)
    questions = QUESTIONS[_QUESTIONS_OF[split]]
    question = questions[_number(len(questions), *key, "question")]
    return InstructionPrompt(
        question=question,
        instructions=tuple(_draw_instruction(kind, question, key) for kind in kinds),
    )


def _draw_instruction(kind: str, question: str, key: Sequence[object]) -> Instruction:
    arguments = {
        slot: values[_number(len(values), *key, kind, slot)]
        for slot, values in KINDS[kind].choices.items()
    }
    if "{question}" in KINDS[kind].wording:
        arguments["question"] = question
    return Instruction(kind=kind, arguments=arguments)


def _number(count: int, *key: object) -> int:
    return int.from_bytes(digest(*key)[:8], "big") % count


def instructions(
    *,
    num_train: int,
    num_validation: int,
    num_test: int,
    prompt_seed: int,
    level: Literal["prompt", "instruction"],
    seed: int,
) -> QuestionTask:
    """Build the task of `conf/task/instructions.yaml`.

    Args:
        num_train: how many prompts to learn from.
        num_validation: how many to choose by.
        num_test: how many to report.
        prompt_seed: which prompts.
        level: what scores 1: a reply that follows all its instructions, or (as a share) each one.
        seed: of the order in which training prompts come.

    Raises:
        UserError: a split's size is out of range.
    """
    sizes: dict[Split, int] = {"train": num_train, "validation": num_validation, "test": num_test}
    for split, size in sizes.items():
        if not 1 <= size <= MAX_PROMPTS:
            raise UserError(f"task.num_{split}", size, f"1 to {MAX_PROMPTS}")
    return QuestionTask(
        {
            split: [
                Question(
                    uid=f"{split}/{index}/{'+'.join(prompt.kinds)}",
                    text=prompt.text,
                    judge=partial(_judge, prompt, level),
                )
                for index, prompt in enumerate(draw_prompts(split, size, prompt_seed))
            ]
            for split, size in sizes.items()
        },
        seed=seed,
    )


def _judge(prompt: InstructionPrompt, level: str, reply: str) -> float | None:
    if not spoken(reply).strip():
        return None
    followed = prompt.followed(reply)
    return float(all(followed)) if level == "prompt" else sum(followed) / len(followed)
