"""The arithmetic, held against a float64 reference that shares no code with it, and against geometry."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
import torch

from slerpkit.maths import exact_sum, lerp, slerp, slerp_coefficients, slerp_weights
from tests.builders import reference_slerp, units_of_last_place

SEEDS = range(12)
METHODS = ("slerp", "slerp-norm", "lerp")


def random_pair(seed: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Two tensors of a random shape, of sizes far apart and at any angle, and a random t."""
    chooser = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(chooser.randint(1, 9) for _ in range(chooser.randint(1, 3)))
    first, other = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    second = chooser.uniform(-1, 1) * first + 10 ** chooser.uniform(-3, 1) * other
    scales = 10 ** chooser.uniform(-4, 4), 10 ** chooser.uniform(-4, 4)
    return (scales[0] * first).to(dtype), (scales[1] * second).to(dtype), chooser.random()


def plane_pair(degrees: float, norms: tuple[float, float] = (1.0, 1.0)) -> tuple[torch.Tensor, torch.Tensor]:
    """Two vectors of the plane, the second turned by an angle against the first."""
    radians = math.radians(degrees)
    first = torch.tensor([norms[0], 0.0], dtype=torch.float64)
    second = norms[1] * torch.tensor([math.cos(radians), math.sin(radians)], dtype=torch.float64)
    return first, second


def blend_at(cosine: float, t: float = 0.5, **settings):
    """The blend of two unit vectors of a given cosine."""
    return slerp_coefficients(cosine, 1.0, 1.0, t, **settings)


# ── Against the reference ──


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", SEEDS)
def test_slerp_equals_the_reference(seed, method):
    for case in range(20):
        v0, v1, t = random_pair(1000 * seed + case)
        found = slerp(v0, v1, t, method)
        assert found.shape == v0.shape
        size = float(v0.abs().max() + v1.abs().max())
        torch.testing.assert_close(found, reference_slerp(v0, v1, t, method), rtol=1e-11, atol=1e-12 * size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_slerp_of_narrow_parents_is_computed_in_float64(dtype):
    for seed in SEEDS:
        v0, v1, t = random_pair(seed)
        v0, v1 = (v0 / v0.norm()).to(dtype), (v1 / v1.norm()).to(dtype)
        found = slerp(v0, v1, t)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, reference_slerp(v0, v1, t), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.9995, 1.0])
def test_the_dot_threshold_decides_as_in_the_reference(threshold):
    for degrees in (1, 5, 20, 25, 26, 59, 61, 119, 121, 155, 179):
        v0, v1 = plane_pair(degrees, (2.0, 0.5))
        found = slerp(v0, v1, 0.3, dot_threshold=threshold)
        torch.testing.assert_close(found, reference_slerp(v0, v1, 0.3, threshold=threshold), rtol=1e-12, atol=1e-12)


def test_a_single_number_is_lerped():
    for left, right in ((2.0, 5.0), (2.0, -5.0), (0.0, 3.0)):
        found = slerp(torch.tensor(left), torch.tensor(right), 0.25)
        assert found.shape == ()
        assert float(found) == pytest.approx(0.75 * left + 0.25 * right)


# ── Known values ──


def test_the_middle_of_a_right_angle():
    weights = slerp_weights(0.0, 0.5)
    assert weights == pytest.approx((math.sqrt(0.5), math.sqrt(0.5)), rel=1e-15)
    blend = blend_at(0.0)
    assert (blend.primary_weight, blend.secondary_weight) == weights
    assert (blend.operation, blend.reason) == ("slerp", "")
    assert blend.angle_degrees == pytest.approx(90)


@pytest.mark.parametrize(
    ("degrees", "t", "expected"),
    [
        (60, 0.5, (1 / math.sqrt(3), 1 / math.sqrt(3))),
        (90, 1 / 3, (math.cos(math.radians(30)), 0.5)),
        (120, 0.5, (1.0, 1.0)),
        (120, 0.25, (2 / math.sqrt(3), 1 / math.sqrt(3))),
    ],
)
def test_weights_on_known_arcs(degrees, t, expected):
    assert slerp_weights(math.cos(math.radians(degrees)), t) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_the_ends_give_the_parents_exactly(method):
    for seed in SEEDS:
        v0, v1, _ = random_pair(seed)
        assert torch.equal(lerp(v0, v1, 0.0), v0)
        assert torch.equal(lerp(v0, v1, 1.0), v1)
        rounding = {"rtol": 1e-15, "atol": 0.0}  # slerp-norm divides by a norm and multiplies with it again
        torch.testing.assert_close(slerp(v0, v1, 0.0, method), v0, **rounding)
        torch.testing.assert_close(slerp(v0, v1, 1.0, method), v1, **rounding)


