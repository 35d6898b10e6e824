"""Contexts: what the teacher is shown, word for word."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from opcd_nemo.context.sources import Context, ContextSource, FewShotContext, FixedContext

CONF = Path(__file__).parents[3] / "conf" / "context"
PAIRS = [
    {"question": "What is a mill?", "answer": "It grinds."},
    {"question": "What is a mole?", "answer": "It digs."},
]


def _from_config(name: str) -> Context:
    source: ContextSource = instantiate(OmegaConf.load(CONF / f"{name}.yaml"))
    return source.context("uid", 0)


def test_a_context_puts_system_then_demonstrations_before_the_question() -> None:
    context = FewShotContext(system="Be brief.", demonstrations=PAIRS).context("uid", 0)
    assert context.messages("What is a bee?") == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is a mill?"},
        {"role": "assistant", "content": "It grinds."},
        {"role": "user", "content": "What is a mole?"},
        {"role": "assistant", "content": "It digs."},
        {"role": "user", "content": "What is a bee?"},
    )


def test_without_a_system_text_there_is_no_system_message() -> None:
    context = FewShotContext(system=None, demonstrations=PAIRS).context("uid", 0)
    assert [message["role"] for message in context.messages("x")].count("system") == 0


def test_the_empty_context_is_the_bare_question() -> None:
    empty = Context(system=None, demonstrations=())
    assert empty.messages("x") == ({"role": "user", "content": "x"},)


def test_a_long_context_is_never_cut() -> None:
    system = "word " * 100_000
    question = "why " * 100_000
    first, last = FixedContext(system=system).context("uid", 0).messages(question)
    assert (first["content"], last["content"]) == (system, question)


def test_a_source_gives_the_same_context_to_every_episode_and_step() -> None:
    source = FewShotContext(system=None, demonstrations=PAIRS)
    assert source.context("a", 0) == source.context("b", 7)


def test_the_hash_is_that_of_the_content() -> None:
    def hash_of(system: str | None, *pairs: tuple[str, str]) -> str:
        return Context(system=system, demonstrations=pairs).content_hash

    contexts = [
        hash_of(None),
        hash_of(""),
        hash_of("a"),
        hash_of("a", ("b", "c")),
        hash_of("a", ("c", "b")),
        hash_of("a", ("b", "c"), ("d", "e")),
        hash_of("a", ("d", "e"), ("b", "c")),
        hash_of(None, ("a", "b")),
        hash_of(None, ("ab", "")),
    ]
    assert len(set(contexts)) == len(contexts)
    assert hash_of("a", ("b", "ç")) == hash_of("a", ("b", "ç"))


def test_the_hash_does_not_change_with_the_version() -> None:
    context = Context(system="Talk like a pirate.", demonstrations=(("Où ?", "Là."),))
    assert (
        context.content_hash == "a095159b308256e77f40022877f8583682bfc5b88e6875a9a62dc09a475fa701"
    )


@pytest.mark.parametrize(
    ("system", "demonstrations", "message"),
    [
        (None, [], r"context\.demonstrations=\[\]; allowed: one demonstration or more"),
        (" ", PAIRS, r"context\.system=' '; allowed"),
        (None, [{"question": "a", "answer": ""}], r"context\.demonstrations\[0\]\.answer=''"),
        (None, [*PAIRS, {"question": "\n", "answer": "b"}], r"demonstrations\[2\]\.question"),
        (None, [{"question": "a"}], r"\['question'\]; allowed: the keys question and answer"),
        (None, [{"question": "a", "answer": "b", "weight": "1"}], r"'weight'"),
    ],
)
def test_a_bad_few_shot_context_names_key_value_and_what_is_allowed(
    system: str | None, demonstrations: list[dict[str, str]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        FewShotContext(system=system, demonstrations=demonstrations)


def test_a_blank_system_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match=r"context\.system=''; allowed"):
        FixedContext(system="")


@pytest.mark.parametrize(
    ("name", "num_demonstrations", "has_system"),
    [("brevity", 4, False), ("bullets", 3, True), ("json", 4, True), ("pirate", 0, True)],
)
def test_each_configured_context_builds(
    name: str, num_demonstrations: int, has_system: bool
) -> None:
    context = _from_config(name)
    assert len(context.demonstrations) == num_demonstrations
    assert (context.system is not None) == has_system
    assert all(type(text) is str for pair in context.demonstrations for text in pair)
