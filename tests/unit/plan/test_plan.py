"""The plan's arithmetic against numbers worked out by hand, and against what must hold."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from opcd_nemo.config.groups import split_settings
from opcd_nemo.config.programs import PlanConfig
from opcd_nemo.config.train import load_config
from opcd_nemo.plan import duration, memory
from opcd_nemo.plan.accelerator import Accelerator
from opcd_nemo.plan.outline import known_shapes, model_shapes
from opcd_nemo.plan.planning import plan
from opcd_nemo.plan.report import layouts, plan_report, sweep_report
from opcd_nemo.plan.work import (
    Servers,
    Stream,
    backward_flops,
    forward_flops,
    head_flops,
    key_value_width,
)
from tests.model_shapes import SHAPES, num_parameters
from tests.quick_compose import compose
from tests.sample_work import layout, work

ACCELERATORS = ("h100", "h200", "a100", "this_cpu")
QWEN, LLAMA = SHAPES["Qwen/Qwen3-8B"], SHAPES["meta-llama/Llama-3.1-8B-Instruct"]
MATHS = [
    "recipe=math_qwen3_8b_to_4b_2n8g",
    "plan.prompt_tokens=150",
    "plan.context_tokens=8000",
]


def accelerator(name: str = "h100", **changes: Any) -> Accelerator:
    raw = compose("plan", [f"accelerator={name}"])
    _, found = split_settings(raw, "accelerator", Accelerator)
    return replace(found, **changes)


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record.getMessage())


@contextmanager
def seen() -> Iterator[list[str]]:
    """What is logged meanwhile."""
    lines, log = _Lines(), logging.getLogger("opcd_nemo")
    log.addHandler(lines)
    yield lines.seen
    log.removeHandler(lines)


def said(*overrides: str) -> str:
    with seen() as lines:
        plan(compose("plan", list(overrides)))
    return "\n".join(lines)


def refused(*overrides: str) -> str:
    with pytest.raises(ValueError, match="allowed") as caught:
        said(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def parts(**changes: Any) -> dict[str, float]:
    """Bytes of the student's phase without the base, nothing added for the allocator."""
    plain = accelerator(base_gib=0.0, transient_share=1.0)
    return memory._phases(work(**changes), plain)["student"]


def test_keys_and_values_of_an_8b_llama_take_128_kib_a_token() -> None:
    assert key_value_width(LLAMA, tp=1) * 2 * LLAMA.num_layers == 128 * 1024
    assert key_value_width(LLAMA, tp=4) == key_value_width(LLAMA, tp=1) / 4


def test_a_token_takes_two_operations_a_weight() -> None:
    stream = Stream(rows=1, before=0, shared=0, unshared=1)
    outside = 2 * QWEN.vocab_size * QWEN.hidden_size
    norms = QWEN.num_layers * (2 * QWEN.hidden_size + 2 * QWEN.head_dim) + QWEN.hidden_size
    weights = num_parameters(QWEN) - outside - norms
    assert forward_flops(QWEN, stream) == pytest.approx(2 * weights, rel=1e-3)
    assert head_flops(QWEN, 1) == outside


def test_shared_start_is_computed_once() -> None:
    apart = Stream(rows=4, before=0, shared=0, unshared=100)
    together = Stream(rows=4, before=0, shared=60, unshared=40)
    assert together.tokens == 220
    assert forward_flops(QWEN, together) < 0.56 * forward_flops(QWEN, apart)


def test_tensor_and_pipeline_parallelism_divide_operations() -> None:
    stream = Stream(rows=2, before=0, shared=0, unshared=50)
    assert forward_flops(QWEN, stream, tp=4, pp=2) == forward_flops(QWEN, stream) / 8


def test_held_bytes_are_two_weights_and_twelve_of_the_optimizer() -> None:
    found, count = parts(model=QWEN), num_parameters(QWEN)
    assert found["student weights"] == found["teacher weights"] == 2 * count
    assert found["optimizer"] == 12 * count
    assert found["gradients"] == 4 * count
    assert parts(model=QWEN, layout=layout(dp=4))["optimizer"] == 3 * count
    whole = layout(dp=4, distributed_optimizer=False)
    assert parts(model=QWEN, layout=whole)["optimizer"] == 12 * count
    assert parts(model=QWEN, student_dtype="fp32")["optimizer"] == 8 * count
    assert parts(model=QWEN, teacher_update="shared")["teacher weights"] == 0
    assert parts(model=QWEN, teacher_update="ema")["teacher weights"] == 6 * count


