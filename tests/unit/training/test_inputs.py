"""What a run reads is refused in one line before a process group starts or a model loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from opcd_nemo.config.train import load_config
from opcd_nemo.errors import UserError
from opcd_nemo.training.inputs import Inputs, open_inputs
from tests.quick_compose import compose
from tests.tiny import CHAT_TEMPLATE, END_OF_TEXT, write_chat_model, write_chat_tokenizer

SMALL = [
    "evaluation.num_questions=2",
    "evaluation.num_retention=2",
    "rollout.sampling.max_new_tokens=4",
    "evaluation.retention_max_new_tokens=4",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("model") / "tiny")


def opened(model: Path, runs: Path, *overrides: str, world_size: int = 2) -> Inputs:
    settings = [f"student.path={model}", f"exp_manager.exp_dir={runs}", *SMALL, *overrides]
    return open_inputs(load_config(compose("train", settings)), world_size)


def refused(model: Path, runs: Path, *overrides: str, world_size: int = 2) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011  # its text is what the tests are about
        opened(model, runs, *overrides, world_size=world_size)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refusal(model: Path, runs: Path, *overrides: str, world_size: int = 2) -> UserError:
    with pytest.raises(UserError) as caught:
        opened(model, runs, *overrides, world_size=world_size)
    return caught.value


def copy(model: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model, folder))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_opens_a_good_folder(model: Path, tmp_path: Path) -> None:
    inputs = opened(model, tmp_path)
    assert inputs.teacher is inputs.student
    assert inputs.prefix_ids
    assert inputs.student_config.num_layers == 2


def test_a_top_k_above_the_vocabulary(model: Path, tmp_path: Path) -> None:
    size = opened(model, tmp_path).student_config.vocab_size
    top_k = "loss=reverse_kl_top256"
    opened(model, tmp_path, top_k, f"loss.k={size}")
    error = refusal(model, tmp_path, top_k, f"loss.k={size + 1}")
    assert (error.key, error.value) == ("loss.k", size + 1)
    assert error.allowed == f"at most the student's vocabulary of {size}"
    assert "loss.tail=stop_gradient" in refused(
        model, tmp_path, top_k, "loss.k=4", "loss.kind=forward_kl", "loss.tail=stop_gradient"
    )


def test_keeps_layers(model: Path, tmp_path: Path) -> None:
    inputs = opened(model, tmp_path, "student.keep_layers=[1]")
    assert (inputs.student_config.num_layers, inputs.teacher.config.num_layers) == (1, 2)
    message = refused(model, tmp_path, "student.keep_layers=[0,2]")
    assert message.startswith("student.keep_layers=[0, 2]: ")
    assert message.endswith("allowed: strictly increasing numbers from 0 to 1")


def test_layout_and_world_size(model: Path, tmp_path: Path) -> None:
    error = refusal(model, tmp_path, "parallel=tp2_pp2", world_size=6)
    assert (error.key, error.value) == ("parallel.tensor_model_parallel_size", 2)
    assert "4 ranks, which do not divide the 6 ranks" in str(error.problem)


def test_context_parallel_ranks_are_data_parallel_ranks(model: Path, tmp_path: Path) -> None:
    sizes = "parallel=tp2", "parallel.context_parallel_size=2"
    error = refusal(model, tmp_path, *sizes, world_size=6)
    assert (error.key, error.value) == ("parallel.context_parallel_size", 2)
    assert "3 data-parallel ranks" in error.allowed
    batch = "batching.global_batch_size=8", "batching.micro_batch_size=8"
    error = refusal(model, tmp_path, *sizes, *batch, world_size=8)
    assert (error.key, error.value) == ("batching.global_batch_size", 8)
    assert error.allowed == (
        "a multiple of batching.micro_batch_size=8 x 2 groups of context-parallel ranks, and of "
        "4 data-parallel ranks"
    )


def test_batch_and_data_parallel_ranks(model: Path, tmp_path: Path) -> None:
    error = refusal(model, tmp_path, world_size=3)
    assert (error.key, error.value) == ("batching.global_batch_size", 8)
    assert error.allowed == "a multiple of batching.micro_batch_size=4 x 3 data-parallel ranks"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_layers_and_stages(model: Path, tmp_path: Path, side: str) -> None:
    odd = write_chat_model(tmp_path / "odd", num_layers=3)
    student, teacher = (odd, model) if side == "student" else (model, odd)
    error = refusal(student, tmp_path / "runs", "parallel=pp2", f"teacher.path={teacher}")
    assert (error.key, error.value) == ("parallel.pipeline_model_parallel_size", 2)
    assert error.problem == f"the {side} has 3 layers"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_missing_folder(model: Path, tmp_path: Path, side: str) -> None:
    gone = tmp_path / "gone"
    error = refusal(model, tmp_path, f"{side}.path={gone}")
    assert (error.key, error.value) == (f"{side}.path", str(gone))
    assert error.problem == "the model is not there"


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_folder_without_tokenizer(model: Path, tmp_path: Path, side: str) -> None:
    bare = copy(model, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    error = refusal(model, tmp_path, f"{side}.path={bare}")
    assert (error.key, error.value) == (f"{side}.path", str(bare))
    assert error.problem == "no tokenizer"


def test_unsupported_architecture(model: Path, tmp_path: Path) -> None:
    other = copy(model, tmp_path / "other")
    edit_json(other / "config.json", model_type="gemma")
    error = refusal(other, tmp_path)
    assert (error.key, error.value) == ("student.path", str(other))
    assert error.problem == f"{other / 'config.json'}: model_type=gemma"


def test_no_chat_template(model: Path, tmp_path: Path) -> None:
    plain = copy(model, tmp_path / "plain")
    write_chat_tokenizer(plain, template=None)
    error = refusal(plain, tmp_path)
    assert (error.key, error.value) == ("student.path", str(plain))
    assert error.problem == "no chat template"


def test_a_teacher_with_fewer_rows(model: Path, tmp_path: Path) -> None:
    other = write_chat_model(tmp_path / "other", vocab_size=310)
    assert refused(model, tmp_path, f"teacher.path={other}") == (
        f"teacher.path={other}: vocabulary of 310 differs from the student's 320 ({model}); "
        "allowed: the same tokens, and at least as many rows"
    )


def test_a_teacher_with_more_rows_is_read_up_to_the_students(model: Path, tmp_path: Path) -> None:
    other = write_chat_model(tmp_path / "other", vocab_size=332)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / name, other / name)
    inputs = opened(model, tmp_path, f"teacher.path={other}")
    assert (inputs.teacher.config.vocab_size, inputs.teacher_config.vocab_size) == (332, 320)


def test_arguments_of_the_chat_template(model: Path, tmp_path: Path) -> None:
    error = refusal(model, tmp_path, "+student.chat_template_arguments.enable_thinking=false")
    assert error.key == "student.chat_template_arguments"
    assert error.value == {"enable_thinking": False}
    other = copy(model, tmp_path / "other")
    text = "{%- if enable_thinking is defined and enable_thinking is false %}<think>{% endif %}"
    (other / "chat_template.jinja").write_text(CHAT_TEMPLATE + text)
    argument = "+student.chat_template_arguments.enable_thinking"
    chats = [
        opened(other, tmp_path, *more).tokenizer.render([{"role": "user", "content": "A"}])
        for more in ([], [f"{argument}=true"], [f"{argument}=false"])
    ]
    assert chats[0] == chats[1]
    assert chats[0] == chats[2][: len(chats[0])] != chats[2]


def test_different_tokens_in_as_large_a_vocabulary(model: Path, tmp_path: Path) -> None:
    other = copy(model, tmp_path / "other")
    file = other / "tokenizer.json"
    contents = json.loads(file.read_text())
    vocabulary = contents["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    file.write_text(json.dumps(contents))
    error = refusal(model, tmp_path, f"teacher.path={other}")
    assert (error.key, error.value) == ("teacher.path", str(other))
    assert error.problem == f"its tokens, or their ids, are not those of the student ({model})"


def test_different_end_of_sequence(model: Path, tmp_path: Path) -> None:
    other = copy(model, tmp_path / "other")
    edit_json(other / "tokenizer_config.json", eos_token=END_OF_TEXT)
    error = refusal(model, tmp_path, f"teacher.path={other}")
    assert (error.key, error.value) == ("teacher.path", str(other))
    assert str(error.problem).startswith("end-of-sequence ids (")


def test_context_longer_than_positions(tmp_path: Path) -> None:
    short = write_chat_model(tmp_path / "short", max_positions=128)
    message = refused(short, tmp_path / "runs")
    assert message.startswith("context._target_=opcd_nemo.context.FewShotContext: ")
    assert "max_new_tokens=4: with a prompt of 275 tokens more than the model's 128 pos" in message


def test_question_longer_than_positions(tmp_path: Path) -> None:
    short = write_chat_model(tmp_path / "short", max_positions=16)
    message = refused(short, tmp_path / "runs")
    assert message.startswith("task._target_=opcd_nemo.tasks.system_prompt.StyleTask: ")
    assert "tokens more than the model's 16 positions" in message


def test_more_new_tokens_than_positions(model: Path, tmp_path: Path) -> None:
    message = refused(model, tmp_path, "evaluation.retention_max_new_tokens=2048")
    assert "max_new_tokens=2048: with a prompt of " in message
    assert "tokens more than the model's 2048 positions" in message


def test_empty_prompt_set(model: Path, tmp_path: Path) -> None:
    error = refusal(model, tmp_path, "task._target_=tests.recipes.faulty_parts.EmptyTask")
    assert (error.key, error.value) == ("evaluation.num_questions", 2)
    assert error.problem == "the task has 0 prompts where 2 are asked for"


@pytest.mark.parametrize(
    "key", ["evaluation.num_questions", "evaluation.num_retention", "batching.global_batch_size"]
)
def test_more_prompts_than_there_are(model: Path, tmp_path: Path, key: str) -> None:
    message = refused(model, tmp_path, f"{key}=100000")
    assert message.startswith(f"{key}=100000: ")
    assert "allowed: 1 to " in message


def test_retention_is_checked_like_the_task(model: Path, tmp_path: Path) -> None:
    other = ["~retention", "+task@retention=json"]
    inputs = opened(model, tmp_path, *other)
    assert inputs.retention.episodes("test", 0, 1)[0].uid.startswith("test/")
    target = "retention._target_=opcd_nemo.tasks.system_prompt.StyleTask: "
    assert refused(model, tmp_path, *other, "retention.verifier=poem").startswith(
        f"{target}task.verifier=poem; allowed: brevity"
    )
    assert refused(model, tmp_path, *other, "evaluation.num_retention=201") == (
        "evaluation.num_retention=201: test: n=201; allowed: 1 to 200"
    )


def test_unknown_verifier(model: Path, tmp_path: Path) -> None:
    assert refused(model, tmp_path, "task.verifier=poem").startswith(
        "task.verifier=poem; allowed: brevity"
    )


def test_output_folder_not_writable(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("not a folder")
    folder = file / "runs"
    error = refusal(model, folder)
    assert (error.key, error.value) == ("exp_manager.exp_dir", folder)
    assert error.problem == "Not a directory"


def test_validation_needs_as_many_questions_as_the_test(model: Path, tmp_path: Path) -> None:
    questions = "evaluation.num_questions=100"  # the test split has 200, the validation split 64
    opened(model, tmp_path, questions)
    assert refused(model, tmp_path, questions, "evaluation.every_n_steps=1") == (
        "evaluation.num_questions=100: validation: n=100; allowed: 1 to 64"
    )


def test_the_smaller_of_both_models_positions_count(model: Path, tmp_path: Path) -> None:
    """A student with room for more than its teacher has, and the other way round."""
    shorter = write_chat_model(tmp_path / "shorter", max_positions=1024)
    for student, teacher in ((model, shorter), (shorter, model)):
        inputs = opened(student, tmp_path, f"teacher.path={teacher}")
        assert inputs.conversation.max_positions == 1024


def test_as_many_other_ends_of_sequence_are_others(model: Path, tmp_path: Path) -> None:
    one, other = (copy(model, tmp_path / name) for name in ("one", "other"))
    edit_json(one / "generation_config.json", eos_token_id=[0, 2])
    edit_json(other / "generation_config.json", eos_token_id=[1, 2])
    error = refusal(one, tmp_path, f"teacher.path={other}")
    assert str(error.problem).startswith("end-of-sequence ids (")


SFT = ("method=sft", "student.dtype=fp32")


@pytest.mark.parametrize("name", ["file", "file/below", "dangling"])
def test_samples_are_kept_in_a_folder(model: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    error = refusal(model, tmp_path, *SFT, f"rollout.teacher_data={tmp_path / name}")
    assert error.key == "rollout.teacher_data"


def test_samples_of_another_teacher_are_refused_at_set_up(model: Path, tmp_path: Path) -> None:
    folder = f"rollout.teacher_data={tmp_path / 'samples'}"
    samples_of = opened(model, tmp_path, *SFT, folder).samples_of
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/samples_of.json").write_text(json.dumps(samples_of))
    assert opened(copy(model, tmp_path / "copy"), tmp_path, *SFT, folder).samples_of == samples_of
    other = write_chat_model(tmp_path / "other", seed=1)
    for overrides, name in (
        ((f"teacher.path={other}",), "the teacher"),
        (("rollout.sampling.temperature=0.5",), "rollout.sampling"),
        (("seed=5",), "seed"),
        (("context=pirate",), "the context"),
        (("teacher.dtype=bf16",), "teacher.dtype"),
    ):
        error = refusal(model, tmp_path, *SFT, folder, *overrides)
        assert error.key == "rollout.teacher_data"
        assert f"{name} was " in str(error.problem)
        assert str(error.problem).count(" was ") == 1
