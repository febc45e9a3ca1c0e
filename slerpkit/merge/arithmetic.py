"""The arithmetic on one block: three sums over a pair of vectors, and their blend.

Knows arrays of numbers alone: no file, no name, no plan. `Arithmetic` is the processor's, with numpy, for torch would
take longer to load than most merges take; `DeviceArithmetic` does the same on an accelerator, with torch.

Precision: float32, or float64 where a source is float64. Sums are taken in that precision over rows of ROW elements and
added in float64; results are rounded once, to the child's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slerpkit.lazy import numpy, torch
from slerpkit.maths import exact_sum
from slerpkit.parents.dtypes import (
    convert,
    converted,
    is_bfloat16,
    narrow,
    narrow_pairs,
    stored_dtype,
    widen,
    widen_pairs,
)
from slerpkit.parents.tensors import SAFETENSORS_NAMES

ROW = 512  # elements that are added in working precision; measured off by 1e-8 in float32, and by 6e-8 at 4096
FEW_ELEMENTS = 1 << 17  # a shorter block is added in float64: it has too few rows for their roundings to even out

if TYPE_CHECKING:
    Block = Sequence[numpy.ndarray]  # each source of a tensor: flat, of one length, in its stored dtype


@dataclass(frozen=True)
class Sums:
    """What a stretch tells about a pair of tensors."""

    primary_squared: tuple[float, ...]  # v0 . v0, a partial sum for each block
    secondary_squared: tuple[float, ...]  # v1 . v1
    dot: tuple[float, ...]  # v0 . v1
    identical: bool  # every byte agrees
    columns: numpy.ndarray | None = None  # (3, columns), float64: the same for each column, where they are vectors


def total_sums(sums: Sequence[Sums]) -> tuple[float, float, float]:
    """(v0 . v1, |v0|, |v1|) over all stretches of a tensor. The sum is exact, so that no order shows in it."""
    primary_squared, secondary_squared, dot = (
        exact_sum(value for part in sums for value in getattr(part, name))
        for name in ("primary_squared", "secondary_squared", "dot")
    )
    return dot, math.sqrt(primary_squared), math.sqrt(secondary_squared)


class Arithmetic:
    """The arithmetic of one worker on the processor, with its scratch memory.

    dtype, of its methods: the working precision, float32 or float64 of numpy.
    """

    device = "cpu"

    def __init__(self, cast_dtype: str | None = None) -> None:
        """cast_dtype: torch's name of the dtype that sources and results are rounded to first."""
        self.cast = stored_dtype(SAFETENSORS_NAMES[cast_dtype]) if cast_dtype else None
        self._rooms: dict[numpy.dtype, numpy.ndarray] = {}
        # (rows, ROW) and (rows, ROW) to (rows,); numpy before 2.0 has no vecdot, and takes twice as long.
        self._row_products = getattr(numpy, "vecdot", None) or functools.partial(numpy.einsum, "ij,ij->i")

    def room(self, dtype: numpy.dtype, elements: int) -> numpy.ndarray:
        """Scratch memory for a block: (3, at least `elements`) of working precision, a row for each source."""
        room = self._rooms.get(dtype)
        if room is None or room.shape[1] < elements:
            room = self._rooms[dtype] = numpy.empty((3, -(-elements // ROW) * ROW), dtype)
        return room

    def round(self, stored: numpy.ndarray) -> numpy.ndarray:
        """Stored numbers rounded to the recipe's dtype, where it has one."""
        return stored if self.cast is None else converted(stored, self.cast)

    def store(self, values: numpy.ndarray, out: numpy.ndarray) -> None:
        """Results into the child's dtype; first into the recipe's, where it has another."""
        if self.cast is None or self.cast == out.dtype:
            narrow(values, out)
        else:
            rounded = numpy.empty(values.shape, self.cast)
            narrow(values, rounded)
            convert(rounded, out)

    def are_pairs(self, block: Block) -> bool:
        """Whether two numbers can be taken at once: bfloat16 throughout, and as it is stored."""
        return len(block[0]) % 2 == 0 and all(map(is_bfloat16, block)) and self.cast in (None, block[0].dtype)

    def load(self, block: Block, room: numpy.ndarray, in_pairs: bool = False) -> numpy.ndarray:
        """The sources of a block in working precision, (sources, elements), in the room.

        With a base, v0 and v1 become what each learned since.
        """
        loaded = room[: len(block), : len(block[0])]
        for stored, values in zip(block, loaded):
            if in_pairs:
                widen_pairs(stored, values)
            else:
                widen(self.round(stored), values)
        if len(block) == 3:
            numpy.subtract(loaded[:2], loaded[2], out=loaded[:2])
        return loaded

    def measure(self, block: Block, dtype: numpy.dtype) -> tuple[float, float, float]:
        """(v0 . v0, v1 . v1, v0 . v1) of a block."""
        count = len(block[0])
        if count < FEW_ELEMENTS:
            dtype = numpy.dtype("f8")
        room = self.room(dtype, count)
        self.load(block, room, in_pairs=dtype == numpy.float32 and self.are_pairs(block))
        rows = -(-count // ROW)
        room[:2, count : rows * ROW] = 0  # what fills the last row up adds nothing
        v0, v1 = room[:2, : rows * ROW].reshape(2, rows, ROW)
        products = numpy.stack([self._row_products(a, b) for a, b in ((v0, v0), (v1, v1), (v0, v1))])
        sums = products.sum(axis=1, dtype="f8").tolist()
        if dtype == numpy.float32 and not math.isfinite(sum(sums)):
            return self.measure(block, numpy.dtype("f8"))  # large values overflow a float32 square
        return sums[0], sums[1], sums[2]

    def blend(self, block: Block, dtype: numpy.dtype, weights: tuple[float, float], out: numpy.ndarray) -> None:
        """out = w0 * v0 + w1 * v1, and the base where there is one, rounded to out's dtype."""
        in_pairs = dtype == numpy.float32 and self.are_pairs([*block, out])
        loaded = self.load(block, self.room(dtype, len(out)), in_pairs)
        for values, weight in zip(loaded, weights):
            numpy.multiply(values, dtype.type(weight), out=values)
        result = self.add(loaded)
        if in_pairs:
            narrow_pairs(result, loaded[1], out)
        else:
            self.store(result, out)

    def add(self, terms: numpy.ndarray) -> numpy.ndarray:
        """The sum of the rows, in the first of them."""
        for values in terms[1:]:
            numpy.add(terms[0], values, out=terms[0])
        return terms[0]

    def measure_vectors(self, block: Block, dtype: numpy.dtype, width: int, axis: int) -> numpy.ndarray:
        """The three sums for each vector of a block of whole rows `width` long: (3, vectors), float64.

        axis 1: the rows are the vectors; axis 0: the columns are. In float64, for a vector is short and its sum has no
        digits to spare.
        """
        wide = numpy.dtype("f8")
        v0, v1, *base = self.load(block, self.room(wide, len(block[0]))).reshape(len(block), -1, width)
        if dtype == numpy.float32 and base:  # what each learned, as float32 has it
            v0, v1 = v0.astype("f4").astype("f8"), v1.astype("f4").astype("f8")
        return numpy.stack([(a * b).sum(axis=axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))])

    def blend_vectors(
        self,
        block: Block,
        dtype: numpy.dtype,
        weights: Sequence[numpy.ndarray],  # two: (rows, 1) or (1, columns), float64
        width: int,
        out: numpy.ndarray,
    ) -> None:
        """The same as blend, with weights of its own for each vector."""
        loaded = self.load(block, self.room(dtype, len(out)))
        for values, own in zip(loaded.reshape(len(block), -1, width), weights):
            numpy.multiply(values, own.astype(dtype), out=values)
        self.store(self.add(loaded), out)

    def give_back(self) -> None:
        """Gives the scratch memory back."""
        self._rooms.clear()


def as_torch(stored: numpy.ndarray) -> torch.Tensor:
    """The same memory as a tensor of torch."""
    if is_bfloat16(stored):
        return torch.from_numpy(stored.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(stored)


class DeviceArithmetic(Arithmetic):
    """The same on an accelerator, a block at once."""

    def __init__(self, device: str, cast_dtype: str | None = None) -> None:
        super().__init__(cast_dtype)
        self.device = device
        self.cast_dtype = getattr(torch, cast_dtype) if cast_dtype else None

    def load_block(self, block: Block, dtype: numpy.dtype) -> list[torch.Tensor]:
        """Each source on the device in working precision; with a base, v0 and v1 are what each learned since."""
        working = getattr(torch, dtype.name)
        loaded = [self.round_tensor(as_torch(stored)).to(self.device, working) for stored in block]
        if len(loaded) == 3:
            loaded[:2] = loaded[0] - loaded[2], loaded[1] - loaded[2]
        return loaded

    def round_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rounded to the recipe's dtype, where it has one."""
        return tensor if self.cast_dtype is None else tensor.to(self.cast_dtype)

    def measure(self, block: Block, dtype: numpy.dtype) -> tuple[float, float, float]:
        v0, v1, *_ = self.load_block(block, dtype)
        # torch.sum adds pairwise and is off by 1e-7; torch.dot in float32 was measured off by 1e-5.
        sums = tuple((a * b).sum().item() for a, b in ((v0, v0), (v1, v1), (v0, v1)))
        if not math.isfinite(sum(sums)) and dtype == numpy.float32 and self.device != "mps":
            return self.measure(block, numpy.dtype("f8"))
        return sums

    def blend(self, block: Block, dtype: numpy.dtype, weights: tuple[float, float], out: numpy.ndarray) -> None:
        v0, v1, *base = self.load_block(block, dtype)
        result = (v0 * weights[0]).add_(v1, alpha=weights[1])
        as_torch(out).copy_(self.round_tensor(result.add_(base[0]) if base else result))

    def measure_vectors(self, block: Block, dtype: numpy.dtype, width: int, axis: int) -> numpy.ndarray:
        v0, v1 = (part.view(-1, width) for part in self.load_block(block, dtype)[:2])
        if self.device != "mps":  # which knows no float64
            v0, v1 = v0.double(), v1.double()
        sums = torch.stack([(a * b).sum(dim=axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))])
        return sums.cpu().double().numpy()

    def blend_vectors(
        self, block: Block, dtype: numpy.dtype, weights: Sequence[numpy.ndarray], width: int, out: numpy.ndarray
    ) -> None:
        v0, v1, *base = (part.view(-1, width) for part in self.load_block(block, dtype))
        first, second = (torch.from_numpy(part).to(v0.dtype).to(self.device) for part in weights)
        result = (v0 * first).addcmul_(v1, second)
        as_torch(out).view(-1, width).copy_(self.round_tensor(result.add_(base[0]) if base else result))

    def give_back(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


def could_be_equal(sums: tuple[float, float, float]) -> bool:
    """Equal bytes have equal norms, or sums that are no number; only then is it worth looking at every byte."""
    return sums[0] == sums[1] or not math.isfinite(sum(sums))


def vector_weights(sums: numpy.ndarray, t: float) -> tuple[numpy.ndarray, numpy.ndarray]:
    """NuSLERP's weights for many pairs of vectors at once.

    sums: (3, vectors), float64: v0 . v0, v1 . v1, v0 . v1 of each pair. Returns two arrays (vectors,), float64.
    A pair that is parallel, antiparallel, of no length or not finite gets LERP's weights.
    """
    with numpy.errstate(all="ignore"):  # what is not finite is told apart below
        cosine = numpy.clip(sums[2] / numpy.sqrt(sums[0] * sums[1]), -1, 1)
        theta = numpy.arccos(cosine)
        sine = numpy.sin(theta)
        curved = (sine >= 1e-8) & numpy.isfinite(cosine)
        sine = numpy.where(curved, sine, 1.0)
        weights = numpy.sin((1 - t) * theta) / sine, numpy.sin(t * theta) / sine
    return numpy.where(curved, weights[0], 1 - t), numpy.where(curved, weights[1], t)
