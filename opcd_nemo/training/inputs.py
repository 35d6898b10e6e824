"""Everything a run reads, opened and checked before a process group starts or a model loads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any

from opcd_nemo.config.plugs import build_plug
from opcd_nemo.config.train import TrainConfig
from opcd_nemo.context.sources import (
    ContextSource,
    NoContext,
    ShuffledContext,
    content_hash,
)
from opcd_nemo.distributed.groups import check_batch, check_layout
from opcd_nemo.engines.recorded import check_samples
from opcd_nemo.errors import UserError
from opcd_nemo.formats.shape import ModelConfig, keep_layers
from opcd_nemo.formats.stored_model import StoredModel, open_model
from opcd_nemo.formats.tokenizer import ChatTokenizer
from opcd_nemo.losses import TopKLoss
from opcd_nemo.rollout.conversation import Conversation, shared_start
from opcd_nemo.storage.durable import check_writable
from opcd_nemo.tasks import Episode, Task
from opcd_nemo.training.digests import model_digest, tokenizer_digest

logger = logging.getLogger(__name__)
_BARE = ({"role": "user", "content": "?"},)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Opened files, and what was made of them without loading a weight."""

    student: StoredModel
    student_config: ModelConfig
    teacher: StoredModel
    teacher_config: ModelConfig
    task: Task
    retention: Task
    conversation: Conversation
    prefix_ids: tuple[int, ...]
    samples_of: Mapping[str, Any] | None
    """With `rollout.teacher_data`: what the samples of that folder are a function of."""
    longest_tokens: int = 0
    """Of a prompt with its answer, among those that were looked at."""

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The tokenizer of student and teacher."""
        return self.conversation.tokenizer

    @property
    def context_hash(self) -> str:
        """SHA-256 of what the teacher reads."""
        return content_hash(self.conversation.source)

    def with_source(self, source: ContextSource, num_questions: int) -> Inputs:
        """The same, but for what the teacher reads."""
        conversation = replace(self.conversation, source=source)
        prefix_ids = shared_prefix(self.task, conversation, num_questions)
        return replace(self, conversation=conversation, prefix_ids=prefix_ids)


def open_inputs(config: TrainConfig, world_size: int) -> Inputs:
    """Open models, tokenizer, task and context, and check that they fit each other.

    Raises:
        UserError: a key, its value and what is allowed.
    """
    _check_world(config, world_size)
    check_writable("exp_manager.exp_dir", Path(config.exp_manager["exp_dir"]))
    with _about("student.path", config.student.path):
        student = open_model(config.student.path)
    teacher = student
    if config.teacher.path is not None:
        with _about("teacher.path", config.teacher.path):
            teacher = open_model(config.teacher.path)
    student_config = student.config
    if config.student.keep_layers is not None:
        with _about("student.keep_layers", config.student.keep_layers):
            student_config = keep_layers(student_config, config.student.keep_layers)
    tokenizer = _shared_tokenizer(config, student.config, teacher.config)
    # rows past the student's are padding of the teacher's vocabulary: no token has them
    teacher_config = replace(teacher.config, vocab_size=student_config.vocab_size)
    _check_losses(config, student_config.vocab_size)
    check_stages(config, {"student": student_config, "teacher": teacher_config})
    source: ContextSource = build_plug(config.context)
    conversation = Conversation(
        tokenizer=tokenizer,
        source=source,
        max_positions=min(student_config.max_positions, teacher.config.max_positions),
    )
    task: Task = build_plug(config.task)
    with _about("retention._target_", config.retention["_target_"]):
        retention: Task = build_plug(config.retention)
    longest = _check_prompts(config, task, retention, conversation)
    _check_wrong_context(config, task, conversation)
    return Inputs(
        student=student,
        student_config=student_config,
        teacher=teacher,
        teacher_config=teacher_config,
        task=task,
        retention=retention,
        conversation=conversation,
        prefix_ids=shared_prefix(task, conversation, config.evaluation.num_questions),
        samples_of=_samples_of(config, conversation),
        longest_tokens=longest,
    )


def _samples_of(config: TrainConfig, conversation: Conversation) -> dict[str, Any] | None:
    """Check the folder that keeps the teacher's samples, if the run has such a folder."""
    folder = config.rollout.teacher_data
    if folder is None:
        return None
    made_of = {
        "the teacher": model_digest(config.teacher.path or config.student.path),
        "teacher.dtype": config.teacher.dtype,
        "the tokenizer": tokenizer_digest(conversation.tokenizer),
        "the context": content_hash(conversation.source),
        "rollout.sampling": asdict(config.rollout.sampling),
        "seed": config.seed,
    }
    check_samples(Path(folder), made_of)
    return made_of


