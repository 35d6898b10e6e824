"""Keys of Lightning and NeMo that a run does not follow are refused; what a run has is named."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from opcd_nemo.config.doc import check_value, doc_of
from opcd_nemo.config.third_parties import CheckpointKeys, TensorBoardKeys, TrainerKeys
from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from tests.quick_compose import compose

CALLBACK = "exp_manager.checkpoint_callback_params"
CURVES = "exp_manager.wandb_logger_kwargs"


def refused(*overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(compose("train", list(overrides)))
    return caught.value


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("+trainer.limit_train_batches=1", "trainer.max_steps"),
        ("+trainer.fast_dev_run=true", "trainer.max_steps"),
        ("+trainer.max_epochs=3", "trainer.max_steps"),
        ("+trainer.min_steps=3", "trainer.max_steps, with evaluation.min_retention=null"),
        ("trainer.precision=16-mixed", "student.dtype and teacher.dtype"),
        ("+trainer.gradient_clip_val=1", "optim.clip_grad"),
        ("+trainer.devices=null", "parallel.device and parallel.num_ranks"),
        ("+exp_manager.ema.enable=true", "teacher.update=ema"),
        ("+exp_manager.explicit_log_dir=/tmp", "exp_manager.exp_dir and name"),
        (f"+{CALLBACK}.dirpath=/tmp", "exp_manager.exp_dir and name"),
        (f"{CALLBACK}.every_n_epochs=1", "every_n_train_steps"),
        ("+exp_manager.summary_writer_kwargs={save_dir: /tmp}", "the folder nemo of the run"),
        (f"+{CURVES}.dir=/tmp", "the folder nemo of the run"),
    ],
)
def test_the_key_that_a_run_has_is_named(override: str, instead: str) -> None:
    error = refused(override)
    assert error.key.startswith(override.lstrip("+").partition("=")[0].rpartition(".")[0])
    assert str(error.problem).startswith("a run does not follow this key of ")
    assert error.allowed.startswith(instead)


@pytest.mark.parametrize("value", ["nothing", "null", "step"])
def test_checkpoints_are_the_last_ones_whatever_is_monitored(value: str) -> None:
    assert refused(f"{CALLBACK}.monitor={value}").allowed.startswith("evaluation.every_n_steps")


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["+trainer.plugins=[a]"], "trainer.plugins"),
        (["+exp_manager.files_to_copy=[/etc/passwd]"], "exp_manager.files_to_copy"),
        ([f"+{CALLBACK}.foo=1"], f"{CALLBACK}.foo"),
        (["trainer.log_every_n_steps=0"], "trainer.log_every_n_steps"),
        ([f"{CALLBACK}.every_n_train_steps=0"], f"{CALLBACK}.every_n_train_steps"),
        ([f"{CALLBACK}.every_n_train_steps=null"], f"{CALLBACK}.every_n_train_steps"),
        ([f"{CALLBACK}.every_n_train_steps=often"], f"{CALLBACK}.every_n_train_steps"),
        ([f"{CALLBACK}.save_top_k=0"], f"{CALLBACK}.save_top_k"),
        ([f"{CALLBACK}.save_top_k=-2"], f"{CALLBACK}.save_top_k"),
        ([f"{CALLBACK}.save_weights_only=perhaps"], f"{CALLBACK}.save_weights_only"),
        (
            ["exp_manager=resumable", f"{CALLBACK}.save_weights_only=true"],
            f"{CALLBACK}.save_weights_only",
        ),
        ([f"{CALLBACK}=null"], CALLBACK),
        ([f"+{CURVES}.tags=a"], f"{CURVES}.tags"),
        (
            ["exp_manager.create_wandb_logger=true", "exp_manager.wandb_logger_kwargs=null"],
            f"{CURVES}.project",
        ),
        ([f"+{CURVES}.settings={{root_dir: /tmp}}"], f"{CURVES}.settings"),
        ([f"+{CURVES}.settings=text"], f"{CURVES}.settings"),
        (["exp_manager.summary_writer_kwargs=text"], "exp_manager.summary_writer_kwargs"),
        (["hydra.run.dir=/tmp/x"], "hydra.run.dir"),
        (["+hydra.job.chdir=true"], "+hydra.job.chdir"),
    ],
)
def test_a_run_is_not_changed_behind_its_back(overrides: list[str], key: str) -> None:
    assert refused(*overrides).key == key


@pytest.mark.parametrize(
    "override",
    [
        "exp_manager.summary_writer_kwargs={flush_secs: 10, max_queue: 5}",
        f"+{CURVES}.tags=[a, b]",
        f"+{CURVES}.settings={{api_key: something}}",
        f"+{CURVES}.settings={{api_key: something, base_url: 'https://host'}}",
        f"+{CURVES}.settings={{}}",
        f"{CALLBACK}.save_top_k=-1",
        f"{CALLBACK}.filename='run {{step}}'",
        "trainer.enable_progress_bar=false",
        "exp_manager=job",
    ],
)
def test_what_a_run_follows_is_taken(override: str) -> None:
    config: Any = load_config(compose("train", [override]))
    assert config.exp_manager["checkpoint_callback_params"]["save_top_k"] != 0


LEAST_AND_MOST = {
    (TrainerKeys, "max_steps"): (1, 10**9),
    (TrainerKeys, "log_every_n_steps"): (1, 10**9),
    (CheckpointKeys, "every_n_train_steps"): (1, 10**9),
    (CheckpointKeys, "save_top_k"): (-1, 10**9),
    (TensorBoardKeys, "flush_secs"): (1, 86_400),
    (TensorBoardKeys, "max_queue"): (1, 10**6),
}


@pytest.mark.parametrize(("schema", "name"), LEAST_AND_MOST)
def test_a_number_of_others_has_a_range(schema: type, name: str) -> None:
    least, most = LEAST_AND_MOST[schema, name]
    kind, described = get_type_hints(schema)[name], doc_of(schema, name)
    for number in (least, most):
        check_value(name, number, kind, described)
    for number in (least - 1, most + 1):
        with pytest.raises(UserError):
            check_value(name, number, kind, described)
