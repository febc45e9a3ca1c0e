"""Leads every tensor through the workers: a merge's two passes, an inspection's one.

Knows in which order things happen, and decides a tensor's weights once it is measured; how a stretch is read and
computed is the workers' business. Everything here runs on the main thread and needs no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import numpy
from slerpkit.maths import TensorWeights, cosine_between, degrees_of, slerp_coefficients
from slerpkit.merge.arithmetic import total_sums
from slerpkit.merge.blocks import cut_tasks
from slerpkit.merge.difference_map import build_map, difference_of
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.plan import inputs_of
from slerpkit.merge.tensor_plan import MergedTensor, MergeResult, TensorInputs, TensorPlan
from slerpkit.merge.worker import BlendTask, MeasureTask, TaskBatch
from slerpkit.messages import explain_os_error
from slerpkit.parents.tensors import DTYPE_BYTES, MAX_FINITE, natural_order

if TYPE_CHECKING:
    from slerpkit.merge.arithmetic import Sums
    from slerpkit.merge.difference_map import DifferenceMap
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.merge.supply import StreamedSupply
    from slerpkit.merge.team import WorkerTeam
    from slerpkit.merge.tensor_plan import ShardPlan
    from slerpkit.parity.report import TensorSources
    from slerpkit.recipe import MergeRecipe


@dataclass
class TensorProgress:
    """One tensor on its way through the workers."""

    tensor: TensorInputs  # a TensorPlan where it is blended
    number: int
    stretches: tuple[range, ...]  # of element numbers, a task each
    shard: ShardPlan | None = None  # None where the parents are only measured
    known: MergedTensor | None = None  # of a file that an earlier run finished
    sums: list[Sums | None] = dataclasses.field(default_factory=list)
    unfinished: int = 0  # stretches of the pass at hand
    weights: TensorWeights | None = None
    columns: Any = None  # sums over all of the tensor for each column, where these are the vectors
    check_finite: bool = False  # whether blending could overflow the child's dtype
    non_finite: int = 0
    started: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.sums = [None] * len(self.stretches)


# Small tasks are handed over together, since models have tens of thousands of small tensors.
SMALL_ELEMENTS = 1 << 14  # of a stretch that waits for others
BATCH_TASKS = 64


def is_small(stretch: range) -> bool:
    """Whether handing a stretch over could cost more than carrying it out."""
    return len(stretch) <= SMALL_ELEMENTS


def load_of(progress: TensorProgress) -> int:
    """How much of the workers' time a tensor takes, in small tasks."""
    return sum(1 if is_small(stretch) else BATCH_TASKS for stretch in progress.stretches)


class TensorStream:
    """Leads tensors through their passes, a few at a time, and yields each that is done, in their order.

    A tensor is measured; then it is done, unless `decide` says that it is blended too.
    """

    def __init__(self, team: WorkerTeam, cast_dtype: str | None, observe: Observer) -> None:
        self.team = team
        self.cast_dtype = cast_dtype
        self.observe = observe
        self.most_under_way = 4 * team.count * BATCH_TASKS  # enough that no worker waits, few enough to stay flat
        self.under_way = 0  # as load_of
        self.in_order: deque[TensorProgress] = deque()
        # Small tasks to be handed over together, with their keys: those that measure, those that blend.
        self.batches: tuple[list[Any], list[Any]] = ([], [])

    def run(self, tensors: Iterable[TensorProgress]) -> Iterator[TensorProgress]:
        waiting = iter(tensors)
        upcoming = next(waiting, None)
        while True:
            while upcoming is not None and (self.under_way < self.most_under_way or len(self.in_order) < 2):
                if not self.is_ready(upcoming):
                    break
                self.admit(upcoming)
                upcoming = next(waiting, None)
            while self.in_order and self.in_order[0].finished:
                yield self.in_order.popleft()
            if self.in_order:
                for batch in self.batches:
                    self.hand_over(batch)
                keys, answer = self.team.next_answer()
                for key, part in zip(keys, answer if len(keys) > 1 else [answer]):
                    self.receive(*key, part)
            elif upcoming is None:
                return

    def admit(self, progress: TensorProgress) -> None:
        """Begins with a tensor."""
        progress.started = time.perf_counter()
        self.in_order.append(progress)
        self.under_way += load_of(progress)
        if self.is_measured(progress):
            self.begin_measuring(progress)
        else:
            self.begin_blending(progress)

    def is_ready(self, progress: TensorProgress) -> bool:
        """Whether a tensor can begin now; where not, it is asked again once others are done."""
        return True

    def begin_measuring(self, progress: TensorProgress) -> None:
        progress.unfinished = len(progress.stretches)
        for number, stretch in enumerate(progress.stretches):
            self.submit((progress, number, False), MeasureTask(progress.tensor, stretch, self.cast_dtype))

    def submit(self, key: tuple[TensorProgress, int, bool], task: MeasureTask | BlendTask) -> None:
        """Has a task carried out: with others, where it is small.

        key: the tensor, the number of its stretch, and whether that is blended, not measured.
        """
        waits = is_small(task.stretch) and task.tensor.rows is None
        batch = self.batches[key[2]] if waits else []
        batch.append((key, task))
        if not waits or len(batch) == BATCH_TASKS:
            self.hand_over(batch)

    def hand_over(self, batch: list[Any]) -> None:
        """Gives the tasks of a batch to the workers; the batch is then empty."""
        if batch:
            keys, tasks = zip(*batch)
            batch.clear()
            progress, number, is_blended = keys[0]
            task = TaskBatch(tasks) if len(tasks) > 1 else tasks[0]
            self.team.submit(keys, task, (progress.number, number) if is_blended else None)

    def receive(self, progress: TensorProgress, number: int, is_blended: bool, answer: Any) -> None:
        """Takes what a worker found, or wrote, of a stretch."""
        progress.unfinished -= 1
        self.observe(WorkAdvanced(self.advance(progress, number, is_blended)))
        if is_blended:
            progress.non_finite += answer
            self.child.flush(progress.shard.file_name, self.advance(progress, number, is_blended))
        else:
            progress.sums[number] = answer
        if not progress.unfinished:
            if is_blended or not self.decide(progress):
                self.finish(progress)
            else:
                self.begin_blending(progress)

    def finish(self, progress: TensorProgress) -> None:
        progress.finished = time.perf_counter()
        self.under_way -= load_of(progress)

    def is_measured(self, progress: TensorProgress) -> bool:
        return True

    def begin_blending(self, progress: TensorProgress) -> None:
        raise NotImplementedError("what is only measured is never blended")

    def advance(self, progress: TensorProgress, number: int, is_blended: bool) -> int:
        """What a finished stretch adds to the progress that is told: of a measured one the bytes that were read."""
        return progress.tensor.source_bytes * len(progress.stretches[number]) // progress.tensor.element_count

    def decide(self, progress: TensorProgress) -> bool:
        """Whether a tensor that is measured is blended too."""
        return False


