"""A vocabulary of every byte, and of the words and sentences that the games' prompts are made of.

Any text comes back as it was. A board character is one token together with the space or line break
before it, so that a board has as many tokens as cells.
"""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opcd_nemo.model_files import write_json

USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (END, USER, "<|system|>", ASSISTANT)
LETTERS = "adefghklmnpqsuwx"  # what controls are drawn from
SYMBOLS = "ABCDEGHKMOPSTX#%&*+=@$_.~^"  # what boards are drawn with
DIRECTIONS = ("up", "down", "left", "right")
HEADER = "\n\nExperience from earlier games, which may be incomplete or wrong:"
ASK_START = "A game that was played:"
ASK_END = (
    "\n\nWrite what this game shows, one short rule a line, each as:\n- EXPERIENCE ITEM: <rule>"
)
OPENING = (
    "\n\nOn the board below you are the",
    "On the board below you are the",
    ". Get to the goal in as few moves as you can, one move a turn. The moves you may name: ",
    ". End your answer with one of them in square brackets.",
)
MOVES = ("\n\nBoard:", "\n\nMove: [", "\nThat move cannot be made.")
MOVES += ("\n\nMove: none was found in the answer.",)
OUTCOMES = (
    "\n\nThe game is won:",
    "\n\nThe game is lost:",
    " reached",
    " stepped on",
    " 2 times in a row there was no move that can be made.",
    "\n\nThe game is not won: all ",
    " moves are used.",
    " every",
    " was pushed onto an",
)
ITEMS = ("- EXPERIENCE ITEM: ", "\n- ", "to go ", "never step on", "reach", "push")
ITEMS += (" onto",)
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def drawn(symbol: str) -> tuple[str, str]:
    """The tokens of a board character: within a row, and at its start."""
    return f" {symbol}", f"\n{symbol}"


def words() -> list[str]:
    """The tokens that are no bytes and not special."""
    symbols = [token for symbol in SYMBOLS for token in drawn(symbol)]
    texts = (HEADER, ASK_START, ASK_END, *OPENING, *MOVES, *OUTCOMES, *ITEMS)
    answers = [f"{direction}{end}" for direction in DIRECTIONS for end in (" [", " answer [")]
    return [*answers, ", ", *symbols, *texts]


def make_tokenizer() -> Tokenizer:
    """Build the tokenizer; ids are special tokens, bytes, words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in words()])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer as transformers reads it."""
    make_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    write_json(folder / "tokenizer_config.json", settings)
