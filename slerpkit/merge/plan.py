"""plan_merge: a rule and a place for every tensor, and what it will cost."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import re
import shutil
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slerpkit.files import FileHandles, existing_folder
from slerpkit.merge.save_directory import check_save_directory, staged_bytes
from slerpkit.messages import SlerpMergeError, format_bytes
from slerpkit.parents.checkpoint import WEIGHTS_SINGLE, companion_bytes
from slerpkit.parents.tensors import CHUNK_ELEMENTS, DTYPE_BYTES, SAFETENSORS_NAMES, TensorReader, natural_order
from slerpkit.parity.kinship import measure_kinship
from slerpkit.recipe import check_t

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.parity.kinship import Kinship
    from slerpkit.parity.report import ParityReport, RowMap, TensorSources
    from slerpkit.recipe import MergeRecipe
    from slerpkit.schedule import Schedule

MAX_THREADS = 8  # reading and writing saturate before more cores than this help


@dataclass(frozen=True)
class TensorPlan:
    """One tensor of the child: what it is made from, how, and where its bytes go."""

    name: str
    dtype: str  # the child's, safetensors' name
    shape: tuple[int, ...]
    rule: str  # "slerp", "lerp" or "copy"; slerp may still fall back to lerp or copy once measured
    t: float
    sources: tuple[TensorInfo, ...]  # (primary, secondary), (primary, secondary, base), or the one that is copied
    weights: tuple[float, float] | None = None  # of a LERP that is not (1 - t, t)
    granularity: str = "tensor"
    rows: RowMap | None = None  # of `sources`, where rows follow tokens
    offset: int = 0  # bytes from the start of the child's shard

    @property
    def is_measured(self) -> bool:
        """Whether the parents are held against each other before the child's tensor is written."""
        return len(self.sources) > 1 and (self.rule != "copy" or not self.sources[0].is_float)

    @property
    def row_elements(self) -> int:
        """Elements that stand for one token, where rows follow tokens."""
        return self.element_count // len(self.rows.is_blended)

    @property
    def element_count(self) -> int:
        return math.prod(self.shape)

    @property
    def byte_count(self) -> int:
        return self.element_count * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class ShardPlan:
    """One file of the child: its header, ready to write, and the tensors behind it."""

    file_name: str
    header: bytes
    jobs: tuple[TensorPlan, ...]

    @property
    def byte_count(self) -> int:
        return len(self.header) + sum(job.byte_count for job in self.jobs)


@dataclass(frozen=True)
class MergePlan:
    """All that will be done, decided before a byte is written."""

    recipe: MergeRecipe
    primary: Checkpoint
    secondary: Checkpoint
    base: Checkpoint | None
    parity: ParityReport
    shards: tuple[ShardPlan, ...]
    threads: int
    peak_memory_bytes: int
    disk_needed_bytes: int
    disk_free_bytes: int
    kinship: Kinship
    remarks: tuple[str, ...]  # what the person may want to know before it starts
    read_bytes_per_second: float  # of a short probe of the parents' files
    expected_seconds: float

    @property
    def jobs(self) -> Iterator[TensorPlan]:
        for shard in self.shards:
            yield from shard.jobs

    @property
    def child_bytes(self) -> int:
        return sum(job.byte_count for job in self.jobs)

    @property
    def tokenizer_role(self) -> str | None:
        return self.parity.vocabulary.role

    @property
    def template_role(self) -> str | None:
        """The parent whose chat template the child has."""
        asked = self.recipe.chat_template
        return self.tokenizer_role if asked == "auto" or self.tokenizer_role is None else asked

    @property
    def parents(self) -> dict[str, Checkpoint]:
        """By role: "primary", "secondary" and, where there is one, "base"."""
        base = {} if self.base is None else {"base": self.base}
        return {"primary": self.primary, "secondary": self.secondary, **base}

    def count(self, rule: str) -> int:
        return sum(job.rule == rule for job in self.jobs)


PROCESS_BYTES = 245_000_000  # the interpreter with torch and the screen's libraries loaded, measured on Linux
PROBE_BYTES = 1 << 20  # per sample of the read probe
PROBE_SAMPLES = 8
# Rough costs behind the expected time, measured on one core of a 2023 server.
ARITHMETIC_SECONDS_PER_ELEMENT = 1.3e-9
WRITE_BYTES_PER_SECOND = 1.5e9


def choose_threads(asked: int) -> int:
    """Worker threads: as asked, else the usable cores up to MAX_THREADS."""
    if asked:
        return asked
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, usable)


