"""Threads that measure and blend spans of tensors.

Knows how a stretch is read, computed and written; in which order, and with which weights, is stream.py's business.

Each tensor is cut into chunks (read, computed and written at once) and runs of chunks into spans (what
a worker takes at a time). Workers first measure every span of a tensor: three float32 sums of products
a chunk. The main thread adds them up exactly and in float64 finds the tensor's two weights. Workers
then blend every span and write it at its place. Chunks and the exact sum depend on the tensor alone,
so the child's bits do not depend on how many workers there are or who was first.

Both passes read. Keeping a tensor between them was measured slower: a second read of a file in the
page cache costs less than writing what was read to memory beyond the processor's cache.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import io
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import FileHandles
from slerpkit.lazy import numpy, torch
from slerpkit.maths import vector_weights
from slerpkit.merge.arithmetic import ChunkArithmetic, ChunkBuffer, Sums, could_be_equal, count_non_finite
from slerpkit.messages import SlerpMergeError, explain_os_error
from slerpkit.parents.tensors import CHUNK_ELEMENTS, DTYPE_BYTES, TensorReader

if TYPE_CHECKING:
    from slerpkit.maths import TensorWeights
    from slerpkit.merge.tensor_plan import MergedTensor, ShardPlan, TensorInputs

SPAN_CHUNKS = 4  # chunks that one worker takes at a time


class ShardWriter:
    """Writes stretches of tensors into the child's files, each at the place the plan gives it."""

    def __init__(self, folder: Path, shard: ShardPlan) -> None:
        self.path = folder / shard.file_name
        self.shard = shard

    def create(self) -> None:
        """The file with its header, and room for all that follows."""
        try:
            with open(self.path, "xb") as stream:
                stream.write(self.shard.header)
                stream.truncate(self.shard.byte_count)
        except OSError as error:
            raise explain_os_error(error, self.path, "create") from error

    def begin(self, handles: FileHandles, offset: int) -> Callable[[memoryview], None]:
        """A function that writes one buffer after another, from byte `offset` of the file on.

        Both raise SlerpMergeError where the disk refuses, as a full one does.
        """
        try:
            handle = handles.at(self.path, "r+", offset)
        except OSError as error:
            raise explain_os_error(error, self.path, "write") from error
        return functools.partial(self._write, handle)

    def _write(self, handle: io.FileIO, view: memoryview) -> None:
        try:
            written = handle.write(view)
            while written < len(view):
                written += handle.write(view[written:])
        except OSError as error:
            raise explain_os_error(error, self.path, "write") from error


@dataclass
class TensorProgress:
    """One tensor on its way through the workers. The main thread alone changes it."""

    tensor: TensorInputs  # a TensorInputs where it is blended
    number: int
    spans: tuple[range, ...]  # of element numbers
    writer: ShardWriter | None = None  # None where the parents are only measured
    known: MergedTensor | None = None  # of a file that an earlier run finished
    sums: list[Sums | None] = dataclasses.field(default_factory=list)
    unfinished: int = 0  # spans of the pass at hand
    weights: TensorWeights | None = None
    vector_weights: tuple[torch.Tensor, torch.Tensor] | None = None  # of columns, each blended on its own
    check_finite: bool = False  # whether blending could overflow the child's dtype
    non_finite: int = 0
    started: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.sums = [None] * len(self.spans)


def chunk_elements(tensor: TensorInputs) -> int:
    """Elements per chunk: whole rows where rows or columns are taken for vectors, or where rows follow tokens."""
    if tensor.vectors == "tensor" and tensor.rows is None:
        return CHUNK_ELEMENTS
    width = tensor.vector_width
    if width > CHUNK_ELEMENTS:
        raise SlerpMergeError(
            f"{tensor.name} is {width} elements wide, too wide to be blended vector by vector.",
            "Use the granularity tensor.",
        )
    return CHUNK_ELEMENTS // width * width


def cut_spans(tensor: TensorInputs) -> tuple[range, ...]:
    """Stretches of elements, each a few whole chunks long but for the last."""
    step = SPAN_CHUNKS * chunk_elements(tensor)
    return tuple(
        range(start, min(start + step, tensor.element_count)) for start in range(0, tensor.element_count, step)
    )


