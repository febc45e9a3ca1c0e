"""One worker: measures, blends and recomputes stretches of tensors, one task after the other.

It is told what to do through a connection and answers through it; whether it is a process or a thread makes no
difference here (team.py starts them). A task carries all that it needs: a worker knows no plan and keeps nothing
between tasks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import os
import pickle
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import FileHandles
from slerpkit.lazy import numpy
from slerpkit.merge.arithmetic import (
    Arithmetic,
    DeviceArithmetic,
    Sums,
    could_be_equal,
    vector_weights,
)
from slerpkit.merge.blocks import BlockBuffer, BlockReader, rows_in
from slerpkit.merge.dtypes import convert, converted, count_non_finite, plain
from slerpkit.merge.recompute import recompute, working_dtype
from slerpkit.merge.tensor_plan import TensorInputs
from slerpkit.messages import SlerpMergeError, explain_os_error
from slerpkit.parents.tensors import DTYPE_BYTES, TensorReader

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from slerpkit.maths import TensorWeights
    from slerpkit.merge.arithmetic import Block
    from slerpkit.merge.tensor_plan import TensorPlan


@dataclass(frozen=True)
class MeasureTask:
    """First pass over a stretch: how two vectors lie to each other."""

    tensor: TensorInputs
    stretch: range  # of element numbers
    cast_dtype: str | None


@dataclass(frozen=True)
class BlendTask:
    """Second pass over a stretch: blended or copied, and written at its place."""

    tensor: TensorPlan
    stretch: range
    cast_dtype: str | None
    file: Path  # the child's
    weights: TensorWeights
    columns: numpy.ndarray | None  # Sums.columns of the whole tensor, where its columns are the vectors
    check_finite: bool


@dataclass(frozen=True)
class RecomputeTask:
    """After the merge: a stretch of the child held against its parents."""

    tensor: TensorPlan
    stretch: range
    cast_dtype: str | None
    file: Path
    weights: TensorWeights
    recipe: Any  # MergeRecipe where the weights are to be recomputed too, from all of the tensor; else None


@dataclass(frozen=True)
class ReleaseTask:
    """Between tasks: closes every file, so that those that are dropped take no more room."""


Task = MeasureTask | BlendTask | RecomputeTask | ReleaseTask


class Worker:
    """Means to carry out tasks: open files, and buffers for one block."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.handles = FileHandles()  # of the child's files
        self.reader = TensorReader()
        self.blocks = BlockReader(self.reader)
        self.out = BlockBuffer()
        self._arithmetic: dict[tuple[str, str | None], Arithmetic] = {}

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.handles.close()
        self.reader.close()

    def carry_out(self, task: Task) -> Any:
        """Sums of a MeasureTask; how many values of a BlendTask are not finite; whether a RecomputeTask is right."""
        if isinstance(task, ReleaseTask):
            self.handles.close()
            self.reader.close()
            return None
        if isinstance(task, MeasureTask):
            return self.measure(task)
        if isinstance(task, BlendTask):
            return self.blend(task)
        return recompute(self.blocks, task.tensor, task.stretch, task.cast_dtype, task.file, task.weights, task.recipe)

    def arithmetic_for(self, dtype: numpy.dtype, cast_dtype: str | None) -> Arithmetic:
        """The device's, or the processor's for what MPS does not know: float64."""
        device = "cpu" if self.device == "mps" and dtype == numpy.float64 else self.device
        if (device, cast_dtype) not in self._arithmetic:
            made = Arithmetic(cast_dtype) if device == "cpu" else DeviceArithmetic(device, cast_dtype)
            self._arithmetic[device, cast_dtype] = made
        return self._arithmetic[device, cast_dtype]

    def compute(self, task: Task, method: str, block: Block, *arguments: Any) -> Any:
        """What a method of Arithmetic makes of a block: on the device, until its memory is full; then on the
        processor, as all that follows.
        """
        dtype = working_dtype(task.tensor)
        arithmetic = self.arithmetic_for(dtype, task.cast_dtype)
        try:
            return getattr(arithmetic, method)(block, dtype, *arguments)
        except (RuntimeError, AssertionError) as error:
            if arithmetic.device == "cpu":
                raise
            if "out of memory" not in str(error).lower():
                cause = (str(error).splitlines() or ["no reason given"])[0]
                hint = "Run it again with --device cpu; it then starts anew."
                raise SlerpMergeError(f"The device {arithmetic.device} failed: {cause}.", hint) from error
        arithmetic.give_back()
        self.device = "cpu"
        return getattr(self.arithmetic_for(dtype, task.cast_dtype), method)(block, dtype, *arguments)

    def measure(self, task: MeasureTask) -> Sums:
        tensor, sums, columns, identical = task.tensor, [], None, True
        for _, block in self.blocks.read(tensor, task.stretch, blended=True):
            primary, secondary, *_ = block
            alike = primary.dtype == secondary.dtype
            if tensor.is_float:
                if tensor.vectors == "first_dim":
                    own = self.compute(task, "measure_vectors", block, tensor.vector_width, 0)
                    columns = own if columns is None else columns + own
                    sums.append(tuple(own.sum(axis=1).tolist()))
                else:
                    sums.append(self.compute(task, "measure", block))
                alike = alike and could_be_equal(sums[-1])
            identical = identical and alike and numpy.array_equal(primary.view("u1"), secondary.view("u1"))
        parts = [tuple(row[kind] for row in sums) for kind in range(3)]
        return Sums(*parts, identical, columns)

    def blend(self, task: BlendTask) -> int:
        tensor = task.tensor
        width = DTYPE_BYTES[tensor.dtype]
        write = begin_writing(self.handles, task.file, tensor.offset + task.stretch.start * width)
        non_finite = 0
        for part, block in self.blocks.read(tensor, task.stretch):
            out = self.out.typed(tensor.dtype)[: len(part)]
            if task.weights.operation == "copy":
                convert(self.round(task, block[0]), out)
            else:
                self.blend_block(task, block, out)
            if tensor.rows is not None:
                self.keep_rows(task, part, block, out)
            if task.check_finite:
                non_finite += count_non_finite(out)
            write(self.out.memory[: len(part) * width])
        return non_finite

    def blend_block(self, task: BlendTask, block: Block, out: numpy.ndarray) -> None:
        """out = w0 * v0 + w1 * v1, with the tensor's weights, or those of each of its vectors."""
        tensor = task.tensor
        if tensor.vectors == "tensor":
            weights = task.weights.primary_weight, task.weights.secondary_weight
            self.compute(task, "blend", block, weights, out)
            return
        if tensor.vectors == "first_dim":
            own = [part[None, :] for part in vector_weights(task.columns, tensor.t)]
        else:
            sums = self.compute(task, "measure_vectors", block, tensor.vector_width, 1)
            own = [part[:, None] for part in vector_weights(sums, tensor.t)]
        self.compute(task, "blend_vectors", block, own, tensor.vector_width, out)

    def round(self, task: Task, stored: numpy.ndarray) -> numpy.ndarray:
        """What is copied, rounded to the recipe's dtype where it has one and the values are real numbers."""
        is_float = task.tensor.is_float
        return self.arithmetic_for(numpy.dtype("f4"), task.cast_dtype).round(stored) if is_float else stored

    def keep_rows(self, task: BlendTask, part: range, block: Block, out: numpy.ndarray) -> None:
        """Puts the rows of tokens that a single parent has into `out` as they are."""
        tensor = task.tensor
        width = tensor.row_elements
        for source, stored in enumerate(block[:2]):
            rows = numpy.flatnonzero(tensor.rows.is_kept(source)[rows_in(tensor, part)])
            if len(rows):
                kept = converted(self.round(task, stored.reshape(-1, width)[rows]), out.dtype)
                plain(out).reshape(-1, width)[rows] = plain(kept)


