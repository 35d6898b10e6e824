"""`opcd train` as a function: the same words, the same configuration, the same run."""

from __future__ import annotations

import hashlib
import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig

from opcd_nemo.api.finished import FinishedRun
from opcd_nemo.api.process import borrowed_process
from opcd_nemo.api.words import word
from opcd_nemo.errors import RunFailed, StoppedByFile, StoppedBySignal, UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.launch.exits import EXIT_INTERRUPTED, STOPS
from opcd_nemo.launch.ranks import PROGRAM, check_run, quiet_training
from opcd_nemo.storage.durable import write_whole
from opcd_nemo.tasks.draws import digest
from opcd_nemo.tasks.splits import identity

Score = Callable[[str], float | bool | None]
_QUESTIONS = "questions"  # a folder beside those of the runs
_COLUMN = "question"  # of conf/task/questions.yaml and scored_questions.yaml
_MOST_TEST, _MOST_VALIDATION = 50, 16
_LONGEST_WORD = 128 * 1024 - 1  # bytes, of an argument that Linux starts a program with


def distill(
    student: str | Path,
    *,
    context: str | Sequence[tuple[str, str]],
    questions: Sequence[str],
    test_questions: Sequence[str] | None = None,
    score: str | Score | None = None,
    steps: int = 30,
    max_new_tokens: int = 64,
    ranks: int = 1,
    folder: str | Path = "runs",
    name: str | None = None,
    settings: Sequence[str] = (),
    quiet: bool = False,
) -> FinishedRun:
    """Train a student to answer as if it had read a context.

    One rank runs in this process; more are started as `opcd train` starts them.

    Args:
        student: the model: a Hugging Face folder, `hf://owner/name`, a GGUF or `.nemo` file, a
            checkpoint, or the word `smollm2-135m-instruct`.
        context: what the teacher reads: a system prompt, or pairs of a question and its answer.
        questions: texts of questions. Without `test_questions` a fifth, 50 at most, is kept for
            the test; a tenth, 16 at most, for validation.
        test_questions: texts of questions that are asked before and after training.
        score: how answers are scored: `brevity`, `bullets`, `json`, `pirate`, or a function that
            takes an answer and returns a number from 0 to 1, or None for no answer. None: an answer
            that is not blank has score 1, which says nothing about the context.
        steps: updates of the student.
        max_new_tokens: the longest answer, in tokens.
        ranks: processes; each trains on its part of a step's questions.
        folder: where the run's folder lies.
        name: of the run's folder; None: `distill-1`, or the first number that is free. An earlier
            run of the same name is set aside.
        settings: other keys of `opcd train`, each as on its command line: `["optim.lr=3e-5"]`.
        quiet: show neither the log nor the progress.

    Raises:
        UserError: an argument or a key is wrong, before a model loads; its fields name the key, the
            value and what is allowed.
        RunFailed: a rank of several has failed; the message is the rank's line.
        NonFiniteError, SaveError, StoppedBySignal, StoppedByFile: as of `opcd train`.
        KeyboardInterrupt: Ctrl-C.
    """
    _check_places(folder, name, settings)
    folder = Path(folder)
    name = name or _free_name(folder)
    splits = _split(questions, test_questions)
    files = _write_questions(folder, splits)
    words = [
        *_score_words(score),
        *(word(f"task.{split}", path) for split, path in files.items()),
        *_context_words(context),
        *_layout_words(ranks, settings),
        word("student.path", student),
        word("trainer.max_steps", steps),
        word("rollout.sampling.max_new_tokens", max_new_tokens),
        word("evaluation.num_questions", min(_MOST_TEST, len(splits["test"]))),
        word("exp_manager.exp_dir", folder),
        word("name", name),
        *(["trainer.enable_progress_bar=false"] if quiet else []),
        *settings,
    ]
    with borrowed_process(["train", *words], quiet=quiet):
        raw = compose("train", words)
        if raw.parallel.num_ranks == 1:
            return FinishedRun(_train_here(raw))
        _check_ranks(raw, ranks, score)
        run_folder = Path(raw.exp_manager.exp_dir) / raw.name  # settings may name another
    _run_command(["train", *words], quiet=quiet)
    return FinishedRun(run_folder)


def _train_here(raw: DictConfig) -> Path:
    from opcd_nemo.trainer.run import train

    quiet_training()
    return train(raw)


def _check_ranks(raw: DictConfig, ranks: int, score: str | Score | None) -> None:
    """Raise what the command would only print."""
    if ranks not in (1, raw.parallel.num_ranks):
        raise UserError("ranks", ranks, f"{raw.parallel.num_ranks}, as the layout of settings has")
    if callable(score) and score.__module__ == "__main__":
        allowed = "a function of a module that every rank can import, or ranks=1"
        raise UserError("score", score.__qualname__, allowed, problem="is of this program alone")
    check_run(raw)


def _run_command(words: Sequence[str], *, quiet: bool) -> None:
    """Start `opcd` with these words, show its output, and raise the error that ended it."""
    longest = max(words, key=len)
    if len(longest.encode()) > _LONGEST_WORD:
        key, allowed = longest.partition("=")[0], "a shorter text, or ranks=1"
        raise UserError(key, allowed=allowed, problem="is longer than 128 KiB")
    command = [sys.executable, *PROGRAM, *words]
    last = ""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            text = line.decode(errors="replace")
            last = text.strip() or last
            if not quiet:
                sys.stdout.write(text)
                sys.stdout.flush()
    _raise_end(process.returncode, last)


