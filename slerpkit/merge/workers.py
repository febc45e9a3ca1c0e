"""Threads that measure and blend spans of tensors.

Each tensor is cut into chunks (read, computed and written at once) and runs of chunks into spans (what
a worker takes at a time). Workers first measure every span of a tensor: three float32 sums of products
a chunk. The main thread adds them up exactly and in float64 finds the tensor's two weights. Workers
then blend every span and write it at its place. Chunks and the exact sum depend on the tensor alone,
so the child's bits do not depend on how many workers there are or who was first.

Both passes read. Keeping a tensor between them was measured slower: a second read of a file in the
page cache costs less than writing what was read to memory beyond the processor's cache.
"""

from __future__ import annotations

import functools
import heapq
import io
import math
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
    from slerpkit.merge.events import MergedTensor
    from slerpkit.merge.plan import ShardPlan, TensorPlan

MAX_PIECES = 16  # that a chunk is cut into for an accelerator short of memory; then the processor takes over
SPAN_CHUNKS = 4  # chunks that one worker takes at a time


class ShardWriter:
    """Writes stretches of tensors into the child's files, each at the place the plan gives it."""

    def __init__(self, folder: Path, shard: ShardPlan) -> None:
        self.path = folder / shard.file_name
        self.shard = shard
        self.unfinished = len(shard.jobs)

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

    job: TensorPlan
    number: int
    writer: ShardWriter | None  # None where the parents are only measured
    known: MergedTensor | None  # of a file that an earlier run finished
    spans: tuple[range, ...]  # of element numbers
    sums: list[Sums | None]
    unfinished: int = 0  # spans of the pass at hand
    blend: TensorWeights | None = None
    vector_weights: tuple[torch.Tensor, torch.Tensor] | None = None  # of columns, each blended on its own
    check_finite: bool = False  # whether blending could overflow the child's dtype
    non_finite: int = 0
    started: float = 0.0
    finished: float = 0.0


def chunk_elements(job: TensorPlan) -> int:
    """Elements per chunk: whole rows where a job takes rows or columns for vectors, or where rows follow tokens."""
    if job.granularity == "tensor" and job.rows is None:
        return CHUNK_ELEMENTS
    width = matrix_width(job)
    if width > CHUNK_ELEMENTS:
        raise SlerpMergeError(
            f"{job.name} is {width} elements wide, too wide to be blended {job.granularity} by {job.granularity}.",
            "Use the granularity tensor.",
        )
    return CHUNK_ELEMENTS // width * width


def matrix_width(job: TensorPlan) -> int:
    """Elements in a row, when a tensor is laid out so that its vectors are the rows, or are the columns; of a token.

    mergekit's nuslerp_row_wise takes vectors along dimension 0, which here are columns of a matrix of shape[0] rows;
    without it they run along the last dimension.
    """
    if job.granularity == "tensor":
        return job.row_elements
    return job.shape[-1] if job.granularity == "column" else math.prod(job.shape[1:])


def cut_spans(job: TensorPlan) -> tuple[range, ...]:
    """Stretches of elements, each a few whole chunks long but for the last."""
    step = SPAN_CHUNKS * chunk_elements(job)
    return tuple(range(start, min(start + step, job.element_count)) for start in range(0, job.element_count, step))


