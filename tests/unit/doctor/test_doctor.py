"""Each of the doctor's checks that need no weights passes on good input and fails on its own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import DoctorConfig
from opcd_nemo.config.train import load_config
from opcd_nemo.doctor import environment, text
from opcd_nemo.doctor.checks import Check, refusal, stop_if_failed, table
from opcd_nemo.doctor.examination import _asked, _checkpoints_gib, without_weights
from opcd_nemo.errors import CheckFailed, UserError
from opcd_nemo.training.inputs import Inputs, open_inputs
from opcd_nemo.types import Message
from tests.quick_compose import compose
from tests.tiny import CHAT_TEMPLATE, write_chat_model

CHAT: list[Message] = [{"role": "user", "content": "What is a violin?"}]
SMALL = [
    "evaluation.num_questions=2",
    "evaluation.num_retention=2",
    "rollout.sampling.max_new_tokens=4",
    "evaluation.retention_max_new_tokens=4",
    "parallel=single",
    "parallel.device=cpu",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_chat_model(folder / "tiny")
    write_chat_model(folder / "other", vocab_size=300)
    return folder


def settings(folder: Path, *overrides: str) -> list[str]:
    return [f"student.path={folder / 'tiny'}", f"exp_manager.exp_dir={folder}", *SMALL, *overrides]


@pytest.fixture(scope="module")
def inputs(folder: Path) -> Inputs:
    return open_inputs(load_config(compose("train", settings(folder))), 1)


def side(folder: Path, name: str, **changes: object) -> text.Side:
    """A model folder with some settings of its files changed."""
    path = write_chat_model(folder / name)
    for file in ("tokenizer_config.json", "generation_config.json"):
        there = json.loads((path / file).read_text()) if (path / file).exists() else {}
        known = {key: value for key, value in changes.items() if (key in there) or "tok" in file}
        (path / file).write_text(json.dumps(there | known))
    return text.open_side(str(path))


def doctor(folder: Path, *overrides: str, only: bool = False) -> dict[str, Check]:
    raw = compose("doctor", settings(folder, f"doctor.environment_only={only}", *overrides))
    run, options = split_settings(raw, "doctor", DoctorConfig)
    checks, _ = without_weights(load_config(run), options, 1)
    return {check.name: check for check in checks}


def test_tiny_run_passes_everything(folder: Path) -> None:
    found = doctor(folder)
    assert {check.status for check in found.values()} == {"pass"}
    assert "prompt lengths" in found
    assert "same response under both prompts" in found


def test_environment_alone_opens_no_model(folder: Path) -> None:
    found = doctor(folder, "student.path=nowhere", only=True)
    assert {check.status for check in found.values()} == {"pass"}
    assert not {"models", "vocabulary", "inputs"} & found.keys()


def test_missing_model_is_a_row_that_says_what_is_allowed(folder: Path) -> None:
    row = doctor(folder, "student.path=nowhere")["models"]
    assert row.status == "fail"
    assert "nowhere: the model is not there" in row.found
    assert row.mend.startswith("use a Hugging Face folder")


def test_teacher_with_another_vocabulary_fails(folder: Path) -> None:
    found = doctor(folder, f"teacher.path={folder / 'other'}")
    assert found["vocabulary"].status == "fail"
    assert "320 and 300 tokens" in found["vocabulary"].found


def test_context_longer_than_the_positions_fails(folder: Path) -> None:
    write_chat_model(folder / "short", max_positions=128)
    row = doctor(folder, f"student.path={folder / 'short'}")["inputs"]
    assert row.status == "fail"
    assert "128 positions" in row.found


def test_vocabulary_is_padded_for_the_layout(folder: Path) -> None:
    tiny = text.open_side(str(folder / "tiny"))
    row = text.vocabularies(tiny, tiny, tp=3)
    assert row.status == "pass"
    assert "321 and 321 padded for tp 3" in row.found


def test_token_without_a_row_fails(folder: Path) -> None:
    tiny = text.open_side(str(folder / "tiny"))
    few = text.Side(model=text.open_side(str(folder / "other")).model, tokenizer=tiny.tokenizer)
    assert text.vocabularies(few, few, tp=1).status == "fail"


def test_other_ends_fail(folder: Path) -> None:
    tiny = text.open_side(str(folder / "tiny"))
    other = side(folder, "ends", eos_token="<|endoftext|>")
    assert text.ends(tiny, tiny).status == "pass"
    assert text.ends(tiny, other).status == "fail"


def test_end_that_only_the_template_knows_is_a_warning(folder: Path) -> None:
    base = side(folder, "base", eos_token="<|endoftext|>", eos_token_id=0)
    row = text.ends(base, base)
    assert row.status == "warn"
    assert "(0, 2)" in row.found
    assert "closes a turn with '<|im_end|>'" in row.found


def test_other_template_is_a_warning(folder: Path) -> None:
    tiny = text.open_side(str(folder / "tiny"))
    other = side(folder, "template", chat_template=CHAT_TEMPLATE.replace("tiny", "large"))
    same = side(folder, "comment", chat_template="{#- the same -#}" + CHAT_TEMPLATE)
    assert "one template" in text.templates(tiny, tiny, CHAT).found
    assert "two templates that write the same" in text.templates(tiny, same, CHAT).found
    assert text.templates(tiny, other, CHAT).status == "warn"


def test_new_tokens_past_the_positions_fail(inputs: Inputs) -> None:
    episodes = inputs.task.episodes("train", 0, 3)
    assert text.lengths(inputs, episodes, 100).status == "pass"
    assert text.lengths(inputs, episodes, 2000).status == "fail"


def test_prompts_of_later_steps_and_of_evaluations_are_looked_at(
    folder: Path, inputs: Inputs
) -> None:
    steps = ["batching.global_batch_size=4", "trainer.max_steps=5"]
    found = doctor(folder, *steps, "doctor.num_lengths=10")["prompt lengths"].found
    assert found.endswith("longest of 14 prompts")  # three steps, two test questions
    config = load_config(compose("train", settings(folder, *steps, "evaluation.every_n_steps=5")))
    asked = [one.uid for one in _asked(config, inputs.task, 100)]
    expected = [inputs.task.episodes("train", step, 4) for step in range(5)]
    expected += [inputs.task.episodes(split, 0, 2) for split in ("test", "validation")]
    assert asked == [one.uid for part in expected for one in part]


ALTERED = {
    "upper case": ("{{ message.content }}", "{{ message.content | upper }}"),
    "shortened": ("{{ message.content }}", "{{ message.content[:20] }}"),
    "only with a context": (
        "{{ message.content }}",
        "{{ message.content if messages | length == 2 else message.content | upper }}",
    ),
}


@pytest.mark.parametrize("how", ALTERED)
def test_template_that_alters_the_response_fails(how: str, folder: Path, inputs: Inputs) -> None:
    template = CHAT_TEMPLATE.replace(*ALTERED[how])
    assert template != CHAT_TEMPLATE
    broken = side(folder, how.replace(" ", "_"), chat_template=template).tokenizer
    source = inputs.conversation.source
    episodes = inputs.task.episodes("train", 0, 2)
    assert text.same_suffix(inputs.tokenizer, source, episodes).status == "pass"
    assert text.same_suffix(broken, source, episodes).status == "fail"


def test_what_a_template_puts_before_the_response_is_told(folder: Path, inputs: Inputs) -> None:
    template = CHAT_TEMPLATE.replace(
        "{{ message.content }}", "<think></think>{{ message.content }}"
    )
    thinking = side(folder, "thinking", chat_template=template).tokenizer
    source = inputs.conversation.source
    row = text.same_suffix(thinking, source, inputs.task.episodes("train", 0, 2))
    assert row.status == "pass"
    assert "<think></think>" in row.found


def test_packages_other_than_required_fail() -> None:
    found = environment.installed_versions()
    assert environment.packages(found).status == "pass"
    row = environment.packages(found | {"megatron-core": "0.11.0", "jinja2": None})
    assert row.status == "fail"
    assert re.search(r"megatron-core\S+ \(found 0\.11\.0\)", row.mend)
    assert "jinja2 (found none)" in row.mend


@pytest.mark.parametrize(
    ("device", "te", "apex", "status"),
    [
        ("cpu", False, False, "pass"),
        ("cpu", True, False, "fail"),
        ("cuda", True, True, "pass"),
        ("cuda", True, False, "warn"),
        ("cuda", False, True, "warn"),
    ],
)
def test_optional_packages_fit_the_device(device: str, te: bool, apex: bool, status: str) -> None:
    installed = {"transformer_engine": te, "apex": apex, "triton": True}
    assert environment.extensions_fit(device, "", installed).status == status


def test_more_gpus_than_there_are_fail(folder: Path) -> None:
    row = doctor(folder, "parallel.device=cuda", only=False)["device"]
    assert row.status == "fail"
    assert "as many GPUs as ranks" in row.mend


def test_full_disk_fails(tmp_path: Path) -> None:
    assert environment.disk(tmp_path / "not" / "yet", 0.001).status == "pass"
    assert environment.disk(tmp_path, 1e9).status == "fail"


def test_folder_that_cannot_be_made_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert environment.writable(tmp_path / "new").status == "pass"
    assert environment.writable(tmp_path / "file" / "runs").status == "fail"


@pytest.mark.parametrize(
    ("manager", "bytes_each", "count"),
    [("default", 2, 2), ("resumable", 14, 4)],
)
def test_checkpoints_that_are_kept_need_room(
    manager: str, bytes_each: int, count: int, folder: Path
) -> None:
    words = settings(folder, f"exp_manager={manager}", "student.dtype=bf16")
    config = load_config(compose("train", words))
    tiny = text.open_side(str(folder / "tiny"))
    parameters = _checkpoints_gib(config, tiny) * 2**30 / (bytes_each * count)
    assert parameters == pytest.approx(2 * (320 * 24) + 2 * _layer_parameters() + 24)


def _layer_parameters() -> int:
    attention = 24 * (6 + 3 + 3) * 4 + 6 * 4 * 24
    return attention + 3 * 24 * 41 + 2 * 24


@pytest.mark.parametrize(
    ("override", "allowed"),
    [
        ("doctor.num_prompts=-1", "a whole number >= 1"),
        ("doctor.environment_only=3", "true or false"),
        ("doctor.num_prompts=many", "a whole number >= 1"),
        ("doctor.max_divergence=inf", "a number >= 0"),
        ("doctor.max_logprob_gap.bf16=-1", "a mapping of names to numbers >= 0"),
        ("+doctor.prompts=3", "num_prompts, environment_only, num_"),
    ],
)
def test_wrong_setting_is_refused(override: str, allowed: str, folder: Path) -> None:
    with pytest.raises(UserError) as refused:
        split_settings(compose("doctor", settings(folder, override)), "doctor", DoctorConfig)
    assert override.lstrip("+").startswith(refused.value.key)
    assert refused.value.allowed.startswith(allowed)


def test_table_counts_and_says_what_mends() -> None:
    rows = [
        Check(name="disk", status="pass", found="enough"),
        refusal("inputs", UserError("a", 1, "2 or 3", problem="too small")),
    ]
    lines = table(rows).splitlines()
    assert lines[0].startswith("PASS  disk")
    assert lines[1].endswith("a=1: too small")
    assert lines[2].strip() == "-> use 2 or 3"
    assert lines[3] == "1 pass, 0 warn, 1 fail, 0 skip"
    with pytest.raises(CheckFailed, match="1 of 2 checks failed: inputs"):
        stop_if_failed(rows)
    stop_if_failed(rows[:1])
