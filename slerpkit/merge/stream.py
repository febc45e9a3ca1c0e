"""Leads every tensor through the workers: a merge's two passes, an inspection's one."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import write_json
from slerpkit.lazy import torch
from slerpkit.maths import TensorWeights, cosine_between, degrees_of, slerp_coefficients, vector_weights
from slerpkit.merge.arithmetic import choose_device, torch_dtype, torch_threads_kept, total_sums
from slerpkit.merge.difference_map import build_map, difference_of
from slerpkit.merge.events import (
    BytesMerged,
    DeviceChosen,
    MergedTensor,
    MergeResult,
    ShardWritten,
    WorkAdvanced,
    WorkBegan,
    WorkEnded,
)
from slerpkit.merge.plan import TensorPlan, choose_threads
from slerpkit.merge.workers import ShardWriter, TensorProgress, WorkerTeam, cut_spans
from slerpkit.parents.checkpoint import WEIGHTS_INDEX
from slerpkit.parents.tensors import DTYPE_BYTES, natural_order
from slerpkit.recipe import vectors_of

if TYPE_CHECKING:
    from slerpkit.merge.difference_map import DifferenceMap, TensorDifference
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.parity.report import TensorSources
    from slerpkit.recipe import MergeRecipe


class MergeStream:
    """Leads every tensor through its two passes, a few at a time, and tells what happens in the child's order."""

    def __init__(self, plan: MergePlan, child: StagedChild, team: WorkerTeam, observe: Observer) -> None:
        self.recipe = plan.recipe
        self.child = child
        self.team = team
        self.observe = observe
        self.spans_ahead = 4 * plan.threads  # enough that no worker waits, few enough to stay flat
        self.spans_under_way = 0
        self.waiting = self._all_progress(plan)
        self.in_order: deque[TensorProgress] = deque()
        self.done: list[MergedTensor] = []

    def _all_progress(self, plan: MergePlan) -> Iterator[TensorProgress]:
        number = 0
        for shard in plan.shards:
            writer = ShardWriter(self.child.folder, shard)
            known = {merged.job.name: merged for merged in self.child.journal.finished.get(shard.file_name, ())}
            if not known:
                writer.create()
            for job in shard.jobs:
                spans = () if known else cut_spans(job)
                yield TensorProgress(job, number, writer, known.get(job.name), spans, [None] * len(spans))
                number += 1

    def run(self) -> tuple[MergedTensor, ...]:
        exhausted = False
        while True:
            while not exhausted and (self.spans_under_way < self.spans_ahead or len(self.in_order) < 2):
                progress = next(self.waiting, None)
                if progress is None:
                    exhausted = True
                else:
                    self.admit(progress)
            if not self.in_order:
                return tuple(self.done)
            self.receive(*self.team.next_answer())

    def admit(self, progress: TensorProgress) -> None:
        progress.started = time.perf_counter()
        self.in_order.append(progress)
        self.spans_under_way += len(progress.spans)
        if progress.known is not None:
            self.observe(BytesMerged(progress.job.byte_count))
            self.finish(progress)
        elif progress.job.is_measured:
            self.begin_pass(progress, "measure")
        else:
            progress.blend = TensorWeights(1.0, 0.0, "copy", f"t = {progress.job.t:g}", None)
            progress.check_finite = progress.job.sources[0].is_float
            self.begin_pass(progress, "blend")

    def begin_pass(self, progress: TensorProgress, method: str) -> None:
        progress.unfinished = len(progress.spans)
        for number in range(len(progress.spans)):
            self.team.submit(method, progress, number)
        if not progress.spans:
            self.finish(progress)  # a tensor of no elements

    def receive(self, progress: TensorProgress, number: int, method: str, answer: Any) -> None:
        progress.unfinished -= 1
        if method == "measure":
            progress.sums[number] = answer
            if not progress.unfinished:
                self.decide(progress)
                self.begin_pass(progress, "blend")
            return
        progress.non_finite += answer
        self.spans_under_way -= 1
        self.observe(BytesMerged(len(progress.spans[number]) * DTYPE_BYTES[progress.job.dtype]))
        if not progress.unfinished:
            self.finish(progress)

    def decide(self, progress: TensorProgress) -> None:
        """The blend of a tensor from the sums over all its spans."""
        job = progress.job
        sums, progress.sums = progress.sums, []
        if not job.sources[0].is_float:
            reason = "not a real number" if all(part.identical for part in sums) else "differs; the primary's is kept"
            progress.blend = TensorWeights(1.0, 0.0, "copy", reason, None)
            return
        dot, *norms = total_sums(sums)
        if all(part.identical for part in sums) and job.weights is None:
            angle = 0.0 if 0 < norms[0] < math.inf else None
            progress.blend = TensorWeights(1.0, 0.0, "copy", "identical", angle, (norms[0], norms[1]))
        else:
            method = "lerp" if job.rule == "lerp" else self.recipe.method
            progress.blend = slerp_coefficients(
                dot, *norms, job.t, method, self.recipe.dot_threshold, self.recipe.epsilon
            )
            if job.weights is not None:
                first, second = job.weights
                progress.blend = dataclasses.replace(progress.blend, primary_weight=first, secondary_weight=second)
            if job.granularity == "row":
                # In the order of the spans, so that the sum's bits do not depend on who was first.
                columns = functools.reduce(torch.add, (part.columns for part in sums))
                progress.vector_weights = vector_weights(columns, job.t)
        simple = len(job.sources) == 2 and job.granularity == "tensor" and job.rows is None
        progress.check_finite = not simple or self.could_overflow(job, progress.blend, norms)

    @staticmethod
    def could_overflow(job: TensorPlan, blend: TensorWeights, norms: tuple[float, float]) -> bool:
        """No value exceeds its tensor's norm, so small norms rule out an overflow without a look at any value."""
        largest = abs(blend.primary_weight) * norms[0] + abs(blend.secondary_weight) * norms[1]
        return not largest < torch.finfo(torch_dtype(job.dtype)).max

    def finish(self, progress: TensorProgress) -> None:
        progress.finished = time.perf_counter()
        while self.in_order and self.in_order[0].finished:
            first = self.in_order.popleft()
            seconds = first.finished - first.started
            merged = first.known or MergedTensor(first.job, first.blend, seconds, first.non_finite)
            self.done.append(merged)
            self.observe(merged)
            first.writer.unfinished -= 1
            if not first.writer.unfinished:
                shard = first.writer.shard
                if first.known is None:
                    self.child.finish_file(shard.file_name, self.done[-len(shard.jobs) :])
                self.observe(ShardWritten(shard.file_name, shard.byte_count))