def rows_in(job: TensorPlan, part: range) -> slice:
    """The rows that a stretch of whole rows has, where rows follow tokens."""
    return slice(part.start // job.row_elements, part.stop // job.row_elements)


class MergeWorker:
    """One thread's means to measure and blend spans: open files, and buffers for one chunk."""

    def __init__(self, device: str, cast_dtype: str | None) -> None:
        self.handles = FileHandles()
        self.reader = TensorReader(self.handles)
        self.device = device
        self.cast_dtype = cast_dtype
        self.arithmetic = {device: ChunkArithmetic(device, cast_dtype)}
        self.sources = ChunkBuffer(), ChunkBuffer(), ChunkBuffer()
        self.out = ChunkBuffer()

    def arithmetic_for(self, dtype: torch.dtype) -> ChunkArithmetic:
        """MPS has no float64; what needs it is done on the processor."""
        return self.arithmetic_on("cpu" if self.device == "mps" and dtype == torch.float64 else self.device)

    def arithmetic_on(self, device: str) -> ChunkArithmetic:
        if device not in self.arithmetic:
            self.arithmetic[device] = ChunkArithmetic(device, self.cast_dtype)
        return self.arithmetic[device]

    @staticmethod
    def working_dtype(job: TensorPlan) -> torch.dtype:
        return torch.float64 if any(info.dtype == "F64" for info in job.sources) else torch.float32

    def compute(
        self, dtype: torch.dtype, count: int, run: Callable[[ChunkArithmetic, slice], Any], whole: bool = False
    ) -> list[Any]:
        """Results of `run` over the `count` elements of a chunk: on the device, where it has the memory at once.

        Else in ever smaller pieces, and at last on the processor, as all that follows. A chunk that must stay whole
        goes there at once.
        """
        while True:
            arithmetic = self.arithmetic_for(dtype)
            if whole and count > arithmetic.elements:
                arithmetic = self.arithmetic_on("cpu")
            step = count if whole else min(count, arithmetic.elements)
            try:
                return [run(arithmetic, slice(start, start + step)) for start in range(0, count, step)]
            except (RuntimeError, AssertionError) as error:
                if arithmetic.device == "cpu":
                    raise
                if "out of memory" not in str(error).lower():
                    cause = (str(error).splitlines() or ["no reason given"])[0]
                    hint = "Run it again with --device cpu; it then starts anew."
                    raise SlerpMergeError(f"The device {arithmetic.device} failed: {cause}.", hint) from error
                arithmetic.shrink()
                if arithmetic.elements < CHUNK_ELEMENTS / MAX_PIECES:
                    self.device = "cpu"

    def read_chunks(self, job: TensorPlan, span: range, blended: bool) -> Iterator[tuple[range, list[torch.Tensor]]]:
        """(elements, chunk of each source) over a span; flat, in their stored dtypes, valid until the next.

        blended: zeros stand for rows that will be kept, which then add nothing to a sum.
        """
        step = chunk_elements(job)
        fill = self.fill_rows if job.rows else self.fill_on
        fills = [fill(job, span, side, blended) for side in range(len(job.sources))]
        for start in range(span.start, span.stop, step):
            part = range(start, min(start + step, span.stop))
            chunk = []
            for fill, info, buffer in zip(fills, job.sources, self.sources):
                fill(buffer.memory[: len(part) * DTYPE_BYTES[info.dtype]])
                chunk.append(buffer.typed(info.dtype)[: len(part)])
            yield part, chunk

    def fill_on(self, job: TensorPlan, span: range, side: int, blended: bool) -> Callable[[memoryview], None]:
        """A function that fills one buffer after another with a span of a source."""
        info = job.sources[side]
        return self.reader.begin(info, span.start * DTYPE_BYTES[info.dtype], side)

    def fill_rows(self, job: TensorPlan, span: range, side: int, blended: bool) -> Callable[[memoryview], None]:
        """The same, with the rows that stand for the child's tokens."""
        info, maps = job.sources[side], job.rows.blended if blended else job.rows.sources
        rows = maps[side][rows_in(job, span)]
        done = 0

        def fill(view: memoryview) -> None:
            nonlocal done
            count = len(view) // (job.row_elements * DTYPE_BYTES[info.dtype])
            self.reader.read_rows(info, rows[done : done + count], view, side)
            done += count

        return fill

    def measure(self, progress: TensorProgress, number: int) -> Sums:
        """First pass over a span of a pair."""
        job = progress.job
        dtype = self.working_dtype(job)
        sums, identical = [], True
        columns = None
        for _, chunk in self.read_chunks(job, progress.spans[number], blended=True):
            left, right, *_ = chunk
            alike = left.dtype == right.dtype
            if job.sources[0].is_float:
                found = self.measure_chunk(job, chunk, dtype)
                if job.granularity == "row":
                    columns = found[0] if columns is None else columns + found[0]
                    found = [tuple(found[0].sum(dim=1).tolist())]
                sums += found
                alike = alike and all(map(could_be_equal, found))
            identical = identical and alike and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
        return Sums(*(tuple(row[place] for row in sums) for place in range(3)), identical, columns)

    def measure_chunk(self, job: TensorPlan, chunk: Sequence[torch.Tensor], dtype: torch.dtype) -> list[Any]:
        """Three sums of products of each piece of a chunk, or of each of its columns where these are the vectors."""
        if job.granularity == "row":
            width = matrix_width(job)
            return self.compute(dtype, len(chunk[0]), lambda on, _: on.measure_vectors(chunk, dtype, width, 0), True)
        return self.compute(dtype, len(chunk[0]), lambda on, piece: on.measure([raw[piece] for raw in chunk], dtype))

    def blend(self, progress: TensorProgress, number: int) -> int:
        """Second pass over a span: blends or copies it, writes it. Returns its non-finite values, where asked."""
        job, blend, span = progress.job, progress.blend, progress.spans[number]
        width = DTYPE_BYTES[job.dtype]
        write = progress.writer.begin(self.handles, job.offset + span.start * width)
        non_finite = 0
        for part, chunk in self.read_chunks(job, span, blended=False):
            out = self.out.typed(job.dtype)[: len(part)]
            if blend.rule == "copy":
                out.copy_(
                    self.arithmetic_for(torch.float32).round(chunk[0]) if chunk[0].is_floating_point() else chunk[0]
                )
            else:
                self.blend_chunk(progress, chunk, out)
            if job.rows is not None:
                self.keep_rows(job, part, chunk, out)
            if progress.check_finite:
                non_finite += count_non_finite(out)
            write(self.out.memory[: len(part) * width])
        return non_finite

    def blend_chunk(self, progress: TensorProgress, chunk: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """out = w0 * v0 + w1 * v1, with the tensor's weights, or those of each of its vectors."""
        job, dtype = progress.job, self.working_dtype(progress.job)
        weights = progress.blend.primary_weight, progress.blend.secondary_weight
        if progress.vector_weights is None and job.granularity != "column":
            self.compute(
                dtype, len(out), lambda on, piece: on.blend([raw[piece] for raw in chunk], dtype, weights, out[piece])
            )
            return

        def by_vectors(on: ChunkArithmetic, _: slice) -> None:
            own = progress.vector_weights
            if own is None:
                sums = on.measure_vectors(chunk, dtype, matrix_width(job), axis=1)
                own = [part.unsqueeze(1) for part in vector_weights(sums, job.t)]
            on.blend_vectors(chunk, dtype, own, matrix_width(job), out)

        self.compute(dtype, len(out), by_vectors, whole=True)

    def keep_rows(self, job: TensorPlan, part: range, chunk: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Puts the rows of tokens that a single parent has into `out` as they are."""
        width = job.row_elements
        for side, raw in enumerate(chunk[:2]):
            places = torch.from_numpy(numpy.flatnonzero(job.rows.is_kept(side)[rows_in(job, part)]))
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
        with torch.inference_mode():
            while task := self._take():
                method, progress, number = task
                try:
                    answer = getattr(worker, method)(progress, number)
                except BaseException as error:  # handed to the main thread, which raises it
                    answer = error
                self._finish(task, answer)
        worker.handles.close()
