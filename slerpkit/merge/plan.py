"""plan_merge: how each tensor of the child is made, where it goes, and what it will cost.

All is decided here, before a byte is written, and nothing is changed afterwards. What the parents are and how they
differ is known already (parity/). Read tensor_plan.py before this.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slerpkit import devices
from slerpkit.files import existing_folder, file_size
from slerpkit.lazy import load_modules
from slerpkit.merge.blocks import BLOCK_ELEMENTS
from slerpkit.merge.journal import Journal, Leftover, merge_fingerprint
from slerpkit.merge.save_directory import check_save_directory, free_bytes, staged_bytes, staging_area
from slerpkit.merge.supply import check_download_space, download_bytes, peak_parent_bytes, streamed_sizes
from slerpkit.merge.tensor_plan import TensorInputs, TensorPlan, plan_shards
from slerpkit.messages import SlerpMergeError, format_bytes
from slerpkit.parents.adapted_tensor import AdaptedTensor
from slerpkit.parents.checkpoint import companion_bytes
from slerpkit.parents.tensors import (
    DTYPE_BYTES,
    MAX_KEPT,
    SAFETENSORS_NAMES,
    TORCH_NAMES,
    TensorReader,
    natural_order,
    stands_before_layers,
)
from slerpkit.parity.copied_files import check_links, copied_files
from slerpkit.parity.kinship import Kinship, have_same_bytes_in_the_middle, measure_kinship
from slerpkit.parity.modules import modules_source
from slerpkit.recipe import MAX_THREADS, PARENTS, check_t
from slerpkit.recipe_identity import recorded_differences
from slerpkit.schedule import Schedule

if TYPE_CHECKING:
    from slerpkit.merge.tensor_plan import ShardPlan
    from slerpkit.parents.checkpoint import Checkpoint, Parents
    from slerpkit.parity.copied_files import CopiedFiles
    from slerpkit.parity.report import ParityReport, TensorSources
    from slerpkit.recipe import MergeRecipe, RunOptions


@dataclass(frozen=True)
class MergePlan:
    """All that will be done, decided before a byte is written."""

    recipe: MergeRecipe
    options: RunOptions
    parents: Parents
    parity: ParityReport
    shards: tuple[ShardPlan, ...]
    threads: int
    peak_memory_bytes: int
    download_bytes: int  # of parents' weights that are still on the Hub
    streamed_disk_bytes: int  # of these, on the disk at once where they are streamed
    disk_needed_bytes: int  # beside the finished files of an earlier run
    disk_free_bytes: int | None  # None where the disk does not tell
    kinship: Kinship
    leftover: Leftover | None  # of an earlier run that ended early
    remarks: tuple[str, ...]  # what the person may want to know before it starts
    read_bytes_per_second: float  # of a short probe of the parents' files
    expected_seconds: float

    @property
    def tensors(self) -> Iterator[TensorPlan]:
        for shard in self.shards:
            yield from shard.tensors

    @functools.cached_property
    def child_bytes(self) -> int:
        return sum(tensor.byte_count for tensor in self.tensors)

    @property
    def kept_bytes(self) -> int:
        """The child's bytes that stand already, in the finished files of an earlier run."""
        return self.child_bytes - sum(tensor.byte_count for tensor in unfinished_tensors(self.shards, self.leftover))

    @functools.cached_property
    def source_bytes(self) -> int:
        """What is read of the parents, in each of the two passes."""
        return sum(tensor.source_bytes for tensor in self.tensors)

    @property
    def dtypes(self) -> set[str]:
        """torch's names of all that numbers are read in, rounded to, or written in."""
        return dtypes_of(self.tensors, self.recipe)

    @property
    def device(self) -> str:
        """Where the arithmetic runs: the processor, unless another device is asked for, or made the finished files."""
        if self.options.device != "auto":
            return self.options.device
        return self.leftover.device if self.leftover is not None and self.leftover.kept else "cpu"

    @property
    def tokenizer_role(self) -> str | None:
        return self.parity.vocabulary.tokenizer_source

    @property
    def modules_role(self) -> str | None:
        """The parent whose modules of sentence-transformers the child has, blended where they have weights."""
        return modules_source(self.parents.primary, self.parents.secondary)

    @functools.cached_property
    def copied_files(self) -> list[CopiedFiles]:
        """What the child takes over of its parents as it is, beside their weights."""
        parity = self.parity
        return copied_files(self.parents.primary, self.parents.secondary, parity.vocabulary, parity.template)

    @property
    def settled_recipe(self) -> MergeRecipe:
        """The recipe with whose tokenizer it is, for whoever follows it again."""
        is_settled = self.recipe.tokenizer != "auto" or self.tokenizer_role is None
        return self.recipe if is_settled else dataclasses.replace(self.recipe, tokenizer=self.tokenizer_role)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """All that the bits of the child's files depend on."""
        return merge_fingerprint(self.recipe, self.options, self.parents, self.shards)

    def count(self, operation: str) -> int:
        return sum(tensor.operation == operation for tensor in self.tensors)

    def as_dict(self) -> dict[str, Any]:
        """What `--dry-run --json` prints beside what parity found."""
        return {
            "child": str(self.options.save_directory),
            "tensors": sum(1 for _ in self.tensors),
            **{f"to_{operation}": self.count(operation) for operation in ("slerp", "lerp", "copy")},
            "files": [shard.file_name for shard in self.shards],
            "bytes": self.child_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "disk_needed_bytes": self.disk_needed_bytes,
            "disk_free_bytes": self.disk_free_bytes,
            "download_bytes": self.download_bytes,
            "expected_seconds": self.expected_seconds,
            "t": {tensor.name: tensor.t for tensor in self.tensors},
            "kinship": self.kinship.as_dict(),
            "remarks": [*self.remarks, *([] if self.leftover is None else [self.leftover.describe()])],
            "tokenizer_from": self.tokenizer_role,
            "chat_template_from": self.parity.template.source,
            **self.parity.as_dict(),
        }


