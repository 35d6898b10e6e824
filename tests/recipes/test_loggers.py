"""The curves of a run go to TensorBoard and to Weights & Biases, without a network."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.recipes.conftest import Train


def test_the_loss_is_in_tensorboard_and_in_wandbs_offline_run(train: Train, tmp_path: Path) -> None:
    done = train(
        "parallel=single",
        "name=logged",
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.create_tensorboard_logger=true",
        "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs.project=a-test",
        environment={"WANDB_MODE": "offline", "WANDB_SILENT": "true"},
    )
    assert done.returncode == 0, done.stderr
    nemo = tmp_path / "logged/nemo"
    events = EventAccumulator(str(nemo)).Reload()
    assert len(events.Scalars("loss/reverse_kl")) == 2, "a value a step"
    (record,) = nemo.glob("wandb/offline-run-*/*.wandb")
    text = record.read_bytes()  # messages one after the other, not compressed
    assert text.count(b"loss/reverse_kl") >= 2
    assert b"a-test" in text
