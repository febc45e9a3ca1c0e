"""The finished child, read back and held against its plan and its parents.

Every header, a sample of the values recomputed in float64, and the ids that tokenizer and config speak of.
transformers is not asked here; evaluation/models.py can load the child with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import read_json
from slerpkit.lazy import torch
from slerpkit.maths import vector_weights
from slerpkit.merge.arithmetic import torch_dtype
from slerpkit.merge.stream import weights_of
from slerpkit.merge.tensor_plan import TensorInputs
from slerpkit.merge.workers import MergeWorker, rows_in, working_dtype
from slerpkit.messages import SlerpMergeError, shorten
from slerpkit.parents.safetensors_header import read_header
from slerpkit.parents.tensors import TORCH_NAMES, TensorInfo
from slerpkit.parity.chat import has_row
from slerpkit.parity.configs import stated_ids
from slerpkit.parity.vocabulary import open_tokenizer

if TYPE_CHECKING:
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.merge.tensor_plan import MergedTensor, MergeResult, TensorPlan
    from slerpkit.recipe import MergeRecipe

RECOMPUTED_TENSORS = 4  # recomputed whole, in float64, straight from the parents
RECOMPUTED_ELEMENTS = 1 << 20  # none larger than this, so that the check stays cheap
SPOT_CHECKS = 256  # tensors of which a stretch is recomputed
SPOT_ELEMENTS = 512  # elements of such a stretch


@dataclass(frozen=True)
class Verification:
    """What was found of a child that was read back and is right."""

    checks: tuple[str, ...]  # what was found right, in words
    warnings: tuple[str, ...]  # what may be wrong


def wrong_child(reason: str) -> SlerpMergeError:
    """The error for a child that is not what was planned."""
    return SlerpMergeError(
        f"The child did not pass its own check: {reason}.",
        "Nothing was saved. Run the merge again; if it fails the same way, the disk or memory may be faulty.",
    )


def verify_child(plan: MergePlan, child: StagedChild, result: MergeResult) -> Verification:
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
    warnings = [plan.kinship.warning] if plan.kinship.warning else []
    warnings += [
        f"{merged.tensor.name}: {merged.non_finite} values are infinite or not a number"
        for merged in result.tensors
        if merged.non_finite
    ]
    warnings += [
        f"{merged.tensor.name}: the parents' {TORCH_NAMES[merged.tensor.dtype]} values differ; the primary's are kept"
        for merged in result.tensors
        if merged.weights.reason.startswith("differs")
    ]
    if not any(merged.non_finite for merged in result.tensors):
        checks.append("no infinite value and none that is not a number")
    tokens, warning = compare_tokenizer_with_rows(plan, child.folder)
    checks += [tokens] if tokens else []
    warnings += [warning] if warning else []
    warnings += ids_without_rows(plan, child.folder)
    return Verification(tuple(checks), tuple(warnings))


def verify_headers(plan: MergePlan, folder: Path) -> None:
    """Every file's header, as written, against the plan; every name and shape against the primary's."""
    found: dict[str, TensorInfo] = {}
    for shard in plan.shards:
        try:
            found.update(read_header(folder / shard.file_name))
        except SlerpMergeError as error:
            raise wrong_child(error.message.rstrip(".")) from error
        for tensor in shard.tensors:
            info = found.get(tensor.name)
            if info is None or (info.dtype, info.shape, info.offset) != (tensor.dtype, tensor.shape, tensor.offset):
                raise wrong_child(f"{shard.file_name} does not hold {tensor.name} as planned")
    for pair in plan.parity.pairs:
        if pair.name not in found or found[pair.name].shape != pair.shape:
            raise wrong_child(f"the primary's tensor {pair.name} is not in it with its shape")


def verify_values(plan: MergePlan, folder: Path, result: MergeResult) -> tuple[int, int]:
    """Recomputes a sample of the child in float64 from the parents' bytes. Returns (whole tensors, stretches)."""
    files = {tensor.name: folder / shard.file_name for shard in plan.shards for tensor in shard.tensors}
    filled = [merged for merged in result.tensors if merged.tensor.element_count]
    blended = [
        merged
        for merged in filled
        if merged.weights.operation != "copy" and merged.tensor.element_count <= RECOMPUTED_ELEMENTS
    ]
    blended.sort(key=lambda merged: -merged.tensor.element_count)
    whole = blended[:: max(1, len(blended) // RECOMPUTED_TENSORS)][:RECOMPUTED_TENSORS]
    spots = [m for m in filled if m.tensor.vectors == "tensor" or m.weights.operation == "copy"]
    spots = spots[:: max(1, -(-len(spots) // SPOT_CHECKS))]
    with MergeWorker("cpu", plan.recipe.cast_dtype) as worker:
        for merged in whole:
            weights = recompute_weights(plan.recipe, merged, worker)
            every = range(merged.tensor.element_count)
            verify_stretch(merged, weights, every, files[merged.tensor.name], worker)
        for merged in spots:
            weights = merged.weights.primary_weight, merged.weights.secondary_weight
            verify_stretch(merged, weights, middle_stretch(merged.tensor), files[merged.tensor.name], worker)
    return len(whole), len(spots)


def read_wide(
    worker: MergeWorker, tensor: TensorInputs, stretch: range, blended: bool = False
) -> Iterator[tuple[range, list[torch.Tensor], torch.Tensor]]:
    """(elements, [v0, v1] or the copied one, base or zeros) over a stretch, in float64; task vectors with a base.

    blended: zeros stand for rows that are kept.
    """
    for part, chunk in worker.read_chunks(tensor, stretch, blended):
        sources = [raw.to(torch.float64, copy=True) for raw in chunk]
        if worker.cast_dtype is not None and tensor.is_float:
            sources = [source.to(getattr(torch, worker.cast_dtype)).double() for source in sources]
        if len(sources) == 3:
            yield part, [sources[0] - sources[2], sources[1] - sources[2]], sources[2]
        else:
            yield part, sources, torch.zeros_like(sources[0])


def middle_stretch(tensor: TensorInputs) -> range:
    """A few elements from the middle of a tensor; whole rows where they count."""
    row = 1 if tensor.vectors == "tensor" and tensor.rows is None else tensor.vector_width
    length = min(max(1, SPOT_ELEMENTS // row) * row, tensor.element_count)
    start = (tensor.element_count - length) // 2 // row * row
    return range(start, start + length)


def weights_at(weights: Sequence[Any], tensor: TensorInputs, stretch: range) -> list[Any]:
    """Both parents' weights over a stretch: a number, or one for each element where vectors or rows have their own."""
    spread = [spread_weight(weight, tensor, stretch) for weight in weights]
    if tensor.rows is None:
        return spread
    rows = rows_in(tensor, stretch)
    kept = [
        torch.from_numpy(tensor.rows.is_kept(source)[rows]).repeat_interleave(tensor.row_elements) for source in (0, 1)
    ]
    for source in (0, 1):
        weight = torch.as_tensor(spread[source], dtype=torch.float64).expand(len(stretch))
        spread[source] = torch.where(kept[source], 1.0, torch.where(kept[1 - source], 0.0, weight))
    return spread


def spread_weight(weight: Any, tensor: TensorInputs, stretch: range) -> Any:
    """A weight for each element of a stretch, from one for each row or column; a number stays one."""
    if not torch.is_tensor(weight):
        return weight
    width = tensor.vector_width
    if tensor.vectors == "first_dim":
        return weight.repeat(len(stretch) // width)
    return weight[stretch.start // width : stretch.stop // width].repeat_interleave(width)


def recompute_weights(recipe: MergeRecipe, merged: MergedTensor, worker: MergeWorker) -> tuple[Any, Any]:
    """A tensor's weights again, from float64 sums over all of both parents; or those of each of its vectors."""
    tensor = merged.tensor
    if tensor.weights is not None:
        return tensor.weights
    every = range(tensor.element_count)  # at most RECOMPUTED_ELEMENTS, so that all of them can be held
    pairs = [sources for _, sources, _ in read_wide(worker, tensor, every, blended=True)]
    if tensor.vectors != "tensor":
        axis = 0 if tensor.vectors == "first_dim" else 1
        rows = [[source.view(-1, tensor.vector_width) for source in pair] for pair in pairs]
        sums = [torch.stack([(a * b).sum(axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]) for v0, v1 in rows]
        return vector_weights(torch.cat(sums, dim=1) if axis else torch.stack(sums).sum(0), tensor.t)
    totals = [math.fsum(float(torch.dot(pair[i], pair[j])) for pair in pairs) for i, j in ((0, 0), (1, 1), (0, 1))]
    found = weights_of(tensor, recipe, totals[2], math.sqrt(totals[0]), math.sqrt(totals[1]))
    # At the very threshold float32 sums may fall on the other side than float64 ones; both are right.
    used = found if found.operation == merged.weights.operation else merged.weights
    return used.primary_weight, used.secondary_weight


def verify_stretch(
    merged: MergedTensor, weights: Sequence[Any], stretch: range, path: Path, worker: MergeWorker
) -> None:
    """Holds a stretch of the child against its parents: equal but for the rounding to the child's dtype."""
    tensor = merged.tensor
    info = TensorInfo(tensor.name, tensor.dtype, tensor.shape, path, tensor.offset, tensor.byte_count)
    stored = TensorInputs(tensor.name, tensor.shape, (info,))
    for part, sources, base in read_wide(worker, tensor, stretch):
        terms = [sources[0]]
        if merged.weights.operation != "copy" or tensor.rows is not None:
            terms = [w * source for w, source in zip(weights_at(weights, tensor, part), sources)] + [base]
        made = torch.cat([chunk[0].double() for _, chunk in worker.read_chunks(stored, part, blended=False)])
        if not is_right(made, terms, tensor, worker.cast_dtype):
            differs = "from what its parents make" if tensor.is_float else "from the primary's"
            raise wrong_child(f"{tensor.name} differs {differs}")


def is_right(made: torch.Tensor, terms: Sequence[torch.Tensor], tensor: TensorPlan, cast_dtype: str | None) -> bool:
    """Whether what was made is the sum of its terms, in float64, but for what roundings may lose."""
    if not tensor.is_float:
        return torch.equal(terms[0], made)
    roundings = [torch_dtype(tensor.dtype)] + ([getattr(torch, cast_dtype)] if cast_dtype else [])
    limits = [torch.finfo(dtype) for dtype in roundings]
    expected = sum(terms)
    # Half a unit of the last place for each rounding, and what float32 sums and products may lose before it.
    allowed = sum(0.5 * limit.eps * expected.abs() + limit.smallest_normal for limit in limits)
    lost = 1e-12 if working_dtype(tensor) == torch.float64 else 2e-6
    allowed = allowed + lost * sum(term.abs() for term in terms)
    close = (made - expected).abs() <= allowed * 1.01  # false where either is not a number
    off = ~close & (expected.abs() <= min(limit.max for limit in limits))
    return not bool(off.any())


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
