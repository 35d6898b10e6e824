"""A task of your own: questions, and a judge for the answers."""

from functools import partial

from opcd_nemo.tasks.questions import Question, QuestionTask

PAIRS = """up down, hot cold, big small, fast slow, old new, high low, long short, rich poor,
    light dark, hard soft, wet dry, open closed, full empty, good bad, strong weak, happy sad,
    left right, early late, clean dirty, loud quiet, thick thin, near far, deep shallow, true false,
    wide narrow, black white, day night, love hate, push pull, win lose, buy sell, front back,
    inside outside, always never, begin end, sweet sour, tall short, young old, alive dead"""


def opposites(*, seed: int) -> QuestionTask:
    """Ask for the opposite of a word; right is the other word and nothing else."""
    pairs = [pair.split() for pair in PAIRS.split(",")]
    asked = [
        Question(uid=word, text=f"What is the opposite of {word}?", judge=partial(is_word, right))
        for word, right in pairs
    ]
    splits = {"test": asked[:12], "validation": asked[12:16], "train": asked[16:]}
    return QuestionTask(splits, seed=seed)


def is_word(right: str, answer: str) -> float:
    """1.0 for the right word, in any case, with or without a full stop."""
    return float(answer.strip().rstrip(".").lower() == right)