def parameters_for(
    pair: TensorSources, recipe: MergeRecipe
) -> tuple[Schedule, tuple[Schedule, Schedule] | None, float]:
    """(t's schedule, the weights' schedules, position) of one tensor.

    In a recipe of slices a layer follows its own; what stands before the layers follows the first slice, what
    stands behind them the last, both at position 0, as mergekit has it.
    """
    position = pair.place.position
    if not recipe.slices:
        return recipe.schedule, recipe.weights, position
    number = pair.place.slice_number
    if number < 0:
        number = 0 if re.search(r"emb|wte|wpe", pair.name) else len(recipe.slices) - 1
    part = recipe.slices[number]
    return part.schedule, part.weights, position


def blend_parameter(pair: TensorSources, recipe: MergeRecipe) -> tuple[float, tuple[float, float] | None]:
    """(t, weights of a LERP that is not (1 - t, t)) of one tensor."""
    schedule, weights, position = parameters_for(pair, recipe)
    if weights is None:
        return schedule.t_for(pair.name, position), None
    first, second = (part.t_for(pair.name, position) for part in weights)
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


def plan_job(pair: TensorSources, recipe: MergeRecipe) -> TensorPlan:
    """The rule for one tensor, as far as headers tell."""
    info, rows = pair.primary, pair.rows
    dtype = info.dtype
    if info.is_float and recipe.dtype != "auto":
        dtype = SAFETENSORS_NAMES[recipe.dtype]
    job = functools.partial(TensorPlan, pair.name, dtype, pair.shape)
    if pair.secondary is None or math.prod(pair.shape) == 0:
        return job("copy", 0.0, (info,))
    if not info.is_float:
        return job("copy", 0.0, (info, pair.secondary))  # the second is read to see that it is equal
    t, weights = blend_parameter(pair, recipe)
    if t in (0.0, 1.0) and weights is None:
        order = (0, 1) if t == 0.0 else (1, 0)
        copied = tuple((info, pair.secondary)[side] for side in order)
        return job("copy", t, copied, rows=rows.first(order)) if rows else job("copy", t, copied[:1])
    sources = (info, pair.secondary) if pair.base is None else (info, pair.secondary, pair.base)
    rule = "lerp" if recipe.method == "lerp" or not info.shape else "slerp"
    one_axis = len(info.shape) < 2 or (rows is not None and info.shape[0] == 1)
    granularity = "tensor" if one_axis else recipe.granularity  # a single axis is one vector either way
    return job(rule, t, sources, weights, granularity, rows)


