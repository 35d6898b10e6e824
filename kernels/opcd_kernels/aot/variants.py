"""Which kernels are compiled, with which types, alignments and options, for which GPUs."""

from dataclasses import dataclass, field
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from opcd_kernels import triton_divergence, triton_token
from opcd_kernels.triton_backend import KIND_CODES, TritonBackend

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "sm_100a": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT_BYTES = {"sm_80": 166912, "sm_90a": 232448, "sm_100a": 232448, "gfx942": 65536}

_LOGITS = ("FIRST", "SECOND", "STUDENT", "TEACHER", "LOGITS")
_INTEGERS = ("num_columns", "blocks_per_split")
_BLOCKS = TritonBackend()


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One compilation of one kernel.

    Args:
        name: of the kernel, with the kind of its divergence.
        kernel: the jitted function.
        block: columns a program works on at a time.
        num_inputs: logit matrices that it reads.
        dtype: of the logits, in Triton's words.
        row_unit: 8 when row strides are multiples of 8 elements, else 1.
        column_unit: 8 when the number of columns is a multiple of 8, else 1.
        options: further compile-time constants.
    """

    name: str
    kernel: JITFunction[Any]
    block: int
    num_inputs: int
    dtype: str = "bf16"
    row_unit: int = 8
    column_unit: int = 8
    options: dict[str, int] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The row's name in the table, without the target."""
        caps = [value for key, value in self.options.items() if key.endswith("CAP")]
        capped = " softcap" if any(caps) else ""
        aligned = {(8, 8): "", (8, 1): " odd width", (1, 1): " odd stride"}
        return f"{self.name} {self.dtype}{capped}{aligned[self.row_unit, self.column_unit]}"

    @property
    def elements_per_thread(self) -> int:
        """Of a wave of 32 lanes."""
        return self.block // (_BLOCKS.num_warps * 32)

    def compile(self, target: str) -> CompiledKernel:
        """Machine code for `target`; needs no GPU and no driver."""
        constants = {
            "BLOCK": self.block,
            "ROW_UNIT": self.row_unit,
            "COLUMN_UNIT": self.column_unit,
            **self.options,
        }
        names = self.kernel.arg_names
        signature = {name: self._type(name, constants) for name in names}
        pointers = [i for i, name in enumerate(names) if signature[name].startswith("*")]
        source = ASTSource(
            fn=self.kernel,
            signature=signature,
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in pointers},
        )
        options = {"num_warps": _BLOCKS.num_warps}
        compiled = triton.compile(source, target=TARGETS[target], options=options)
        assert target in compiled.asm["ptx" if target.startswith("sm_") else "amdgcn"]
        return compiled

    def _type(self, argument: str, constants: dict[str, int]) -> str:
        if argument in constants:
            return "constexpr"
        if argument in _LOGITS:
            return f"*{self.dtype}"
        if argument == "COLUMN":
            return "*i64"
        if argument.isupper():
            return "*fp32"
        return "i32" if argument in _INTEGERS or argument.endswith("stride") else "fp32"


def _kernels(dtype: str, **alignment: int) -> list[Variant]:
    """Every kernel without a softcap, in one type and alignment."""
    statistics, gradient = _BLOCKS.statistics_block, _BLOCKS.gradient_block
    both = {"STUDENT_CAP": 0, "TEACHER_CAP": 0}
    found = [
        Variant(
            name="row_statistics",
            kernel=triton_divergence.row_statistics,
            block=statistics,
            num_inputs=2,
            dtype=dtype,
            options={"HAS_WEIGHT": 1, "FIRST_CAP": 0, "SECOND_CAP": 0},
            **alignment,
        ),
        Variant(
            name="mixture_statistics",
            kernel=triton_divergence.mixture_statistics,
            block=gradient,
            num_inputs=2,
            dtype=dtype,
            options={"HAS_WEIGHT": 1, **both},
            **alignment,
        ),
        Variant(
            name="token_statistics",
            kernel=triton_token.token_statistics,
            block=statistics,
            num_inputs=1,
            dtype=dtype,
            options={"HAS_WEIGHT": 1, "CAP": 0},
            **alignment,
        ),
        Variant(
            name="token_gradient",
            kernel=triton_token.token_gradient,
            block=gradient,
            num_inputs=1,
            dtype=dtype,
            options={"CAP": 0},
            **alignment,
        ),
    ]
    for kind, code in KIND_CODES.items():
        found.append(
            Variant(
                name=f"{kind}_gradient",
                kernel=triton_divergence.divergence_gradient,
                block=gradient,
                num_inputs=2,
                dtype=dtype,
                options={"KIND": code, **both},
                **alignment,
            )
        )
    return found


def _with_cap(variant: Variant) -> Variant:
    options = {key: 1 if key.endswith("CAP") else value for key, value in variant.options.items()}
    return Variant(
        name=variant.name,
        kernel=variant.kernel,
        block=variant.block,
        num_inputs=variant.num_inputs,
        options=options,
    )


def variants_for(target: str) -> list[Variant]:
    """Each kernel in bf16 and fp32; on sm_90a also fp16, softcaps, odd widths and odd strides."""
    found = [*_kernels("bf16"), *_kernels("fp32")]
    if target == "sm_90a":
        found += _kernels("fp16")
        found += [_with_cap(variant) for variant in _kernels("bf16")]
        found += _kernels("bf16", column_unit=1)
        found += _kernels("bf16", row_unit=1, column_unit=1)
    return found
