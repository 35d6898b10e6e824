"""Seeds known faults into a copy of the package and shows that the tests catch each of them.

    python tests/kernels/mutations.py [words of a fault's name]

A fault is one replaced line. It counts as caught when the named tests run and at least one fails;
exit status 1 lists the survivors. The first run has no fault and must pass, the second cannot be
imported and must fail, which shows that the copy is what is tested.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PACKAGE = TESTS.parents[1] / "kernels" / "opcd_kernels"
FAILED, COLLECTION_ERROR = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """`old` occurs once in `file` and becomes `new`; `tests` are what must notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


DIVERGENCE = "test_divergence.py"
LINEAR = "test_linear_divergence.py"
TOKENS = "test_token_logprob.py"
TOPK = "test_topk.py"
PARALLEL = "test_tensor_parallel.py"
INTERPRETER = "interpreter"

FAULTS = (
    Fault(
        name="shift by one: the neighbour's token",
        file="shards.py",
        old="column = target_ids_N - start",
        new="column = target_ids_N - start + 1",
        tests=TOKENS,
    ),
    Fault(
        name="shift by one: teacher rows of the next token",
        file="linear_divergence.py",
        old="hidden_NG=take_rows(teacher_hidden_NG.detach(), active)",
        new="hidden_NG=take_rows(teacher_hidden_NG.detach().roll(1, 0), active)",
        tests=LINEAR,
    ),
    Fault(
        name="missing all-reduce in backward",
        file="linear.py",
        old="hidden_gradient = sum_over_shards(hidden_gradient, ctx.plan.group)",
        new="hidden_gradient = sum_over_shards(hidden_gradient, None)",
        tests=PARALLEL,
    ),
    Fault(
        name="missing all-gather in forward",
        file="divergence.py",
        old="merged = merge(gather_parts(part, group))",
        new="merged = merge(gather_parts(part, None))",
        tests=PARALLEL,
    ),
    Fault(
        name="mean of means: losses averaged by chunk",
        file="linear.py",
        old="losses.append(loss_C)",
        new="losses.append(loss_C.mean().expand_as(loss_C))",
        tests=LINEAR,
    ),
    Fault(
        name="mean of means: gradients divided by the chunk's weight",
        file="linear.py",
        old="loss.differentiate_(logits, constants_CX, plan.weight_N[rows], rows)",
        new="loss.differentiate_("
        "logits, constants_CX, plan.weight_N[rows] / plan.weight_N[rows].mean(), rows)",
        tests=LINEAR,
    ),
    Fault(
        name="wrong temperature in the gradient: forgotten",
        file="options.py",
        old="return self.logit_map.scale / self.temperature\n",
        new="return self.logit_map.scale\n",
        tests=DIVERGENCE,
    ),
    Fault(
        name="wrong temperature in the gradient: squared",
        file="options.py",
        old="return self.logit_map.scale / self.temperature\n",
        new="return self.logit_map.scale / self.temperature**2\n",
        tests=DIVERGENCE,
    ),
    Fault(
        name="temperature of the teacher forgotten",
        file="options.py",
        old="teacher=Sharpening(temperature=temperature, logit_map=teacher_map)",
        new="teacher=Sharpening(temperature=1.0, logit_map=teacher_map)",
        tests=DIVERGENCE,
    ),
    Fault(
        name="dropped tail: no bucket in the top-k loss",
        file="topk_classes.py",
        old="loss = loss + torch.where(share > 0, share * ratio, 0.0)",
        new="loss = loss + 0.0 * share",
        tests=TOPK,
    ),
    Fault(
        name="dropped tail: no bucket in the top-k gradient",
        file="topk_classes.py",
        old='if plan.tail == "renorm":\n        tail',
        new="if True:\n        tail",
        tests=TOPK,
    ),
    Fault(
        name="dropped tail: columns after the last full block",
        file="triton_divergence.py",
        old="        s = load(FIRST, tail + lane, ok, first_pre, True, FIRST_CAP)",
        new="        s = load(FIRST, tail + lane, ok & False, first_pre, True, FIRST_CAP)",
        tests=INTERPRETER,
    ),
    Fault(
        name="teacher and student swapped: KL directions",
        file="divergence.py",
        old='if objective.kind == "forward_kl":',
        new='if objective.kind == "reverse_kl":',
        tests=DIVERGENCE,
    ),
    Fault(
        name="teacher and student swapped: shares of the JSD mixture",
        file="options.py",
        old="return (rounded, 1.0 - rounded) if self.beta >= 0.5 else (1.0 - rounded, rounded)",
        new="return (1.0 - rounded, rounded) if self.beta >= 0.5 else (rounded, 1.0 - rounded)",
        tests=DIVERGENCE,
    ),
    Fault(
        name="teacher and student swapped: top-k of the wrong model",
        file="topk_classes.py",
        old='return self.objective.kind == "reverse_kl"',
        new='return self.objective.kind == "forward_kl"',
        tests=TOPK,
    ),
    Fault(
        name="teacher and student swapped: kernel constants",
        file="rows.py",
        old="columns = [columns[1], columns[0], columns[3], columns[2], torch.zeros_like(cross)]",
        new="columns = [columns[0], columns[1], columns[2], columns[3], torch.zeros_like(cross)]",
        tests=DIVERGENCE,
    ),
    Fault(
        name="mean of the divergence missing in the gradient",
        file="eager.py",
        old="y.clamp_min_(FLOOR), out=y).sub_(mean)",
        new="y.clamp_min_(FLOOR), out=y)",
        tests=DIVERGENCE,
    ),
    Fault(
        name="softcap without its slope",
        file="eager.py",
        old="gradient_RV.mul_(tanh.square_().neg_().add_(1.0))",
        new="gradient_RV.mul_(1.0)",
        tests=DIVERGENCE,
    ),
    Fault(
        name="softcap without its slope, on a GPU",
        file="triton_divergence.py",
        old="slope *= 1.0 - s * s",
        new="slope *= 1.0",
        tests=INTERPRETER,
    ),
    Fault(
        name="padding with probability",
        file="divergence.py",
        old="width = valid_columns(num_valid_columns, student_logits_NV.shape[1])",
        new="width = student_logits_NV.shape[1]",
        tests=DIVERGENCE,
    ),
    Fault(
        name="padding rows with probability in the linear form",
        file="linear_divergence.py",
        old="return weight_N, valid_columns(num_valid_columns, num_columns)",
        new="return weight_N, num_columns",
        tests=LINEAR,
    ),
    Fault(
        name="weight of a token squared",
        file="divergence.py",
        old="upstream = upstream_N.contiguous() if weight is None else upstream_N * weight",
        new="upstream = upstream_N.contiguous() if weight is None else upstream_N * weight**2",
        tests=DIVERGENCE,
    ),
    Fault(
        name="upstream gradients taken for one number",
        file="linear.py",
        old="if ready is not None and _is_one_number(upstream_N):",
        new="if ready is not None:",
        tests=LINEAR,
    ),
    Fault(
        name="weight gradient of the last chunk only",
        file="linear.py",
        old="self._sum[: self._width].addmm_(gradient_CV.t(), hidden_CH)",
        new="torch.mm(gradient_CV.t(), hidden_CH, out=self._sum[: self._width])",
        tests=LINEAR,
    ),
    Fault(
        name="maxima of shards not joined",
        file="rows.py",
        old="(shrink * (cross + first_sum * shift)).sum(0),",
        new="(shrink * cross).sum(0),",
        tests="test_rows.py",
    ),
    Fault(
        name="splits of a row not joined, on a GPU",
        file="triton_backend.py",
        old="return merge(out)",
        new="return out[0]",
        tests=INTERPRETER,
    ),
    Fault(
        name="entropy's gradient without the entropy",
        file="eager.py",
        old="add_(entropy_bits)",
        new="add_(0.0)",
        tests=TOKENS,
    ),
    Fault(
        name="a token that another rank holds counts as column 0",
        file="eager.py",
        old='target.masked_fill_(column < 0, float("-inf"))',
        new="target.masked_fill_(column < -1, 0.0)",
        tests=PARALLEL,
    ),
)


