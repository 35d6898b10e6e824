"""A vocabulary of every byte, and of the words and sentences that the games' prompts are made of.

Any text comes back as it was. A board character is one token together with the space or line break
before it, so that a board has as many tokens as cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from opcd_nemo.context.items import ITEM_MARKER
from opcd_nemo.formats.locate import write_json
from opcd_nemo.tasks.games.boards import STEPS

_CONF = Path(__file__).parents[2] / "conf"
USER, ASSISTANT, END = "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = (END, USER, "<|system|>", ASSISTANT)
LETTERS = "adefghklmnpqsuwx"  # what controls are drawn from
SYMBOLS = "PGHOX.#_~+*@&%"  # what boards are drawn with
ITEM = f"{ITEM_MARKER} "
GAMES = (
    "On the board below you are the",
    ". Get to the goal in as few moves as you can, one move a turn. The moves you may name: ",
    ". End your answer with one of them in square brackets.",
    ", ",
    "\n\nBoard:",
    "\n\nMove: [",
    "\nThat move cannot be made.",
    "\n\nMove: none was found in the answer.",
    "\n\nThe game is won:",
    "\n\nThe game is lost:",
    "\n\nThe game is not won: all ",
    " reached",
    " stepped on",
    " every",
    " was pushed onto an",
    " 2 times in a row there was no move that can be made.",
    " moves are used.",
)
NOTES = (ITEM, "\n- ", "to go ", "never step on", "reach", "push", " onto")
NEXT_ITEM = f"\n{ITEM}"
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def notes_template() -> str:
    """How a player's prompt shows notes: with the places {opening}, {experience}, {situation}."""
    config: Any = OmegaConf.load(_CONF / "context/experience_games.yaml")
    return str(config.template)


def extraction_prompt() -> str:
    """How notes are asked for: with the places {trace} and {outcome}."""
    config: Any = OmegaConf.load(_CONF / "recipe/demo_games.yaml")
    return str(config.experience.extraction.prompt)


def drawn(symbol: str) -> tuple[str, str]:
    """The tokens of a board character: within a row, and at its start."""
    return f" {symbol}", f"\n{symbol}"


def words() -> list[str]:
    """The tokens that are no bytes and not special."""
    answers = [f"{direction}{end}" for direction in STEPS for end in (" [", " answer [")]
    symbols = [token for symbol in SYMBOLS for token in drawn(symbol)]
    _, header = notes_template().split("{opening}")
    header = header[: header.index("\n{experience}")]
    start, rest = extraction_prompt().split("\n\n{trace}")
    end = rest.removeprefix("\n\n{outcome}")
    return [*answers, *symbols, *GAMES, *NOTES, header, start, end, NEXT_ITEM]


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
