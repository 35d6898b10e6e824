"""A chat in the terminal with a model, with and without its context side by side."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field

from omegaconf import DictConfig

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.config.programs import load_chat
from opcd_nemo.config.sampling import Sampling
from opcd_nemo.context.sources import Context
from opcd_nemo.distributed.devices import choose_device
from opcd_nemo.distributed.groups import init_parallel
from opcd_nemo.errors import UserError
from opcd_nemo.export.provenance import as_context, read_provenance
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.model.language_model import LanguageModel, choose_dtype
from opcd_nemo.rollout.engine import RolloutEngine, check_engine
from opcd_nemo.types import Message, Prompt

logger = logging.getLogger(__name__)

HELP = "/context shows the context, /reset forgets the chat, /quit (or end of input) ends"


@dataclass(slots=True)
class _Side:
    """One of the two chats."""

    title: str
    context: Context
    turns: list[Message] = field(default_factory=list)

    @property
    def opening(self) -> tuple[Message, ...]:
        """What stands before the first question."""
        return self.context.messages("")[:-1]

    def wrapped(self, line: str) -> str:
        """A question as this side reads it; experience surrounds only a chat's first question."""
        return line if self.turns else self.context.wrapped(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """An answer of a side; `is_whole` is false where `max_new_tokens` cut it."""

    side: str
    text: str
    is_whole: bool


class Chat:
    """Two chats with one model that differ by the context alone."""

    def __init__(
        self,
        engine: RolloutEngine,
        tokenizer: ChatTokenizer,
        sampling: Sampling,
        context: Context | None,
        *,
        max_positions: int,
        seed: int,
    ) -> None:
        """Without a context the chat has a single side."""
        self._engine, self._tokenizer, self._sampling = engine, tokenizer, sampling
        self._max_positions, self._seed, self._count = max_positions, seed, 0
        self.context = context
        self._sides = [_Side("without context", Context(system=None, demonstrations=()))]
        if context is not None:
            self._sides.append(_Side("with context", context))

    def reset(self) -> None:
        """Forget what was said."""
        for side in self._sides:
            side.turns.clear()

    def ask(self, line: str) -> list[str]:
        """Put a question to every side; every answer is a line."""
        try:
            replies = self.replies(line, range(len(self._sides)))
        except UserError:
            return [f"the chat has outgrown {self._max_positions} tokens: /reset starts anew"]
        return [
            f"[{reply.side}] {reply.text}{'' if reply.is_whole else ' [cut at max_new_tokens]'}"
            for reply in replies
        ]

    def replies(self, line: str, sides: Iterable[int]) -> list[Reply]:
        """Put a question to some sides: 0 is without the context, 1 with it.

        Raises:
            UserError: the question does not fit the model beside the chat so far.
        """
        asked = [self._sides[index] for index in sides]
        questions: list[Message] = [
            {"role": "user", "content": side.wrapped(line)} for side in asked
        ]
        prompts = [
            Prompt(
                token_ids=self._tokenizer.render([*side.opening, *side.turns, question]),
                index=index,
                goes_on=True,
            )
            for index, (side, question) in enumerate(zip(asked, questions, strict=True))
        ]
        longest = max(len(prompt.token_ids) for prompt in prompts) + self._sampling.max_new_tokens
        if longest > self._max_positions:
            allowed = f"a chat of at most {self._max_positions} tokens, the answer among them"
            raise UserError("question", line, allowed, problem=f"would make {longest} tokens")
        samples = self._engine.generate(prompts, self._sampling, seed=self._seed, step=self._count)
        self._count += 1
        replies = []
        for side, question, sample in zip(asked, questions, samples, strict=True):
            answer = self._tokenizer.decode(sample.response_ids).strip()
            side.turns += [question, {"role": "assistant", "content": answer}]
            is_whole = sample.finish_reason == "eos"
            replies.append(Reply(side=side.title, text=answer, is_whole=is_whole))
        return replies


def open_chat(settings: DictConfig) -> Chat:
    """Load the model that `conf/chat.yaml` names.

    Raises:
        UserError: a key is wrong, before the model loads.
    """
    config = load_chat(settings)
    source = config.from_
    checkpoint, tokenizer = open_model(source), ChatTokenizer.from_path(source)
    _check_length(config.sampling, checkpoint.config.max_positions)
    for note in tokenizer.notes():
        logger.warning("%s", note)
    context = _context(source, config.system)
    dtype = choose_dtype(config.dtype, checkpoint.dtype)
    device, _ = choose_device(config.parallel.device, 1)
    longest, on_cpu = checkpoint.config.max_positions, device.type == "cpu"
    check_engine(config.engine, (checkpoint.config,), longest, on_cpu=on_cpu)
    parallel = init_parallel(config.parallel, config.seed)
    model = LanguageModel(checkpoint.config, parallel, dtype)
    model.load(checkpoint)
    built: RolloutEngine = build_plug(config.engine, model=model, eos_ids=tokenizer.eos_ids)
    built.load_weights(0)
    return Chat(
        built,
        tokenizer,
        config.sampling,
        context,
        max_positions=checkpoint.config.max_positions,
        seed=config.seed,
    )


def run_chat(settings: DictConfig, lines: Iterable[str]) -> None:
    """Answer every line, until `/quit` or the last one; errors as of `open_chat`."""
    chat = open_chat(settings)
    sides = "no context" if chat.context is None else "with and without its context"
    logger.info("%s: %s; %s", settings["from"], sides, HELP)
    for line in filter(None, map(str.strip, lines)):
        if line == "/quit":
            return
        if line == "/reset":
            chat.reset()
        elif line == "/context":
            logger.info("%s", "no context" if chat.context is None else _shown(chat.context))
        elif line.startswith("/"):
            logger.info("%s: no such command; %s", line, HELP)
        else:
            for answer in chat.ask(line):
                logger.info("%s", answer)


def _check_length(sampling: Sampling, max_positions: int) -> None:
    """Refuse answers beside which no question fits."""
    if sampling.max_new_tokens >= max_positions:
        allowed = f"below the model's {max_positions} positions"
        raise UserError("sampling.max_new_tokens", sampling.max_new_tokens, allowed)


def _context(source: str, system: str | None) -> Context | None:
    """The given context, or else the context that the model was distilled from."""
    if system is not None:
        return Context(system=system, demonstrations=())
    described = read_provenance(source).context
    return None if described is None else as_context(described, source)


def _shown(context: Context) -> str:
    lines = [text for text in (context.system, context.experience) if text is not None]
    lines += [f"Q: {question}\nA: {answer}" for question, answer in context.demonstrations]
    return "\n".join(lines)
