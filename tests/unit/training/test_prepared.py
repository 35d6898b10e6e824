"""What a run is prepared of needs no registry any more, and is checked and opened once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from omegaconf import OmegaConf

from opcd_nemo.context.registry import Entry, Registry
from opcd_nemo.errors import UserError
from opcd_nemo.launch.compose import compose
from opcd_nemo.training import prepared
from opcd_nemo.training.prepared import prepare_run
from tests.tiny import write_chat_model
from tests.unit.training.test_inputs import SMALL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny")


def raw(model: Path, runs: Path, *overrides: str) -> Any:
    return compose(
        "train", [f"student.path={model}", f"exp_manager.exp_dir={runs}", *SMALL, *overrides]
    )


def test_experience_of_a_registry_is_written_out(model: Path, tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry")
    entry = Entry(items=("costs ${a}",), num_tokens=9, lineage={"model": "m"}, scores={})
    registry.add(entry)
    registry.select(entry.hash, "a test")
    composed = raw(model, tmp_path, "context=experience", f"context.path={tmp_path / 'registry'}")
    run = prepare_run(composed, 2)
    assert composed.context.path is not None
    assert run.raw.context.path is None
    assert run.config.context["items"] == ["costs ${a}"]
    assert run.config.context == OmegaConf.to_container(run.raw.context, resolve=True)
    assert run.origin["context_hash"] == run.inputs.context_hash
    assert run.origin["context"] == run.config.context


@pytest.mark.parametrize(("rows", "version"), [(200, None), (2000, 2)])
def test_the_draw_of_many_prompts_is_part_of_the_origin(
    model: Path, tmp_path: Path, rows: int, version: int | None
) -> None:
    lines = [f'{{"question": "{n}?", "answer": "#### {n}"}}\n' for n in range(rows)]
    (tmp_path / "a.jsonl").write_text("".join(lines))
    task = ["task=gsm8k", f"task.train={tmp_path / 'a.jsonl'}", "task.test=0.1"]
    assert prepare_run(raw(model, tmp_path, *task), 2).origin.get("draw") == version
    before = prepare_run(raw(model, tmp_path, *task, "+task.draw=1"), 2)
    assert "draw" not in before.origin


def test_the_configuration_is_checked_once_and_the_inputs_are_opened_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("load_config", "open_inputs"):
        real = getattr(prepared, name)

        def counted(*arguments: Any, name: str = name, real: Any = real) -> Any:
            calls.append(name)
            return real(*arguments)

        monkeypatch.setattr(prepared, name, counted)
    prepare_run(raw(model, tmp_path), 2)
    assert calls == ["load_config", "open_inputs"]


def test_a_wrong_key_is_refused_before_anything_is_opened(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"optim\.lr"):
        prepare_run(raw(model, tmp_path, "optim.lr=-1", "student.path=nowhere"), 2)
    with pytest.raises(UserError) as caught:
        prepare_run(raw(model, tmp_path, "student.path=nowhere"), 2)
    assert (caught.value.key, caught.value.value) == ("student.path", "nowhere")


def test_every_rank_ends_when_the_first_cannot_read_a_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepare_run(raw(model, tmp_path), 2)
    gone = UserError("student.path", model, "a file that can be read")

    def refuse(*_: object) -> NoReturn:
        raise gone

    monkeypatch.setattr(prepared, "input_digests", refuse)
    first: Any = SimpleNamespace(rank=0, gather_objects=lambda mine: [mine, (None, None)])
    second: Any = SimpleNamespace(rank=1, gather_objects=lambda mine: [(None, gone), mine])
    for rank in (first, second):
        with pytest.raises(UserError) as caught:
            prepared.with_digests(run, rank)
        assert caught.value is gone
    second.gather_objects = first.gather_objects = lambda mine: [mine, (None, None)]
    monkeypatch.setattr(prepared, "input_digests", lambda *_: {"a": {}})
    assert prepared.with_digests(run, first).digests == {"a": {}}
