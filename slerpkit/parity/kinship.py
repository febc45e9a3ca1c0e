"""The angle between the parents, from a sample of their weights.

It needs pairs of tensors and reads some of their bytes, with numpy alone: torch would cost more than the measuring.
What the merge itself measures is not known here. Read report.py and parents/tensors.py before this.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import numpy
from slerpkit.maths import cosine_between, degrees_of
from slerpkit.parents.dtypes import stored_dtype, widen
from slerpkit.parents.tensors import DTYPE_BYTES, TensorReader, component_of, find_layer

if TYPE_CHECKING:
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.parity.report import TensorSources

MAX_KINSHIP_MATRICES = 96  # sampled, spread over the layers
KINSHIP_ELEMENTS = 1 << 16  # of each, from its middle: 25 MB of both parents together in 16 bits
TWIN_BYTES = 4096  # of each tensor, to see whether two models are one
SIBLINGS_DEGREES = 30  # fine-tunes of one base lie nearer than this, by far
STRANGERS_DEGREES = 70  # models with nothing in common lie at ninety, give or take a degree
IDENTICAL_DEGREES = 1e-3  # what rounding makes of an angle of nothing is less
# What each verdict means to who has to decide.
MEANINGS = {
    "siblings": "fine-tunes of one base",
    "relatives": "more than fine-tunes usually are",
    "strangers": "their children seldom speak",
}


@dataclass(frozen=True)
class Kinship:
    """How far apart the parents' matrices stand, from a sample of them: whether they come from one base model."""

    degrees: float | None  # over all that was sampled; None where there was nothing to compare
    by_component: tuple[tuple[str, float], ...]  # (attention, mlp or other; degrees)
    angles: tuple[float, ...] = ()  # degrees, of each matrix of the sample
    unknown_because: str = "no matrices to compare"

    @property
    def verdict(self) -> str:
        """siblings, relatives, strangers, or unknown."""
        if self.degrees is None:
            return "unknown"
        if self.degrees < SIBLINGS_DEGREES:
            return "siblings"
        return "relatives" if self.degrees < STRANGERS_DEGREES else "strangers"

    @property
    def meaning(self) -> str:
        """What that means to who has to decide, or why it is not known."""
        return MEANINGS.get(self.verdict, self.unknown_because)

    def are_mostly_within(self, degrees: float) -> bool:
        """Whether most matrices of the sample lie less than so many degrees apart, and are not the same."""
        return 2 * sum(IDENTICAL_DEGREES < angle < degrees for angle in self.angles) > len(self.angles)

    def describe(self) -> str:
        """The verdict in words, with the figures."""
        if self.degrees is None:
            return f"{self.verdict}: {self.unknown_because}"
        angles = ", ".join(f"{component} {degrees:.1f}" for component, degrees in self.by_component)
        return f"{self.verdict}: {self.degrees:.1f} degrees apart ({angles})"

    def as_dict(self) -> dict[str, Any]:
        """What reports hold of it."""
        return {"verdict": self.verdict, "degrees": self.degrees, "components": dict(self.by_component)}

    @property
    def warning(self) -> str | None:
        """What a person should know before, and after, strangers are merged."""
        if self.verdict != "strangers":
            return None
        return (
            f"The parents look like {self.describe()}. Fine-tunes of one base model lie a few degrees apart; "
            "these share a shape and not an origin, and children of such parents seldom speak."
        )


def measure_kinship(pairs: Sequence[TensorSources]) -> Kinship:
    """The angle between the parents' matrices, by component, from a sample; without torch, within a second.

    Vectors such as norms are left out: those of strangers look alike too. So are embeddings where layers have
    matrices: their rows are not in the same order everywhere.
    """
    matrices = [
        pair
        for pair in pairs
        if pair.secondary and not pair.rows and is_matrix(pair.primary) and is_matrix(pair.secondary)
    ]
    matrices = [pair for pair in matrices if find_layer(pair.name)] or matrices
    sums: dict[str, list[float]] = {}
    alone: list[float] = []
    with TensorReader() as reader, numpy.errstate(all="ignore"):  # what is not finite is left out
        for pair in matrices[:: -(-len(matrices) // MAX_KINSHIP_MATRICES) or 1]:
            v0, v1 = (read_middle(reader, info) for info in (pair.primary, pair.secondary))
            # For so few values the threads of a @ b cost more than they bring.
            products = [float(numpy.einsum("i,i", a, b)) for a, b in ((v0, v0), (v1, v1), (v0, v1))]
            component = component_of(pair.name)
            totals = [total + product for total, product in zip(sums.get(component, (0.0, 0.0, 0.0)), products)]
            if math.isfinite(sum(totals)):
                sums[component] = totals
                alone += [angle for angle in [angle_of(*products)] if angle is not None]
    angles = [(component, angle) for component in sums if (angle := angle_of(*sums[component])) is not None]
    return Kinship(angle_of(*map(sum, zip(*sums.values()))) if sums else None, tuple(angles), tuple(alone))


def have_same_bytes_in_the_middle(pairs: Sequence[TensorSources]) -> bool:
    """Whether the parents hold the same weights, as far as some bytes of each pair tell. Stops at the first others.

    Raises SlerpMergeError where a file cannot be read.
    """
    with TensorReader() as reader:
        for first, second in ((pair.primary, pair.secondary) for pair in pairs if pair.secondary is not None):
            count = min(TWIN_BYTES, first.byte_count)
            samples = [bytearray(count), bytearray(count)]
            if (first.dtype, first.shape) != (second.dtype, second.shape):
                return False
            for info, sample in zip((first, second), samples):
                reader.read_into(info, (info.byte_count - count) // 2, memoryview(sample))
            if samples[0] != samples[1]:
                return False
    return bool(pairs)


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor has a direction to speak of: real numbers in two dimensions or more."""
    return info.is_float and len(info.shape) > 1 and info.element_count > 0


def read_middle(reader: TensorReader, info: TensorInfo) -> Any:
    """Up to KINSHIP_ELEMENTS values from the middle of a tensor, as a flat float64 array of numpy."""
    width = DTYPE_BYTES[info.read_dtype]
    count = min(KINSHIP_ELEMENTS, info.element_count)
    data = bytearray(count * width)
    reader.read_into(info, (info.element_count - count) // 2 * width, memoryview(data))
    values = numpy.empty(count, "f8")
    widen(numpy.frombuffer(data, stored_dtype(info.read_dtype)), values)
    return values


def angle_of(primary_squared: float, secondary_squared: float, dot: float) -> float | None:
    """Degrees between two vectors, from v0 . v0, v1 . v1 and v0 . v1; None where one has no length."""
    return degrees_of(cosine_between(dot, math.sqrt(primary_squared), math.sqrt(secondary_squared)))