# Measured on Linux, as proportional set sizes.
PROCESS_BYTES = 75_000_000  # the main process, and what the workers share
TORCH_BYTES = 200_000_000  # shared too, where it is loaded
WORKER_BYTES = 16_000_000  # of a worker's own, beside its buffers: most of it while the child is checked
TENSOR_BYTES = 4_000  # of the main process, for each tensor: its entries in headers, plan, report and journal
SMALL_MERGE_BYTES = 200_000_000  # of what is read once; below this threads are as fast
PROBE_BYTES = 1 << 20  # per sample of the read probe
PROBE_SAMPLES = 8
# Of a tensor in the report, the map, the index and the journal, which stands twice for a moment: numbers and words, and
# how often its name stands there, for which the headers' bytes serve.
BYTES_PER_TENSOR = 1_500
NAMES_PER_TENSOR = 4
SPELT_OUT = 4  # times what it was may tokenizer.json take that is written again, a line for each of its numbers
# Rough costs behind the expected time, measured on one core of a 2023 server.
ARITHMETIC_SECONDS_PER_ELEMENT = 1.9e-9
WRITE_BYTES_PER_SECOND = 1.5e9
NOT_HERE = Kinship(None, (), unknown_because="the weights are still on the Hub")
USUAL_READ_BYTES_PER_SECOND = 1.5e9  # where nothing is here that could be read


def choose_threads(asked: int) -> int:
    """Worker threads: as asked, else the usable cores up to MAX_THREADS."""
    return asked or min(MAX_THREADS, devices.usable_cores())


def parameters_for(
    pair: TensorSources, recipe: MergeRecipe
) -> tuple[Schedule, tuple[Schedule, Schedule] | None, float]:
    """(t's schedule, the weights' schedules, position) of one tensor.

    In a recipe of slices a layer follows its own; what stands before the layers follows the first slice, what
    stands behind them the last, both at position 0, as mergekit has it.
    """
    position = pair.layer.position
    if not recipe.slices:
        return recipe.schedule, recipe.weights, position
    number = pair.layer.slice_number
    if number is None:
        number = 0 if stands_before_layers(pair.name) else len(recipe.slices) - 1
    part = recipe.slices[number]
    if part.alone is not None:
        return Schedule.constant(float(PARENTS.index(part.alone))), None, position
    return part.schedule, part.weights, position


