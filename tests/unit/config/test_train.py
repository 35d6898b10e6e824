"""Bad values are refused in one line that names the key, the value and what is allowed."""

from __future__ import annotations

from itertools import product

import pytest
from omegaconf import DictConfig

from opcd_nemo.config.plugs import build_plug, check_plug
from opcd_nemo.config.train import TrainConfig, load_config
from opcd_nemo.distributed.devices import fast_dtype
from opcd_nemo.errors import UserError
from opcd_nemo.launch.recipes import CONF
from tests.quick_compose import compose


def names(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    return compose("train", [])


def refused(*overrides: str) -> UserError:
    with pytest.raises(UserError) as caught:
        load_config(compose("train", list(overrides)))
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "+optim.lrr=1",
            "optim.lrr=1: no such key; did you mean lr?; allowed: lr, min_lr, schedule, "
            "warmup_steps, betas, eps, weight_decay, clip_grad, use_distributed_optimizer, "
            "overlap_grad_reduce",
        ),
        (
            "+optim.temperature=1",
            "optim.temperature=1: no such key; did you mean rollout.sampling.temperature or "
            "evaluation.sampling.temperature?; allowed: lr, min_lr, schedule, warmup_steps, betas, "
            "eps, weight_decay, clip_grad, use_distributed_optimizer, overlap_grad_reduce",
        ),
        (
            "+loss.temperatur=1",
            "loss.temperatur=1: no such argument; did you mean temperature?; allowed: "
            "temperature, kind, beta, chunk_tokens",
        ),
        (
            "~student.path",
            "student.path: no value is given: the model that learns; allowed: a Hugging Face "
            "folder, a .gguf or .nemo file, an unpacked .nemo, a training checkpoint, "
            "hf://owner/name, e.g. student.path=models/Qwen3-0.6B",
        ),
        (
            "~loss.temperature",
            "loss.temperature: no value is given: divides both models' logits; independent of the "
            "rollout's; allowed: a number >= 0.001 and <= 100",
        ),
        (
            "rollout.sampling.max_new_tokens=${foo.bar}",
            "rollout.sampling.max_new_tokens: Interpolation key 'foo.bar' not found; allowed: "
            "a key that exists",
        ),
        ("optim.lr=nan", "optim.lr=nan: is not finite; allowed: a number > 0 and <= 10"),
    ],
)
def test_a_mistake_is_told_in_one_line(override: str, line: str) -> None:
    assert str(refused(override)) == line


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("~optim.lr", "a number > 0"),
        ("seed=???", "a whole number >= 0"),
        ("~loss.kind", "reverse_kl, forward_kl, jsd"),
        ("optim.lr=abc", "a number > 0"),
        ("optim.lr=true", "a number > 0"),
        ("seed=1.5", "a whole number >= 0"),
        ("parallel.sequence_parallel=3", "true or false"),
        ("parallel.context_parallel_size=0", "a whole number >= 1"),
        ("parallel.recompute_modules=[core_attn]", "a list of mlp, each at most once"),
        ("parallel.recompute_modules=[mlp,mlp]", "a list of mlp, each at most once"),
        ("parallel.layer_spec=apex", "auto, local, te"),
        ("parallel.fp8=e5m2", "null, hybrid, e4m3"),
        ("parallel.fp8=hybrid", "null with parallel.layer_spec=auto; te has it"),
        ("student.chat_template_arguments=3", "a mapping"),
        ("parallel.sequence_parallel=true", "false with parallel.tensor_model_parallel_size=1"),
        ("loss.beta=1", "a number > 0 and < 1"),
        ("trainer.max_steps=1.5", "a whole number >= 1"),
        ("trainer.max_steps=0", "a whole number >= 1"),
        ("exp_manager.checkpoint_callback_params.async_save=1", "true or false"),
        ("engine.max_batch_size=1.5", "a whole number >= 1"),
        ("engine.max_batch_size=0", "a whole number >= 1"),
        ("optim.betas=0.9", "two numbers >= 0 and < 1"),
        ("optim.betas=[0.9]", "two numbers >= 0 and < 1"),
        ("optim.betas=[nan,0.9]", "two numbers >= 0 and < 1"),
        ("optim.betas=[1,0.9]", "two numbers >= 0 and < 1"),
        ("student.keep_layers=[a]", "a list of whole numbers >= 0 and <= 10000, or null"),
        ("student.path=null", "a Hugging Face folder, a .gguf or .nemo file, an unpacked"),
        ("exp_manager.exp_dir=null", "a text"),
        ("optim.lr=-1", "a number > 0"),
        ("parallel.num_ranks=0", "a whole number >= 1"),
        ("rollout.sampling.temperature=-0.1", "0, or a number >= 0.001 and <= 100"),
        ("loss.chunk_tokens=-1", "a whole number >= 1"),
        ("optim.lr=inf", "a number > 0"),
        ("loss.temperature=nan", "a number >= 0.001 and <= 100"),
        ("rollout.sampling.top_p=1.2", "a number > 0 and <= 1"),
        ("rollout.sampling.top_p=0", "a number > 0 and <= 1"),
        ("parallel.port=70000", "a whole number >= 0 and <= 65535"),
        ("optim.schedule=linear", "constant, cosine"),
        ("loss.kind=kl", "reverse_kl, forward_kl, jsd"),
        ("optim.min_lr=1", "at most optim.lr=5e-05"),
        ("batching.micro_batch_size=3", "a divisor of batching.global_batch_size=8"),
        ("evaluation.num_questions=0", "a whole number >= 1"),
        ("evaluation.leakage_phrases=[]", "a list of one phrase or more, each with a word in it"),
        ("evaluation.min_retention=0.5", "null with evaluation.every_n_steps=0"),
        ("teacher.update=slow", "never, every_n_steps, ema, shared"),
        ("teacher.ema_decay=0.9", "null with teacher.update=never"),
        ("teacher.sync_every_n_steps=1.5", "a whole number >= 1 and <= 1000000000, or null"),
        ("task._target_=nope.Task", "an importable class"),
        ("loss._target_=os.system", "a class or function of Python with annotated arguments"),
        ("loss._target_=subprocess.run", "a class or function of Python with annotated arguments"),
        ("name=../x", "the name of a folder"),
        ("name='a\nb'", "the name of a folder"),
        ("name=-x", "the name of a folder"),
        ("name=.run.lock", "the name of a folder"),
        ("name='a '", "the name of a folder"),
        (f"name={'x' * 300}", "the name of a folder"),
        (f"name=a/{'é' * 120}", "the name of a folder"),
        ("exp_manager.exp_dir=' '", "the path of a folder"),
        (f"seed={2**70}", "a whole number >= 0 and <= 9223372036854775807"),
        ("optim.lr=1e300", "a number > 0 and <= 10"),
        ("optim.warmup_steps=31", "0 to 30"),
        ("trainer.max_steps=1e30", "a whole number >= 1"),
        ("parallel.timeout_s=1e-9", "a number >= 1"),
        ("parallel.timeout_s=1e300", "a number >= 1"),
        ("parallel.threads_per_rank=1000000000", "a whole number >= 1 and <= 1024"),
        ("rollout.sampling.temperature=1e-300", "0, or a number >= 0.001 and <= 100"),
        ("rollout.sampling.top_k=1000000000000", "a whole number >= 0 and <= 10000000"),
        (f"loss.chunk_tokens={2**63}", "a whole number >= 1 and <= 10000000"),
        ("resume.allow_changes=[optm.lr]", "a list of keys or groups of seed, student"),
    ],
)
def test_a_refusal_names_the_key_and_what_is_allowed(override: str, allowed: str) -> None:
    error = refused(override)
    assert error.key == override.lstrip("~+").partition("=")[0]
    assert error.allowed.startswith(allowed)


