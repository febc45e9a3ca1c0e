"""A tensor that an adapter changes, made while it is read: W + scale * left @ right, never stored.

Reads it tile by tile, in memory that does not grow with the tensor. Which factors belong to which tensor is not known
here (adapters.py). Read tensors.py and dtypes.py before this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from slerpkit.lazy import numpy
from slerpkit.parents.dtypes import stored_dtype, widen
from slerpkit.parents.tensors import DTYPE_BYTES, TensorInfo, TensorReader

# A tile is whole rows, cut from the tensor's first on. Its shape depends on the tensor alone, and so do the bits of its
# product, whoever asks for which stretch.
# A product of high rank is bound by arithmetic and fastest where it is large, one of low rank by memory, in a cache.
TILE_ELEMENTS_BY_RANK = 1 << 12
MIN_TILE_ELEMENTS, MAX_TILE_ELEMENTS = 1 << 16, 1 << 18
PANEL_ELEMENTS = 1 << 18  # of the left factor, read at once
ROOM_ELEMENTS = 1 << 18  # of a base that are read at once, by who asks for a block
ADDED_ELEMENTS = 1 << 16  # widened and added at once: what a core's own cache holds


@dataclass(frozen=True)
class AdaptedTensor(TensorInfo):
    """A base's tensor, whose name, dtype, shape and place it has, and the factors of what is added to it.

    The tensor is taken as a matrix (rows, width): its first dimension, and all others together. Where `is_transposed`,
    both factors are stored with rows for columns.
    """

    left: TensorInfo  # (rows, rank)
    right: TensorInfo | None  # (rank, width); None for a bias: ones, of width 1
    scale: float
    is_transposed: bool = False

    @property
    def read_dtype(self) -> str:
        return "F64" if self.dtype == "F64" else "F32"

    @property
    def read_bytes(self) -> int:
        return self.element_count * DTYPE_BYTES[self.read_dtype]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return tuple(part for part in (self.stored, self.left, self.right) if part is not None)

    @property
    def stored(self) -> TensorInfo:
        """The base's tensor."""
        return TensorInfo(*(getattr(self, field.name) for field in dataclasses.fields(TensorInfo)))

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    @property
    def tile_rows(self) -> int:
        """Rows of a tile; the last has fewer."""
        elements = min(max(self.rank * TILE_ELEMENTS_BY_RANK, MIN_TILE_ELEMENTS), MAX_TILE_ELEMENTS)
        return min(max(1, elements // self.width), self.shape[0])

    @property
    def kept_bytes(self) -> int:
        """What a reader keeps of it: a tile, the right factor, a panel of the left one, and room for the base."""
        elements = (self.tile_rows + self.rank) * self.width + max(PANEL_ELEMENTS, self.tile_rows * self.rank)
        return (elements + ROOM_ELEMENTS) * DTYPE_BYTES[self.read_dtype]

    @property
    def rank(self) -> int:
        """Columns of the left factor."""
        return self.left.element_count // max(self.shape[0], 1)

    def begin(self, reader: TensorReader, start: int, source: int) -> Callable[[memoryview], None]:
        tiles = reader.keep(self, source, lambda: Tiles(reader, self, source))
        position = start

        def fill(view: memoryview) -> None:
            nonlocal position
            tiles.read(position, view)
            position += len(view)

        return fill


class Tiles:
    """The products of one adapted tensor, a tile of which stays: float32, or float64 where the base is that."""

    def __init__(self, reader: TensorReader, info: AdaptedTensor, source: int) -> None:
        """Reads the right factor, whole."""
        self.reader, self.info, self.source = reader, info, source
        self.stored = info.stored
        self.dtype = stored_dtype(info.read_dtype)
        self.panel_rows = max(1, PANEL_ELEMENTS // info.rank // info.tile_rows) * info.tile_rows
        self.right = self.read_right()
        self.product = numpy.empty(info.tile_rows * info.width, self.dtype)
        self.room = numpy.empty(0, stored_dtype(info.dtype))  # for stored numbers of the base
        self.number, self.panel_number = -1, -1
        self.panel = self.right[:0]  # (rows, rank) of the left factor, times the scale

    def read(self, position: int, view: memoryview) -> None:
        """Fills `view` with the tensor's bytes from byte `position` on, both whole numbers'.

        Raises SlerpMergeError as the reader does.
        """
        out, first = numpy.frombuffer(view, self.dtype), position // self.dtype.itemsize
        if len(self.room) < len(out):
            self.room = numpy.empty(len(out), self.room.dtype)
        stored = self.room[: len(out)]
        self.reader.begin_stored(self.stored, first * stored.itemsize, self.source)(memoryview(stored.view("u1")))
        done = 0
        with numpy.errstate(all="ignore"):  # what is not finite is told apart where it matters
            while done < len(out):
                number, begin = divmod(first + done, len(self.product))
                if number != self.number:
                    self.multiply(number)
                count = min(ADDED_ELEMENTS, len(self.product) - begin, len(out) - done)
                part = out[done : done + count]
                widen(stored[done : done + count], part)
                numpy.add(part, self.product[begin : begin + count], out=part)
                done += count

    def multiply(self, number: int) -> None:
        """Puts the product of a tile's rows into `product`."""
        info, first = self.info, number * self.info.tile_rows
        rows = min(info.tile_rows, info.shape[0] - first)
        self.number = -1  # of no tile, until it is whole
        if first // self.panel_rows != self.panel_number:
            self.read_panel(first // self.panel_rows)
        begin = first - self.panel_number * self.panel_rows
        product = self.product[: rows * info.width].reshape(rows, info.width)
        numpy.matmul(self.panel[begin : begin + rows], self.right, out=product)
        self.number = number

    def read_panel(self, number: int) -> None:
        """Rows of the left factor for some tiles on end."""
        info, first = self.info, number * self.panel_rows
        rows = min(self.panel_rows, info.shape[0] - first)
        if info.is_transposed:
            columns = numpy.empty((info.rank, rows), self.dtype)
            for rank, column in enumerate(columns):
                self.read_numbers(info.left, rank * info.shape[0] + first, column)
            self.panel = numpy.ascontiguousarray(columns.T)
        else:
            self.panel = numpy.empty((rows, info.rank), self.dtype)
            self.read_numbers(info.left, first * info.rank, self.panel.reshape(-1))
        self.panel *= self.dtype.type(info.scale)
        self.panel_number = number

    def read_right(self) -> numpy.ndarray:
        """(rank, width), whole."""
        info = self.info
        if info.right is None:
            return numpy.ones((1, 1), self.dtype)
        shape = (info.width, info.rank) if info.is_transposed else (info.rank, info.width)
        right = numpy.empty(shape, self.dtype)
        self.read_numbers(info.right, 0, right.reshape(-1))
        return numpy.ascontiguousarray(right.T) if info.is_transposed else right

    def read_numbers(self, info: TensorInfo, first: int, out: numpy.ndarray) -> None:
        """Fills `out`, flat, with a stored tensor's numbers from the one of number `first` on."""
        stored = numpy.empty(len(out), stored_dtype(info.dtype))
        self.reader.begin_stored(info, first * stored.itemsize, self.source)(memoryview(stored.view("u1")))
        widen(stored, out)
