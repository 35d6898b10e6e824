"""Experience items: read from answers, capped, kept in a registry, put around questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from omegaconf import OmegaConf

from opcd_nemo.config.stored import check_stored, escaped, parse_stored
from opcd_nemo.config.train import load_config
from opcd_nemo.context.items import as_text, newest_within, parse_items, shuffled_words
from opcd_nemo.context.registry import Entry, Registry, difference, read_entry, table
from opcd_nemo.context.sources import (
    Context,
    ContextSource,
    ExperienceContext,
    ExperiencePool,
    FixedContext,
    content_hash,
)
from opcd_nemo.errors import UserError
from opcd_nemo.export.convert import nemo_config
from opcd_nemo.export.provenance import as_context, describe_context
from opcd_nemo.launch.compose import compose
from opcd_nemo.training.prepared import freeze_context

WRAP = "{experience}\n\n{question}"
GAME_WRAP = "{opening}\n\n{experience}\n\n{situation}"


def entry(*items: str, **scores: float) -> Entry:
    return Entry(items=items, num_tokens=9, lineage={"model": "m"}, scores=dict(scores))


def experience(path: Path | str | None, template: str = WRAP, **given: object) -> ExperienceContext:
    plain = {"items": None, "lineage": None} | given
    return ExperienceContext(path=path and str(path), template=template, **plain)


def test_thinking_and_lines_without_the_marker_are_dropped() -> None:
    answer = (
        "- EXPERIENCE ITEM: thought of\n</think>\nSo:\n- EXPERIENCE ITEM:  one \n"
        "no item\n  - EXPERIENCE ITEM: two - EXPERIENCE ITEM: three\n- EXPERIENCE ITEM:   \n"
    )
    assert parse_items(answer) == ("one", "two", "three")
    assert parse_items(f"<think>first</think>\n<think>{answer}") == ("one", "two", "three")
    assert parse_items("<think>maybe\n- EXPERIENCE ITEM: a guess that was cut") == ()
    assert parse_items("nothing") == parse_items("") == ()


LATEX = (r"\${x}", "${oc.env:HOME}", r"with $\frac{1}{2}$, ${n \choose k}$", r"\\${y}$\\")


def test_items_may_hold_what_a_configuration_would_interpolate(tmp_path: Path) -> None:
    written = parse_items("\n".join(f"- EXPERIENCE ITEM: {item}" for item in LATEX))
    assert written == LATEX
    raw = compose("train", ["context=experience", f"context.path={tmp_path}"])
    registry = Registry(tmp_path)
    registry.add(entry(*LATEX))
    registry.select(entry(*LATEX).hash, "a test")
    frozen = freeze_context(raw)
    for config in (frozen, freeze_context(frozen)):  # once by the run, once by its model
        assert tuple(load_config(config).context["items"]) == LATEX
        context = OmegaConf.to_container(config.context, resolve=True)
        assert context == load_config(config).context  # so `prepare_run` need not check it again
    plain = OmegaConf.to_container(frozen, resolve=True)
    text = OmegaConf.to_yaml(OmegaConf.create(nemo_config(plain)))
    stored = parse_stored(text.encode(), "a package")
    assert (
        OmegaConf.to_container(OmegaConf.create(stored), resolve=True)["context"]
        == (plain["context"])
    )


def test_escaped_text_is_plain_and_an_interpolation_stays_refused() -> None:
    rng = Random(0)
    texts = ["".join(rng.choices("\\${}x: '\"[\n", k=8)) for _ in range(200)]
    texts += [
        f"{before}${{x}}{after}" for before in ("", "\\", "\\\\", "$") for after in texts[:50]
    ]
    config = OmegaConf.create({"a": escaped(texts)})
    assert OmegaConf.to_container(config, resolve=True) == {"a": texts}
    check_stored({"a": escaped(texts)}, "here")
    for text in ("${x}", r"\\${x}", r"\${x} ${x}", "$${x}"):
        with pytest.raises(ValueError, match="has an interpolation"):
            check_stored({"a": text}, "here")


def test_the_newest_whole_items_within_the_cap_are_kept() -> None:
    items = ("aaaa", "bb", "cc")
    count = len
    assert newest_within(items, len(as_text(items)), count) == items
    assert newest_within(items, len(as_text(items)) - 1, count) == ("bb", "cc")
    assert newest_within(items, 4, count) == ("cc",)
    assert newest_within((), 1, count) == ()
    with pytest.raises(
        ValueError, match=r"^experience\.extraction\.cap_tokens=3: .* 4 tokens; allowed"
    ):
        newest_within(items, 3, count)


def test_the_cost_of_the_newest_items_grows_with_the_cap() -> None:
    def of_every_cap(items: Sequence[str], cap: int) -> tuple[str, ...]:
        starts = range(len(items))
        return next(tuple(items[i:]) for i in starts if len(as_text(items[i:])) <= cap)

    items = tuple("x" * (1 + number * 7 % 5) for number in range(40))
    for cap in range(len("- ") + 5, len(as_text(items)) + 2):
        assert newest_within(items, cap, len) == of_every_cap(items, cap)
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text)
        return len(text)

    assert len(newest_within(("item",) * 100_000, 700, count)) == 100
    assert counted < 10_000


def test_shuffled_words_are_the_same_words_elsewhere() -> None:
    items = ("to go up answer [w]", "never step on H", "reach G")
    shuffled = shuffled_words(items, 0)
    assert sorted(" ".join(shuffled).split()) == sorted(" ".join(items).split())
    assert [len(item.split()) for item in shuffled] == [5, 4, 2]
    assert shuffled != items
    assert shuffled == shuffled_words(items, 0) != shuffled_words(items, 1)


def test_the_registry_keeps_entries_and_goes_back(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    first, second = entry("one", validation=0.5), entry("one", "two", validation=0.75)
    for each in (first, second, first):
        registry.add(each)
        registry.select(each.hash, "best on validation")
    assert [line["content_hash"] for line in registry.history()] == [
        first.hash,
        second.hash,
        first.hash,
    ]
    registry.select(first.hash, "again")
    assert len(registry.history()) == 3
    assert registry.rollback() == registry.selected() == second
    assert registry.find(first.hash[:8]) == first
    assert len(registry.entries()) == 2
    assert "+- two" in difference(first, second)
    assert f"* {second.hash[:12]}" in table(registry)
    assert "0.750" in table(registry)


def test_rollbacks_go_further_back_and_a_selection_goes_on_from_there(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    one, two, three, four = (entry(text) for text in ("one", "two", "three", "four"))
    for each in (one, two, three):
        registry.add(each)
        registry.select(each.hash, "a test")
    assert [registry.rollback(), registry.rollback()] == [two, one]
    with pytest.raises(ValueError, match="1 selections; allowed: a rollback after two or more"):
        registry.rollback()
    registry.add(four)
    registry.select(four.hash, "a test")
    assert registry.rollback() == registry.selected() == one
    assert len(registry.history()) == 7


def test_registry_errors_name_what_is_there(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    with pytest.raises(ValueError, match="nothing is selected; allowed"):
        registry.selected()
    path = registry.add(entry("one"))
    with pytest.raises(ValueError, match="0 entries start with 'zz'; allowed"):
        registry.find("zz")
    with pytest.raises(ValueError, match="0 selections; allowed"):
        registry.rollback()
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, "items": ["changed"]}))
    with pytest.raises(ValueError, match=r"content_hash is .*; allowed: that of its 1 items"):
        read_entry(path)
    path.write_text('{"items": 3}')
    with pytest.raises(ValueError, match=r"cannot be read .*; allowed: an entry"):
        read_entry(path)


def test_a_line_that_a_crash_cut_off_is_no_selection(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    registry.add(entry("one"))
    registry.select(entry("one").hash, "first")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"content_hash": "ab')
    assert registry.selected() == entry("one")
    registry.add(entry("two"))
    registry.select(entry("two").hash, "second")
    assert [line["reason"] for line in registry.history()] == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("by hand", "line 2: no JSON"),
        ('{"reason": "x"}', "line 2: no content_hash"),
        ('{"content_hash": 3, "reason": "x"}', "line 2: content_hash is 3"),
        ("[1, 2]", "line 2: a list instead of a record"),
        ("", "line 2: no JSON"),
        ("\udcff", "is no text"),
    ],
)
def test_a_history_that_was_edited_is_named(tmp_path: Path, line: str, problem: str) -> None:
    registry = Registry(tmp_path)
    registry.add(entry("one"))
    registry.select(entry("one").hash, "first")
    history = tmp_path / "history.jsonl"
    edited = history.read_bytes() + f"{line}\n".encode(errors="surrogateescape")
    history.write_bytes(edited)
    for use in (registry.selected, registry.rollback, lambda: table(registry)):
        with pytest.raises(UserError) as caught:
            use()
        assert caught.value.key == str(history)
        assert str(caught.value.problem).startswith(problem)
        assert "remove this one" in caught.value.allowed
    assert history.read_bytes() == edited


def test_experience_stands_around_the_question(tmp_path: Path) -> None:
    file = Registry(tmp_path).add(entry("use {question}", "b"))
    context = experience(file).context("", 0)
    assert context.messages("Q?") == ({"role": "user", "content": "- use {question}\n- b\n\nQ?"},)
    game = experience(file, GAME_WRAP).context("", 0)
    wanted = "Open.\n\n- use {question}\n- b\n\nBoard\n\nMove"
    assert game.messages("Open.\n\nBoard\n\nMove")[0]["content"] == wanted


def test_a_frozen_experience_needs_no_registry(tmp_path: Path) -> None:
    file = Registry(tmp_path).add(entry("one"))
    source = experience(file)
    frozen = source.frozen()
    file.unlink()
    described = describe_context(frozen)
    assert described["lineage"] == {"model": "m", "experience": entry("one").hash}
    assert as_context(described, "here") == source.context("", 0)


def test_a_pool_draws_a_context_a_sample(tmp_path: Path) -> None:
    registry = Registry(tmp_path)
    paths = [str(registry.add(entry(item))) for item in ("one", "two", "three")]
    pool: ContextSource = ExperiencePool(paths=paths, pool=None, template=WRAP, seed=1)
    drawn = [pool.context(f"u{uid}", step) for uid in range(20) for step in range(3)]
    assert set(drawn) == set(pool.contexts())
    assert drawn == [pool.context(f"u{uid}", step) for uid in range(20) for step in range(3)]
    assert len({pool.context("u0", step) for step in range(20)}) == 3
    frozen = pool.frozen()
    assert frozen is not None
    described = describe_context(frozen)
    assert described["content_hash"] == content_hash(pool)
    assert [one["content_hash"] for one in described["pool"]] == [
        context.content_hash for context in pool.contexts()
    ]
    assert as_context(described, "here") == pool.contexts()[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"path": None}, "context.path=null: context.items=None; allowed"),
        ({"path": None, "items": []}, r"context.items=\[\]; allowed"),
        ({"path": None, "items": [" "]}, "context.items=.*; allowed"),
        ({"path": "x", "template": "no places"}, "context.template=.*; allowed"),
        ({"path": "absent.json"}, "absent.json: cannot be read"),
    ],
)
def test_bad_experience_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        experience(**given)


def test_hashes_of_contexts_without_experience_are_what_they_were() -> None:
    fixed = FixedContext(system="Be brief.").context("", 0)
    assert fixed == Context(system="Be brief.", demonstrations=())
    assert fixed.content_hash == (
        "4ccd42564e1027159440e3e1c48a3da401ec08378d7b760bb250dcf9ae26bb3c"
    )


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    path = Registry(tmp_path).add(entry("a", validation=0.5))
    path.write_text(path.read_text().replace("0.5", '"good"'))
    with pytest.raises(UserError, match=r"scores\.validation is 'good'"):
        read_entry(path)


def test_a_context_whose_words_were_changed_is_refused() -> None:
    described = describe_context({"_target_": "opcd_nemo.context.FixedContext", "system": "Be."})
    assert as_context(described, "a file").system == "Be."
    with pytest.raises(UserError) as refused:
        as_context({**described, "system": "Do not be."}, "a file")
    assert str(refused.value.problem).startswith("content_hash is ")
