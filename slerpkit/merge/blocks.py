"""One way to cut and to read tensors, for merging, inspecting and verifying.

Two sizes of one thing. A task is a stretch of a tensor that a worker takes at a time: long enough that handing it over
costs nothing, short enough that a large tensor is spread over all workers. A block is read, computed and written at
once: large enough that calls cost little, small enough to stay in a processor's caches. Both depend on the tensor
alone, so that the child's bits depend on nothing else.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from slerpkit.lazy import numpy
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.dtypes import stored_dtype
from slerpkit.parents.tensors import DTYPE_BYTES, TensorReader

if TYPE_CHECKING:
    from slerpkit.merge.tensor_plan import TensorInputs

BLOCK_ELEMENTS = 1 << 18
TASK_BLOCKS = 32


def block_elements(tensor: TensorInputs) -> int:
    """Elements of a block: whole rows where rows or columns are taken for vectors, or where rows follow tokens.

    Raises SlerpMergeError where a single row is larger than a block.
    """
    if tensor.vectors == "tensor" and tensor.rows is None:
        return BLOCK_ELEMENTS
    width = tensor.vector_width
    if width > BLOCK_ELEMENTS:
        raise SlerpMergeError(
            f"{tensor.name} is {width} elements wide, too wide to be blended vector by vector.",
            "Use the granularity tensor.",
        )
    return BLOCK_ELEMENTS // width * width


def cut_tasks(tensor: TensorInputs) -> tuple[range, ...]:
    """Stretches of element numbers, each a few whole blocks long but for the last."""
    step, count = TASK_BLOCKS * block_elements(tensor), tensor.element_count
    return tuple(range(start, min(start + step, count)) for start in range(0, count, step))


def rows_in(tensor: TensorInputs, stretch: range) -> slice:
    """The rows that a stretch of whole rows has, where rows follow tokens."""
    return slice(stretch.start // tensor.row_elements, stretch.stop // tensor.row_elements)


class BlockBuffer:
    """Room for one block of any dtype, as bytes for files and as flat arrays of numbers."""

    def __init__(self) -> None:
        # Mapped memory is aligned as vector units like it, and takes no room until it is used.
        self.memory = memoryview(mmap.mmap(-1, BLOCK_ELEMENTS * max(DTYPE_BYTES.values())))
        self._typed: dict[str, numpy.ndarray] = {}

    def typed(self, dtype: str) -> numpy.ndarray:
        """All of this memory as a flat array; dtype is safetensors' name."""
        if dtype not in self._typed:
            self._typed[dtype] = numpy.frombuffer(self.memory, stored_dtype(dtype))
        return self._typed[dtype]


class BlockReader:
    """Reads the sources of a tensor block by block, into buffers that are used again and again."""

    def __init__(self, reader: TensorReader) -> None:
        self.reader = reader
        self.buffers = BlockBuffer(), BlockBuffer(), BlockBuffer()

    def read(
        self, tensor: TensorInputs, stretch: range, blended: bool = False
    ) -> Iterator[tuple[range, list[numpy.ndarray]]]:
        """(element numbers, each source) of the blocks of a stretch; flat, in their read_dtype, valid until the next.

        blended: zeros stand for rows that will be kept, which then add nothing to a sum.
        Raises SlerpMergeError where a file cannot be read.
        """
        step = block_elements(tensor)
        fill = self._fill_rows if tensor.rows else self._fill_on
        fills = [fill(tensor, stretch, source, blended) for source in range(len(tensor.sources))]
        for start in range(stretch.start, stretch.stop, step):
            part = range(start, min(start + step, stretch.stop))
            block = []
            for fill, info, buffer in zip(fills, tensor.sources, self.buffers):
                fill(buffer.memory[: len(part) * DTYPE_BYTES[info.read_dtype]])
                block.append(buffer.typed(info.read_dtype)[: len(part)])
            yield part, block

    def _fill_on(
        self, tensor: TensorInputs, stretch: range, source: int, blended: bool
    ) -> Callable[[memoryview], None]:
        """A function that fills one buffer after another with a stretch of a source."""
        info = tensor.sources[source]
        return self.reader.begin(info, stretch.start * DTYPE_BYTES[info.read_dtype], source)

    def _fill_rows(
        self, tensor: TensorInputs, stretch: range, source: int, blended: bool
    ) -> Callable[[memoryview], None]:
        """The same, with the rows that stand for the child's tokens."""
        info = tensor.sources[source]
        rows: Sequence[int] = (tensor.rows.blended if blended else tensor.rows.sources)[source][
            rows_in(tensor, stretch)
        ]
        row_bytes = tensor.row_elements * DTYPE_BYTES[info.read_dtype]
        done = 0

        def fill(view: memoryview) -> None:
            nonlocal done
            count = len(view) // row_bytes
            self.reader.read_rows(info, rows[done : done + count], view, source)
            done += count

        return fill
