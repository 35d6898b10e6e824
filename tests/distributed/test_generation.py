"""Every layout, batch and cache continues prompts with the same tokens as transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from opcd_nemo.types import Prompt, Sample
from tests.distributed import reference
from tests.distributed.cases import (
    GENERATORS,
    LAYOUTS,
    NEW_TOKENS,
    PREFIX,
    SAMPLED_FROM,
    UNSPLIT,
    generation_prompts,
)
from tests.error_limits import check

Results = Callable[[str], Any]
NARROW = [name for name in UNSPLIT if LAYOUTS[name].world <= 2]
PLAIN = [name for name in NARROW if not LAYOUTS[name].sequence_parallel]
RAGGED, LED = (generation_prompts(led=led) for led in (False, True))
HALF_LED = [p if p.index % 2 else Prompt(token_ids=p.token_ids[1:], index=p.index) for p in LED]


def tokens(samples: Sequence[Sample]) -> list[tuple[int, ...]]:
    return [sample.response_ids for sample in samples]


@pytest.fixture(scope="module")
def greedy(
    transformers_models: dict[str, Any], folder: Path
) -> Callable[[str, list[Prompt]], list[tuple[int, ...]]]:
    ends = json.loads((folder / "ends.json").read_text())
    known: dict[tuple[str, int], list[tuple[int, ...]]] = {}

    def of(name: str, prompts: list[Prompt]) -> list[tuple[int, ...]]:
        key = (name, id(prompts))
        if key not in known:
            known[key] = reference.generate(transformers_models[name], prompts, ends[name])
        return known[key]

    return of


@pytest.mark.parametrize(
    ("layout", "pack"),
    [*((layout, "packed") for layout in UNSPLIT), *((layout, "plain") for layout in PLAIN)],
)
@pytest.mark.parametrize("name", GENERATORS)
def test_greedy_tokens_equal_transformers(
    name: str, layout: str, pack: str, results: Results, greedy: Any
) -> None:
    samples = results(layout)["generate"][f"{name}/{pack}"]
    assert tokens(samples) == greedy(name, RAGGED)


@pytest.mark.parametrize("name", GENERATORS)
def test_rows_finish_at_different_times(name: str, results: Results) -> None:
    samples = results("one")["generate"][f"{name}/packed"]
    lengths = [len(sample.response_ids) for sample in samples]
    assert len(set(lengths)) >= 5
    assert len({sample.finish_reason for sample in samples}) == 2
    assert all(s.finish_reason == "eos" for s in samples if len(s.response_ids) < NEW_TOKENS)


@pytest.mark.parametrize("layout", UNSPLIT)
def test_a_held_prefix_and_a_lead_in_the_stream_go_together(
    layout: str, results: Results, greedy: Any
) -> None:
    samples = results(layout)["generate"]["led, held"]
    assert tokens(samples) == greedy(SAMPLED_FROM, LED)


@pytest.mark.parametrize("variant", ["second turn", "second turn, narrow"])
@pytest.mark.parametrize("layout", UNSPLIT)
def test_a_turn_after_a_held_turn_is_answered_as_alone(
    layout: str, variant: str, results: Results, greedy: Any
) -> None:
    assert tokens(results(layout)["generate"][variant]) == greedy(SAMPLED_FROM, LED)


def test_what_is_held_of_a_turn_is_not_computed_again(results: Results) -> None:
    rows = results("one")["generate"]["turns rows"]
    first, second = (place for place, count in enumerate(rows) if count > len(LED))
    assert first == 0
    added = sum(1 + prompt.index % 3 for prompt in LED)
    assert rows[second] <= added < rows[first]


@pytest.mark.parametrize("layout", NARROW)
@pytest.mark.parametrize(
    ("variant", "prompts"),
    [
        ("narrow", RAGGED),
        ("led", LED),
        ("led, held, plain", LED),
        ("led, all held", LED),
        ("half led", HALF_LED),
        ("half led, held", HALF_LED),
    ],
)
def test_greedy_tokens_depend_on_no_batch_and_no_prefix(
    variant: str, prompts: list[Prompt], layout: str, results: Results, greedy: Any
) -> None:
    assert tokens(results(layout)["generate"][variant]) == greedy(SAMPLED_FROM, prompts)


def test_the_prompts_share_what_the_variants_say() -> None:
    assert all(p.token_ids[: len(PREFIX)] == PREFIX for p in LED)
    assert len({p.token_ids[:1] for p in RAGGED}) > 1
    assert len({len(p.token_ids) for p in RAGGED}) >= 20


@pytest.mark.parametrize(
    ("layout", "variant"),
    [
        *product(UNSPLIT, ["", ", split"]),
        *product(NARROW, [", plain", ", narrow", ", held", ", reversed"]),
    ],
)
def test_a_sample_is_a_function_of_seed_step_and_index(
    layout: str, variant: str, results: Results
) -> None:
    expected = results("one")["generate"]["drawn"]
    samples = results(layout)["generate"]["drawn" + variant]
    assert tokens(samples) == tokens(expected)
    for mine, true in zip(samples, expected, strict=True):
        difference = torch.tensor(mine.logprobs) - torch.tensor(true.logprobs)
        check("logprobs: layouts and batches", difference.abs().max().item(), 1e-5, layout)


def test_samples_of_different_prompts_and_the_greedy_ones_differ(results: Results) -> None:
    found = results("one")["generate"]
    drawn = tokens(found["drawn"])
    assert len(set(drawn)) == len(drawn)
    assert sum(a == b for a, b in zip(drawn, tokens(found["led"]), strict=True)) < 4


@torch.no_grad()
@pytest.mark.parametrize(("variant", "temperature"), [("led", 1.0), ("drawn", 0.8)])
def test_logprobs_are_those_of_the_tempered_model(
    variant: str, temperature: float, results: Results, transformers_models: dict[str, Any]
) -> None:
    for prompt, sample in zip(LED, results("one")["generate"][variant], strict=True):
        ids = torch.tensor([[*prompt.token_ids, *sample.response_ids]])
        logits = transformers_models[SAMPLED_FROM](ids).logits[0, len(prompt.token_ids) - 1 : -1]
        true = -reference.negative_logprob(
            logits.double() / temperature, torch.tensor(sample.response_ids)
        )
        difference = torch.tensor(sample.logprobs, dtype=torch.float64) - true
        check("logprobs: transformers", difference.abs().max().item(), 1e-5)


@pytest.mark.parametrize("layout", ["one", "dp2", "tp2", "tp3"])
def test_finished_rows_stop_costing(layout: str, results: Results) -> None:
    found = results(layout)["generate"]
    _, *steps = found["decoded rows"]
    count = LAYOUTS[layout]
    mine = found[f"{SAMPLED_FROM}/packed"]
    if count.world > count.tp:  # rank 0's share over dp
        mine = mine[: len(mine) // 2]
    assert sum(steps) == sum(len(sample.response_ids) - 1 for sample in mine)
    assert all(later <= earlier for earlier, later in pairwise(steps))


@pytest.mark.parametrize("layout", UNSPLIT)
@pytest.mark.parametrize("variant", ["padding, greedy", "padding, hot"])
def test_padded_vocabulary_is_never_sampled(variant: str, layout: str, results: Results) -> None:
    samples = tokens(results(layout)["generate"][variant])
    assert samples == tokens(results("one")["generate"][variant])
    assert max(map(max, samples)) < 67