@pytest.mark.parametrize(
    ("teacher", "override", "allowed"),
    [
        ("ema", "teacher.ema_decay=1", "a number > 0 and < 1, or null"),
        ("ema", "teacher.ema_decay=0", "a number > 0 and < 1, or null"),
        ("ema", "teacher.ema_decay=nan", "a number > 0 and < 1, or null"),
        ("ema", "teacher.ema_decay=null", "a number > 0 and < 1 with teacher.update=ema"),
        ("ema", "teacher.sync_every_n_steps=2", "null with teacher.update=ema"),
        ("hard_sync", "teacher.ema_decay=0.5", "null with teacher.update=every_n_steps"),
        (
            "hard_sync",
            "teacher.sync_every_n_steps=0",
            "a whole number >= 1 and <= 1000000000, or null",
        ),
        (
            "hard_sync",
            "teacher.sync_every_n_steps=null",
            "a whole number >= 1 with teacher.update=every_n_steps",
        ),
        ("live", "teacher.sync_every_n_steps=2", "null with teacher.update=shared"),
    ],
)
def test_an_update_of_the_teacher_takes_its_own_keys(
    teacher: str, override: str, allowed: str
) -> None:
    error = refused(f"teacher={teacher}", override)
    assert (error.key, error.allowed) == (override.partition("=")[0], allowed)