class MergeStream(TensorStream):
    """Leads the tensors of a plan through measuring and blending, into the child's files."""

    def __init__(
        self, plan: MergePlan, child: StagedChild, team: WorkerTeam, observe: Observer, supply: StreamedSupply | None
    ) -> None:
        super().__init__(team, plan.recipe.cast_dtype, observe)
        self.recipe = plan.recipe
        self.child = child
        self.supply = supply

    def merge(self, plan: MergePlan) -> Iterator[MergedTensor]:
        """Every tensor of the child, once it is whole; its file goes to the disk as soon as the last one is."""
        of_file: list[MergedTensor] = []
        for progress in self.run(self.all_progress(plan)):
            seconds = progress.finished - progress.started
            merged = progress.known or MergedTensor(progress.tensor, progress.weights, seconds, progress.non_finite)
            self.observe(merged)
            yield merged
            of_file.append(merged)
            if self.supply is not None and progress.known is None:
                self.supply.unchecked.append(merged)
            if len(of_file) == len(progress.shard.tensors):
                if self.supply is not None:
                    self.supply.check_done()
                if progress.known is None:
                    self.child.finish_file(progress.shard.file_name, of_file)
                of_file = []

    def all_progress(self, plan: MergePlan) -> Iterator[TensorProgress]:
        """Every tensor in the child's order; a file is created when its first tensor's turn comes."""
        number = 0
        for shard in plan.shards:
            known = {merged.tensor.name: merged for merged in self.child.journal.finished.get(shard.file_name, ())}
            if not known:
                create_file(self.child.folder / shard.file_name, shard)
            for tensor in shard.tensors:
                stretches = () if known else cut_tasks(tensor)
                yield TensorProgress(tensor, number, stretches, shard, known.get(tensor.name))
                number += 1

    def is_ready(self, progress: TensorProgress) -> bool:
        if self.supply is None or progress.known is not None:
            return True
        return self.supply.is_ready(
            progress.tensor, progress.number, progress.shard.file_name, is_idle=not self.in_order
        )

    def is_measured(self, progress: TensorProgress) -> bool:
        return progress.tensor.is_measured and bool(progress.stretches)

    def begin_blending(self, progress: TensorProgress) -> None:
        """Hands out the second pass; there is none over what has no elements, or is known from an earlier run."""
        tensor = progress.tensor
        if progress.weights is None:
            progress.weights = TensorWeights(1.0, 0.0, "copy", f"t = {tensor.t:g}", None)
            progress.check_finite = tensor.is_float
        progress.unfinished = len(progress.stretches)
        for number, stretch in enumerate(progress.stretches):
            task = BlendTask(
                tensor,
                stretch,
                self.cast_dtype,
                self.child.folder / progress.shard.file_name,
                progress.weights,
                progress.columns,
                progress.check_finite,
            )
            self.submit((progress, number, True), task)
        if not progress.stretches:
            self.observe(WorkAdvanced(tensor.byte_count))
            self.finish(progress)

    def advance(self, progress: TensorProgress, number: int, is_blended: bool) -> int:
        """The child's bytes that were written."""
        return len(progress.stretches[number]) * DTYPE_BYTES[progress.tensor.dtype] if is_blended else 0

    def decide(self, progress: TensorProgress) -> bool:
        """The weights of a tensor from the sums over all of it."""
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
                # In the order of the stretches, so that the sum's bits do not depend on who was first.
                with numpy.errstate(all="ignore"):  # what is not finite gets LERP's weights
                    progress.columns = functools.reduce(numpy.add, (part.columns for part in sums))
        simple = len(tensor.sources) == 2 and tensor.vectors == "tensor" and tensor.rows is None
        progress.check_finite = not simple or could_overflow(tensor, progress.weights, norms[0], norms[1])
        progress.sums = []
        return True