def run_tests(package_parent: Path, tests: str) -> int:
    """Pytest's exit status with the package of that folder."""
    environment = os.environ | {"PYTHONPATH": str(package_parent), "OMP_NUM_THREADS": "1"}
    if tests == INTERPRETER:
        environment["TRITON_INTERPRET"] = "1"
    options = ["-q", "-x", "-p", "no:cacheprovider", "-o", "pythonpath="]
    command = [sys.executable, "-m", "pytest", *options, str(TESTS / tests)]
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode


def survives(fault: Fault) -> bool:
    """Whether all tests pass in spite of the fault."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / PACKAGE.name
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
        source = (copy / fault.file).read_text()
        assert source.count(fault.old) == 1, f"{fault.name}: the line is not in {fault.file} once"
        (copy / fault.file).write_text(source.replace(fault.old, fault.new))
        status = run_tests(Path(folder), fault.tests)
    return status != FAILED


def check_harness() -> None:
    """The tests pass without a fault, and fail to start when the copy cannot be imported."""
    for tests in sorted({fault.tests for fault in FAULTS}):
        assert run_tests(PACKAGE.parent, tests) == 0, f"{tests} fails without a fault"
    with tempfile.TemporaryDirectory() as folder:
        broken = Path(folder) / PACKAGE.name
        broken.mkdir()
        (broken / "__init__.py").write_text("raise ImportError('the copy is what is tested')\n")
        assert run_tests(Path(folder), DIVERGENCE) == COLLECTION_ERROR


def main() -> int:
    """The exit status."""
    wanted = " ".join(sys.argv[1:])
    check_harness()
    survivors = []
    for fault in FAULTS:
        if wanted not in fault.name:
            continue
        alive = survives(fault)
        survivors += [fault.name] * alive
        sys.stdout.write(f"{'SURVIVES' if alive else 'caught':9s}{fault.name}\n")
        sys.stdout.flush()
    sys.stdout.write(f"{len(survivors)} of {len(FAULTS)} faults survive\n")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
