"""Numbers as files store them, to working precision and back, bit for bit as torch has them."""

from __future__ import annotations

import numpy
import pytest
import torch

from slerpkit.parents import dtypes
from slerpkit.parents.dtypes import convert, count_non_finite, narrow, narrow_pairs, stored_dtype, widen, widen_pairs
from slerpkit.parents.tensors import DTYPE_BYTES, FLOAT_DTYPES, TORCH_NAMES

EVERY_16_BITS = numpy.arange(1 << 16, dtype="<u2")
HALVES = ("BF16", "F16")


@pytest.fixture(autouse=True)
def as_in_a_worker():
    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture(params=[True, False], ids=["with torch", "without"])
def by_torch(request, monkeypatch) -> bool:
    """Whether float16 is converted by torch."""
    monkeypatch.setattr(dtypes, "float16_by_torch", request.param)
    return request.param


def as_torch(array: numpy.ndarray, name: str) -> torch.Tensor:
    """An array of stored numbers in torch's dtype for them."""
    return torch.from_numpy(array.view("u1").copy()).view(getattr(torch, TORCH_NAMES[name]))


def assert_same(found: numpy.ndarray, expected: torch.Tensor) -> None:
    """The same bits; of what is not a number only that it is none."""
    ours = torch.from_numpy(found.view("u1").copy()).view(expected.dtype)
    undefined = torch.isnan(expected)
    assert torch.equal(torch.isnan(ours), undefined)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    assert torch.equal(ours[~undefined].view(width), expected[~undefined].view(width))


def awkward_floats() -> numpy.ndarray:
    """float32 of every kind: each rounding's ties and their neighbours, tiny and huge ones, NaN of any bits."""
    upper = EVERY_16_BITS.astype("<u4") << 16
    lower = numpy.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x0FFF, 0x1000, 0x1001, 0x3000], "<u4")
    random = numpy.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype="<u4")
    return numpy.concatenate([(upper[:, None] | lower).ravel(), random]).view("<f4")


@pytest.mark.parametrize("working", ["f4", "f8"])
@pytest.mark.parametrize("name", HALVES)
def test_every_number_of_16_bits_is_widened_exactly(by_torch, name, working):
    found = numpy.empty(len(EVERY_16_BITS), working)
    widen(EVERY_16_BITS.view(stored_dtype(name)), found)
    dtype = torch.float32 if working == "f4" else torch.float64
    assert_same(found, as_torch(EVERY_16_BITS, name).to(dtype))


@pytest.mark.parametrize("name", HALVES)
def test_a_float32_is_rounded_to_the_nearest_and_to_even_on_a_tie(by_torch, name):
    values = awkward_floats()
    found = numpy.empty(len(values), stored_dtype(name))
    narrow(values, found)
    assert_same(found, torch.from_numpy(values).to(getattr(torch, TORCH_NAMES[name])))


@pytest.mark.parametrize("name", FLOAT_DTYPES)
@pytest.mark.parametrize("out", FLOAT_DTYPES)
def test_every_stored_dtype_is_converted_as_torch_does(by_torch, name, out):
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)).double() * 3e-5
    once = 1 + 2**-11 + 2**-40  # rounded twice, by way of float32, it would become 1
    values[:5] = torch.tensor([0.0, -0.0, float("inf"), 7e4, once], dtype=torch.float64)
    stored = values.to(getattr(torch, TORCH_NAMES[name]))
    found = numpy.empty(len(values), stored_dtype(out))
    assert stored.dtype != torch.float64 or stored[4] == once
    convert(stored.view(torch.uint8).numpy().view(stored_dtype(name)), found)
    # torch rounds float64 to float16 by way of float32; here it is rounded once.
    expected = stored.numpy().astype("f2") if (name, out) == ("F64", "F16") else None
    expected = stored.to(getattr(torch, TORCH_NAMES[out])) if expected is None else torch.from_numpy(expected)
    assert_same(found, expected)


def test_numbers_taken_in_pairs_are_those_taken_one_by_one():
    values = numpy.empty(len(EVERY_16_BITS), "<f4")
    widen_pairs(EVERY_16_BITS.view(stored_dtype("BF16")), values)
    assert_same(values, as_torch(EVERY_16_BITS, "BF16").float().view(-1, 2).t().reshape(-1))

    awkward = awkward_floats()
    awkward = awkward[~numpy.isnan(awkward) | (awkward.view("<u4") & 0xFFFF == 0)]
    awkward = awkward[: len(awkward) // 2 * 2]
    found = numpy.empty(len(awkward), stored_dtype("BF16"))
    narrow_pairs(awkward, numpy.empty_like(awkward), found)
    assert_same(found, torch.from_numpy(awkward).to(torch.bfloat16).view(2, -1).t().reshape(-1))


@pytest.mark.parametrize("name", HALVES)
def test_infinite_and_undefined_values_are_counted(name):
    expected = int((~torch.isfinite(as_torch(EVERY_16_BITS, name))).sum())
    assert count_non_finite(EVERY_16_BITS.view(stored_dtype(name))) == expected > 0


def test_who_converts_float16_leaves_no_trace(monkeypatch):
    """Not in the bits of what is no number either."""
    made = []
    for by_torch in (True, False):
        monkeypatch.setattr(dtypes, "float16_by_torch", by_torch)
        wide, narrowed = numpy.empty(len(EVERY_16_BITS), "f4"), numpy.empty(len(awkward_floats()), "f2")
        widen(EVERY_16_BITS.view("f2"), wide)
        narrow(awkward_floats(), narrowed)
        made.append((wide.tobytes(), narrowed.tobytes()))
    assert made[0] == made[1]


def test_torch_converts_float16_where_it_is_asked_to(monkeypatch):
    asked = []
    stand_in = type("torch", (), {"from_numpy": lambda array: asked.append(array) or torch.from_numpy(array)})
    monkeypatch.setattr(dtypes, "torch", stand_in)
    monkeypatch.setattr(dtypes, "float16_by_torch", False)
    for wanted, count in ((False, 0), (True, 2)):
        dtypes.convert_float16_by_torch(wanted)
        narrow(numpy.ones(3, "f4"), numpy.empty(3, "f2"))
        assert len(asked) == count


def test_every_dtype_has_its_width():
    assert {name: stored_dtype(name).itemsize for name in DTYPE_BYTES} == DTYPE_BYTES
