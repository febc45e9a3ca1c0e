"""Leads every tensor through the workers: a merge's two passes, an inspection's one.

Knows in which order things happen, and decides a tensor's weights once it is measured; how a stretch is read and
computed is the workers' business. Everything here runs on the main thread.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from slerpkit import devices
from slerpkit.lazy import torch
from slerpkit.maths import TensorWeights, cosine_between, degrees_of, slerp_coefficients, vector_weights
from slerpkit.merge.arithmetic import torch_dtype, total_sums
from slerpkit.merge.difference_map import build_map, difference_of
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.plan import choose_threads, inputs_of
from slerpkit.merge.tensor_plan import MergedTensor, MergeResult, TensorPlan
from slerpkit.merge.workers import ShardWriter, TensorProgress, WorkerTeam, cut_spans
from slerpkit.parents.tensors import DTYPE_BYTES, natural_order

if TYPE_CHECKING:
    from slerpkit.merge.difference_map import DifferenceMap
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.parity.report import TensorSources
    from slerpkit.recipe import MergeRecipe, RunOptions


class TensorStream:
    """Leads tensors through their passes, a few at a time, and yields each that is done, in their order.

    A tensor is measured; then it is done, unless `decide` says that it is blended too.
    """

    def __init__(self, team: WorkerTeam, threads: int, observe: Observer) -> None:
        self.team = team
        self.observe = observe
        self.spans_ahead = 4 * threads  # enough that no worker waits, few enough to stay flat
        self.spans_under_way = 0
        self.in_order: deque[TensorProgress] = deque()

    def run(self, tensors: Iterable[TensorProgress]) -> Iterator[TensorProgress]:
        waiting = iter(tensors)
        exhausted = False
        while True:
            while not exhausted and (self.spans_under_way < self.spans_ahead or len(self.in_order) < 2):
                progress = next(waiting, None)
                if progress is None:
                    exhausted = True
                else:
                    self.admit(progress)
            while self.in_order and self.in_order[0].finished:
                yield self.in_order.popleft()
            if self.in_order:
                self.receive(*self.team.next_answer())
            elif exhausted:
                return

    def admit(self, progress: TensorProgress) -> None:
        """Begins with a tensor."""
        progress.started = time.perf_counter()
        self.in_order.append(progress)
        self.spans_under_way += len(progress.spans)
        self.begin_pass(progress, "measure")

    def begin_pass(self, progress: TensorProgress, method: str) -> None:
        progress.unfinished = len(progress.spans)
        for number in range(len(progress.spans)):
            self.team.submit(method, progress, number)
        if not progress.spans:  # a tensor of no elements, or one that is known already
            self.finish(progress)

    def receive(self, progress: TensorProgress, number: int, method: str, answer: Any) -> None:
        """Takes what a worker found, or wrote, of a span."""
        progress.unfinished -= 1
        self.observe(WorkAdvanced(self.advance(progress, number, method)))
        if method == "measure":
            progress.sums[number] = answer
        else:
            progress.non_finite += answer
        if not progress.unfinished:
            if method == "measure" and self.decide(progress):
                self.begin_pass(progress, "blend")
            else:
                self.finish(progress)

    def finish(self, progress: TensorProgress) -> None:
        progress.finished = time.perf_counter()
        self.spans_under_way -= len(progress.spans)

    def advance(self, progress: TensorProgress, number: int, method: str) -> int:
        """What a finished span adds to the progress that is told: of a measured one the bytes that were read."""
        return progress.tensor.source_bytes * len(progress.spans[number]) // progress.tensor.element_count

    def decide(self, progress: TensorProgress) -> bool:
        """Whether a tensor that is measured is blended too."""
        return False


class MergeStream(TensorStream):
    """Leads the tensors of a plan through measuring and blending, into the child's files."""

    def __init__(self, plan: MergePlan, child: StagedChild, team: WorkerTeam, observe: Observer) -> None:
        super().__init__(team, plan.threads, observe)
        self.recipe = plan.recipe
        self.child = child

    def merge(self, plan: MergePlan) -> Iterator[MergedTensor]:
        """Every tensor of the child, once it is whole; its file goes to the disk as soon as the last one is."""
        of_file: list[MergedTensor] = []
        for progress in self.run(self.all_progress(plan)):
            seconds = progress.finished - progress.started
            merged = progress.known or MergedTensor(progress.tensor, progress.weights, seconds, progress.non_finite)
            self.observe(merged)
            yield merged
            of_file.append(merged)
            shard = progress.writer.shard
            if len(of_file) == len(shard.tensors):
                if progress.known is None:
                    self.child.finish_file(shard.file_name, of_file)
                of_file = []

    def all_progress(self, plan: MergePlan) -> Iterator[TensorProgress]:
        """Every tensor in the child's order; a file is created when its first tensor's turn comes."""
        numbers = iter(range(sum(1 for _ in plan.tensors)))
        for shard in plan.shards:
            writer = ShardWriter(self.child.folder, shard)
            known = {merged.tensor.name: merged for merged in self.child.journal.finished.get(shard.file_name, ())}
            if not known:
                writer.create()
            for tensor in shard.tensors:
                spans = () if known else cut_spans(tensor)
                yield TensorProgress(tensor, next(numbers), spans, writer, known.get(tensor.name))

    def admit(self, progress: TensorProgress) -> None:
        if progress.known is not None:
            self.observe(WorkAdvanced(progress.tensor.byte_count))
        if progress.tensor.is_measured:
            super().admit(progress)
            return
        progress.weights = TensorWeights(1.0, 0.0, "copy", f"t = {progress.tensor.t:g}", None)
        progress.check_finite = progress.tensor.is_float
        progress.started = time.perf_counter()
        self.in_order.append(progress)
        self.spans_under_way += len(progress.spans)
        self.begin_pass(progress, "blend")

    def advance(self, progress: TensorProgress, number: int, method: str) -> int:
        """The child's bytes that were written."""
        return 0 if method == "measure" else len(progress.spans[number]) * DTYPE_BYTES[progress.tensor.dtype]

    def decide(self, progress: TensorProgress) -> bool:
        """The weights of a tensor from the sums over all its spans."""
        tensor, sums = progress.tensor, progress.sums
        identical = all(part.identical for part in sums)
        if not tensor.is_float:
            reason = "not a real number" if identical else "differs; the primary's is kept"
            progress.weights = TensorWeights(1.0, 0.0, "copy", reason, None)
            return True
        dot, *norms = total_sums(sums)
        if identical and tensor.weights is None:
            angle = 0.0 if 0 < norms[0] < math.inf else None
            progress.weights = TensorWeights(1.0, 0.0, "copy", "identical", angle, (norms[0], norms[1]))
        else:
            progress.weights = weights_of(tensor, self.recipe, dot, norms[0], norms[1])
            if tensor.vectors == "first_dim":
                # In the order of the spans, so that the sum's bits do not depend on who was first.
                columns = functools.reduce(torch.add, (part.columns for part in sums))
                progress.vector_weights = vector_weights(columns, tensor.t)
        simple = len(tensor.sources) == 2 and tensor.vectors == "tensor" and tensor.rows is None
        progress.check_finite = not simple or could_overflow(tensor, progress.weights, norms[0], norms[1])
        progress.sums = []
        return True