def blend_parameter(pair: TensorSources, recipe: MergeRecipe) -> tuple[float, tuple[float, float] | None]:
    """(t, weights of a LERP that is not (1 - t, t)) of one tensor."""
    schedule, weights, position = parameters_for(pair, recipe)
    if weights is None:
        return schedule.t_for(pair.name, position), None
    # A weight is a model's own, so its filters speak of that model's names, where t's speak of the child's.
    first, second = (part.t_for(name, position) for part, name in zip(weights, pair.source_names))
    total = first + second
    if recipe.method == "nuslerp":
        t = second / total if abs(total) >= 1e-6 else 0.5
    elif not recipe.normalize:
        return second, (first, second)
    elif total == 0:
        raise SlerpMergeError(f"The weights for {pair.name} add up to 0.", "Give weights whose sum is not 0.")
    else:
        t = second / total
    check_t(t, recipe, pair.name)
    return t, None


def inputs_of(pair: TensorSources) -> TensorInputs:
    """What is read of a tensor's sources to measure how they differ."""
    sources = tuple(info for info in (pair.primary, pair.secondary, pair.base) if info is not None)
    return TensorInputs(pair.name, pair.shape, sources, rows=pair.rows)


def plan_tensor(pair: TensorSources, recipe: MergeRecipe) -> TensorPlan:
    """How one tensor is made, as far as headers tell."""
    info, rows = pair.primary, pair.rows
    dtype = info.dtype
    if info.is_float and recipe.dtype != "auto":
        dtype = SAFETENSORS_NAMES[recipe.dtype]
    plan = functools.partial(TensorPlan, pair.name, pair.shape, dtype=dtype, folder=pair.folder)
    if pair.secondary is None or math.prod(pair.shape) == 0:
        return plan((info,), operation="copy", t=float(pair.layer.alone == "secondary"))
    if not info.is_float:
        return plan((info, pair.secondary), operation="copy")  # the second is read to see that it is equal
    t, weights = blend_parameter(pair, recipe)
    if t in (0.0, 1.0) and weights is None:
        order = (0, 1) if t == 0.0 else (1, 0)
        copied = tuple((info, pair.secondary)[source] for source in order)
        if rows is None:
            return plan(copied[:1], operation="copy", t=t)
        return plan(copied, rows=rows.select(order), operation="copy", t=t)
    sources = (info, pair.secondary) if pair.base is None else (info, pair.secondary, pair.base)
    operation = "lerp" if recipe.method == "lerp" or not info.shape else "slerp"
    one_axis = len(info.shape) < 2 or (rows is not None and info.shape[0] == 1)
    vectors = "tensor" if one_axis else recipe.vectors  # a single axis is one vector either way
    return plan(sources, vectors, rows, operation=operation, t=t, weights=weights)