@pytest.mark.parametrize(
    ("teacher", "update"), [("hard_sync", "every_n_steps"), ("ema", "ema"), ("live", "shared")]
)
def test_a_teacher_that_is_updated_has_the_students_parameters(teacher: str, update: str) -> None:
    for override, value in (
        ("teacher.path=other", "null"),
        ("student.keep_layers=[0]", "null"),
        ("teacher.dtype=fp32", "student.dtype=bf16"),
    ):
        allowed = refused(f"teacher={teacher}", "student.dtype=bf16", override).allowed
        assert allowed == f"{value} with teacher.update={update}"
    assert load_config(compose("train", [f"teacher={teacher}"])).teacher.update == update


def test_limits_of_what_is_drawn_have_no_effect_on_greedy_rollouts() -> None:
    for override, off in (("top_p=0.9", "1.0"), ("top_k=5", "0")):
        error = refused("rollout.sampling.temperature=0", f"rollout.sampling.{override}")
        assert error.allowed.startswith(f"{off} with rollout.sampling.temperature=0")


def test_a_warm_up_ends_before_a_cosine_schedule() -> None:
    steps = ["optim.schedule=cosine", "trainer.max_steps=5"]
    assert refused(*steps, "optim.warmup_steps=5").key == "optim.warmup_steps"
    assert load_config(compose("train", [*steps, "optim.warmup_steps=4"])).optim.warmup_steps == 4


def test_a_folder_of_the_teachers_samples_has_a_name() -> None:
    assert refused("method=sft", "rollout.teacher_data=''").key == "rollout.teacher_data"


def test_warmup_loss_is_checked_when_there_is_a_warmup() -> None:
    assert refused("method=opcd_warmup", "warmup.loss.kind=kl").key == "warmup.loss.kind"
    assert refused("method=opcd_warmup", "warmup.loss=null").key == "warmup.loss"


def test_loads_typed(composed: DictConfig) -> None:
    config = load_config(composed)
    assert isinstance(config, TrainConfig)
    assert config.optim.betas == [0.9, 0.999]
    assert config.teacher.dtype == config.student.dtype == fast_dtype()
    assert config.evaluation.sampling.max_new_tokens == config.rollout.sampling.max_new_tokens
    assert config.task["seed"] == config.seed


def test_defaults_follow_the_paper(composed: DictConfig) -> None:
    config = load_config(composed)
    optim = config.optim
    assert (optim.weight_decay, optim.clip_grad, optim.warmup_steps) == (0.01, 1.0, 0)
    assert config.batching.aggregation == "sequence_mean"
    assert (config.loss["kind"], config.loss["temperature"]) == ("reverse_kl", 1.0)
    assert (config.rollout.sampler, config.rollout.sampling.temperature) == ("student", 1.0)


STYLES = ("demo_brevity", "demo_bullets", "demo_json", "demo_pirate")  # demo_games asks for a path
DEMOS = [name for name in names("recipe") if name.startswith(STYLES)]
LAYOUTS = [name for name in names("parallel") if not name.startswith("h100_")]
METHODS = names("method")


@pytest.mark.parametrize(("recipe", "method"), product(DEMOS, METHODS))
def test_every_demo_composes_with_every_method(recipe: str, method: str) -> None:
    config = load_config(compose("train", [f"recipe={recipe}", f"method={method}"]))
    suffix = "" if method.startswith("opcd") else f"_{method}"
    assert config.name == f"{recipe}{suffix}-dp2"
    assert recipe.split("_")[1] == config.task["verifier"]
    assert config.rollout.sampler == ("teacher" if suffix else "student")
    assert bool(config.warmup.steps) == (config.warmup.loss is not None)
    assert bool(config.warmup.steps) == (method == "opcd_warmup")


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_a_demo_composes_with_every_layout(parallel: str) -> None:
    assert (
        load_config(compose("train", [f"parallel={parallel}"])).name == f"demo_brevity-{parallel}"
    )