def weights_of(
    tensor: TensorPlan, recipe: MergeRecipe, dot: float, primary_norm: float, secondary_norm: float
) -> TensorWeights:
    """The two weights of a measured tensor: those that the recipe states, or SLERP's."""
    method = "lerp" if tensor.operation == "lerp" else recipe.method
    found = slerp_coefficients(
        dot, primary_norm, secondary_norm, tensor.t, method, recipe.dot_threshold, recipe.epsilon
    )
    if tensor.weights is None:
        return found
    return dataclasses.replace(found, primary_weight=tensor.weights[0], secondary_weight=tensor.weights[1])


def could_overflow(tensor: TensorPlan, weights: TensorWeights, primary_norm: float, secondary_norm: float) -> bool:
    """No value exceeds its tensor's norm, so small norms rule out an overflow without a look at any value."""
    largest = abs(weights.primary_weight) * primary_norm + abs(weights.secondary_weight) * secondary_norm
    return not largest < torch.finfo(torch_dtype(tensor.dtype)).max


def stream_merge(plan: MergePlan, child: StagedChild, observe: Observer) -> MergeResult:
    """Writes the child's weights into the staging folder, every tensor measured and blended in bounded memory.

    Raises SlerpMergeError where a parent cannot be read or the child cannot be written.
    """
    kept = len(child.journal.finished)
    device, reason = choose_device(plan.options.device)
    if kept and plan.options.device == "auto":
        device, reason = child.journal.device, "where the finished files were made"
    child.journal.device = device
    observe(Noted(f"Merging on {device}: {reason}."))
    observe(WorkBegan("", plan.child_bytes, in_bytes=True, tensors=tuple(tensor.name for tensor in plan.tensors)))
    with devices.torch_threads_kept():
        started = time.perf_counter()
        with WorkerTeam(device, plan.threads, plan.recipe.cast_dtype) as team:
            tensors = tuple(MergeStream(plan, child, team, observe).merge(plan))
        seconds = time.perf_counter() - started
    observe(WorkEnded())
    return MergeResult(tensors, seconds, device, kept)


def choose_device(asked: str) -> tuple[str, str]:
    """(device, reason). Raises SlerpMergeError where a device is asked for that is not there."""
    if asked == "auto":
        return "cpu", "reading and writing bound a merge, not arithmetic"
    devices.check_device(asked)
    return asked, "as asked"


def measure_differences(
    pairs: Iterable[TensorSources], recipe: MergeRecipe, options: RunOptions, observe: Observer
) -> DifferenceMap:
    """Angle and norms of every pair of tensors of real numbers, by the workers that a merge measures with.

    Of recipe and options it follows the device, the threads, and the dtype that the parents are rounded to. Reads each
    parent once. Raises SlerpMergeError where a parent cannot be read.
    """
    tensors = [inputs_of(pair) for pair in pairs if pair.secondary and pair.primary.is_float]
    tensors = sorted((t for t in tensors if t.element_count), key=lambda t: natural_order(t.name))
    threads = choose_threads(options.threads)
    device, _ = choose_device(options.device)
    observe(WorkBegan("Measuring how the parents differ", sum(t.source_bytes for t in tensors)))
    with devices.torch_threads_kept(), WorkerTeam(device, threads, recipe.cast_dtype) as team:
        waiting = (TensorProgress(tensor, number, cut_spans(tensor)) for number, tensor in enumerate(tensors))
        done = TensorStream(team, threads, observe).run(waiting)
        differences = tuple(difference_of(progress.tensor, *angle_and_norms(progress)) for progress in done)
    observe(WorkEnded())
    return build_map(differences, recipe.compared_vectors)


def angle_and_norms(progress: TensorProgress) -> tuple[float | None, tuple[float, float]]:
    """(degrees between the parents or None, their norms) of a tensor that is measured."""
    dot, *norms = total_sums(progress.sums)
    angle = degrees_of(cosine_between(dot, *norms))
    if angle is not None and all(part.identical for part in progress.sums):
        angle = 0.0
    return angle, (norms[0], norms[1])
