"""A stretch of the child computed again, in float64, straight from the parents' bytes.

Shares the reading with the merge, and none of its arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import torch
from slerpkit.maths import slerp_coefficients
from slerpkit.merge.arithmetic import vector_weights
from slerpkit.merge.blocks import rows_in, torch_dtype
from slerpkit.merge.tensor_plan import TensorInputs
from slerpkit.parents.tensors import TensorInfo

if TYPE_CHECKING:
    from slerpkit.maths import TensorWeights
    from slerpkit.merge.blocks import BlockReader
    from slerpkit.merge.tensor_plan import TensorPlan
    from slerpkit.recipe import MergeRecipe


def working_dtype(tensor: TensorInputs) -> torch.dtype:
    """The precision that a tensor is computed in: float32, or float64 where a source has it."""
    return torch.float64 if any(info.dtype == "F64" for info in tensor.sources) else torch.float32


def recompute(
    blocks: BlockReader,
    tensor: TensorPlan,
    stretch: range,
    cast_dtype: str | None,
    file: Path,
    weights: TensorWeights,
    recipe: MergeRecipe | None,
) -> bool:
    """Whether a stretch of the child is what its parents make, but for the rounding to the child's dtype.

    recipe: where it is given, the weights are found again from all of the tensor, held in float64 at once.
    """
    used: Sequence[Any] = weights.primary_weight, weights.secondary_weight
    if recipe is not None:
        used = recompute_weights(blocks, tensor, cast_dtype, weights, recipe)
    info = TensorInfo(tensor.name, tensor.dtype, tensor.shape, file, tensor.offset, tensor.byte_count)
    stored = TensorInputs(tensor.name, tensor.shape, (info,))
    for part, sources, base in read_wide(blocks, tensor, stretch, cast_dtype):
        terms = [sources[0]]
        if weights.operation != "copy" or tensor.rows is not None:
            shares = weights_at(used, tensor, part)
            terms = [share * source for share, source in zip(shares, sources)] + ([base] if base is not None else [])
        made = torch.cat([block[0].double() for _, block in blocks.read(stored, part)])
        if not is_right(made, terms, tensor, cast_dtype):
            return False
    return True


def read_wide(
    blocks: BlockReader, tensor: TensorInputs, stretch: range, cast_dtype: str | None, blended: bool = False
) -> Iterator[tuple[range, list[torch.Tensor], torch.Tensor | None]]:
    """(element numbers, [v0, v1] or the copied one, base or None) over a stretch, in float64; task vectors with a base.

    blended: zeros stand for rows that are kept.
    """
    for part, block in blocks.read(tensor, stretch, blended):
        sources = [raw.to(torch.float64, copy=True) for raw in block]
        if cast_dtype is not None and tensor.is_float:
            sources = [source.to(getattr(torch, cast_dtype)).double() for source in sources]
        if len(sources) == 3:
            yield part, [sources[0] - sources[2], sources[1] - sources[2]], sources[2]
        else:
            yield part, sources, None


def recompute_weights(
    blocks: BlockReader, tensor: TensorPlan, cast_dtype: str | None, weights: TensorWeights, recipe: MergeRecipe
) -> Sequence[Any]:
    """A tensor's two weights again, from float64 sums over all of both parents; or those of each of its vectors."""
    if tensor.weights is not None:
        return tensor.weights
    every = range(tensor.element_count)
    pairs = [sources for _, sources, _ in read_wide(blocks, tensor, every, cast_dtype, blended=True)]
    if tensor.vectors != "tensor":
        axis = 0 if tensor.vectors == "first_dim" else 1
        rows = [[source.view(-1, tensor.vector_width) for source in pair] for pair in pairs]
        sums = [torch.stack([(a * b).sum(axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]) for v0, v1 in rows]
        return vector_weights(torch.cat(sums, dim=1) if axis else torch.stack(sums).sum(0), tensor.t)
    squared, other_squared, dot = (
        math.fsum(float(torch.dot(pair[i], pair[j])) for pair in pairs) for i, j in ((0, 0), (1, 1), (0, 1))
    )
    found = slerp_coefficients(
        dot,
        math.sqrt(squared),
        math.sqrt(other_squared),
        tensor.t,
        "lerp" if tensor.operation == "lerp" else recipe.method,
        recipe.dot_threshold,
        recipe.epsilon,
    )
    # At the very threshold float32 sums may fall on the other side than float64 ones; both are right.
    used = found if found.operation == weights.operation else weights
    return used.primary_weight, used.secondary_weight


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