def probe_reading(parents: Sequence[Checkpoint]) -> float:
    """Bytes per second of a few short reads spread over the parents' files; some milliseconds."""
    infos = [info for parent in parents for info in parent.tensors.values()]
    infos = sorted(infos, key=lambda info: -info.byte_count)[: 4 * PROBE_SAMPLES]
    buffer = bytearray(PROBE_BYTES)
    count, seconds = 0, 0.0
    with TensorReader() as reader:
        for info in infos[:: max(1, len(infos) // PROBE_SAMPLES)][:PROBE_SAMPLES]:
            stretch, width = min(PROBE_BYTES, info.read_bytes), DTYPE_BYTES[info.read_dtype]
            middle = (info.read_bytes - stretch) // (2 * width) * width
            started = time.perf_counter()
            reader.read_into(info, middle, memoryview(buffer)[:stretch])
            seconds += time.perf_counter() - started
            count += stretch * info.byte_count // max(info.read_bytes, 1)
    return count / seconds if count else USUAL_READ_BYTES_PER_SECOND


def dtypes_of(tensors: Iterable[TensorPlan], recipe: MergeRecipe) -> set[str]:
    """torch's names of all that numbers are read in, rounded to, or written in."""
    stored = {part.dtype for tensor in tensors for part in (*tensor.sources, tensor)}
    rounded = set() if recipe.cast_dtype is None else {recipe.cast_dtype}
    return {TORCH_NAMES.get(name, name) for name in stored} | rounded


def choose_workers(device: str, byte_count: int, dtypes: Collection[str]) -> tuple[bool, bool]:
    """(whether the workers of a merge are processes, whether they load torch).

    byte_count: of all that is read once. dtypes: torch's names. torch converts float16 ten times as fast as numpy, and
    takes a second to load.
    """
    is_large = byte_count >= SMALL_MERGE_BYTES and device == "cpu"
    return is_large and hasattr(os, "fork"), is_large and "float16" in dtypes


def estimate_memory(
    threads: int, vectors: str = "tensor", with_torch: bool = False, tensors: Sequence[TensorPlan] = ()
) -> int:
    """Peak resident bytes of a merge on the processor: the process and each worker's buffers, whatever the size.

    tensors: of the child. What is known of each is kept, and sources that are adapted take a worker more.
    """
    # Three sources and the result, as they are stored, and three sources as they are computed with.
    per_worker = WORKER_BYTES + BLOCK_ELEMENTS * (4 * 2 + 3 * 4)
    if vectors != "tensor":
        per_worker += BLOCK_ELEMENTS * 4 * 8  # and these in float64
    adapted = {info for tensor in tensors for info in tensor.sources if isinstance(info, AdaptedTensor)}
    per_worker += MAX_KEPT * max((info.kept_bytes for info in adapted), default=0)
    return PROCESS_BYTES + threads * per_worker + TORCH_BYTES * with_torch + len(tensors) * TENSOR_BYTES


def plan_merge(recipe: MergeRecipe, options: RunOptions, parents: Parents, parity: ParityReport) -> MergePlan:
    """An operation for each tensor, the child's files, and what it will cost. Writes nothing.

    Raises SlerpMergeError where the recipe, the save directory or the free disk space do not allow it, ImportError
    where a library is missing that the merge will need.
    """
    load_modules("filelock", "numpy", "tokenizers", "yaml")  # nobody merges for hours to learn that one is missing
    models = list(parents.by_role.values())
    check_save_directory(
        options.save_directory, [model.folder for model in parents.by_folder.values()], options.overwrite
    )
    pairs = sorted(parity.pairs, key=lambda pair: natural_order(pair.name))
    tensors = [plan_tensor(pair, recipe) for pair in pairs]
    shards = plan_shards(tensors, options.max_shard_bytes)
    threads = choose_threads(options.threads)
    rate = probe_reading([model for model in models if not model.awaited])
    leftover = find_leftover(recipe, options, parents, shards)
    unfinished = unfinished_tensors(shards, leftover)
    unfinished_bytes = sum(tensor.byte_count for tensor in unfinished)
    source_bytes = sum(tensor.source_bytes for tensor in tensors)
    download = download_bytes(models)
    _, with_torch = choose_workers("cpu", source_bytes, dtypes_of(tensors, recipe))
    plan = MergePlan(
        recipe=recipe,
        options=options,
        parents=parents,
        parity=parity,
        shards=shards,
        threads=threads,
        peak_memory_bytes=estimate_memory(threads, recipe.vectors, with_torch, tensors),
        download_bytes=download,
        streamed_disk_bytes=peak_parent_bytes(unfinished, streamed_sizes(parents)),
        disk_needed_bytes=unfinished_bytes + bytes_beside_weights(shards, parents, parity),
        disk_free_bytes=free_bytes(existing_folder(options.save_directory)),
        kinship=NOT_HERE if download else measure_kinship(pairs),
        leftover=leftover,
        remarks=(
            *recipe.origin.remarks,
            *recorded_differences(recipe.origin.recorded, parents.by_role),
            *unmatched_filters(recipe, pairs),
            *(() if download else (*remarks_on_base(pairs), *remarks_on_twins(parents, pairs))),
        ),
        read_bytes_per_second=rate,
        expected_seconds=sum(tensor.source_bytes for tensor in unfinished) / rate
        + unfinished_bytes / WRITE_BYTES_PER_SECOND
        + sum(tensor.element_count for tensor in unfinished) * ARITHMETIC_SECONDS_PER_ELEMENT / threads,
    )
    check_disk_space(plan)
    streamed, needed = plan.streamed_disk_bytes, plan.disk_needed_bytes
    check_download_space(download, streamed, needed, options.save_directory, options.stream_parents)
    if not options.follow_links:
        check_links(plan.copied_files, parents.primary, parents.secondary)
    return plan


def bytes_beside_weights(shards: Sequence[ShardPlan], parents: Parents, parity: ParityReport) -> int:
    """An upper bound for all that the child, and its journal, take on the disk beside the tensors."""
    headers = sum(len(shard.header) for shard in shards)
    count = sum(len(shard.tensors) for shard in shards)
    models = (parents.primary, parents.secondary)
    found = headers + count * BYTES_PER_TENSOR + NAMES_PER_TENSOR * headers + companion_bytes(models)
    files = [model.tokenizer_folder / "tokenizer.json" for model in models if parity.vocabulary.appended]
    return found + SPELT_OUT * sum(file_size(path) for path in files if path.is_file())


def find_leftover(
    recipe: MergeRecipe, options: RunOptions, parents: Parents, shards: Sequence[ShardPlan]
) -> Leftover | None:
    """What an earlier run that ended early left for this one; None where there is nothing, or it is not wanted."""
    if options.restart:
        return None
    fingerprint = merge_fingerprint(recipe, options, parents, shards)
    return Journal(staging_area(options.save_directory), fingerprint, shards).leftover(devices.is_available)


def unfinished_tensors(shards: Sequence[ShardPlan], leftover: Leftover | None) -> list[TensorPlan]:
    """The tensors that no finished file of an earlier run holds."""
    kept = leftover.kept_files if leftover is not None else ()
    return [tensor for shard in shards if shard.file_name not in kept for tensor in shard.tensors]


def remarks_on_base(pairs: Sequence[TensorSources]) -> Iterator[str]:
    """A base that is no relative of the primary is probably the wrong one."""
    kinship = measure_kinship([dataclasses.replace(pair, secondary=pair.base) for pair in pairs if pair.base])
    if kinship.verdict == "strangers":
        yield f"The base and the primary look like {kinship.describe()}. It is hardly what the parents learned from."


def remarks_on_twins(parents: Parents, pairs: Sequence[TensorSources]) -> Iterator[str]:
    """Two folders with the same weights: one model, uploaded twice. Parity speaks of one folder given twice."""
    is_one_folder = parents.primary.folder.resolve() == parents.secondary.folder.resolve()
    if not is_one_folder and have_same_bytes_in_the_middle(pairs):
        yield "The parents hold the same weights, as far as a sample of each tensor tells; blending changes nothing."


def unmatched_filters(recipe: MergeRecipe, pairs: Sequence[TensorSources]) -> Iterator[str]:
    """Filters that no tensor's name holds, in the child or in a parent: probably misspelt."""
    schedules = [part for cut in recipe.slices or (recipe,) for part in (cut.schedule, *(cut.weights or ()))]
    filters = dict.fromkeys(rule.name_filter for schedule in schedules for rule in schedule.rules)
    for name_filter in filters:
        if name_filter != "*" and not any(name_filter in " ".join((p.name, *p.source_names)) for p in pairs):
            yield f"The filter {name_filter!r} matches no tensor."


def check_disk_space(plan: MergePlan) -> None:
    """Raises SlerpMergeError where the child does not fit on its disk, as far as that tells."""
    if plan.disk_free_bytes is None:
        return
    whole = plan.disk_needed_bytes + plan.kept_bytes
    if whole > plan.disk_free_bytes + staged_bytes(plan.options.save_directory):
        raise SlerpMergeError(
            f"The child needs {format_bytes(plan.disk_needed_bytes)}, but only {format_bytes(plan.disk_free_bytes)} "
            f"are free at {existing_folder(plan.options.save_directory)}.",
            "Free some space, choose a save directory on another disk, or a smaller dtype with --dtype.",
        )