@pytest.mark.parametrize("cosine", [-0.99, -0.5, 0.0, 0.3, 0.9994])
def test_the_weights_of_the_ends_are_exactly_one_and_zero(cosine):
    assert slerp_weights(cosine, 0.0) == (1.0, 0.0)
    assert slerp_weights(cosine, 1.0) == (0.0, 1.0)


# ── Invariants ──


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("seed", SEEDS)
def test_exchanging_the_parents_and_t_changes_nothing(seed, method):
    for case in range(20):
        v0, v1, t = random_pair(1000 * seed + case)
        size = float(v0.abs().max() + v1.abs().max())
        torch.testing.assert_close(
            slerp(v0, v1, t, method), slerp(v1, v0, 1 - t, method), rtol=1e-11, atol=1e-12 * size
        )


@pytest.mark.parametrize("degrees", [3, 30, 90, 150, 177])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_the_arc_is_walked_at_constant_speed_on_the_circle(degrees, t):
    x, y = slerp(*plane_pair(degrees), t).tolist()
    assert math.hypot(x, y) == pytest.approx(1, rel=1e-12)
    assert math.degrees(math.atan2(y, x)) == pytest.approx(t * degrees, rel=1e-10)


@pytest.mark.parametrize("degrees", [3, 30, 90, 150, 177])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_slerp_norm_interpolates_norm_and_direction_apart(degrees, t):
    norms = 3.0, 0.2
    x, y = slerp(*plane_pair(degrees, norms), t, "slerp-norm").tolist()
    assert math.hypot(x, y) == pytest.approx((1 - t) * norms[0] + t * norms[1], rel=1e-12)
    assert math.degrees(math.atan2(y, x)) == pytest.approx(t * degrees, rel=1e-10)


