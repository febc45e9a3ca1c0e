"""A stretch of the child computed again, in float64, straight from the parents' bytes.

Shares with the merge how bytes are read, what a stored number is worth, and NuSLERP's weights; none of its sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import numpy
from slerpkit.maths import slerp_coefficients
from slerpkit.merge.arithmetic import vector_weights
from slerpkit.merge.blocks import BlockReader, rows_in
from slerpkit.merge.tensor_plan import TensorInputs
from slerpkit.parents.dtypes import EPSILON, SMALLEST_NORMAL, converted, stored_dtype, widen
from slerpkit.parents.tensors import MAX_FINITE, SAFETENSORS_NAMES, TensorInfo

if TYPE_CHECKING:
    from slerpkit.maths import TensorWeights
    from slerpkit.merge.tensor_plan import TensorPlan
    from slerpkit.recipe import MergeRecipe


def working_dtype(tensor: TensorInputs) -> numpy.dtype:
    """The precision that a tensor is computed in: float32, or float64 where a source has it."""
    return numpy.dtype("f8" if any(info.dtype == "F64" for info in tensor.sources) else "f4")


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

    recipe: where it is given, the weights are found again from all of the tensor.
    """
    used: Sequence[Any] = weights.primary_weight, weights.secondary_weight
    if recipe is not None:
        used = recompute_weights(blocks, tensor, cast_dtype, weights, recipe)
    info = TensorInfo(tensor.name, tensor.dtype, tensor.shape, file, tensor.offset, tensor.byte_count)
    stored = TensorInputs(tensor.name, tensor.shape, (info,))
    if not tensor.is_float:
        pairs = zip(blocks.read(tensor, stretch), BlockReader(blocks.reader).read(stored, stretch))
        return all(numpy.array_equal(sources[0], made[0]) for (_, sources), (_, made) in pairs)
    for part, sources, base in read_wide(blocks, tensor, stretch, cast_dtype):
        terms = [sources[0]]
        if weights.operation != "copy" or tensor.rows is not None:
            shares = weights_at(used, tensor, part)
            terms = [share * source for share, source in zip(shares, sources)]
        terms += [base] if base is not None else []
        made = numpy.concatenate([wide(block[0]) for _, block in blocks.read(stored, part)])
        if not is_right(made, terms, tensor, cast_dtype):
            return False
    return True


def wide(stored: numpy.ndarray) -> numpy.ndarray:
    """Stored real numbers in float64."""
    values = numpy.empty(stored.shape, "f8")
    widen(stored, values)
    return values


def read_wide(
    blocks: BlockReader, tensor: TensorInputs, stretch: range, cast_dtype: str | None, blended: bool = False
) -> Iterator[tuple[range, list[numpy.ndarray], numpy.ndarray | None]]:
    """(element numbers, [v0, v1] or the copied one, base or None) over a stretch, in float64; task vectors with a base.

    blended: zeros stand for rows that are kept.
    """
    for part, block in blocks.read(tensor, stretch, blended):
        if cast_dtype is not None:
            block = [converted(stored, stored_dtype(SAFETENSORS_NAMES[cast_dtype])) for stored in block]
        sources = [wide(stored) for stored in block]
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
    pairs = (sources for _, sources, _ in read_wide(blocks, tensor, every, cast_dtype, blended=True))
    if tensor.vectors != "tensor":
        axis = 0 if tensor.vectors == "first_dim" else 1
        rows = ([source.reshape(-1, tensor.vector_width) for source in pair] for pair in pairs)
        sums = [[(a * b).sum(axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))] for v0, v1 in rows]
        return vector_weights(numpy.concatenate(sums, axis=1) if axis else numpy.sum(sums, axis=0), tensor.t)
    products = [[float(numpy.dot(a, b)) for a, b in ((v0, v0), (v1, v1), (v0, v1))] for v0, v1 in pairs]
    squared, other_squared, dot = map(math.fsum, zip(*products))
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
    kept = [numpy.repeat(tensor.rows.is_kept(source)[rows], tensor.row_elements) for source in (0, 1)]
    return [
        numpy.where(kept[source], 1.0, numpy.where(kept[1 - source], 0.0, weight))
        for source, weight in enumerate(spread)
    ]


def spread_weight(weight: Any, tensor: TensorInputs, stretch: range) -> Any:
    """A weight for each element of a stretch, from one for each row or column; a number stays one."""
    if not isinstance(weight, numpy.ndarray):
        return weight
    width = tensor.vector_width
    if tensor.vectors == "first_dim":
        return numpy.tile(weight, len(stretch) // width)
    return numpy.repeat(weight[stretch.start // width : stretch.stop // width], width)


def is_right(made: numpy.ndarray, terms: Sequence[numpy.ndarray], tensor: TensorPlan, cast_dtype: str | None) -> bool:
    """Whether what was made is the sum of its terms, in float64, but for what roundings may lose."""
    roundings = [tensor.dtype] + ([SAFETENSORS_NAMES[cast_dtype]] if cast_dtype else [])
    expected = sum(terms)
    # Half a unit of the last place for each rounding, and what float32 sums and products may lose before it.
    allowed = sum(0.5 * EPSILON[name] * numpy.abs(expected) + SMALLEST_NORMAL[name] for name in roundings)
    lost = 1e-12 if working_dtype(tensor) == numpy.float64 else 2e-6
    allowed = allowed + lost * sum(numpy.abs(term) for term in terms)
    close = numpy.abs(made - expected) <= allowed * 1.01  # false where either is not a number
    off = ~close & (numpy.abs(expected) <= min(MAX_FINITE[name] for name in roundings))
    return not bool(off.any())