def create_file(path: Path, shard: ShardPlan) -> None:
    """A file of the child with its header, and room for all that follows. Raises SlerpMergeError where it cannot be."""
    try:
        path.parent.mkdir(exist_ok=True, parents=True)
        with open(path, "xb") as stream:
            stream.write(shard.header)
            stream.truncate(shard.byte_count)
    except OSError as error:
        raise explain_os_error(error, path, "create") from error


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
    return not largest < MAX_FINITE[tensor.dtype]


def await_workers(team: WorkerTeam, observe: Observer) -> None:
    """Waits until the workers are ready, and tells where they are fewer than there should be."""
    team.wait()
    if team.size < team.count:
        observe(Noted(f"The system lets only {team.size} of {team.count} workers be started."))


def stream_merge(
    plan: MergePlan, child: StagedChild, team: WorkerTeam, observe: Observer, supply: StreamedSupply | None = None
) -> MergeResult:
    """Writes the child's weights into the staging folder, every tensor measured and blended in bounded memory.

    supply: brings the parents' files where they are not here.
    Raises SlerpMergeError where a parent cannot be read, the child cannot be written, or a worker died. Nobody writes
    into the child any more by then.
    """
    kept = len(child.journal.finished)
    child.journal.device = team.device
    if team.device != "cpu":  # which goes without saying
        observe(Noted(f"Merging on {team.device}."))
    names = tuple(tensor.name for tensor in plan.tensors)
    unfinished = (shard for shard in plan.shards if shard.file_name not in child.journal.finished)
    fetched = supply.bytes_to_fetch(tensor for shard in unfinished for tensor in shard.tensors) if supply else 0
    what = "Fetching and merging" if fetched else "Merging"
    observe(WorkBegan(what, plan.child_bytes + fetched, unit="bytes", tensors=names))
    await_workers(team, observe)
    started = time.perf_counter()
    try:
        tensors = tuple(MergeStream(plan, child, team, observe, supply).merge(plan))
    except BaseException:
        team.settle()
        raise
    seconds = time.perf_counter() - started
    observe(WorkEnded())
    return MergeResult(tensors, seconds, team.device, kept)


def measure_differences(
    pairs: Iterable[TensorSources], recipe: MergeRecipe, team: WorkerTeam, observe: Observer
) -> DifferenceMap:
    """Angle and norms of every pair of tensors of real numbers, by the workers that a merge measures with.

    Of the recipe it follows the dtype that the parents are rounded to. Reads each parent once. Raises SlerpMergeError
    where a parent cannot be read.
    """
    tensors = [inputs_of(pair) for pair in pairs if pair.secondary and pair.primary.is_float]
    tensors = sorted((t for t in tensors if t.element_count), key=lambda t: natural_order(t.name))
    observe(WorkBegan("Measuring how the parents differ", sum(t.source_bytes for t in tensors)))
    await_workers(team, observe)
    waiting = (TensorProgress(tensor, number, cut_tasks(tensor)) for number, tensor in enumerate(tensors))
    try:
        done = TensorStream(team, recipe.cast_dtype, observe).run(waiting)
        differences = tuple(difference_of(progress.tensor, *angle_and_norms(progress)) for progress in done)
    except BaseException:
        team.settle()
        raise
    observe(WorkEnded())
    return build_map(differences, recipe.compared_vectors)


def angle_and_norms(progress: TensorProgress) -> tuple[float | None, tuple[float, float]]:
    """(degrees between the parents or None, their norms) of a tensor that is measured."""
    dot, *norms = total_sums(progress.sums)
    angle = degrees_of(cosine_between(dot, *norms))
    if angle is not None and all(part.identical for part in progress.sums):
        angle = 0.0
    return angle, (norms[0], norms[1])