def shared_prefix(task: Task, conversation: Conversation, num_questions: int) -> tuple[int, ...]:
    """The ids that every teacher prompt of the task starts with, in all its contexts.

    Found with two made-up questions, after the first paragraph that two real questions share.
    """
    nothing = NoContext().context("", 0)
    questions = [
        episode.turn(nothing).student_messages[-1]["content"]
        for episode in task.episodes("test", 0, min(2, num_questions))
    ]
    openings = [text.partition("\n\n")[0] for text in questions]
    alike = len(openings) == 2 and openings[0] == openings[1]
    opening = f"{openings[0]}\n\n" if alike else ""
    return shared_start(
        conversation.tokenizer.render(context.messages(f"{opening}{probe}"))
        for context in conversation.source.contexts()
        for probe in ("A", "7")
    )


def _check_losses(config: TrainConfig, vocab_size: int) -> None:
    plugs = {"loss": config.loss}
    if config.warmup.steps:
        plugs["warmup.loss"] = config.warmup.loss
    for key, plug in plugs.items():
        loss = build_plug(plug)
        if isinstance(loss, TopKLoss) and loss.k > vocab_size:
            raise UserError(f"{key}.k", loss.k, f"at most the student's vocabulary of {vocab_size}")


def _check_world(config: TrainConfig, world_size: int) -> None:
    parallel, batching = config.parallel, config.batching
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    cp = parallel.context_parallel_size
    check_layout(world_size, tp, pp, cp)
    dp = world_size // (tp * pp)
    check_batch(batching.global_batch_size, batching.micro_batch_size, dp, cp)


def _shared_tokenizer(
    config: TrainConfig, student: ModelConfig, teacher: ModelConfig
) -> ChatTokenizer:
    with _about("student.path", config.student.path):
        tokenizer = ChatTokenizer.from_path(config.student.path)
    arguments = config.student.chat_template_arguments
    with _about("student.chat_template_arguments", arguments):
        tokenizer = tokenizer.with_arguments(arguments)
    with _about("student.path", config.student.path):
        for note in tokenizer.notes():
            logger.warning("%s", note)
    if config.teacher.path is None:
        return tokenizer
    with _about("teacher.path", config.teacher.path):
        other = ChatTokenizer.from_path(config.teacher.path)
    problem = None
    if teacher.vocab_size < student.vocab_size:
        sizes = teacher.vocab_size, student.vocab_size
        problem = "vocabulary of {} differs from the student's {}".format(*sizes)
    elif tokenizer.fingerprint != other.fingerprint:
        problem = "its tokens, or their ids, are not those of the student"
    if problem is not None:
        raise UserError(
            "teacher.path",
            config.teacher.path,
            "the same tokens, and at least as many rows",
            problem=f"{problem} ({config.student.path})",
        )
    if set(tokenizer.eos_ids) != set(other.eos_ids):
        raise UserError(
            "teacher.path",
            config.teacher.path,
            "the same ids",
            problem=f"end-of-sequence ids {other.eos_ids} differ from the student's "
            f"{tokenizer.eos_ids} ({config.student.path})",
        )
    return tokenizer


