"""SLERP's weights and the angle between two vectors.

Pure functions of numbers: no file, no layout of a tensor and no device is known here. Weights are float64 throughout;
what is summed is decided in merge/arithmetic.py. v0 is the primary's vector (t = 0), v1 the secondary's (t = 1).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

from slerpkit.lazy import torch

COLINEAR_DOT = 0.9995  # |cosine| above which SLERP is numerically a straight line (1.8 degrees)
TINY_NORM = 1e-8  # a norm at or below this has no direction worth following


@dataclass(frozen=True)
class TensorWeights:
    """child = primary_weight * v0 + secondary_weight * v1, and why these weights."""

    primary_weight: float
    secondary_weight: float
    operation: str  # "slerp", "lerp" or "copy"
    reason: str  # "" when the asked method was followed
    angle_degrees: float | None  # between the parents; None where a norm is zero or not finite
    norms: tuple[float, float] | None = None  # |v0|, |v1|; None where the tensor was copied unmeasured


def lerp(primary: torch.Tensor, secondary: torch.Tensor, t: float) -> torch.Tensor:
    """(1 - t) primary + t secondary, in the precision of its arguments; t = 0 gives the primary."""
    return (1 - t) * primary + t * secondary


def exact_sum(values: Iterable[float]) -> float:
    """The float64 nearest to the true sum, whatever the order; infinite where a value is not finite."""
    values = list(values)
    try:
        return math.fsum(values) if all(map(math.isfinite, values)) else math.inf
    except OverflowError:
        return math.inf


def slerp_weights(cosine: float, t: float) -> tuple[float, float]:
    """(sin((1-t) theta), sin(t theta)) / sin theta, with theta = acos(cosine). float64.

    Formula: K. Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985. Raises ZeroDivisionError where
    the cosine is 1 or -1.
    """
    theta = math.acos(max(-1.0, min(1.0, cosine)))
    return math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)


def cosine_between(dot: float, primary_norm: float, secondary_norm: float) -> float:
    """v0 . v1 / (|v0| |v1|); not a number where a norm is zero or a sum is not finite."""
    if not (math.isfinite(dot + primary_norm + secondary_norm) and primary_norm and secondary_norm):
        return math.nan
    # Divided one after the other: the product of two small norms could underflow.
    return dot / primary_norm / secondary_norm


def degrees_of(cosine: float) -> float | None:
    """The angle of a cosine that rounding may have put outside -1 to 1; None where it is not finite."""
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine)))) if math.isfinite(cosine) else None


def slerp_coefficients(
    dot: float,  # v0 . v1
    primary_norm: float,  # |v0|
    secondary_norm: float,  # |v1|
    t: float,
    method: str = "slerp",
    dot_threshold: float = COLINEAR_DOT,
    epsilon: float = TINY_NORM,
) -> TensorWeights:
    """The two weights that blend a pair of tensors, from three sums over them. float64 throughout.

    `slerp` weights the raw tensors, the convention of dvschultz's gist and of mergekit; `slerp-norm`
    follows the arc between the directions and interpolates the norms. Both fall back to LERP where a
    norm is at most epsilon, where |cosine| exceeds dot_threshold (nearly parallel or antiparallel:
    the arc is a line, or is not defined), or where the sums are not finite.
    """
    cosine = cosine_between(dot, primary_norm, secondary_norm)
    angle = degrees_of(cosine)
    norms = primary_norm, secondary_norm
    lerp_weights = functools.partial(TensorWeights, 1 - t, t, "lerp", angle_degrees=angle, norms=norms)
    if method == "lerp":
        return lerp_weights(reason="")
    if not math.isfinite(dot + primary_norm + secondary_norm):
        return lerp_weights(reason="not finite")
    if min(primary_norm, secondary_norm) <= epsilon or not math.isfinite(cosine):
        return lerp_weights(reason="zero")
    if method == "nuslerp":
        dot_threshold = 1.0  # its own limit, |sin theta| < 1e-8, is a cosine of 1 in float64
    # Towards opposite directions the weights know no bounds, and float32 sums are good to 1e-6.
    if abs(cosine) > dot_threshold or abs(cosine) >= 1 or cosine < -1 + 1e-6:
        return lerp_weights(reason="parallel" if cosine > 0 else "antiparallel")
    primary_weight, secondary_weight = slerp_weights(cosine, t)
    if method == "slerp-norm":
        norm = (1 - t) * primary_norm + t * secondary_norm
        primary_weight *= norm / primary_norm
        secondary_weight *= norm / secondary_norm
    return TensorWeights(primary_weight, secondary_weight, "slerp", "", angle, norms)


def slerp(
    primary: torch.Tensor,  # any shape, taken as one flat vector
    secondary: torch.Tensor,  # the same shape
    t: float,
    method: str = "slerp",
    dot_threshold: float = COLINEAR_DOT,
    epsilon: float = TINY_NORM,
) -> torch.Tensor:
    """SLERP of two whole tensors held in memory, in float64: the plain form that the stream is held against."""
    v0, v1 = primary.double(), secondary.double()
    weights = slerp_coefficients(
        float(torch.sum(v0 * v1)), float(v0.norm()), float(v1.norm()), t, method, dot_threshold, epsilon
    )
    return weights.primary_weight * v0 + weights.secondary_weight * v1