def cut_shards(jobs: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Consecutive tensors, in layer order, into files of at most `max_shard_bytes` of tensor data.

    A tensor larger than that has a file of its own.
    """
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for job in jobs:
        if groups[-1] and filled + job.byte_count > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(job)
        filled += job.byte_count
    return groups


def lay_out_shard(file_name: str, group: Sequence[TensorPlan]) -> ShardPlan:
    """The header of one safetensors file and the place of each tensor behind it.

    Wider dtypes come first, as the format's library writes them, so that every tensor is aligned.
    """
    ordered = sorted(group, key=lambda job: -DTYPE_BYTES[job.dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for job in ordered:
        end = begin + job.byte_count
        entries[job.name] = {"dtype": job.dtype, "shape": list(job.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    placed = tuple(
        dataclasses.replace(job, offset=len(header) + entries[job.name]["data_offsets"][0]) for job in ordered
    )
    return ShardPlan(file_name, header, placed)


def plan_shards(jobs: Sequence[TensorPlan], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """The child's files: one, or numbered ones with an index beside them."""
    groups = cut_shards(jobs, max_shard_bytes)
    if len(groups) == 1:
        return (lay_out_shard(WEIGHTS_SINGLE, groups[0]),)
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return tuple(lay_out_shard(name, group) for name, group in zip(names, groups))


def probe_reading(parents: Sequence[Checkpoint]) -> float:
    """Bytes per second of a few short reads spread over the parents' files; some milliseconds."""
    infos = [info for parent in parents for info in parent.tensors.values()]
    infos = sorted(infos, key=lambda info: -info.byte_count)[: 4 * PROBE_SAMPLES]
    reader = TensorReader(handles := FileHandles())
    buffer = bytearray(PROBE_BYTES)
    count, seconds = 0, 0.0
    try:
        for info in infos[:: max(1, len(infos) // PROBE_SAMPLES)][:PROBE_SAMPLES]:
            stretch = min(PROBE_BYTES, info.byte_count)
            started = time.perf_counter()
            reader.read_into(info, (info.byte_count - stretch) // 2, memoryview(buffer)[:stretch])
            seconds += time.perf_counter() - started
            count += stretch
    finally:
        handles.close()
    return count / max(seconds, 1e-6)


def estimate_memory(threads: int, granularity: str = "tensor") -> int:
    """Peak resident bytes of a merge on the processor: the process and each worker's buffers, whatever the model."""
    per_worker = CHUNK_ELEMENTS * (3 * 2 + 3 * 4)  # three buffers of two bytes a value, three in float32
    if granularity != "tensor":
        per_worker += CHUNK_ELEMENTS * 3 * 8  # and three in float64
    return PROCESS_BYTES + threads * per_worker


def plan_merge(
    recipe: MergeRecipe,
    primary: Checkpoint,
    secondary: Checkpoint,
    parity: ParityReport,
    base: Checkpoint | None = None,
) -> MergePlan:
    """A rule per tensor, the child's files, and what it will cost. Writes nothing.

    Raises SlerpMergeError where the recipe, the save directory or the free disk space do not allow it.
    """
    parents = [parent for parent in (primary, secondary, base) if parent is not None]
    check_save_directory(recipe.save_directory, [parent.folder for parent in parents], recipe.overwrite)
    pairs = sorted(parity.pairs, key=lambda pair: natural_order(pair.name))
    jobs = [plan_job(pair, recipe) for pair in pairs]
    shards = plan_shards(jobs, recipe.max_shard_bytes)
    threads = choose_threads(recipe.threads)
    rate = probe_reading(parents)
    read_bytes = sum(info.byte_count for job in jobs for info in job.sources)
    elements = sum(job.element_count for job in jobs)
    child_bytes = sum(shard.byte_count for shard in shards)
    plan = MergePlan(
        recipe=recipe,
        primary=primary,
        secondary=secondary,
        base=base,
        parity=parity,
        shards=shards,
        threads=threads,
        peak_memory_bytes=estimate_memory(threads, recipe.granularity),
        disk_needed_bytes=child_bytes + companion_bytes((primary, secondary)),
        disk_free_bytes=shutil.disk_usage(existing_folder(recipe.save_directory)).free,
        kinship=measure_kinship(pairs),
        remarks=(*unmatched_filters(recipe, jobs), *remarks_on_base(pairs)),
        read_bytes_per_second=rate,
        expected_seconds=read_bytes / rate
        + child_bytes / WRITE_BYTES_PER_SECOND
        + elements * ARITHMETIC_SECONDS_PER_ELEMENT / threads,
    )
    check_disk_space(plan)
    return plan


def remarks_on_base(pairs: Sequence[TensorSources]) -> Iterator[str]:
    """A base that is no relative of the primary is probably the wrong one."""
    kinship = measure_kinship([dataclasses.replace(pair, secondary=pair.base) for pair in pairs if pair.base])
    if kinship.verdict == "strangers":
        yield f"The base and the primary look like {kinship.describe()}. It is hardly what the parents learned from."


def unmatched_filters(recipe: MergeRecipe, jobs: Sequence[TensorPlan]) -> Iterator[str]:
    """Filters that no tensor's name holds: probably misspelt."""
    schedules = [part for cut in recipe.slices or (recipe,) for part in (cut.schedule, *(cut.weights or ()))]
    filters = dict.fromkeys(rule.name_filter for schedule in schedules for rule in schedule.rules)
    for name_filter in filters:
        if name_filter != "*" and not any(name_filter in job.name for job in jobs):
            yield f"The filter {name_filter!r} matches no tensor."


def check_disk_space(plan: MergePlan) -> None:
    """Raises SlerpMergeError where the child does not fit on its disk."""
    if plan.disk_needed_bytes > plan.disk_free_bytes + staged_bytes(plan.recipe.save_directory):
        raise SlerpMergeError(
            f"The child needs {format_bytes(plan.disk_needed_bytes)}, but only {format_bytes(plan.disk_free_bytes)} "
            f"are free at {existing_folder(plan.recipe.save_directory)}.",
            "Free some space, choose a save directory on another disk, or a smaller dtype with --dtype.",
        )


def plan_as_dict(plan: MergePlan) -> dict[str, Any]:
    """The plan as `--dry-run --json` prints it."""
    return {
        "child": str(plan.recipe.save_directory),
        "tensors": sum(1 for _ in plan.jobs),
        **{f"to_{rule}": plan.count(rule) for rule in ("slerp", "lerp", "copy")},
        "files": [shard.file_name for shard in plan.shards],
        "bytes": plan.child_bytes,
        "peak_memory_bytes": plan.peak_memory_bytes,
        "disk_needed_bytes": plan.disk_needed_bytes,
        "disk_free_bytes": plan.disk_free_bytes,
        "expected_seconds": plan.expected_seconds,
        "t": {job.name: job.t for job in plan.jobs},
        "kinship": plan.kinship.as_dict(),
        "remarks": list(plan.remarks),
        "tokenizer_from": plan.tokenizer_role,
        "chat_template_from": plan.template_role,
        "vocabulary": plan.parity.vocabulary.as_dict(),
        "resolved": [dataclasses.asdict(m) for m in plan.parity.of_severity("resolved")],
        "notices": [dataclasses.asdict(m) for m in plan.parity.of_severity("notice")],
    }
