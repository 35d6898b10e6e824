"""What keys may say beside each other, and what commands other than a run take."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from opcd_nemo.config.programs import DoctorConfig, ExportConfig, load_chat
from opcd_nemo.config.schema import read_schema
from opcd_nemo.config.train import DTYPES, load_config
from opcd_nemo.errors import UserError
from tests.quick_compose import compose


def refused(read: Callable[[], object]) -> UserError:
    with pytest.raises(UserError) as caught:
        read()
    return caught.value


def test_a_long_name_is_shown_by_its_beginning() -> None:
    for length, shown in ((60, "." * 60), (61, "." * 60 + "...")):
        raw = compose("train", [])
        raw.name = "." * length
        assert refused(lambda raw=raw: load_config(raw)).value == shown


def test_a_schedule_says_why_its_warmup_is_too_long() -> None:
    error = refused(lambda: load_config(compose("train", ["optim.warmup_steps=31"])))
    assert error.problem == "trainer.max_steps=30 with optim.schedule=constant"


@pytest.mark.parametrize(
    ("data", "allowed"), [("a folder", "null with rollout.sampler=student"), (None, None)]
)
def test_samples_of_a_teacher_are_for_its_own_sampler(data: str | None, allowed: object) -> None:
    raw = compose("train", [])
    raw.rollout.teacher_data = data
    if allowed is None:
        assert load_config(raw).rollout.teacher_data is None
    else:
        error = refused(lambda: load_config(raw))
        assert (error.key, error.value, error.allowed) == ("rollout.teacher_data", data, allowed)


def with_ranks(name: str, *words: str) -> Any:
    raw = compose(name, list(words))
    raw.parallel.num_ranks = 3
    return raw


def test_a_command_that_starts_no_ranks_has_those_of_its_world(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    error = refused(lambda: load_chat(with_ranks("chat", "from=a/model")))
    assert (error.key, error.value) == ("parallel.num_ranks", 3)
    assert error.allowed == "1: the command starts no ranks"
    raw = with_ranks("export", "from=a", "to=b")
    assert refused(lambda: read_schema(ExportConfig, raw)).key == "parallel.num_ranks"
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert load_chat(with_ranks("chat", "from=a/model")).parallel.num_ranks == 3
    assert read_schema(ExportConfig, raw).parallel.num_ranks == 3


@pytest.mark.parametrize("system", ["", " \n"])
def test_the_context_of_a_chat_has_words(system: str) -> None:
    raw = compose("chat", ["from=a/model"])
    assert load_chat(raw).system is None
    raw.system = "Be kind."
    assert load_chat(raw).system == "Be kind."
    raw.system = system
    error = refused(lambda: load_chat(raw))
    assert (error.key, error.value) == ("system", system)


def test_the_doctor_has_a_limit_for_every_precision() -> None:
    raw = compose("doctor", []).doctor
    assert set(read_schema(DoctorConfig, raw).max_logprob_gap) == set(DTYPES)
    raw.max_logprob_gap = {DTYPES[0]: 0.1}
    assert refused(lambda: read_schema(DoctorConfig, raw, prefix="doctor.")).key == (
        "doctor.max_logprob_gap"
    )


def test_a_plugs_argument_without_a_value_is_told_as_its_words() -> None:
    raw = compose("train", [])
    raw.loss.temperature = "???"
    error = refused(lambda: load_config(raw))
    assert (error.key, error.allowed) == ("loss.temperature", "a number >= 0.001 and <= 100")
    assert error.problem is not None
    assert error.problem.startswith("no value is given: divides both models' logits")


def test_a_value_that_names_no_key_says_so() -> None:
    raw = compose("train", [])
    raw.seed = "${foo.bar}"
    error = refused(lambda: load_config(raw))
    assert (error.key, error.allowed) == ("seed", "a key that exists")
    assert error.problem is not None
    assert error.problem.startswith("Interpolation key 'foo.bar' not found")


def test_the_least_rate_may_be_the_rate() -> None:
    raw = compose("train", [])
    raw.optim.min_lr = raw.optim.lr
    assert load_config(raw).optim.min_lr == raw.optim.lr
    raw.optim.min_lr = 2 * raw.optim.lr
    assert refused(lambda: load_config(raw)).key == "optim.min_lr"


def test_the_loss_of_a_warmup_is_checked_where_there_is_one() -> None:
    raw = compose("train", [])
    raw.warmup.loss = {**raw.loss, "kind": "kl"}
    assert load_config(raw).warmup.steps == 0
    raw.warmup.steps = 1
    assert refused(lambda: load_config(raw)).key == "warmup.loss.kind"