def stream_merge(plan: MergePlan, child: StagedChild, observe: Observer) -> MergeResult:
    """Writes the child's weights into the staging folder, every tensor measured and blended in bounded memory.

    Raises SlerpMergeError where a parent cannot be read or the child cannot be written.
    """
    kept = len(child.journal.finished)
    if kept and plan.recipe.device == "auto":
        device, reason = child.journal.device, "where the finished files were made"
    else:
        device, reason = choose_device(plan.recipe.device, plan.threads)
    child.journal.device = device
    observe(DeviceChosen(device, reason))
    with torch_threads_kept():
        started = time.perf_counter()
        with WorkerTeam(device, plan.threads, plan.recipe.cast_dtype) as team:
            tensors = MergeStream(plan, child, team, observe).run()
        seconds = time.perf_counter() - started
    write_index(plan, child.folder)
    return MergeResult(tensors, seconds, device, kept)


def write_index(plan: MergePlan, folder: Path) -> None:
    """model.safetensors.index.json, where the child has more than one file."""
    if len(plan.shards) == 1:
        return
    index = {
        "metadata": {
            "total_parameters": sum(job.element_count for job in plan.jobs),
            "total_size": plan.child_bytes,
        },
        "weight_map": {job.name: shard.file_name for shard in plan.shards for job in shard.jobs},
    }
    write_json(folder / WEIGHTS_INDEX, index)


def inspected_job(pair: TensorSources) -> TensorPlan:
    """A pair as the workers measure it. The child's part of a job is not used."""
    sources = tuple(info for info in (pair.primary, pair.secondary, pair.base) if info is not None)
    return TensorPlan(pair.name, pair.primary.dtype, pair.shape, "slerp", 0.5, sources, rows=pair.rows)


def measure_differences(pairs: Iterable[TensorSources], recipe: MergeRecipe, observe: Observer) -> DifferenceMap:
    """Angle and norms of every pair of tensors of real numbers, by the workers that a merge measures with.

    Of the recipe it follows the device, the threads, and dtype as the parents are rounded to. Reads each parent once.
    Raises SlerpMergeError where a parent cannot be read.
    """
    jobs = [inspected_job(pair) for pair in pairs if pair.secondary and pair.primary.is_float]
    jobs = sorted((job for job in jobs if job.element_count), key=lambda job: natural_order(job.name))
    threads = choose_threads(recipe.threads)
    device = "cpu" if recipe.device == "auto" else choose_device(recipe.device, threads)[0]
    observe(WorkBegan("Measuring how the parents differ", sum(map(read_bytes_of, jobs))))
    with torch_threads_kept(), WorkerTeam(device, threads, recipe.cast_dtype) as team:
        found = tuple(measured_in_order(jobs, team, 4 * threads, observe))
    observe(WorkEnded())
    return build_map(found, vectors_of(recipe))


def read_bytes_of(job: TensorPlan) -> int:
    """Bytes of all the sources of a tensor."""
    return sum(info.byte_count for info in job.sources)


def measured_in_order(
    jobs: Sequence[TensorPlan], team: WorkerTeam, spans_ahead: int, observe: Observer
) -> Iterator[TensorDifference]:
    """What differs in each tensor, one by one, while the team measures those behind it."""
    waiting = deque(
        TensorProgress(job, number, None, None, spans := cut_spans(job), [None] * len(spans), len(spans))
        for number, job in enumerate(jobs)
    )
    in_order: deque[TensorProgress] = deque()
    under_way = 0
    while waiting or in_order:
        while waiting and under_way < spans_ahead:
            in_order.append(progress := waiting.popleft())
            under_way += len(progress.spans)
            for number in range(len(progress.spans)):
                team.submit("measure", progress, number)
        progress, number, _, answer = team.next_answer()
        progress.sums[number] = answer
        progress.unfinished -= 1
        under_way -= 1
        observe(WorkAdvanced(read_bytes_of(progress.job) * len(progress.spans[number]) // progress.job.element_count))
        while in_order and not in_order[0].unfinished:
            done = in_order.popleft()
            dot, *norms = total_sums(done.sums)
            angle = degrees_of(cosine_between(dot, *norms))
            if angle is not None and all(part.identical for part in done.sums):
                angle = 0.0
            yield difference_of(done.job, angle, (norms[0], norms[1]))