def test_clipping_copies_the_largest_gradient_of_a_share_without_transformer_engine() -> None:
    def copied(**changes: Any) -> float:
        phases = memory._phases(work(model=QWEN, **changes), accelerator())
        return phases["optimizer"]["scaled gradient"]

    assert copied() == 4 * QWEN.vocab_size * QWEN.hidden_size
    assert copied(layout=layout(dp=1024)) == 4 * num_parameters(QWEN) / 1024
    assert copied(transformer_engine=True) == 0


def test_activations_shrink_with_what_is_split_or_recomputed() -> None:
    whole = parts(model=QWEN)["activations"]
    split = parts(model=QWEN, layout=layout(tp=4))["activations"]
    sequence = parts(model=QWEN, layout=layout(tp=4, sequence_parallel=True))["activations"]
    again = parts(model=QWEN, layout=layout(recompute_mlp=True))["activations"]
    assert sequence == pytest.approx(whole / 4)
    assert whole / 4 < split < whole
    assert again < 0.5 * whole
    stream = Stream(rows=1, before=0, shared=0, unshared=100)
    ffn = 2 * 100 * 3 * QWEN.ffn_hidden_size * QWEN.hidden_size * QWEN.num_layers
    plain = backward_flops(QWEN, stream, layout())
    assert backward_flops(QWEN, stream, layout(recompute_mlp=True)) == plain + ffn


def test_context_parallelism_divides_a_training_pass_but_no_keys_and_values() -> None:
    split = layout(dp=2, cp=2, micro_batch_size=1)
    whole, one = work(model=QWEN, layout=layout(dp=2, micro_batch_size=1)), work(model=QWEN)
    shared = work(model=QWEN, layout=split)
    assert (whole.rows, whole.num_microbatches) == (4, 4)
    assert (shared.rows, shared.trained_rows, shared.num_microbatches) == (4, 8, 8)
    stream = Stream(rows=1, before=0, shared=0, unshared=100)
    keys = 100 * key_value_width(QWEN, 1) * 2  # of which a rank has two stretches, 1/2 and 3/4
    found, expected = (memory.layer_activations(w, stream, accelerator()) for w in (shared, one))
    assert found == (expected - keys) / 2 + 5 / 4 * keys
    training, alone = (parts(model=QWEN, layout=each.layout) for each in (shared, whole))
    for name in ("student weights", "optimizer", "gradients", "context"):
        assert training[name] == alone[name]
    hidden = 24 * QWEN.hidden_size * 2  # of a sequence, before a rank takes its own of it
    assert training["teacher's hidden states"] == alone["teacher's hidden states"] + hidden


def test_time_of_a_split_pass_is_its_share_and_an_exchange_a_layer() -> None:
    split = work(model=QWEN, layout=layout(dp=2, cp=2, micro_batch_size=1))
    whole = work(model=QWEN, layout=layout(dp=2, micro_batch_size=1))
    quick = accelerator(collective_latency_s=0.0)
    for seconds in (duration.student_seconds, duration.teacher_seconds):
        assert seconds(split, quick)[0] == pytest.approx(seconds(whole, quick)[0])
        assert seconds(whole, quick)[1] == 0
    size = (40 + 20 - 1) * key_value_width(QWEN, 1) * 2
    sent = QWEN.num_layers * size / 2 / quick.link(2)
    assert duration.student_seconds(split, quick)[1] == pytest.approx(8 * 2 * sent)


def test_scores_are_stored_where_attention_is_not_fused() -> None:
    one = work(model=QWEN)
    stream = Stream(rows=2, before=0, shared=0, unshared=100)
    fused = memory.layer_activations(one, stream, accelerator())
    stored = memory.layer_activations(one, stream, accelerator("this_cpu"))
    scores = 2 * QWEN.num_attention_heads * 100 * 100
    keys = 2 * 100 * key_value_width(QWEN, 1)
    assert stored - fused == scores * (4 + 2 + 1) + keys * 2


def test_decoding_one_row_reads_every_weight_once() -> None:
    fast = accelerator(layer_latency_s=0.0, bandwidth_share=1.0, memory_gb_per_s=1000.0)
    one = work(model=QWEN, sequences=1)
    _, decode, _ = duration.rollout_seconds(one, fast, 1, 10, with_context=False)
    cache = 45 * QWEN.num_layers * key_value_width(QWEN, 1) * 2
    assert decode == pytest.approx(10 * (2 * num_parameters(QWEN) + cache) / 1e12)


def test_pipeline_bubble_is_stages_less_one_over_micro_batches() -> None:
    quiet = accelerator(collective_latency_s=0.0, link_gb_per_s=1e9, network_gb_per_s=1e9)
    alone = duration.student_seconds(work(model=QWEN, sequences=16), quiet)[0]
    staged = layout(pp=4, micro_batch_size=4)
    piped = duration.student_seconds(work(model=QWEN, sequences=16, layout=staged), quiet)[0]
    bubble = 1 + 3 / 4
    head = duration.loss_flops(work(model=QWEN), 4 * 20)
    head_s = 4 * head / quiet.flops("bf16", quiet.training_share)
    assert piped == pytest.approx(bubble * ((alone - head_s) / 4 + head_s))