def _raise_end(code: int, line: str) -> None:
    if code == EXIT_INTERRUPTED:
        raise KeyboardInterrupt
    kinds: dict[int, type[StoppedBySignal] | type[StoppedByFile]] = {
        STOPS[kind]: kind for kind in (StoppedBySignal, StoppedByFile)
    }
    if code in kinds:
        raise kinds[code](line)
    if code:
        raise RunFailed(code, line.removeprefix("error: "))


def _free_name(folder: Path) -> str:
    number = 1
    while (folder / f"distill-{number}").exists():
        number += 1
    return f"distill-{number}"


def _check_places(folder: str | Path, name: str | None, settings: Sequence[str]) -> None:
    if not isinstance(folder, str | Path):
        raise UserError("folder", repr(folder), "the path of a folder")
    if name == _QUESTIONS:  # would be set aside with the questions of every run
        raise UserError("name", name, "another name: this folder has the questions of runs")
    if isinstance(settings, str) or not isinstance(settings, Sequence):
        raise UserError("settings", repr(settings), 'a list of texts, as ["optim.lr=3e-5"]')
    for index, setting in enumerate(settings):
        if not isinstance(setting, str):
            raise UserError(f"settings[{index}]", repr(setting), "a text, as optim.lr=3e-5")


def _layout_words(ranks: int, settings: Sequence[str]) -> list[str]:
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise UserError("ranks", ranks, "a whole number from 1 on")
    if any(setting.startswith("parallel=") for setting in settings):
        return []
    return ["parallel=single"] if ranks == 1 else ["parallel=dp2", f"parallel.num_ranks={ranks}"]


def _context_words(context: str | Sequence[tuple[str, str]]) -> list[str]:
    if isinstance(context, str):
        return ["context=system", word("context.system", context)]
    if not isinstance(context, Sequence) or not all(
        isinstance(pair, tuple | list) and len(pair) == 2 for pair in context
    ):
        allowed = "a system prompt, or a list of pairs of a question and its answer"
        raise UserError("context", repr(context), allowed)
    demonstrations = [{"question": pair[0], "answer": pair[1]} for pair in context]
    return ["context=demonstrations", word("context.demonstrations", demonstrations)]


def _score_words(score: str | Score | None) -> list[str]:
    if score is None or isinstance(score, str):
        return ["task=questions", word("task.verifier", score)]
    if not inspect.isfunction(score) or "<" in score.__qualname__ or "." in score.__qualname__:
        allowed = "the name of a style, or a function that a module defines with def"
        raise UserError("score", score, allowed)
    target = f"{score.__module__}.{score.__qualname__}"
    return ["task=scored_questions", word("task.score", target)]


def _split(
    questions: Sequence[str], test_questions: Sequence[str] | None
) -> Mapping[str, Sequence[str]]:
    """Questions by split, in the order of their hashes, which nobody chooses."""
    asked = sorted(_distinct("questions", questions), key=digest)
    if test_questions is None:
        num_test = min(_MOST_TEST, max(1, len(asked) // 5))
        test, asked = asked[:num_test], asked[num_test:]
    else:
        test = _distinct("test_questions", test_questions)
    num_validation = min(_MOST_VALIDATION, max(1, len(asked) // 10))
    if len(asked) <= num_validation:
        allowed = "more: a fifth of them is for the test, a tenth for validation"
        raise UserError("questions", questions, allowed, problem="are too few")
    return {"train": asked[num_validation:], "validation": asked[:num_validation], "test": test}


def _distinct(key: str, questions: Sequence[str]) -> list[str]:
    """The questions, each once.

    Raises:
        UserError: no list of texts, a blank text, or none at all.
    """
    if isinstance(questions, str) or not isinstance(questions, Sequence) or not questions:
        raise UserError(key, questions, "a list of texts")
    for index, question in enumerate(questions):
        if not isinstance(question, str) or not question.strip():
            raise UserError(f"{key}[{index}]", repr(question), "a text that is not blank")
        if any("\ud800" <= letter <= "\udfff" for letter in question):
            problem = "has a character that no text has"
            raise UserError(f"{key}[{index}]", repr(question), "a text", problem=problem)
    return list({identity(question): question for question in reversed(questions)}.values())


def _write_questions(folder: Path, splits: Mapping[str, Sequence[str]]) -> dict[str, Path]:
    """Write a file for each split, in a folder named by the content."""
    texts = {
        split: "".join(json.dumps({_COLUMN: each}) + "\n" for each in asked)
        for split, asked in splits.items()
    }
    content = hashlib.sha256("\n".join(texts.values()).encode()).hexdigest()[:12]
    below = folder / _QUESTIONS / content
    files = {split: below / f"{split}.jsonl" for split in texts}
    try:
        below.mkdir(parents=True, exist_ok=True)
        for split, text in texts.items():
            write_whole(files[split], text)
    except OSError as error:
        problem = f"{below}: {error.strerror}"
        raise UserError("folder", folder, "one that can be written", problem=problem) from error
    return files
