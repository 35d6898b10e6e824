"""A task of your own: questions, and a judge for the answers."""

import re
from functools import partial

from opcd_nemo.tasks.questions import Question, QuestionTask

ANIMALS = """ant bat bear bee bird cat chicken cow crab crow deer dog donkey duck eagle fish fox
    frog goat goose hen horse kitten lamb lion lizard monkey mouse owl ox parrot pig rabbit rat
    seal shark sheep snail snake spider swan tiger toad turtle whale wolf worm zebra""".split()


def animals(*, seed: int) -> QuestionTask:
    """Ask what an animal is; right is a short sentence that names the animal."""
    asked = [
        Question(uid=animal, text=f"Tell me about the {animal}.", judge=partial(is_right, animal))
        for animal in ANIMALS
    ]
    splits = {"test": asked[::4], "validation": asked[1::8], "train": asked[2::4] + asked[3::4]}
    return QuestionTask(splits, seed=seed)


def is_right(animal: str, answer: str) -> float:
    """1.0 for 12 words at most that end with a full stop and name the animal."""
    is_short = answer.strip().endswith(".") and len(answer.split()) <= 12
    return float(is_short and re.search(rf"\b{animal}s?\b", answer.lower()) is not None)
