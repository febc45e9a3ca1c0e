"""Numbers as files store them, and as they are computed with: numpy's dtypes, and bfloat16, which numpy does not know.

An array of bfloat16 has a dtype of its own here, so that every array tells what it holds. All conversions round to
nearest, to even on a tie, as IEEE 754 has it; only float64 to bfloat16 goes by way of float32, as torch does it.
"""

from __future__ import annotations

import functools

from slerpkit.lazy import numpy, torch
from slerpkit.parents.tensors import DTYPE_BYTES, FLOAT_DTYPES

BFLOAT16_BITS = 16  # of a float32's upper half, which is what a bfloat16 is
UPPER_HALF = 0xFFFF0000
float16_by_torch = False  # whether this process converts float16 by torch: ten times as fast as numpy, equal bits
# Of safetensors' names: the distance from 1 to the next number, and the smallest number of full precision.
EPSILON = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
SMALLEST_NORMAL = {"F64": 2.0**-1022, "F32": 2.0**-126, "F16": 2.0**-14, "BF16": 2.0**-126}


@functools.cache
def stored_dtype(name: str) -> numpy.dtype:
    """numpy's dtype for safetensors' name of it; of what is no real number, that of its bytes."""
    if name == "BF16":
        return numpy.dtype([("bfloat16", "<u2")])
    kind = "f" if name in FLOAT_DTYPES else "u"
    return numpy.dtype(f"<{kind}{DTYPE_BYTES[name]}")


def is_bfloat16(array: numpy.ndarray) -> bool:
    """Whether an array is of the dtype that stands for bfloat16."""
    return array.dtype.names is not None


def plain(array: numpy.ndarray) -> numpy.ndarray:
    """The same memory in a dtype that numpy copies fast: bfloat16 as its bits."""
    return array.view("<u2") if is_bfloat16(array) else array


def widen(stored: numpy.ndarray, out: numpy.ndarray) -> None:
    """Stored real numbers, exactly, into `out`: float64, or float32 where none of them is float64."""
    if not is_bfloat16(stored):
        convert_plain(stored, out)
    elif out.dtype == numpy.float32:
        numpy.left_shift(plain(stored), numpy.uint32(BFLOAT16_BITS), out=out.view("<u4"), dtype="<u4")
    else:
        out[...] = (plain(stored).astype("<u4") << numpy.uint32(BFLOAT16_BITS)).view("<f4")


def narrow(values: numpy.ndarray, out: numpy.ndarray) -> None:
    """float32 or float64 numbers, rounded, into `out`, of any dtype of real numbers."""
    if not is_bfloat16(out):
        convert_plain(values, out)
        return
    values = values.astype("<f4", copy=False)
    if numpy.isnan(values.max()):  # its lowest bits, which rounding would carry up, say nothing
        values = numpy.where(numpy.isnan(values), numpy.float32(numpy.nan), values)
    bits = add_rounding(values, numpy.empty(values.shape, "<u4"))
    numpy.right_shift(bits, numpy.uint32(BFLOAT16_BITS), out=plain(out), casting="unsafe")


def convert(stored: numpy.ndarray, out: numpy.ndarray) -> None:
    """Stored numbers into another stored dtype, or as they are where it is the same."""
    if stored.dtype == out.dtype:
        plain(out)[...] = plain(stored)
        return
    values = numpy.empty(stored.shape, "<f8" if stored.dtype == numpy.float64 else "<f4")
    widen(stored, values)
    narrow(values, out)


def converted(stored: numpy.ndarray, dtype: numpy.dtype) -> numpy.ndarray:
    """Stored numbers in a stored dtype: the same array where that is theirs already."""
    if stored.dtype == dtype:
        return stored
    out = numpy.empty(stored.shape, dtype)
    convert(stored, out)
    return out


def convert_plain(values: numpy.ndarray, out: numpy.ndarray) -> None:
    """Between dtypes that numpy knows. What is not a number becomes the same one, whoever converts float16."""
    is_half = {values.dtype.name, out.dtype.name} == {"float16", "float32"}
    if is_half and float16_by_torch:
        torch.from_numpy(out).copy_(torch.from_numpy(values))
    else:
        numpy.copyto(out, values, casting="unsafe")
    if is_half and numpy.isnan(out.max()):
        out[numpy.isnan(out)] = numpy.nan


def convert_float16_by_torch(wanted: bool) -> None:
    """Whether this process does so from now on; torch must be there to be loaded."""
    global float16_by_torch
    float16_by_torch = wanted and hasattr(torch, "from_numpy")


def add_rounding(values: numpy.ndarray, out: numpy.ndarray) -> numpy.ndarray:
    """Bits, uint32, whose upper halves are float32 values rounded to bfloat16. `out` has room for them."""
    bits = values.view("<u4")
    numpy.right_shift(bits, numpy.uint32(BFLOAT16_BITS), out=out)
    numpy.bitwise_and(out, numpy.uint32(1), out=out)  # an odd one goes up on a tie
    numpy.add(out, bits, out=out)
    return numpy.add(out, numpy.uint32(0x7FFF), out=out)


def widen_pairs(stored: numpy.ndarray, out: numpy.ndarray) -> None:
    """bfloat16, an even number of them, into float32: those at even places first, then the others.

    Where the order is of no account this takes half the time of `widen`, for no number changes its width.
    """
    pairs, bits = stored.view("<u4"), out.view("<u4")
    half = len(pairs)
    numpy.left_shift(pairs, numpy.uint32(BFLOAT16_BITS), out=bits[:half])
    numpy.bitwise_and(pairs, numpy.uint32(UPPER_HALF), out=bits[half:])


def narrow_pairs(values: numpy.ndarray, scratch: numpy.ndarray, out: numpy.ndarray) -> None:
    """The reverse of `widen_pairs`, rounded; float32 `scratch` is as long as `values`.

    What is not a number keeps its lowest bits clear in any sum of numbers that were bfloat16, so it needs no care.
    """
    bits = add_rounding(values, scratch.view("<u4"))
    half = len(bits) // 2
    numpy.right_shift(bits[:half], numpy.uint32(BFLOAT16_BITS), out=bits[:half])
    numpy.bitwise_and(bits[half:], numpy.uint32(UPPER_HALF), out=bits[half:])
    numpy.bitwise_or(bits[:half], bits[half:], out=out.view("<u4"))


def count_non_finite(stored: numpy.ndarray) -> int:
    """Infinite or not-a-number values of stored real numbers."""
    if is_bfloat16(stored):
        exponents = numpy.uint16(0x7F80)
        return int(numpy.count_nonzero((plain(stored) & exponents) == exponents))
    return stored.size - int(numpy.count_nonzero(numpy.isfinite(stored)))