def test_only_a_method_says_who_samples_and_which_loss() -> None:
    """`method=sft` replaces all of a recipe's method: no recipe chooses a loss beside it."""
    for file in (CONF / "recipe").rglob("*.yaml"):
        assert "override /loss" not in file.read_text(), file
        assert "sampler:" not in file.read_text(), file


NOT_OF_ONE_RUN = ("recipe", "parallel", "experience", "accelerator")


@pytest.mark.parametrize(
    ("group", "name"),
    [
        (path.name, name)
        for path in sorted(CONF.iterdir())
        if path.is_dir() and path.name not in NOT_OF_ONE_RUN
        for name in names(path.name)
        if name != "custom"  # a class of the user's
    ],
)
def test_every_word_of_a_group_loads_once_its_files_are_named(group: str, name: str) -> None:
    overrides = [f"{group}={name}"]
    while key := _missing(overrides):
        assert group in ("task", "context"), key
        assert len(overrides) < 6
        overrides.append(f"{key}=/data/some.jsonl")


@pytest.mark.parametrize("group", ["task", "context", "loss"])
def test_a_class_of_the_user_is_asked_for(group: str) -> None:
    assert refused(f"{group}=custom").key == f"{group}._target_"


def _missing(overrides: list[str]) -> str | None:
    try:
        load_config(compose("train", overrides))
    except UserError as error:
        if not str(error.problem).startswith("no value is given"):
            raise
        return error.key
    return None


def test_any_task_can_be_asked_for_retention() -> None:
    config = load_config(compose("train", ["~retention", "+task@retention=json"]))
    assert config.retention == {**config.task, "verifier": "json"}
    assert refused(f"retention._target_={config.task['_target_']}").key == "retention.verifier"


class Plug:
    def __init__(self, model: str, *, size: int, share: float = 0.5, rest: object = None) -> None:
        self.values = (model, size, share, rest)


def test_plug_is_built_of_yaml_and_runtime_arguments() -> None:
    plug = {"_target_": f"{__name__}.Plug", "size": 3, "share": 1, "rest": ["any"]}
    check_plug("plug", plug)
    assert build_plug(plug, model="tiny").values == ("tiny", 3, 1, ["any"])
    with pytest.raises(UserError, match=r"^plug\.size=true; allowed: a whole number$"):
        check_plug("plug", plug | {"size": True})
    with pytest.raises(UserError, match=r"^plug=null; allowed: a mapping with a _target_$"):
        check_plug("plug", None)


@pytest.mark.parametrize("value", ["a\0b", {"a": ["\udcff"]}, ["a", ["b\0"]]])
def test_no_argument_of_a_plug_has_characters_that_no_text_has(value: object) -> None:
    with pytest.raises(UserError, match="has a character that no text has") as refused:
        check_plug("plug", {"_target_": f"{__name__}.Plug", "size": 3, "rest": value})
    assert refused.value.key.startswith("plug.rest")


@pytest.mark.parametrize("target", ["os.system", "builtins.exec", "os.popen", "shutil.rmtree"])
def test_a_program_of_another_kind_is_no_plug(target: str) -> None:
    with pytest.raises(UserError) as refused:
        check_plug("plug", {"_target_": target})
    assert refused.value.key == "plug._target_"


@pytest.mark.parametrize(
    "name",
    [
        *("'../../{step}'", "'a/{step}'", "same", "'.{step}'", "null", "3"),
        *(
            "'{step}-{loss}'",
            "'step=3-{step}'",
            "'{step}{step}'",
            "'{step}5'",
            f"'{{step}}{'x' * 200}'",
        ),
    ],
)
def test_a_checkpoint_has_a_name_of_its_folder_that_a_later_start_finds(name: str) -> None:
    key = "exp_manager.checkpoint_callback_params.filename"
    assert refused(f"{key}={name}").key == key


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("rollout.ahead=1", "rollout.ahead=1; allowed: 0 with an engine that samples in the ranks"),
        ("engine=vllm rollout.ahead=1 engine.colocated=true", "0 with engine.colocated=true"),
        ("engine=vllm rollout.ahead=1 method=sft", "0 with rollout.sampler=teacher"),
        ("engine=vllm engine.start_timeout_s=600", "below parallel.timeout_s=600"),
        ("engine=vllm engine.max_restarts=-1", "a whole number >= 0"),
    ],
)
def test_an_engine_of_servers_is_refused_what_it_cannot_do(words: str, line: str) -> None:
    assert line in str(refused(*words.split()))
