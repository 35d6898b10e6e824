"""The curves of a run go to TensorBoard and to Weights & Biases, without a network or a secret."""

from __future__ import annotations

import uuid
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.recipes.conftest import Train


def test_the_loss_is_in_tensorboard_and_in_wandbs_offline_run(train: Train, tmp_path: Path) -> None:
    secret = uuid.uuid4().hex
    done = train(
        "parallel=single",
        "name=logged",
        f"exp_manager.exp_dir={tmp_path}",
        "exp_manager.create_tensorboard_logger=true",
        "exp_manager.create_wandb_logger=true",
        "exp_manager.wandb_logger_kwargs.project=a-test",
        "+exp_manager.wandb_logger_kwargs.notes=${oc.env:A_TOKEN}",
        "task._target_=tests.recipes.faulty_parts.ServedTask",
        f"+task.server={{api_KEY: key{secret}}}",
        "+task.url=x://${task.server.api_KEY}@y",
        "exp_manager.checkpoint_callback_params.save_nemo_on_train_end=true",
        environment={
            "WANDB_MODE": "offline",
            "WANDB_SILENT": "true",
            "A_TOKEN": f"token-{secret}",
        },
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "logged").rglob("*") if path.is_file()]
    names = {path.name for path in files}
    assert names >= {"config.yaml", "cmd-args.log", "hparams.yaml", "logged.nemo"}
    assert [path for path in files if secret.encode() in path.read_bytes()] == []
    nemo = tmp_path / "logged/nemo"
    events = EventAccumulator(str(nemo)).Reload()
    assert len(events.Scalars("loss/reverse_kl")) == 2, "a value a step"
    (record,) = nemo.glob("wandb/offline-run-*/*.wandb")
    text = record.read_bytes()  # messages one after the other, not compressed
    assert text.count(b"loss/reverse_kl") >= 2
    assert b"a-test" in text
