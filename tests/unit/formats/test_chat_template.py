"""A stranger's template renders as in transformers, or ends in one line; it never takes long."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytest

from opcd_nemo.errors import UserError
from opcd_nemo.formats.chat_template import ChatTemplate
from opcd_nemo.types import Message

USER: Message = {"role": "user", "content": "hi"}


def rendered(source: str, *chat: Message, **variables: Any) -> str:
    return ChatTemplate(source, "model").render(chat or (USER,), variables)


def refusal(source: str) -> UserError:
    with pytest.raises(UserError) as caught:
        rendered(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    return caught.value


def test_a_template_that_loops_ends_and_is_not_started_again() -> None:
    template = ChatTemplate(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "model"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in range(3):
        with pytest.raises(UserError, match=r"more than 1\.5 CPU-seconds; allowed: a"):
            template.render((USER,), {})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 1000000000 }}",
        "{% set n = 10 ** 9 %}{{ 'a' * n * messages|length }}",
        "{{ 'a'.center(10 ** 10) }}",
        "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}"
        "{% endfor %}{{ ns.x }}",
    ],
)
def test_a_template_that_takes_memory_is_refused(source: str) -> None:
    assert "more memory than a chat needs" in str(refusal(source).problem)


def test_a_chat_does_not_become_a_book() -> None:
    source = "{% for i in range(9000) %}{{ messages[0].content }}{% endfor %}"
    assert "makes 18000 letters" in str(refusal(source).problem)
    long: Message = {"role": "user", "content": "hi" * 10_000}
    assert len(rendered("{{ messages[0].content * 3 }}", long)) == 60_000
    assert len(rendered("{{ tools }}", tools="x" * 60_000)) == 60_000


@pytest.mark.parametrize(
    ("source", "word"),
    [
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ raise_exception('System role not supported') }}", "System role not supported"),
        ("{{ raise_exception('a' * 100000) }}", "aaa"),
        ("{{ messages | nosuch }}", "nosuch"),
        ("{{ messages[7].content.text }}", "no element 7"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% include 'x' %}", "loader"),
        ("{{ 1 // 0 }}", "zero"),
    ],
)
def test_a_template_that_fails_is_one_line(source: str, word: str) -> None:
    error = refusal(source)
    assert (error.key, str(error.problem).split(":")[0]) == (
        "model",
        "the chat template refuses a chat of user",
    )
    assert word in str(error.problem)


@pytest.mark.parametrize("source", ["{% for %}", "{{ " + "(" * 50_000, "{{ " + "9" * 5000 + " }}"])
def test_what_is_no_template_is_refused_before_a_chat(source: str) -> None:
    with pytest.raises(UserError, match="does not compile"):
        ChatTemplate(source, "model")
    with pytest.raises(UserError, match="300000 letters; allowed: at most 262144"):
        ChatTemplate("x" * 300_000, "model")


def test_a_template_sees_no_environment_and_changes_no_chat() -> None:
    assert rendered("{{ environ is defined }}{{ messages[0].content }}") == "Falsehi"
    refusal("{{ messages[0].pop('content') }}")
    assert USER == {"role": "user", "content": "hi"}


def test_the_variables_of_a_template() -> None:
    template = ChatTemplate(
        "{% set a = b %}{{ a }}{{ messages }}{{ c }}{% for d in e %}{% endfor %}", ""
    )
    assert template.names() == {"b", "c", "e", "messages"}
    assert ChatTemplate("{{ 'a' * 10 ** 6 }}{{ b }}", "").names() == {"b"}


def test_surrogates_pass_to_who_refuses_them() -> None:
    half: Message = {"role": "user", "content": "\ud83d"}
    assert rendered("{{ messages[0].content }}", half) == "\ud83d"


def test_a_fork_has_a_process_of_its_own() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "model")
    template.render((USER,), {})
    child = os.fork()
    if child == 0:
        os._exit(template.render((USER,), {}) != "hi")
    assert os.waitpid(child, 0)[1] == 0
    assert template.render((USER,), {}) == "hi"


def test_a_process_that_ended_between_two_chats_is_started_anew() -> None:
    template = ChatTemplate("{{ messages[0].content }}", "model")
    assert template.render((USER,), {}) == "hi"
    assert template._process is not None
    template._process.kill()
    template._process.wait()
    assert template.render((USER,), {}) == "hi"
