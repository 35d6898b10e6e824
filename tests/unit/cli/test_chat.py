"""A chat's keys are checked like a run's, before the model loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from opcd_nemo.cli.chat import open_chat
from opcd_nemo.errors import UserError
from tests.quick_compose import compose
from tests.tiny import write_chat_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("chat") / "tiny")


@pytest.mark.parametrize(
    "word",
    [
        *("sampling.temperature=nan", "sampling.temperature=inf", "sampling.temperature=1e-300"),
        *("sampling.top_k=1.5", "sampling.top_k=5", "sampling.top_p=much", "sampling.top_p=0.5"),
        *("sampling.max_new_tokens=1.5", "sampling.max_new_tokens=true"),
        *("sampling.max_new_tokens=2048", "seed=-1", "seed=x", f"seed={2**70}", "system=' '"),
        *("engine.max_batch_size=0", "parallel.num_ranks=2", "parallel.fp8=hybrid"),
        "parallel.sequence_parallel=true",
    ],
)
def test_a_value_that_no_chat_has_is_refused(
    word: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError) as refused:
        open_chat(compose("chat", [f"from={tiny}", word]))
    assert refused.value.key == word.partition("=")[0]
