"""The control that reads a context's words in random places."""

from __future__ import annotations

from opcd_nemo.context.sources import Context, OneContext, ShuffledContext

CONTEXT = Context(
    system="one two three four five",
    demonstrations=(("What is it?", "It is a red thing."), ("Why?", "Because.")),
    experience="- go up\n- never go down",
    wrap="{experience}\n\n{question}",
)


def test_a_shuffled_context_has_the_same_words_and_as_many_in_each_text() -> None:
    shuffled = CONTEXT.shuffled(3)
    assert shuffled != CONTEXT
    assert shuffled == CONTEXT.shuffled(3)
    assert shuffled.system is not None
    assert sorted(shuffled.system.split()) == sorted("one two three four five".split())
    assert [problem for problem, _ in shuffled.demonstrations] == ["What is it?", "Why?"]
    assert [len(solution.split()) for _, solution in shuffled.demonstrations] == [5, 1]
    assert shuffled.experience is not None
    assert [len(line.split()) for line in shuffled.experience.splitlines()] == [3, 4]
    assert shuffled.wrap == CONTEXT.wrap


def test_a_shuffled_source_shuffles_all_that_the_source_may_give() -> None:
    source = ShuffledContext(OneContext(CONTEXT, {}), seed=3)
    assert source.contexts() == (CONTEXT.shuffled(3),)
    assert source.context("uid", 7) == CONTEXT.shuffled(3)
    assert source.frozen() is None
    bare = Context(system=None, demonstrations=())
    assert bare.shuffled(1) == bare