def rows_in(tensor: TensorInputs, part: range) -> slice:
    """The rows that a stretch of whole rows has, where rows follow tokens."""
    return slice(part.start // tensor.row_elements, part.stop // tensor.row_elements)


def working_dtype(tensor: TensorInputs) -> torch.dtype:
    """The precision that a tensor is computed in: float32, or float64 where a source has it."""
    return torch.float64 if any(info.dtype == "F64" for info in tensor.sources) else torch.float32


class MergeWorker:
    """One thread's means to measure and blend spans: open files, and buffers for one chunk."""

    def __init__(self, device: str, cast_dtype: str | None) -> None:
        self.handles = FileHandles()  # of the child's files
        self.reader = TensorReader()
        self.device = device
        self.cast_dtype = cast_dtype
        self.arithmetic = {device: ChunkArithmetic(device, cast_dtype)}
        self.sources = ChunkBuffer(), ChunkBuffer(), ChunkBuffer()
        self.out = ChunkBuffer()

    def __enter__(self) -> MergeWorker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.handles.close()
        self.reader.__exit__(*exception)

    def arithmetic_for(self, dtype: torch.dtype) -> ChunkArithmetic:
        """MPS has no float64; what needs it is done on the processor."""
        return self.arithmetic_on("cpu" if self.device == "mps" and dtype == torch.float64 else self.device)

    def arithmetic_on(self, device: str) -> ChunkArithmetic:
        if device not in self.arithmetic:
            self.arithmetic[device] = ChunkArithmetic(device, self.cast_dtype)
        return self.arithmetic[device]

    def compute(self, dtype: torch.dtype, method: Callable[..., Any], *arguments: Any) -> Any:
        """What a method of ChunkArithmetic makes of a chunk: on the device, until its memory is full; then on the
        processor, as all that follows.
        """
        arithmetic = self.arithmetic_for(dtype)
        try:
            return method(arithmetic, *arguments)
        except (RuntimeError, AssertionError) as error:
            if arithmetic.device == "cpu":
                raise
            if "out of memory" not in str(error).lower():
                cause = (str(error).splitlines() or ["no reason given"])[0]
                hint = "Run it again with --device cpu; it then starts anew."
                raise SlerpMergeError(f"The device {arithmetic.device} failed: {cause}.", hint) from error
        arithmetic.give_back()
        self.device = "cpu"
        return method(self.arithmetic_for(dtype), *arguments)

    def read_chunks(
        self, tensor: TensorInputs, span: range, blended: bool
    ) -> Iterator[tuple[range, list[torch.Tensor]]]:
        """(elements, chunk of each source) over a span; flat, in their stored dtypes, valid until the next.

        blended: zeros stand for rows that will be kept, which then add nothing to a sum.
        """
        step = chunk_elements(tensor)
        fill = self.fill_rows if tensor.rows else self.fill_on
        fills = [fill(tensor, span, side, blended) for side in range(len(tensor.sources))]
        for start in range(span.start, span.stop, step):
            part = range(start, min(start + step, span.stop))
            chunk = []
            for fill, info, buffer in zip(fills, tensor.sources, self.sources):
                fill(buffer.memory[: len(part) * DTYPE_BYTES[info.dtype]])
                chunk.append(buffer.typed(info.dtype)[: len(part)])
            yield part, chunk

    def fill_on(self, tensor: TensorInputs, span: range, side: int, blended: bool) -> Callable[[memoryview], None]:
        """A function that fills one buffer after another with a span of a source."""
        info = tensor.sources[side]
        return self.reader.begin(info, span.start * DTYPE_BYTES[info.dtype], side)

    def fill_rows(self, tensor: TensorInputs, span: range, side: int, blended: bool) -> Callable[[memoryview], None]:
        """The same, with the rows that stand for the child's tokens."""
        info, maps = tensor.sources[side], tensor.rows.blended if blended else tensor.rows.sources
        rows = maps[side][rows_in(tensor, span)]
        done = 0

        def fill(view: memoryview) -> None:
            nonlocal done
            count = len(view) // (tensor.row_elements * DTYPE_BYTES[info.dtype])
            self.reader.read_rows(info, rows[done : done + count], view, side)
            done += count

        return fill

    def measure(self, progress: TensorProgress, number: int) -> Sums:
        """First pass over a span of a pair."""
        tensor = progress.tensor
        dtype = working_dtype(tensor)
        sums, identical = [], True
        columns = None
        for _, chunk in self.read_chunks(tensor, progress.spans[number], blended=True):
            primary, secondary, *_ = chunk
            alike = primary.dtype == secondary.dtype
            if tensor.is_float:
                if tensor.vectors == "first_dim":
                    own = self.compute(dtype, ChunkArithmetic.measure_vectors, chunk, dtype, tensor.vector_width, 0)
                    columns = own if columns is None else columns + own
                    sums.append(tuple(own.sum(dim=1).tolist()))
                else:
                    sums.append(self.compute(dtype, ChunkArithmetic.measure, chunk, dtype))
                alike = alike and could_be_equal(sums[-1])
            identical = identical and alike and torch.equal(primary.view(torch.uint8), secondary.view(torch.uint8))
        return Sums(*(tuple(row[column] for row in sums) for column in range(3)), identical, columns)

    def blend(self, progress: TensorProgress, number: int) -> int:
        """Second pass over a span: blends or copies it, writes it. Returns its non-finite values, where asked."""
        tensor, span = progress.tensor, progress.spans[number]
        width = DTYPE_BYTES[tensor.dtype]
        write = progress.writer.begin(self.handles, tensor.offset + span.start * width)
        non_finite = 0
        for part, chunk in self.read_chunks(tensor, span, blended=False):
            out = self.out.typed(tensor.dtype)[: len(part)]
            if progress.weights.operation == "copy":
                out.copy_(
                    self.arithmetic_for(torch.float32).round(chunk[0]) if chunk[0].is_floating_point() else chunk[0]
                )
            else:
                self.blend_chunk(progress, chunk, out)
            if tensor.rows is not None:
                self.keep_rows(tensor, part, chunk, out)
            if progress.check_finite:
                non_finite += count_non_finite(out)
            write(self.out.memory[: len(part) * width])
        return non_finite

    def blend_chunk(self, progress: TensorProgress, chunk: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """out = w0 * v0 + w1 * v1, with the tensor's weights, or those of each of its vectors."""
        tensor, dtype = progress.tensor, working_dtype(progress.tensor)
        own = progress.vector_weights
        if tensor.vectors == "last_dim":
            sums = self.compute(dtype, ChunkArithmetic.measure_vectors, chunk, dtype, tensor.vector_width, 1)
            own = [part.unsqueeze(1) for part in vector_weights(sums, tensor.t)]
        if own is None:
            weights = progress.weights.primary_weight, progress.weights.secondary_weight
            self.compute(dtype, ChunkArithmetic.blend, chunk, dtype, weights, out)
        else:
            self.compute(dtype, ChunkArithmetic.blend_vectors, chunk, dtype, own, tensor.vector_width, out)

    def keep_rows(self, tensor: TensorInputs, part: range, chunk: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Puts the rows of tokens that a single parent has into `out` as they are."""
        width = tensor.row_elements
        for side, raw in enumerate(chunk[:2]):
            places = torch.from_numpy(numpy.flatnonzero(tensor.rows.is_kept(side)[rows_in(tensor, part)]))
            if len(places):
                kept = self.arithmetic_for(torch.float32).round(raw.view(-1, width)[places])
                out.view(-1, width)[places] = kept.to(out.dtype)


class WorkerTeam:
    """Threads that take tasks from two queues, measuring and blending, and answer into a third.

    At most half of them blend while there is something to measure. A system lets one thread at a time
    write to a file, and others that want to only wait; reading and arithmetic fill that time (measured: a sixth).
    """

    def __init__(self, device: str, threads: int, cast_dtype: str | None) -> None:
        self._ready = threading.Condition()  # guards the four below
        self._to_measure: deque[Any] = deque()
        self._to_blend: list[tuple[int, int, Any]] = []  # a heap: the first tensor's first span goes first
        self._blending = 0
        self._stopping = False
        self._most_blending = max(1, threads // 2)
        self._answers: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        workers = [MergeWorker(device, cast_dtype) for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._work, args=(worker,), name=f"merge-{number}", daemon=True)
            for number, worker in enumerate(workers)
        ]

    def __enter__(self) -> WorkerTeam:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._ready:
            self._stopping = True
            self._ready.notify_all()
        for thread in self._threads:
            thread.join()

    def submit(self, method: str, progress: TensorProgress, number: int) -> None:
        """Asks for a pass, "measure" or "blend", over one span of a tensor."""
        task = method, progress, number
        with self._ready:
            if method == "blend":
                heapq.heappush(self._to_blend, (progress.number, number, task))
            else:
                self._to_measure.append(task)
            self._ready.notify()

    def _take(self) -> tuple[str, TensorProgress, int] | None:
        """The next task for a free thread; None when it shall go home."""
        with self._ready:
            self._ready.wait_for(lambda: self._stopping or self._to_measure or self._to_blend)
            if self._stopping:
                return None
            if self._to_blend and (self._blending < self._most_blending or not self._to_measure):
                self._blending += 1
                return heapq.heappop(self._to_blend)[-1]
            return self._to_measure.popleft()

    def _finish(self, task: tuple[str, TensorProgress, int], answer: Any) -> None:
        if task[0] == "blend":
            with self._ready:
                self._blending -= 1
        self._answers.put((task, answer))

    def next_answer(self) -> tuple[TensorProgress, int, str, Any]:
        """(progress, span number, method, result) of the next finished task; raises what the task raised."""
        while True:
            try:
                task, answer = self._answers.get(timeout=0.2)  # a wait without end would be deaf to Ctrl-C on Windows
                break
            except queue.Empty:
                continue
        if isinstance(answer, BaseException):
            raise answer
        method, progress, number = task
        return progress, number, method, answer

    def _work(self, worker: MergeWorker) -> None:
        torch.set_num_threads(1)  # the workers are the parallelism; torch's own would fight them
        with worker, torch.inference_mode():
            while task := self._take():
                method, progress, number = task
                try:
                    answer = getattr(worker, method)(progress, number)
                except BaseException as error:  # handed to the main thread, which raises it
                    answer = error
                self._finish(task, answer)
