"""Extraction in waves, candidates of its records, successive halving, selection."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from opcd_nemo.config.sampling import Sampling
from opcd_nemo.context.items import as_text
from opcd_nemo.errors import UserError
from opcd_nemo.experience.candidates import Candidate, candidates
from opcd_nemo.experience.config import ExtractionConfig, ScoringConfig, SelectionConfig
from opcd_nemo.experience.extraction import Extraction, Sampler
from opcd_nemo.experience.scoring import ScoreBook, halve, rungs, select
from opcd_nemo.rollout.conversation import TurnPrompts
from opcd_nemo.storage.heartbeat import HEARTBEAT_ENV
from opcd_nemo.storage.run_folder import RunFolder
from opcd_nemo.tasks import Episode
from opcd_nemo.tasks.questions import Question, QuestionTask
from opcd_nemo.types import Prompt, Sample

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=9)
ALONE: Any = SimpleNamespace(
    rank=0, share=range, gather_objects=lambda value: [value], gather_over_dp=list
)


class Letters:
    """One token a character."""

    def render(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return self.encode(messages[-1]["content"])

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(map(ord, text))

    def reply(self, _prompt: Sequence[int], ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class Writer:
    """Answers problems with "42" and extraction prompts with `items`; remembers all prompts."""

    def __init__(self, items: Sequence[str] = ("learnt",)) -> None:
        self.weights_version = 0
        self.items, self.asked = items, []

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, **_: Any) -> list[Sample]:
        samples = []
        for prompt in prompts:
            text = "".join(map(chr, prompt.token_ids))
            self.asked.append(text)
            writing = text.startswith("LEARN")
            answer = "\n".join(f"- EXPERIENCE ITEM: {i}" for i in self.items) if writing else "42"
            ids = tuple(map(ord, answer or "nothing"))
            samples.append(
                Sample(response_ids=ids, logprobs=(0.0,) * len(ids), finish_reason="eos")
            )
        return samples


def settings(**changes: Any) -> ExtractionConfig:
    plain = {
        "model": None,
        "keep": "items",
        "prompt": "LEARN {trace}|{outcome}|{experience}",
        "with_previous": False,
        "num_chains": 2,
        "num_steps": 3,
        "shared_problems": False,
        "cap_tokens": 100,
        "sampling": SAMPLING,
        "problem_max_new_tokens": 9,
    }
    return ExtractionConfig(**{**plain, **changes})


class Lost:
    """The lock of a folder that another attempt has taken over."""

    def check(self) -> None:
        raise OSError("the folder is now held by another")


def taken_over(folder: Path) -> RunFolder:
    lost: Any = Lost()
    return RunFolder(folder, lock=lost)


def rendered(episode: Episode) -> TurnPrompts:
    messages = episode.turn(NOTHING).student_messages
    ids = Letters().render(messages)
    return TurnPrompts(question=messages[-1]["content"], student_ids=ids, teacher_ids=ids)


def extraction(run_folder: RunFolder, writer: Any, config: ExtractionConfig) -> Extraction:
    questions = [
        Question(uid=f"q{n}", text=f"What is {n}?", judge=lambda text: float(text == "42"))
        for n in range(6)
    ]
    conversation: Any = SimpleNamespace(
        tokenizer=Letters(),
        check_fits=lambda ids, new: None,
        prompts=lambda episode, step, with_context: rendered(episode),
    )
    sampler = Sampler(engine=writer, conversation=conversation, sampling=SAMPLING)
    return Extraction(
        run_folder,
        "waves",
        config,
        QuestionTask({"train": questions}, seed=0),
        player=sampler,
        writer=sampler,
        parallel=ALONE,
        seed=0,
    )


NOTHING: Any = SimpleNamespace(messages=lambda text: ({"role": "user", "content": text},))


def test_every_chain_meets_problems_and_writes_items(tmp_path: Path) -> None:
    writer = Writer()
    records = extraction(RunFolder(tmp_path), writer, settings()).run()
    assert [(one["chain"], one["step"]) for one in records] == [
        (chain, step) for step in range(3) for chain in range(2)
    ]
    assert len({one["uid"] for one in records}) == 6
    assert all(one["items"] == ["learnt"] and one["score"] == 1.0 for one in records)
    assert records[0]["turns"] == [f"What is {records[0]['uid'][1:]}?"]
    learn = [text for text in writer.asked if text.startswith("LEARN")]
    assert all(text.endswith("Answer:\n42||(none)") for text in learn)


def test_a_folder_that_is_taken_over_gets_no_wave_and_no_scores(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="now held by"):
        extraction(taken_over(tmp_path), Writer(), settings()).run()
    with pytest.raises(OSError, match="now held by"):
        ScoreBook(taken_over(tmp_path), "scoring.jsonl").add("a", [1.0])
    assert [path.name for path in tmp_path.rglob("*")] == ["waves"]


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda text: text.replace('"items": ["learnt"]', '"items": "learnt"', 1), "line 1: items"),
        (lambda text: text.splitlines()[0] + "\n", "holds 1 records"),
        (lambda text: text[:-1], "holds 1 records"),
        (lambda text: "junk\n" + text, "line 1: no JSON"),
        (lambda text: "", "holds 0 records"),
    ],
)
def test_a_wave_that_is_not_as_it_was_written_is_named(
    tmp_path: Path, edit: Callable[[str], str], problem: str
) -> None:
    extraction(RunFolder(tmp_path), Writer(), settings()).run()
    file = tmp_path / "waves" / "wave=0001.jsonl"
    file.write_text(edit(file.read_text()))
    with pytest.raises(UserError) as caught:
        extraction(RunFolder(tmp_path), Writer(), settings()).run()
    assert caught.value.key == str(file)
    assert str(caught.value.problem).startswith(problem)
    assert "its wave is done again" in caught.value.allowed
    file.unlink()
    extraction(RunFolder(tmp_path), Writer(), settings()).run()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("junk", "line 3: no JSON"),
        ('{"experience": "a", "start": 2}', "line 3: no scores"),
        ('{"experience": "a", "start": 2, "scores": ["1"]}', 'line 3: scores is ["1"]'),
        ('{"experience": "a", "start": 1, "scores": [1]}', "line 3: start is 1 after 2 scores"),
        ('{"experience": "c", "start": 1, "scores": [1]}', "line 3: start is 1 after 0 scores"),
    ],
)
def test_a_score_book_that_was_edited_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "scoring.jsonl"
    book = ScoreBook(RunFolder(tmp_path), file.name)
    book.add("a", [1.0, 0.5])
    book.add("b", [0.0])
    good = file.read_text()
    file.write_text(f"{good}{line}\n")
    with pytest.raises(UserError) as caught:
        ScoreBook(RunFolder(tmp_path), file.name)
    assert caught.value.key == str(file)
    assert str(caught.value.problem).startswith(problem)
    assert "questions are asked again" in caught.value.allowed
    file.write_text(good + line[:-1])  # a crash has cut it off
    assert ScoreBook(RunFolder(tmp_path), file.name).known("a") == [1.0, 0.5]
    assert file.read_text() == good


def test_shared_problems_are_the_same_for_every_chain(tmp_path: Path) -> None:
    records = extraction(RunFolder(tmp_path), Writer(), settings(shared_problems=True)).run()
    assert [one["uid"] for one in records[::2]] == [one["uid"] for one in records[1::2]]


def test_earlier_items_are_shown_where_asked_for(tmp_path: Path) -> None:
    writer = Writer()
    extraction(RunFolder(tmp_path), writer, settings(with_previous=True, num_chains=1)).run()
    learn = [text for text in writer.asked if text.startswith("LEARN")]
    assert [text.rsplit("|", 1)[1] for text in learn] == [
        "(none)",
        "- learnt",
        "- learnt\n- learnt",
    ]


def test_finished_waves_are_not_repeated(tmp_path: Path) -> None:
    first = extraction(RunFolder(tmp_path), Writer(), settings()).run()
    (tmp_path / "waves/wave=0002.jsonl").unlink()
    writer = Writer()
    assert extraction(RunFolder(tmp_path), writer, settings()).run() == first
    assert len(writer.asked) == 4  # two problems, two extractions


def test_a_wave_of_other_problems_is_not_gone_on_with(tmp_path: Path) -> None:
    first = extraction(RunFolder(tmp_path), Writer(), settings()).run()
    file = tmp_path / "waves" / "wave=0001.jsonl"
    (uid, other) = (record["uid"] for record in first if record["step"] == 1)
    assert uid != other
    file.write_text(file.read_text().replace(json.dumps(uid), json.dumps(other)))
    with pytest.raises(UserError, match=r"its problems are not those .* another name"):
        extraction(RunFolder(tmp_path), Writer(), settings()).run()


def test_every_wave_is_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat = tmp_path / "heartbeat"
    monkeypatch.setenv(HEARTBEAT_ENV, str(heartbeat))
    monkeypatch.delenv("RANK", raising=False)
    seen: list[bool] = []

    class Watch(logging.Handler):
        def emit(self, _: logging.LogRecord) -> None:
            seen.append(heartbeat.exists())
            heartbeat.unlink(missing_ok=True)

    watch = Watch()
    monkeypatch.setattr(logging.getLogger("opcd_nemo"), "handlers", [watch])
    extraction(RunFolder(tmp_path), Writer(), settings()).run()
    assert seen == [True] * 3


def test_the_raw_trace_is_kept_as_an_ablation(tmp_path: Path) -> None:
    records = extraction(RunFolder(tmp_path), Writer([]), settings(keep="trace")).run()
    assert records[0]["items"][0].startswith("Problem:\nWhat is")


@pytest.mark.parametrize("keep", ["items", "trace"])
def test_an_item_above_the_cap_is_refused_in_its_wave(tmp_path: Path, keep: str) -> None:
    writer = Writer()
    with pytest.raises(ValueError, match=r"experience\.extraction\.cap_tokens=5: the newest item"):
        extraction(RunFolder(tmp_path), writer, settings(keep=keep, cap_tokens=5)).run()
    assert len(writer.asked) == 4  # of six problems and as many extractions


def test_silent_extractions_are_counted_and_all_silent_is_an_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError) as refused:
        extraction(RunFolder(tmp_path), Writer([]), settings()).run()
    assert refused.value.key == "experience.extraction"
    assert refused.value.problem == "6 extractions wrote no item"
    assert "2 extractions, 0 items, 2 without any" in caplog.text


def test_candidates_are_the_prefixes_that_differ(tmp_path: Path) -> None:
    records = [
        {"chain": chain, "step": step, "uid": f"{chain}{step}", "items": items}
        for chain, step, items in [
            (0, 0, ["a"]),
            (1, 0, []),
            (0, 1, []),
            (1, 1, ["x", "y"]),
            (0, 2, ["b"]),
        ]
    ]
    found = candidates(records, 6, len)
    assert [(one.chain, one.step, one.items) for one in found] == [
        (0, 0, ("a",)),
        (0, 2, ("b",)),  # the cap holds one item of three characters and a line end
        (1, 1, ("y",)),
    ]
    assert candidates(records, 7, len)[1].items == ("a", "b")
    assert candidates(records, 7, len)[1].num_tokens == len(as_text(("a", "b")))
    assert candidates(records, 7, len)[1].problems == ("00", "01", "02")


def pool(*items: str) -> list[Candidate]:
    return [
        Candidate(chain=0, step=step, items=(item,), num_tokens=1, problems=())
        for step, item in enumerate(items)
    ]


def scoring(**changes: Any) -> ScoringConfig:
    return ScoringConfig(**{"num_questions": 40, "first_questions": 10, "keep": 0.5, **changes})


def test_rungs_double_questions_and_halve_candidates() -> None:
    assert rungs(8, scoring()) == [(10, 8), (20, 4), (40, 2)]
    assert rungs(3, scoring(first_questions=100)) == [(40, 3)]
    assert rungs(5, scoring(num_questions=25)) == [(10, 5), (20, 3), (25, 2)]


def test_halving_finds_the_best_and_asks_less() -> None:
    asked: list[tuple[str, int]] = []

    def ask(some: Sequence[Candidate], count: int) -> list[list[float]]:
        asked.extend((one.items[0], count) for one in some)
        return [[float(one.items[0]) / 10] * count for one in some]

    ranked = halve(pool("1", "7", "3", "9", "9", "2", "5", "4"), scoring(), ask)
    assert [one.candidate.items[0] for one in ranked] == ["9", "7", "5", "4", "3", "2", "1"]
    assert ranked[0].candidate.step == 3  # the same items a second time are not asked again
    assert sum(count for _, count in asked) == 7 * 10 + 4 * 20 + 2 * 40


def test_a_tie_goes_to_fewer_tokens_then_to_the_earlier() -> None:
    one, two, three = (
        Candidate(chain=0, step=step, items=(str(step),), num_tokens=tokens, problems=())
        for step, tokens in enumerate((5, 3, 3))
    )
    ranked = halve([one, two, three], scoring(), lambda some, n: [[0.5] * n for _ in some])
    assert [each.candidate for each in ranked[:2]] == [two, three]


def test_random_selection_draws_among_the_long_ones() -> None:
    ranked = halve(
        pool(*"abcdefgh"), scoring(num_questions=10), lambda some, n: [[0.0] * n for _ in some]
    )
    rule = SelectionConfig(rule="random", min_steps=5, count=2)
    drawn = [tuple(one.candidate.step for one in select(ranked, rule, seed)) for seed in range(20)]
    assert {step for pair in drawn for step in pair} == {4, 5, 6, 7}
    assert drawn[0] == tuple(one.candidate.step for one in select(ranked, rule, 0))
    with pytest.raises(UserError) as refused:
        select(ranked, SelectionConfig(rule="random", min_steps=5, count=5), 0)
    assert (refused.value.key, refused.value.value) == ("experience.selection.count", 5)
    assert refused.value.problem == "4 candidates with another text"


def test_a_random_pool_takes_one_of_every_chain_first() -> None:
    many = [
        Candidate(chain=chain, step=step, items=(f"{chain}{step}",), num_tokens=1, problems=())
        for chain in range(3)
        for step in range(4)
    ]
    ranked = halve(many, scoring(num_questions=10), lambda some, n: [[0.0] * n for _ in some])
    for seed in range(10):
        rule = SelectionConfig(rule="random", min_steps=1, count=3)
        assert {one.candidate.chain for one in select(ranked, rule, seed)} == {0, 1, 2}


def test_a_line_that_a_crash_cut_is_asked_again(tmp_path: Path) -> None:
    file = tmp_path / "scoring.jsonl"
    book = ScoreBook(RunFolder(tmp_path), file.name)
    book.add("a", [1.0, 0.0])
    book.add("a", [1.0])
    with file.open("a") as opened:
        opened.write('{"experience": "a", "sta')
    again = ScoreBook(RunFolder(tmp_path), file.name)
    assert again.known("a") == [1.0, 0.0, 1.0]
    assert again.known("b") == []
    again.add("b", [0.5])
    assert [json.loads(line)["experience"] for line in file.read_text().splitlines()] == list("aab")
