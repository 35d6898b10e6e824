"""Teach a model a system prompt of your own; words after the command are keys of `opcd train`."""

import re
import sys

from opcd_nemo import distill, load_model

WORDS = (
    "anchor ant apple bag ball bell boat book box bread broom bus candle car cat chair clock coat"
)
WORDS += (
    " cup desk dog door drum egg fan fish flute fork goat hat horse key kite lamp leaf map milk"
)
QUESTIONS = [f"What is {'an' if word[0] in 'aeiou' else 'a'} {word}?" for word in WORDS.split()]


def is_shouted(answer: str) -> float:
    """The share of letters that are capitals."""
    letters = re.findall("[A-Za-z]", answer)
    return sum(letter.isupper() for letter in letters) / max(len(letters), 1)


if __name__ == "__main__":
    run = distill(
        "smollm2-135m-instruct",
        context="ANSWER IN CAPITAL LETTERS ONLY. EVERY LETTER OF THE ANSWER IS A CAPITAL LETTER.",
        questions=QUESTIONS,
        score=is_shouted,
        steps=20,
        max_new_tokens=24,
        settings=sys.argv[1:],
    )
    print(run.table)
    print(load_model(run.student).chat("What is a violin?"))
