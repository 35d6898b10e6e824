"""What needs files and no weights: vocabularies, ends, chat templates, prompts, the response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from opcd_nemo.config.train import TrainConfig
from opcd_nemo.context.sources import ContextSource
from opcd_nemo.doctor.checks import Check, judge
from opcd_nemo.formats.shape import ModelConfig
from opcd_nemo.formats.sharding import padded_vocab_size
from opcd_nemo.formats.stored_model import open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.tasks import Episode
from opcd_nemo.training.inputs import Inputs
from opcd_nemo.types import Message

RESPONSE = "Well: 12 or 34, it's <b>so</b>.\n\n- naïve café {x} \\boxed{7}"
"""A made-up response without blanks at its ends, which templates may strip."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """The student or the teacher, as its files describe the model."""

    model: ModelConfig
    tokenizer: ChatTokenizer


def open_sides(config: TrainConfig) -> tuple[Side, Side]:
    """Student and teacher, without weights.

    Raises:
        UserError: a file is missing or malformed.
    """
    student = open_side(config.student.path)
    teacher = student if config.teacher.path is None else open_side(config.teacher.path)
    arguments = config.student.chat_template_arguments
    template = student.tokenizer.chat_template_source
    if teacher.tokenizer.chat_template_source == template:  # else it may not know the variable
        teacher = replace(teacher, tokenizer=teacher.tokenizer.with_arguments(arguments))
    return replace(student, tokenizer=student.tokenizer.with_arguments(arguments)), teacher


def open_side(path: str) -> Side:
    """A model by its path."""
    return Side(model=open_model(path).config, tokenizer=ChatTokenizer.from_path(path))


def vocabularies(student: Side, teacher: Side, tp: int) -> Check:
    """Whether both models speak the same tokens, and the heads have a row for each."""
    sizes = student.model.vocab_size, teacher.model.vocab_size
    padded = tuple(padded_vocab_size(size, tp) for size in sizes)
    largest = student.tokenizer.vocab_size, teacher.tokenizer.vocab_size
    found = (
        f"{sizes[0]} and {sizes[1]} tokens, {padded[0]} and {padded[1]} padded for tp {tp}, "
        f"{largest[0]} and {largest[1]} in the tokenizers"
    )
    if student.tokenizer.fingerprint != teacher.tokenizer.fingerprint:
        return judge("vocabulary", False, f"{found}; the token lists differ", _SAME_FAMILY)
    good = sizes[0] <= sizes[1] and max(largest) <= sizes[0]  # a teacher may have spare rows
    return judge("vocabulary", good, found, _SAME_FAMILY)


_SAME_FAMILY = "use a teacher and a student with one tokenizer: the divergence is over its tokens"


def ends(student: Side, teacher: Side) -> Check:
    """Whether both sides end a response with the same tokens, and the models know them."""
    ids = student.tokenizer.eos_ids, teacher.tokenizer.eos_ids
    if set(ids[0]) != set(ids[1]):
        found = f"the student ends with {ids[0]}, the teacher with {ids[1]}"
        return judge("end of sequence", False, found, "make eos_token_id of both models the same")
    unknown = {*student.model.eos_token_ids, *teacher.model.eos_token_ids} - set(ids[0])
    words = [student.tokenizer.decode([token_id], skip_special=False) for token_id in ids[0]]
    found = f"{ids[0]} {words}"
    notes = list(dict.fromkeys([*student.tokenizer.notes(), *teacher.tokenizer.notes()]))
    if unknown:
        notes.append(f"the model also has {sorted(unknown)}, which ends no response here")
    mend = "make eos_token_id of generation_config.json and the chat template say the same"
    found = "; ".join([found, *notes])
    return judge("end of sequence", not notes, found, mend, otherwise="warn")


def templates(student: Side, teacher: Side, chat: Sequence[Message]) -> Check:
    """Whether the teacher reads the chat as the teacher's template would write it."""
    ours, theirs = student.tokenizer.render(chat), teacher.tokenizer.render(chat)
    if ours == theirs:
        same = student.tokenizer.chat_template_source == teacher.tokenizer.chat_template_source
        how = "one template" if same else "two templates that write the same"
        return judge(
            "chat template", True, f"{how}, {len(ours)} tokens of context and question", ""
        )
    index = next(
        (i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), "the end"
    )
    found = f"the teacher's own template differs from the student's, from token {index} on"
    mend = "a run renders both sides with the student's: give both models the template you want"
    return judge("chat template", False, found, mend, otherwise="warn")


def lengths(inputs: Inputs, episodes: Sequence[Episode], new_tokens: int) -> Check:
    """How much of the model's positions the longest of these prompts leaves."""
    sides = [inputs.conversation.longest_prompts(episode) for episode in episodes]
    student, teacher = (max(len(pair[side]) for pair in sides) for side in (0, 1))
    limit = inputs.conversation.max_positions
    found = (
        f"student {student}, teacher {teacher} tokens (of them {len(inputs.prefix_ids)} shared) "
        f"+ {new_tokens} new of {limit} positions; longest of {len(episodes)} prompts"
    )
    mend = (
        "shorten the context or rollout.sampling.max_new_tokens, or take a model with more "
        "positions"
    )
    return judge("prompt lengths", max(student, teacher) + new_tokens <= limit, found, mend)


def same_suffix(
    tokenizer: ChatTokenizer, source: ContextSource, episodes: Sequence[Episode]
) -> Check:
    """Whether the template leaves a response unchanged, byte for byte, after both prompts.

    A run concatenates token ids and renders no response; demonstrations in a context, later turns
    and whoever uses the student do.
    """
    name = "same response under both prompts"
    mend = "use a chat template that writes the assistant's content unchanged"
    heads: set[str] = set()
    for episode in episodes:
        turn = episode.turn(source.context(episode.uid, 0))
        spans = [_span(tokenizer, chat) for chat in (turn.student_messages, turn.teacher_messages)]
        if spans[0] != spans[1]:
            found = f"{episode.uid}: {spans[0]!r} without context, {spans[1]!r} with it"
            return judge(name, False, found, mend)
        head, response, _ = spans[0].partition(RESPONSE)
        if not response:
            return judge(name, False, f"{episode.uid}: {RESPONSE!r} became {spans[0]!r}", mend)
        heads.add(head)
    before = f", after {sorted(heads)} that a run leaves to the model" if heads != {""} else ""
    found = f"{len(RESPONSE.encode())} bytes unchanged in {len(episodes)} prompts{before}"
    return judge(name, True, found, mend)


def _span(tokenizer: ChatTokenizer, chat: Sequence[Message]) -> str:
    """What the template writes after the prompt when the assistant has answered."""
    answer: Message = {"role": "assistant", "content": RESPONSE}
    prompt = tokenizer.decode(tokenizer.render(chat), skip_special=False)
    answered = tokenizer.render([*chat, answer], add_generation_prompt=False)
    text = tokenizer.decode(answered, skip_special=False)
    return text.removeprefix(prompt) if text.startswith(prompt) else text
