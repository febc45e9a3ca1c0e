"""The finished child, read back and held against plan and parents."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import FileHandles, read_json
from slerpkit.lazy import numpy, torch
from slerpkit.maths import slerp_coefficients, vector_weights
from slerpkit.merge.arithmetic import torch_dtype
from slerpkit.merge.events import Verification
from slerpkit.merge.workers import MergeWorker, matrix_width, rows_in
from slerpkit.messages import SlerpMergeError, shorten
from slerpkit.parents.safetensors_header import read_header
from slerpkit.parents.tensors import DTYPE_BYTES, TORCH_NAMES, TensorInfo, TensorReader
from slerpkit.parity.chat import has_row
from slerpkit.parity.configs import stated_ids
from slerpkit.parity.vocabulary import open_tokenizer

if TYPE_CHECKING:
    from slerpkit.merge.events import MergedTensor, MergeResult, Observer
    from slerpkit.merge.plan import MergePlan, TensorPlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.recipe import MergeRecipe

RECOMPUTED_TENSORS = 4  # recomputed whole, in float64, straight from the parents
RECOMPUTED_ELEMENTS = 1 << 20  # none larger than this, so that the check stays cheap
STRETCH_ELEMENTS = 1 << 16  # held in float64 at once, a dozen times over
SPOT_CHECKS = 256  # tensors of which a stretch is recomputed
SPOT_ELEMENTS = 512  # elements of such a stretch


def wrong_child(reason: str) -> SlerpMergeError:
    """The error for a child that is not what was planned."""
    return SlerpMergeError(
        f"The child did not pass its own check: {reason}.",
        "Nothing was saved. Run the merge again; if it fails the same way, the disk or memory may be faulty.",
    )


def verify_child(plan: MergePlan, child: StagedChild, result: MergeResult, observe: Observer) -> Verification:
    """Reads the finished child back and holds it against plan, parents and tokenizer. Cheap; no transformers.

    Raises SlerpMergeError where the child is not what was planned. What only may be wrong is a warning.
    """
    try:
        verify_headers(plan, child.folder)
        recomputed, spots = verify_values(plan, child.folder, result)
    except SlerpMergeError:
        child.distrust()
        raise
    checks = [
        f"{len(result.tensors)} tensors stand under the primary's names and shapes",
        f"{recomputed} tensors recomputed whole and {spots} in part from the parents, all equal",
    ]
    warnings = [
        f"{merged.job.name}: {merged.non_finite} values are infinite or not a number"
        for merged in result.tensors
        if merged.non_finite
    ]
    warnings += [
        f"{merged.job.name}: the parents' {TORCH_NAMES[merged.job.dtype]} values differ; the primary's are kept"
        for merged in result.tensors
        if merged.blend.reason.startswith("differs")
    ]
    if not any(merged.non_finite for merged in result.tensors):
        checks.append("no infinite value and none that is not a number")
    tokens, warning = compare_tokenizer_with_rows(plan, child.folder)
    checks += [tokens] if tokens else []
    warnings += [warning] if warning else []
    warnings += ids_without_rows(plan, child.folder)
    verified = Verification(tuple(checks), tuple(warnings))
    observe(verified)
    return verified


def verify_headers(plan: MergePlan, folder: Path) -> None:
    """Every file's header, as written, against the plan; every name and shape against the primary's."""
    found: dict[str, TensorInfo] = {}
    for shard in plan.shards:
        try:
            found.update(read_header(folder / shard.file_name))
        except SlerpMergeError as error:
            raise wrong_child(error.message.rstrip(".")) from error
        for job in shard.jobs:
            info = found.get(job.name)
            if info is None or (info.dtype, info.shape, info.offset) != (job.dtype, job.shape, job.offset):
                raise wrong_child(f"{shard.file_name} does not hold {job.name} as planned")
    for pair in plan.parity.pairs:
        if pair.name not in found or found[pair.name].shape != pair.shape:
            raise wrong_child(f"the primary's tensor {pair.name} is not in it with its shape")


def verify_values(plan: MergePlan, folder: Path, result: MergeResult) -> tuple[int, int]:
    """Recomputes a sample of the child in float64 from the parents' bytes. Returns (whole tensors, stretches)."""
    places = {job.name: folder / shard.file_name for shard in plan.shards for job in shard.jobs}
    reader = TensorReader(handles := FileHandles())
    filled = [merged for merged in result.tensors if merged.job.element_count]
    blended = [m for m in filled if m.blend.rule != "copy" and m.job.element_count <= RECOMPUTED_ELEMENTS]
    blended.sort(key=lambda merged: -merged.job.element_count)
    whole = blended[:: max(1, len(blended) // RECOMPUTED_TENSORS)][:RECOMPUTED_TENSORS]
    spots = [merged for merged in filled if merged.job.granularity == "tensor" or merged.blend.rule == "copy"]
    spots = spots[:: max(1, -(-len(spots) // SPOT_CHECKS))]
    try:
        for merged in whole:
            weights = recompute_weights(plan.recipe, merged, reader)
            for stretch in cut_stretches(merged.job):
                verify_stretch(merged, weights, stretch, places[merged.job.name], reader, plan.recipe)
        for merged in spots:
            weights = merged.blend.primary_weight, merged.blend.secondary_weight
            verify_stretch(merged, weights, middle_stretch(merged.job), places[merged.job.name], reader, plan.recipe)
    finally:
        handles.close()
    return len(whole), len(spots)


def read_stretch(
    reader: TensorReader, info: TensorInfo, stretch: range, rows: numpy.ndarray | None = None
) -> torch.Tensor:
    """Elements of a tensor, flat, in float64; or those of some of its rows, in their order, and zeros for a row -1."""
    width = DTYPE_BYTES[info.dtype]
    data = bytearray(len(stretch) * width)
    if rows is None:
        reader.read_into(info, stretch.start * width, memoryview(data))
    else:
        reader.read_rows(info, rows, memoryview(data))
    return torch.frombuffer(data, dtype=torch_dtype(info.dtype)).double()


def read_sources(
    job: TensorPlan, stretch: range, reader: TensorReader, recipe: MergeRecipe, blended: bool = False
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """([v0, v1] or the copied one, base or zeros) of a stretch, in float64; task vectors where there is a base.

    blended: zeros stand for rows that are kept.
    """
    rows: Sequence[Any] = [None] * len(job.sources)
    if job.rows is not None:
        maps = job.rows.blended if blended else job.rows.sources
        rows = [part[rows_in(job, stretch)] for part in maps]
    parts = [read_stretch(reader, info, stretch, part) for info, part in zip(job.sources, rows)]
    if recipe.cast_dtype is not None and job.sources[0].is_float:
        parts = [part.to(getattr(torch, recipe.cast_dtype)).double() for part in parts]
    if len(parts) == 3:
        return [parts[0] - parts[2], parts[1] - parts[2]], parts[2]
    return parts, torch.zeros_like(parts[0])


def whole_row(job: TensorPlan) -> int:
    """Elements that a stretch of a tensor cannot be cut within."""
    return 1 if job.granularity == "tensor" and job.rows is None else matrix_width(job)


def cut_stretches(job: TensorPlan) -> Iterator[range]:
    """All of a tensor, piece by piece; whole rows where they count."""
    step = max(1, STRETCH_ELEMENTS // whole_row(job)) * whole_row(job)
    for start in range(0, job.element_count, step):
        yield range(start, min(start + step, job.element_count))


def middle_stretch(job: TensorPlan) -> range:
    """A few elements from the middle of a tensor; whole rows where they count."""
    row = whole_row(job)
    length = min(max(1, SPOT_ELEMENTS // row) * row, job.element_count)
    start = (job.element_count - length) // 2 // row * row
    return range(start, start + length)


def shares_at(weights: Sequence[Any], job: TensorPlan, stretch: range) -> list[Any]:
    """Both parents' weights over a stretch: a number, or one for each element where vectors or rows have their own."""
    shares = [spread(weight, job, stretch) for weight in weights]
    if job.rows is None:
        return shares
    rows = rows_in(job, stretch)
    kept = [torch.from_numpy(job.rows.is_kept(side)[rows]).repeat_interleave(job.row_elements) for side in (0, 1)]
    for side in (0, 1):
        share = torch.as_tensor(shares[side], dtype=torch.float64).expand(len(stretch))
        shares[side] = torch.where(kept[side], 1.0, torch.where(kept[1 - side], 0.0, share))
    return shares


def spread(weight: Any, job: TensorPlan, stretch: range) -> Any:
    """A weight for each element of a stretch, from one for each row or column; a number stays one."""
    if not torch.is_tensor(weight):
        return weight
    width = matrix_width(job)
    if job.granularity == "row":
        return weight.repeat(len(stretch) // width)
    return weight[stretch.start // width : stretch.stop // width].repeat_interleave(width)


def recompute_weights(recipe: MergeRecipe, merged: MergedTensor, reader: TensorReader) -> tuple[Any, Any]:
    """A tensor's weights again, from float64 sums over all of both parents; or those of each of its vectors."""
    job = merged.job
    if job.weights is not None:
        return job.weights
    if job.granularity != "tensor":
        axis = 0 if job.granularity == "row" else 1
        parts = []
        for stretch in cut_stretches(job):
            v0, v1 = (part.view(-1, matrix_width(job)) for part in read_sources(job, stretch, reader, recipe, True)[0])
            parts.append(torch.stack([(a * b).sum(axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]))
        return vector_weights(torch.cat(parts, dim=1) if axis else torch.stack(parts).sum(0), job.t)
    totals = [0.0, 0.0, 0.0]
    for stretch in cut_stretches(job):
        v0, v1 = read_sources(job, stretch, reader, recipe, blended=True)[0]
        for place, (a, b) in enumerate(((v0, v0), (v1, v1), (v0, v1))):
            totals[place] += float(torch.dot(a, b))
    method = "lerp" if job.rule == "lerp" else recipe.method
    norms = math.sqrt(totals[0]), math.sqrt(totals[1])
    blend = slerp_coefficients(totals[2], *norms, job.t, method, recipe.dot_threshold, recipe.epsilon)
    # At the very threshold float32 sums may fall on the other side than float64 ones; both are right.
    used = blend if blend.rule == merged.blend.rule else merged.blend
    return used.primary_weight, used.secondary_weight


def verify_stretch(
    merged: MergedTensor,
    weights: Sequence[Any],
    stretch: range,
    path: Path,
    reader: TensorReader,
    recipe: MergeRecipe,
) -> None:
    """Holds a stretch of the child against its parents: equal but for the rounding to the child's dtype."""
    job = merged.job
    parts, base = read_sources(job, stretch, reader, recipe)
    terms = [parts[0]]
    if merged.blend.rule != "copy" or job.rows is not None:
        terms = [share * part for share, part in zip(shares_at(weights, job, stretch), parts)] + [base]
    stored = read_stretch(reader, TensorInfo(job.name, job.dtype, job.shape, path, job.offset, job.byte_count), stretch)
    if not job.sources[0].is_float:
        if not torch.equal(parts[0], stored):
            raise wrong_child(f"{job.name} differs from the primary's")
        return
    roundings = [torch_dtype(job.dtype)] + ([getattr(torch, recipe.cast_dtype)] if recipe.cast_dtype else [])
    limits = [torch.finfo(dtype) for dtype in roundings]
    expected = sum(terms)
    # Half a unit of the last place for each rounding, and what float32 sums and products may lose before it.
    allowed = sum(0.5 * limit.eps * expected.abs() + limit.smallest_normal for limit in limits)
    lost = 1e-12 if MergeWorker.working_dtype(job) == torch.float64 else 2e-6
    allowed = allowed + lost * sum(term.abs() for term in terms)
    close = (stored - expected).abs() <= allowed * 1.01  # false where either is not a number
    off = ~close & (expected.abs() <= min(limit.max for limit in limits))
    if bool(off.any()):
        raise wrong_child(f"{job.name} differs from what its parents make")


def compare_tokenizer_with_rows(plan: MergePlan, folder: Path) -> tuple[str | None, str | None]:
    """(what was found right, what may be wrong) of the child's tokenizer beside its embedding."""
    path, rows = folder / "tokenizer.json", plan.parity.vocabulary.rows
    if not path.is_file() or rows is None:
        return None, None
    try:
        ids = open_tokenizer(path).get_vocab(with_added_tokens=True).values()
    except SlerpMergeError as error:
        return None, error.message.replace(str(path), path.name)
    highest = max(ids, default=-1)
    if len(set(ids)) < len(ids):
        return None, f"the tokenizer gives {len(ids) - len(set(ids))} of its tokens the id of another"
    if highest >= rows:
        return None, f"the tokenizer knows the id {highest}, but the embedding has only {rows} rows"
    return f"every token id (up to {highest}) has its row among {rows}", None


def ids_without_rows(plan: MergePlan, folder: Path) -> list[str]:
    """Warnings of the ids in config.json, such as eos_token_id, that the embedding has no row for."""
    vocabulary = plan.parity.vocabulary
    warnings = []
    for key, value in stated_ids(read_json(folder / "config.json")).items():
        ids = value if isinstance(value, list) else [value]
        if any(type(n) is int and n >= 0 and not has_row(n, vocabulary) for n in ids):
            rows = vocabulary.rows
            warnings.append(f"config.json: {key} is {shorten(value)}, the embedding has only {rows} rows")
    return warnings
