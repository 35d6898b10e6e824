"""Everyday questions to be answered in a style: the demo's tasks."""

from __future__ import annotations

from collections.abc import Sequence

from opcd_nemo.errors import UserError
from opcd_nemo.tasks.draws import digest
from opcd_nemo.tasks.prompts import NOUNS, TEMPLATES
from opcd_nemo.tasks.questions import Question, QuestionTask
from opcd_nemo.tasks.verifiers import VERIFIERS, Verifier
from opcd_nemo.types import Split

NUM_TEST_NOUNS = 50
NUM_VALIDATION_NOUNS = 16


class StyleTask(QuestionTask):
    """Questions about everyday things, an answer's style as the score; no noun is in two splits."""

    def __init__(self, *, verifier: str, seed: int) -> None:
        """Raises: UserError when `verifier` is not one of `VERIFIERS`."""
        if verifier not in VERIFIERS:
            raise UserError("task.verifier", verifier, ", ".join(VERIFIERS))
        judge = VERIFIERS[verifier]
        nouns = sorted(NOUNS, key=digest)
        num_held_out = NUM_TEST_NOUNS + NUM_VALIDATION_NOUNS
        super().__init__(
            {
                "train": _questions("train", nouns[num_held_out:], judge),
                "validation": _questions("validation", nouns[NUM_TEST_NOUNS:num_held_out], judge),
                "test": _questions("test", nouns[:NUM_TEST_NOUNS], judge),
            },
            seed=seed,
        )


def _questions(split: Split, nouns: Sequence[str], judge: Verifier) -> list[Question]:
    """Ask each noun once, the templates taking turns, before any noun is asked again."""
    templates = list(TEMPLATES.items())
    questions = []
    for shift in range(len(templates)):
        for index, noun in enumerate(nouns):
            name, template = templates[(index + shift) % len(templates)]
            article = "an" if noun[0] in "aeiou" else "a"
            text = template.format(f"{article} {noun}")
            questions.append(Question(uid=f"{split}/{name}/{noun}", text=text, judge=judge))
    return questions
