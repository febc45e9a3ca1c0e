"""What each tensor of the child is made from, where its bytes go, and what became of it.

Descriptions alone: nothing here reads a weight, and nothing knows why a tensor got its t (plan.py decides that).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slerpkit.parents.checkpoint import WEIGHTS_SINGLE
from slerpkit.parents.tensors import DTYPE_BYTES

if TYPE_CHECKING:
    from slerpkit.maths import TensorWeights
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.parity.report import RowMap


@dataclass(frozen=True)
class TensorInputs:
    """What is read to make, or to measure, one tensor."""

    name: str
    shape: tuple[int, ...]  # of the result
    sources: tuple[TensorInfo, ...]  # (primary, secondary), (primary, secondary, base), or the one that is copied
    vectors: str = "tensor"  # what is taken as one vector, as MergeRecipe.vectors
    rows: RowMap | None = None  # of `sources`, where rows follow tokens

    @functools.cached_property
    def element_count(self) -> int:
        return math.prod(self.shape)

    @property
    def source_bytes(self) -> int:
        return sum(info.byte_count for info in self.sources)

    @property
    def is_float(self) -> bool:
        return self.sources[0].is_float

    @property
    def row_elements(self) -> int:
        """Elements that stand for one token, where rows follow tokens."""
        return self.element_count // len(self.rows.is_blended)

    @property
    def vector_width(self) -> int:
        """Elements in a row, when the tensor is laid out so that its vectors are the rows, or are the columns.

        mergekit's nuslerp_row_wise takes vectors along dimension 0, which here are columns of a matrix of shape[0]
        rows; without it they run along the last dimension. Where rows follow tokens, a row is a token's.
        """
        if self.vectors == "tensor":
            return self.row_elements
        return self.shape[-1] if self.vectors == "last_dim" else math.prod(self.shape[1:])


@dataclass(frozen=True)
class TensorPlan(TensorInputs):
    """One tensor of the child: what it is made from, how, and where its bytes go."""

    dtype: str = ""  # the child's, safetensors' name
    operation: str = "slerp"  # "slerp", "lerp" or "copy"; slerp may still fall back to lerp or copy once measured
    t: float = 0.0
    weights: tuple[float, float] | None = None  # of a LERP that is not (1 - t, t)
    offset: int = 0  # bytes from the start of the child's shard
    folder: str = ""  # as TensorSources.folder

    @property
    def is_measured(self) -> bool:
        """Whether the parents are held against each other before the child's tensor is written."""
        return len(self.sources) > 1 and (self.operation != "copy" or not self.is_float)

    @property
    def byte_count(self) -> int:
        return self.element_count * DTYPE_BYTES[self.dtype]


def prefix_of(file_name: str) -> str:
    """The folder that a file stands in below the child's, with its slash; empty for the child's own."""
    return "".join(file_name.rpartition("/")[:2])


@dataclass(frozen=True)
class ShardPlan:
    """One file of the child: its header, ready to write, and the tensors behind it."""

    file_name: str  # below the child's folder; that of a module's weights begins with the module's own
    header: bytes
    tensors: tuple[TensorPlan, ...]

    @property
    def prefix(self) -> str:
        """What tensors are called by in the plan and not in the file: a module's folder and a slash, or nothing."""
        return prefix_of(self.file_name)

    @property
    def byte_count(self) -> int:
        return len(self.header) + sum(tensor.byte_count for tensor in self.tensors)


@dataclass(frozen=True)
class MergedTensor:
    """A tensor that is whole in the child. Observers are told of each, in the child's order."""

    tensor: TensorPlan
    weights: TensorWeights
    seconds: float  # from its first byte read to its last byte written
    non_finite: int  # values in the child that are infinite or not a number


@dataclass(frozen=True)
class MergeResult:
    """What streaming the tensors yielded."""

    tensors: tuple[MergedTensor, ...]
    seconds: float  # first byte read to last byte written
    device: str
    resumed_files: int = 0  # taken over from an earlier run

    def count(self, operation: str) -> int:
        return sum(merged.weights.operation == operation for merged in self.tensors)


def cut_shards(tensors: Sequence[TensorPlan], max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Consecutive tensors, in layer order, into files of at most `max_shard_bytes` of tensor data.

    A tensor larger than that has a file of its own.
    """
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.byte_count > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.byte_count
    return groups


def lay_out_shard(file_name: str, group: Sequence[TensorPlan]) -> ShardPlan:
    """The header of one safetensors file and the place of each tensor behind it.

    Wider dtypes come first, as the format's library writes them, so that every tensor is aligned.
    """
    ordered = sorted(group, key=lambda tensor: -DTYPE_BYTES[tensor.dtype])
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin, prefix = 0, prefix_of(file_name)
    for tensor in ordered:
        end = begin + tensor.byte_count
        name = tensor.name.removeprefix(prefix)
        entries[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    header = struct.pack("<Q", len(text)) + text
    begins = (entries[tensor.name.removeprefix(prefix)]["data_offsets"][0] for tensor in ordered)
    placed = tuple(dataclasses.replace(tensor, offset=len(header) + begin) for tensor, begin in zip(ordered, begins))
    return ShardPlan(file_name, header, placed)


def plan_shards(tensors: Sequence[TensorPlan], max_shard_bytes: int) -> tuple[ShardPlan, ...]:
    """The child's files: one, or numbered ones with an index beside them; and one in the folder of each module."""
    by_folder: dict[str, list[TensorPlan]] = {"": []}
    for tensor in tensors:
        by_folder.setdefault(tensor.folder, []).append(tensor)
    groups = cut_shards(by_folder.pop(""), max_shard_bytes)
    of_modules = [lay_out_shard(f"{folder}/{WEIGHTS_SINGLE}", group) for folder, group in by_folder.items()]
    if len(groups) == 1:
        return lay_out_shard(WEIGHTS_SINGLE, groups[0]), *of_modules
    count = len(groups)
    names = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    return *(lay_out_shard(name, group) for name, group in zip(names, groups)), *of_modules