@pytest.mark.parametrize("degrees", [5, 60, 120, 175])
@pytest.mark.parametrize("t", [0.2, 0.5, 0.7])
def test_slerp_norm_equals_slerp_only_for_equal_norms(degrees, t):
    equal, unequal = plane_pair(degrees, (2.0, 2.0)), plane_pair(degrees, (2.0, 6.0))
    torch.testing.assert_close(slerp(*equal, t), slerp(*equal, t, "slerp-norm"), rtol=1e-12, atol=1e-13)
    assert float((slerp(*unequal, t) - slerp(*unequal, t, "slerp-norm")).norm()) > 0.01


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [2.0**-60, 2.0**40])
def test_scaling_both_parents_scales_the_child(method, scale):
    v0, v1, t = random_pair(3)
    found = slerp(scale * v0, scale * v1, t, method, epsilon=0.0)
    torch.testing.assert_close(found, scale * slerp(v0, v1, t, method), rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_lerp_keeps_dtype_and_shape(dtype):
    v0, v1, t = random_pair(7, dtype)
    found = lerp(v0, v1, t)
    assert (found.dtype, found.shape) == (dtype, v0.shape)
    exact = (1 - t) * v0.double() + t * v1.double()
    bound = 4 * torch.finfo(dtype).eps * ((1 - t) * v0.double().abs() + t * v1.double().abs())
    assert bool(((found.double() - exact).abs() <= bound).all())
    assert units_of_last_place(lerp(v0, v0, 0.5), v0.double()) == 0


# ── Where there is no arc ──


@pytest.mark.parametrize("method", ["slerp", "slerp-norm"])
@pytest.mark.parametrize(
    ("dot", "norms", "reason"),
    [
        (0.0, (0.0, 1.0), "zero"),
        (0.0, (1.0, 0.0), "zero"),
        (0.0, (0.0, 0.0), "zero"),
        (0.0, (1e-8, 1.0), "zero"),
        (0.0, (1.0, 0.99e-8), "zero"),
        (6.0, (2.0, 3.0), "parallel"),
        (0.9996, (1.0, 1.0), "parallel"),
        (-6.0, (2.0, 3.0), "antiparallel"),
        (-0.9996, (1.0, 1.0), "antiparallel"),
        (math.nan, (1.0, 1.0), "not finite"),
        (1.0, (math.inf, 1.0), "not finite"),
        (math.inf, (math.inf, math.inf), "not finite"),
        (1.0, (1.0, math.nan), "not finite"),
    ],
)
def test_fallbacks_are_straight_lines_with_a_reason(dot, norms, reason, method):
    blend = slerp_coefficients(dot, *norms, 0.25, method)
    assert (blend.primary_weight, blend.secondary_weight) == (0.75, 0.25)
    assert (blend.operation, blend.reason) == ("lerp", reason)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_default_threshold_is_a_cosine_of_0_9995(sign):
    assert blend_at(sign * 0.9995).operation == "slerp"
    assert blend_at(sign * 0.99951).operation == "lerp"
    assert blend_at(sign * 0.9994).operation == "slerp"


def test_a_norm_just_above_epsilon_is_followed():
    assert slerp_coefficients(0.0, 1.01e-8, 1.0, 0.5).operation == "slerp"
    assert slerp_coefficients(0.0, 0.1, 1.0, 0.5, epsilon=0.2).reason == "zero"


def test_a_zero_tensor_is_lerped_and_not_given_the_weight_of_a_right_angle():
    v1 = torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(slerp(torch.zeros(3), v1, 0.5), v1.double() / 2)


def test_the_method_lerp_needs_no_reason_and_still_tells_the_angle():
    blend = slerp_coefficients(0.5, 1.0, 1.0, 0.25, "lerp")
    assert (blend.primary_weight, blend.secondary_weight, blend.operation, blend.reason) == (0.75, 0.25, "lerp", "")
    assert blend.angle_degrees == pytest.approx(60)


@pytest.mark.parametrize("cosine", [1.0, math.nextafter(1.0, 2.0), 1.0000001, -1.0, math.nextafter(-1.0, -2.0)])
def test_a_cosine_rounded_to_one_or_beyond_is_never_divided_by_its_sine(cosine):
    for threshold in (0.9995, 1.0):
        blend = blend_at(cosine, 0.25, dot_threshold=threshold)
        assert (blend.primary_weight, blend.secondary_weight, blend.operation) == (0.75, 0.25, "lerp")
        assert blend.angle_degrees in (0.0, 180.0)


def test_threshold_one_follows_even_the_shortest_arc():
    blend = blend_at(math.nextafter(1.0, 0.0), 0.25, dot_threshold=1.0)
    assert blend.operation == "slerp"
    assert (blend.primary_weight, blend.secondary_weight) == pytest.approx((0.75, 0.25), rel=1e-6)


@pytest.mark.parametrize("factor", [1.0, 3.0, 0.1, -7.0])
def test_multiples_of_a_vector_are_blended_without_a_fault_at_threshold_one(factor):
    """Rounding puts their cosine at 1, a little above or a little below."""
    for seed in range(100):
        v0 = random_pair(seed)[0]
        found = slerp(v0, factor * v0, 0.5, dot_threshold=1.0)
        if factor > 0:
            torch.testing.assert_close(found, (1 + factor) / 2 * v0, rtol=1e-7, atol=0.0)
        else:
            assert bool(torch.isfinite(found).all())


@pytest.mark.parametrize(
    ("dot", "norms", "angle"),
    [(0.0, (2.0, 3.0), 90.0), (3.0, (2.0, 3.0), 60.0), (6.0, (2.0, 3.0), 0.0), (-6.0, (2.0, 3.0), 180.0)],
)
def test_the_angle_between_the_parents(dot, norms, angle):
    assert slerp_coefficients(dot, *norms, 0.5).angle_degrees == pytest.approx(angle, abs=1e-9)


@pytest.mark.parametrize("sums", [(0.0, 0.0, 1.0), (math.nan, 1.0, 1.0), (math.inf, math.inf, 2.0)])
def test_there_is_no_angle_where_a_norm_is_zero_or_a_sum_not_finite(sums):
    assert slerp_coefficients(*sums, 0.5).angle_degrees is None


def test_there_is_no_angle_beside_an_infinite_norm():
    assert slerp_coefficients(1.0, math.inf, 2.0, 0.5).angle_degrees is None


@pytest.mark.parametrize("epsilon", [0.0, 1e-8])
def test_norms_whose_product_underflows_are_no_division_by_zero(epsilon):
    """A float64 tensor of values near 1e-161 has such a norm."""
    blend = slerp_coefficients(0.0, 1e-162, 1e-162, 0.5, epsilon=epsilon)
    assert math.isfinite(blend.primary_weight)
    assert math.isfinite(blend.secondary_weight)


# ── Sums ──


@pytest.mark.parametrize("seed", SEEDS)
def test_the_sum_is_exact_and_in_no_order(seed):
    chooser = random.Random(seed)
    values = [chooser.uniform(-1, 1) * 10 ** chooser.randint(-20, 20) for _ in range(300)]
    values += [-value for value in values[:250]]  # most of it cancels
    exact = float(sum(map(Fraction, values)))
    for _ in range(5):
        chooser.shuffle(values)
        assert exact_sum(values) == exact


def test_the_sum_of_nothing_is_zero():
    assert exact_sum(iter(())) == 0.0


@pytest.mark.parametrize("fault", [math.nan, math.inf, -math.inf])
def test_the_sum_is_infinite_where_a_value_is_not_finite(fault):
    assert exact_sum([1.0, fault, 2.0]) == math.inf
    assert exact_sum([math.inf, -math.inf]) == math.inf


def test_a_sum_beyond_float64_is_infinite():
    """Squares of a float64 tensor can be finite each and too large together."""
    assert exact_sum([1e308, 1e308, 1e308]) == math.inf