def begin_writing(handles: FileHandles, file: Path, offset: int) -> Callable[[memoryview], None]:
    """A function that writes one buffer after another into a file of the child, from byte `offset` on.

    Both raise SlerpMergeError where the disk refuses, as a full one does.
    """
    try:
        handle = handles.at(file, "r+", offset)
    except OSError as error:
        raise explain_os_error(error, file, "write") from error
    return functools.partial(write_whole, handle, file)


def write_whole(handle: io.FileIO, file: Path, view: memoryview) -> None:
    """Writes a buffer, in as many calls as the system wants."""
    try:
        written = handle.write(view)
        while written < len(view):
            written += handle.write(view[written:])
    except OSError as error:
        raise explain_os_error(error, file, "write") from error


def serve(connection: Connection, device: str) -> None:
    """Carries out tasks until the other end of the connection is closed, or gone with its process.

    The first message, the number of its process, says that it is ready.
    A message is (task, number, rows): rows, a RowMap, comes with the first task that needs it and is None after that;
    number names it. The answer is (True, result) or (False, what was raised).
    """
    row_maps = {}
    # What is not finite is told apart where it matters, and counted where it is written.
    with numpy.errstate(all="ignore"), contextlib.suppress(OSError), Worker(device) as worker:
        connection.send(os.getpid())
        while True:
            try:
                task, row_number, rows = connection.recv()
                if rows is not None:
                    row_maps[row_number] = rows
                if row_number is not None:
                    task = dataclasses.replace(task, tensor=dataclasses.replace(task.tensor, rows=row_maps[row_number]))
                try:
                    answer = True, worker.carry_out(task)
                except BaseException as error:  # handed to the main thread, which raises it
                    answer = False, error
                try:
                    connection.send(answer)
                except (pickle.PicklingError, TypeError, AttributeError):
                    connection.send((False, RuntimeError(traceback.format_exc())))
            except (EOFError, OSError):  # nobody is there any more
                break