def check_stages(config: TrainConfig, models: dict[str, ModelConfig]) -> None:
    """Refuse stages that cannot have equally many layers of each model.

    Raises:
        UserError: naming the model.
    """
    stages = config.parallel.pipeline_model_parallel_size
    for side, model in models.items():
        if model.num_layers % stages:
            raise UserError(
                "parallel.pipeline_model_parallel_size",
                stages,
                "a divisor of that",
                problem=f"the {side} has {model.num_layers} layers",
            )


def _check_prompts(
    config: TrainConfig, task: Task, retention: Task, conversation: Conversation
) -> int:
    """Render the longest turns of the first episodes; every turn is checked when rendered.

    Returns:
        The tokens of the longest with its answer.
    """
    longest = 0
    evaluation, batch = config.evaluation, config.batching.global_batch_size
    anchors = round(batch * config.rollout.anchor_fraction)
    questions: list[tuple[str, int, Callable[[int], list[Episode]]]] = [
        ("evaluation.num_questions", evaluation.num_questions, partial(task.episodes, "test", 0)),
        (
            "evaluation.num_retention",
            evaluation.num_retention,
            partial(retention.episodes, "test", 0),
        ),
        (
            "evaluation.num_questions",
            evaluation.num_questions if evaluation.every_n_steps else 0,
            partial(task.episodes, "validation", 0),
        ),
        ("batching.global_batch_size", batch - anchors, partial(task.episodes, "train", 0)),
        ("rollout.anchor_fraction", anchors, partial(task.anchors, 0)),
    ]
    new_tokens = max(
        config.rollout.sampling.max_new_tokens,
        evaluation.sampling.max_new_tokens,
        evaluation.retention_max_new_tokens,
    )
    for key, count, draw in questions:
        if count == 0:
            continue
        value = attrgetter(key)(config)
        with _about(key, value):
            episodes = draw(count)
        if len(episodes) != count:
            raise UserError(
                key,
                value,
                "a task that is not empty, and at most as many as it has",
                problem=f"the task has {len(episodes)} prompts where {count} are asked for",
            )
        for episode in episodes:
            with _about("student.path", config.student.path):
                student, teacher = conversation.longest_prompts(episode)
            plug = "retention" if key == "evaluation.num_retention" else "task"
            with _about(f"{plug}._target_", getattr(config, plug)["_target_"]):
                conversation.check_fits(student, new_tokens)
            with _about("context._target_", config.context["_target_"]):
                conversation.check_fits(teacher, new_tokens)
            longest = max(longest, len(student), len(teacher))
    return longest + new_tokens


def wrong_source(config: TrainConfig, source: ContextSource) -> ContextSource | None:
    """What the teacher reads in the control `wrong_context`; None where there is none to read."""
    if "wrong_context" not in config.evaluation.controls or not has_text(source):
        return None
    if config.evaluation.wrong_context is None:
        return ShuffledContext(source, config.seed)
    wrong: ContextSource = build_plug(config.evaluation.wrong_context)
    return wrong


def has_text(source: ContextSource) -> bool:
    """Whether a source puts anything before or around a question."""
    return any(context.messages("?") != _BARE for context in source.contexts())


def _check_wrong_context(config: TrainConfig, task: Task, conversation: Conversation) -> None:
    source = wrong_source(config, conversation.source)
    if source is None:
        return
    wrong, evaluation = replace(conversation, source=source), config.evaluation
    asked = min(evaluation.num_control_questions, evaluation.num_questions)
    key = "evaluation.wrong_context"
    with _about(key, (evaluation.wrong_context or {}).get("_target_")):
        for episode in task.episodes("test", 0, asked):
            wrong.check_fits(wrong.longest_prompts(episode)[1], evaluation.sampling.max_new_tokens)


@contextmanager
def _about(key: str, value: object) -> Iterator[None]:
    """Put the key and its value before what a reader of files has to say."""
    try:
        yield
    except UserError as error:
        raise error.said_of(key, value) from error
