"""Teach a model a system prompt of your own; words after the command are keys of `opcd train`."""

import re
import sys

from opcd_nemo import distill, load_model

WORDS = """anchor ant apple bag ball bell boat book box bread broom bus candle car cat chair
    clock coat cup desk dog door drum egg fan fish flute fork goat hat horse key kite lamp leaf
    map milk"""
QUESTIONS = [f"What is {'an' if word[0] in 'aeiou' else 'a'} {word}?" for word in WORDS.split()]


def is_pirate(answer: str) -> float:
    """1.0 for an answer with a word of a pirate's."""
    return float(re.search(r"\b(arr+|ahoy|matey|aye|ye)\b", answer.lower()) is not None)


if __name__ == "__main__":
    run = distill(
        "smollm2-135m-instruct",
        context="You are a pirate. Ye speak only like a pirate: arr, ahoy, matey, aye, ye.",
        questions=QUESTIONS,
        score=is_pirate,
        steps=20,
        max_new_tokens=24,
        settings=sys.argv[1:],
    )
    print(run.table)
    print(load_model(run.student).chat("What is a violin?"))