def test_overlap_hides_its_share_of_the_exchange() -> None:
    plain = duration.data_seconds(work(layout=layout(dp=2)), accelerator())
    hidden = duration.data_seconds(work(layout=layout(dp=2, overlap=True)), accelerator())
    assert hidden == pytest.approx(plain * (1 - accelerator().overlap_share))
    assert duration.data_seconds(work(), accelerator()) == 0


def test_fp8_speeds_up_the_linears_alone() -> None:
    one = work(model=QWEN)
    plain = duration.student_seconds(one, accelerator())[0]
    fast = duration.student_seconds(replace(one, fp8=True), accelerator())[0]
    assert 0.5 * plain < fast < 0.65 * plain


def test_moving_teacher_reads_its_context_every_step() -> None:
    frozen = duration.teacher_seconds(work(model=QWEN), accelerator())[0]
    assert (
        duration.teacher_seconds(work(model=QWEN, teacher_update="ema"), accelerator())[0] > frozen
    )


def test_every_number_of_an_accelerator_has_an_effect() -> None:
    sizes = layout(tp=2, pp=2, dp=4, overlap=True)
    one = work(model=QWEN, layout=sizes, sequences=64, student_dtype="bf16")
    processor = accelerator(launcher_gib=1.0)

    def shown(changed: Accelerator) -> str:
        wide = replace(one, max_batch_size=4096, sequences=2**15, teacher_dtype="fp32")
        servers = Servers(count=1, gpus=2, colocated=True, ahead=0.0)
        works = (one, wide, replace(one, servers=servers))
        reports = [plan_report(work_, changed, "") for work_ in works]
        exact = [vars_of(duration.run_duration(work_, changed)) for work_ in works]
        return f"{reports}{exact}{memory.peak_memory(one, changed)}"

    before = shown(processor)
    for field in fields(Accelerator):
        value = getattr(processor, field.name)
        changed: Any = {
            bool: lambda v: not v,
            str: lambda v: v + "!",
            dict: lambda v: {key: rate / 2 for key, rate in v.items()},
        }.get(type(value), lambda v: v / 2)(value)
        if field.name == "ranks_per_node":
            changed = 16
        assert shown(replace(processor, **{field.name: changed})) != before, field.name


def vars_of(found: duration.Duration) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in fields(found)}


def test_what_does_not_fit_says_so_and_ranks_last() -> None:
    one = work(model=QWEN, layout=layout(dp=8), sequences=128)
    small = accelerator(memory_gib=40.0)
    assert "DOES NOT FIT" in plan_report(one, small, "")
    assert "\nfits: " in plan_report(one, accelerator(memory_gib=400.0), "")
    rows = sweep_report(one, small, 100).splitlines()[1:]
    words = ["yes" if " yes " in row else "no" for row in rows]
    assert words == sorted(words, reverse=True)
    assert {"yes", "no"} == set(words)
    good = [row for row in rows if " yes " in row]
    seconds = [float(row.split(" yes ")[1].split()[1]) for row in good]
    assert seconds == sorted(seconds)


