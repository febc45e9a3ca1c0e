"""The arithmetic on one block: three sums over a pair of vectors, and their blend.

Knows tensors of torch alone: no file, no name, no plan. `Arithmetic` is the processor's, in pieces that fit its
second-level cache; `DeviceArithmetic` does the same on an accelerator, a block at once.

Precision: float32, or float64 where a source is float64. Sums are taken in that precision over rows of ROW elements and
added in float64; results are rounded once, to the child's dtype.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import numpy, torch
from slerpkit.maths import exact_sum

ROW = 512  # elements that are added in working precision; measured off by 1e-8 in float32, and by 6e-8 at 4096
PIECE_ELEMENTS = 1 << 17  # computed at once; whole rows

if TYPE_CHECKING:
    Block = Sequence[torch.Tensor]  # each source of a tensor: flat, of one length, in its stored dtype


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


class Room:
    """Scratch memory for a piece in one precision: three sources and a result, and views of it that are used often."""

    def __init__(self, dtype: torch.dtype, elements: int) -> None:
        self.all = torch.empty(4, -(-elements // ROW) * ROW, dtype=dtype)
        self.parts = self.all.unbind()
        self.rows = [part.numpy().reshape(-1, ROW) for part in self.parts]


class Arithmetic:
    """The arithmetic of one worker on the processor, with its scratch memory."""

    device = "cpu"

    def __init__(self, cast_dtype: str | None = None) -> None:
        self.cast = getattr(torch, cast_dtype) if cast_dtype else None
        self._rooms: dict[tuple[torch.dtype, int], Room] = {}
        # (rows, ROW) and (rows, ROW) to (rows,); numpy before 2.0 has no vecdot, and takes twice as long.
        self._row_products = getattr(numpy, "vecdot", None) or functools.partial(numpy.einsum, "ij,ij->i")

    def room(self, dtype: torch.dtype, elements: int) -> Room:
        if (dtype, elements) not in self._rooms:
            self._rooms[dtype, elements] = Room(dtype, elements)
        return self._rooms[dtype, elements]

    def round(self, raw: torch.Tensor) -> torch.Tensor:
        """A block rounded to the recipe's dtype, where it has one."""
        return raw if self.cast is None or raw.dtype == self.cast else raw.to(self.cast)

    def pieces(self, block: Block, width: int = 1) -> Iterator[Block]:
        """A block piece by piece, whole rows of `width`; the last may be shorter."""
        step, count = max(1, PIECE_ELEMENTS // width) * width, len(block[0])
        whole = count // step * step
        yield from zip(*(part[:whole].view(-1, step).unbind() for part in block))
        if whole < count:
            yield [part[whole:] for part in block]

    def load(self, piece: Block, room: Room) -> int:
        """Puts the sources of a piece into the room, in working precision; returns how many elements they have.

        With a base, v0 and v1 become what each learned since.
        """
        count = len(piece[0])
        for raw, part in zip(piece, room.parts):
            (part if len(part) == count else part[:count]).copy_(self.round(raw))
        if len(piece) == 3:
            room.all[:2, :count].sub_(room.parts[2][:count])
        return count

    def measure(self, block: Block, dtype: torch.dtype) -> tuple[float, float, float]:
        """(v0 . v0, v1 . v1, v0 . v1) of a block. A short one has too few rows for their roundings to even out."""
        if len(block[0]) < PIECE_ELEMENTS:
            dtype = torch.float64
        room = self.room(dtype, PIECE_ELEMENTS)
        products = numpy.empty((3, -(-len(block[0]) // ROW)), room.rows[0].dtype)
        done = 0
        with numpy.errstate(all="ignore"):  # what is not finite is dealt with below
            for piece in self.pieces(block):
                count = self.load(piece, room)
                until = done - (-count // ROW)
                if count % ROW:  # what fills the last row up adds nothing
                    room.all[:2, count : (until - done) * ROW] = 0
                v0, v1 = (rows[: until - done] for rows in room.rows[:2])
                for (left, right), out in zip(((v0, v0), (v1, v1), (v0, v1)), products):
                    self._row_products(left, right, out=out[done:until])
                done = until
            sums = products.sum(axis=1, dtype=numpy.float64).tolist()
        if dtype == torch.float32 and not math.isfinite(sum(sums)):
            return self.measure(block, torch.float64)  # large values overflow a float32 square
        return sums[0], sums[1], sums[2]

    def blend(self, block: Block, dtype: torch.dtype, weights: tuple[float, float], out: torch.Tensor) -> None:
        """out = w0 * v0 + w1 * v1, and the base where there is one, rounded to out's dtype."""
        room = self.room(dtype, PIECE_ELEMENTS)
        factors = torch.tensor([*weights, 1.0][: len(block)], dtype=dtype)
        columns, result = room.all[: len(block)].t(), room.parts[3]
        for *piece, made in self.pieces([*block, out]):
            count = self.load(piece, room)
            if count < len(result):
                columns, result = columns[:count], result[:count]
            made.copy_(self.round(torch.mv(columns, factors, out=result)))

    def measure_vectors(self, block: Block, dtype: torch.dtype, width: int, axis: int) -> torch.Tensor:
        """The three sums for each vector of a block of whole rows `width` long: (3, vectors), float64.

        axis 1: the rows are the vectors; axis 0: the columns are. In float64, for a vector is short and its sum has no
        digits to spare.
        """
        room = self.room(torch.float64, max(width, PIECE_ELEMENTS))
        parts = []
        for piece in self.pieces(block, width):
            count = self.load(piece, room)
            v0, v1 = (part[:count].view(-1, width) for part in room.parts[:2])
            if dtype == torch.float32 and len(block) == 3:  # what each learned, as float32 has it
                v0, v1 = v0.float().double(), v1.float().double()
            parts.append(torch.stack([(a * b).sum(dim=axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]))
        return torch.cat(parts, dim=1) if axis else torch.stack(parts).sum(dim=0)

    def blend_vectors(
        self,
        block: Block,
        dtype: torch.dtype,
        weights: Sequence[torch.Tensor],  # two: (rows, 1) or (1, columns), float64
        width: int,
        out: torch.Tensor,
    ) -> None:
        """The same as blend, with weights of its own for each vector."""
        room = self.room(dtype, max(width, PIECE_ELEMENTS))
        done = 0
        for *piece, made in self.pieces([*block, out], width):
            count = self.load(piece, room)
            v0, v1, *base = (part[:count].view(-1, width) for part in room.parts[: len(block)])
            rows = slice(done, done + count // width)
            first, second = ((part if part.shape[0] == 1 else part[rows]).to(dtype) for part in weights)
            result = torch.mul(v0, first, out=room.parts[3][:count].view(-1, width)).addcmul_(v1, second)
            made.view(-1, width).copy_(self.round(result.add_(base[0]) if base else result))
            done = rows.stop

    def give_back(self) -> None:
        """Gives the scratch memory back."""
        self._rooms.clear()


class DeviceArithmetic(Arithmetic):
    """The same on an accelerator, a block at once."""

    def __init__(self, device: str, cast_dtype: str | None = None) -> None:
        super().__init__(cast_dtype)
        self.device = device

    def load_block(self, block: Block, dtype: torch.dtype) -> list[torch.Tensor]:
        """Each source on the device in working precision; with a base, v0 and v1 are what each learned since."""
        loaded = [self.round(raw).to(self.device, dtype) for raw in block]
        if len(loaded) == 3:
            loaded[:2] = loaded[0] - loaded[2], loaded[1] - loaded[2]
        return loaded

    def measure(self, block: Block, dtype: torch.dtype) -> tuple[float, float, float]:
        v0, v1, *_ = self.load_block(block, dtype)
        # torch.sum adds pairwise and is off by 1e-7; torch.dot in float32 was measured off by 1e-5.
        sums = tuple((a * b).sum().item() for a, b in ((v0, v0), (v1, v1), (v0, v1)))
        if not math.isfinite(sum(sums)) and dtype == torch.float32 and self.device != "mps":
            return self.measure(block, torch.float64)
        return sums

    def blend(self, block: Block, dtype: torch.dtype, weights: tuple[float, float], out: torch.Tensor) -> None:
        v0, v1, *base = self.load_block(block, dtype)
        result = (v0 * weights[0]).add_(v1, alpha=weights[1])
        out.copy_(self.round(result.add_(base[0]) if base else result))

    def measure_vectors(self, block: Block, dtype: torch.dtype, width: int, axis: int) -> torch.Tensor:
        v0, v1 = (part.view(-1, width) for part in self.load_block(block, dtype)[:2])
        if self.device != "mps":  # which knows no float64
            v0, v1 = v0.double(), v1.double()
        return torch.stack([(a * b).sum(dim=axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]).cpu().double()

    def blend_vectors(
        self, block: Block, dtype: torch.dtype, weights: Sequence[torch.Tensor], width: int, out: torch.Tensor
    ) -> None:
        v0, v1, *base = (part.view(-1, width) for part in self.load_block(block, dtype))
        first, second = (part.to(self.device, dtype) for part in weights)
        result = (v0 * first).addcmul_(v1, second)
        out.view(-1, width).copy_(self.round(result.add_(base[0]) if base else result))

    def give_back(self) -> None:
        if self.device == "cuda":
            torch.cuda.empty_cache()


def could_be_equal(sums: tuple[float, float, float]) -> bool:
    """Equal bytes have equal norms, or sums that are no number; only then is it worth looking at every byte."""
    return sums[0] == sums[1] or not math.isfinite(sum(sums))


def count_non_finite(tensor: torch.Tensor) -> int:
    """Infinite or not-a-number values of a floating-point tensor; 0 of any other."""
    if not tensor.is_floating_point():
        return 0
    if math.isfinite(tensor.sum().item()):
        return 0  # one infinite or undefined value would have made the sum so; this is 40 times as fast
    return tensor.numel() - int(torch.isfinite(tensor).sum())


def vector_weights(sums: Any, t: float) -> tuple[torch.Tensor, torch.Tensor]:
    """NuSLERP's weights for many pairs of vectors at once.

    sums: (3, vectors), float64: v0 . v0, v1 . v1, v0 . v1 of each pair. Returns two tensors (vectors,), float64.
    A pair that is parallel, antiparallel, of no length or not finite gets LERP's weights.
    """
    sums = torch.as_tensor(sums)
    cosine = (sums[2] / torch.sqrt(sums[0] * sums[1])).clamp(-1, 1)
    theta = torch.acos(cosine)
    sine = torch.sin(theta)
    curved = (sine >= 1e-8) & torch.isfinite(cosine)
    sine = torch.where(curved, sine, 1.0)
    weights = torch.sin((1 - t) * theta) / sine, torch.sin(t * theta) / sine
    return torch.where(curved, weights[0], 1 - t), torch.where(curved, weights[1], t)
