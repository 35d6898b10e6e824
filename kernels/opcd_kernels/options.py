"""What the caller chose: checked once at the public function, passed down unchanged.

Shape letters of the package: N response tokens, C tokens of a chunk, R rows of a block, V
vocabulary columns of this rank's shard, H hidden size of the student, G hidden size of the teacher,
K top-k, P parts of a row (ranks of the vocabulary group, or column splits).
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

Kind = Literal["reverse_kl", "forward_kl", "jsd"]

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


def check_finite_positive(name: str, value: float) -> None:
    """Raises ValueError unless 0 < value < infinity."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}; it must be a finite number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitMap:
    """A model's own map of its lm_head's output.

    `softcap * tanh(scale * logit / softcap)`, or `scale * logit` without a cap. Gemma caps, Granite
    and Cohere scale; `LogitMap()` leaves the logits alone.

    Raises:
        ValueError: scale or softcap is not a finite number above 0.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_finite_positive("scale", self.scale)
        if self.softcap is not None:
            check_finite_positive("softcap", self.softcap)


IDENTITY = LogitMap()


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharpening:
    """From a stored logit to the exponent of its softmax: the model's own map, then temperature.

    Raises:
        ValueError: temperature is not a finite number above 0.
    """

    temperature: float = 1.0
    logit_map: LogitMap = IDENTITY

    def __post_init__(self) -> None:
        check_finite_positive("temperature", self.temperature)

    @property
    def log2_factor(self) -> float:
        """From a logit, capped if there is a cap and else as stored, to an exponent of base 2."""
        scale = self.logit_map.scale if self.logit_map.softcap is None else 1.0
        return scale / self.temperature * LOG2_E

    @property
    def slope(self) -> float:
        """d(exponent of base e) / d(stored logit), less the factor `1 - tanh^2` of a cap."""
        return self.logit_map.scale / self.temperature

    def after_load(self) -> "Sharpening":
        """What is left to do to a value that was loaded: scale, if any, without the cap."""
        scale = self.logit_map.scale if self.logit_map.softcap is None else 1.0
        return Sharpening(temperature=self.temperature, logit_map=LogitMap(scale=scale))


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """Which divergence, of which softmaxes.

    Raises:
        ValueError: kind is unknown, beta outside (0, 1), or a number is not finite and above 0.
    """

    kind: Kind
    beta: float = 0.5
    student: Sharpening = field(default_factory=Sharpening)
    teacher: Sharpening = field(default_factory=Sharpening)

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"kind is {self.kind!r}; allowed: {', '.join(get_args(Kind))}")
        if not 0.0 < self.beta < 1.0:
            raise ValueError(f"beta is {self.beta}; it must lie strictly between 0 and 1")

    @property
    def mixture_shares(self) -> tuple[float, float]:
        """Student's and teacher's share of the JSD mixture, whose fp32 sum is exactly 1.

        The larger one is rounded to 24 bits first, which makes its complement exact: identical rows
        then have a mixture ratio of exactly 1.
        """
        larger = max(self.beta, 1.0 - self.beta)
        rounded = round(larger * 2**24) / 2**24
        return (rounded, 1.0 - rounded) if self.beta >= 0.5 else (1.0 - rounded, rounded)


def make_objective(
    kind: Kind, beta: float, temperature: float, student_map: LogitMap, teacher_map: LogitMap
) -> Objective:
    """One temperature for both models, as the public functions take it."""
    return Objective(
        kind=kind,
        beta=beta,
        student=Sharpening(temperature=temperature, logit_map=student_map),
        teacher=Sharpening(temperature=temperature, logit_map=teacher_map),
    )