def test_every_layout_has_all_ranks_and_divides_models_and_batch() -> None:
    one = work(student=QWEN, teacher=LLAMA, layout=layout(dp=16), sequences=64)
    found = list(layouts(one))
    assert len(found) == len(set(found)) > 10
    assert {each.cp for each in found} == {1, 2, 4, 8}
    for each in found:
        assert each.num_ranks == 16
        assert 64 % (each.micro_batch_size * each.dp // each.cp) == 64 % each.dp == 0
        assert each.dp % each.cp == 0
        assert not QWEN.num_layers % each.pp
        assert not LLAMA.num_layers % each.pp
    assert not [each for each in found if each.pp == 8]  # 36 layers


def test_every_part_of_memory_stands_beside_the_others_phase_by_phase() -> None:
    one, processor = work(model=QWEN), accelerator(memory_gib=400.0)
    _, table = plan_report(one, processor, "").split("memory of the fullest rank by phase, GiB; ")
    title, heads, *lines = table.split("\nfits: ")[0].splitlines()
    phases = memory.memory_by_phase(one, processor)
    fullest = max(phases, key=lambda phase: phase.total)
    marked = [f"{one.phase}*" if one is fullest else one.phase for one in phases]
    assert heads.split() == marked
    assert title == f"*{fullest.phase} is the fullest"
    cells = {line[:26].strip(): line.split()[-5:] for line in lines}
    assert set(cells) == {name for phase in phases for name in phase.parts} | {"sum"}
    assert [cells["gradients"][:3], cells["KV cache"][2:]] == [["-"] * 3, ["-"] * 3]
    for column, phase in enumerate(phases):
        shown = {name: row[column] for name, row in cells.items() if row[column] != "-"}
        assert shown.pop("sum") == f"{phase.total / memory.GIB:.3f}"
        assert shown == {name: f"{size / memory.GIB:.3f}" for name, size in phase.parts.items()}


def test_slowest_phase_is_the_bottleneck() -> None:
    one = work(model=QWEN, sequences=64)
    report = plan_report(one, accelerator(bandwidth_share=1e-4), "")
    assert "bottleneck: rollout decode" in report
    report = plan_report(one, accelerator(training_share=1e-6), "")
    assert "bottleneck: student" in report


def test_papers_recipe_is_planned_without_its_models_and_data() -> None:
    report = said(*MATHS, "plan.sweep=true", "plan.show=3")
    assert "tp4 pp1 dp4 micro 1 sp recompute on 16 x H100" in report
    assert "shapes from Qwen3-4B and Qwen3-8B, " in report
    assert "student 1,005,764,096, teacher 2,047,915,008" in report
    assert "GPU-hours" in report
    assert report.splitlines()[-1].endswith("more: plan.show=144")


@pytest.mark.parametrize("name", ACCELERATORS)
def test_every_accelerator_answers(name: str) -> None:
    assert "bottleneck: " in said(*MATHS, f"accelerator={name}")


def test_long_sequences_take_less_of_a_rank_over_two_of_them() -> None:
    report = said(*MATHS, "parallel=h100_2n8g_tp4_cp2")
    assert "tp4 pp1 dp4 cp2 micro 1 sp recompute on 16 x H100" in report

    def activations(report: str) -> float:
        (line,) = (line for line in report.splitlines() if line.startswith("  activations"))
        return float(line.split()[-2])  # of the student

    assert activations(report) < 0.65 * activations(said(*MATHS))


def test_shape_comes_from_the_file_that_is_given(tmp_path: Path) -> None:
    raw = known_shapes()["Qwen/Qwen3-1.7B"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    report = said(*MATHS, f"plan.student_config={tmp_path}")
    assert "shapes from config.json and Qwen3-8B, " in report


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("student.path=models/unknown", "student.path=models/unknown: not there; allowed: a model"),
        ("plan.context_tokens=null", "task.train: no value is given: "),
        (
            "parallel.num_ranks=6",
            "parallel.tensor_model_parallel_size=4: with ",
        ),
        (
            "parallel.context_parallel_size=3",
            "parallel.context_parallel_size=3; allowed: a divisor",
        ),
        ("batching.micro_batch_size=64", "batching.global_batch_size=128; allowed: a multiple"),
        ("~accelerator.tflops.bf16", "accelerator.tflops: no bf16; allowed: one of fp32, fp8"),
        (
            "parallel.fp8=hybrid accelerator=a100",
            "accelerator.tflops: no fp8; allowed: one of bf16",
        ),
        ("plan.turns=-1", "plan.turns=-1.0; allowed: a number > 0"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(override: str, line: str) -> None:
    assert refused(*MATHS, *override.split()).startswith(line)


def test_lengths_must_be_given_where_no_tokenizer_is() -> None:
    line = refused(*MATHS, "plan.context_tokens=null", "task.train=x", "context.path=x")
    assert line.startswith("plan.context_tokens=null: there is no tokenizer to count with")


@pytest.mark.parametrize("text", ["x", "[1]", "{"])
def test_a_shape_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text)
    assert "allowed: a JSON object" in refused(*MATHS, f"plan.student_config={file}")


@pytest.mark.parametrize(
    "override",
    ["plan.turns=0", "plan.show=0", "accelerator.memory_gib=1e300", "+accelerator.tflops.fp4=1"],
)
def test_a_plan_of_no_machine_is_refused(override: str) -> None:
    key = override.lstrip("+").partition("=")[0]
    assert refused(*MATHS, override).startswith(key)


def test_a_shape_that_nothing_asks_for_is_refused() -> None:
    line = refused(*MATHS, "teacher.path=null", "plan.teacher_config=x")
    assert line.endswith("allowed: null without teacher.path")


def test_a_student_of_fewer_layers_learns_from_a_teacher_with_all() -> None:
    words = ["student.path=Qwen/Qwen3-8B", "student.keep_layers=[0,1]", "parallel=single"]
    raw, _ = split_settings(compose("plan", words), "plan", PlanConfig)
    raw, _ = split_settings(raw, "accelerator", Accelerator)
    (student, teacher), _ = model_shapes(load_config(raw), None, None)
    assert (student.num_layers, teacher.num_layers) == (2, QWEN.num_layers)
