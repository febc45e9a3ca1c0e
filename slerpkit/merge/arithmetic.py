"""The arithmetic on one chunk, on one device.

Knows tensors of torch alone: no file, no name, no plan.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from slerpkit.lazy import torch
from slerpkit.maths import exact_sum
from slerpkit.parents.tensors import CHUNK_ELEMENTS, DTYPE_BYTES, TORCH_NAMES

NORM_ROW = 256  # elements whose squares are added one after the other; a longer sum in float32 loses digits


class ChunkBuffer:
    """Room for one chunk of any dtype, as bytes for files and as flat tensors for torch."""

    def __init__(self) -> None:
        # Mapped memory is aligned as vector units like it, and takes no room until it is used.
        backing = mmap.mmap(-1, CHUNK_ELEMENTS * max(DTYPE_BYTES.values()))
        self.memory = memoryview(backing)
        self._bytes = torch.frombuffer(backing, dtype=torch.uint8)
        self._typed: dict[str, torch.Tensor] = {}

    def typed(self, dtype: str) -> torch.Tensor:
        """All of this memory as a flat tensor; dtype is safetensors' name."""
        if dtype not in self._typed:
            self._typed[dtype] = self._bytes.view(torch_dtype(dtype))
        return self._typed[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """torch's dtype for safetensors' name of it."""
    return getattr(torch, TORCH_NAMES[name])


@dataclass(frozen=True)
class Sums:
    """What a span tells about a pair of tensors."""

    primary_squared: tuple[float, ...]  # v0 . v0, a partial sum for each chunk
    secondary_squared: tuple[float, ...]  # v1 . v1
    dot: tuple[float, ...]  # v0 . v1
    identical: bool  # every byte agrees
    columns: torch.Tensor | None = None  # (3, columns), float64: the same for each column, where they are vectors


def total_sums(sums: Sequence[Sums]) -> tuple[float, float, float]:
    """(v0 . v1, |v0|, |v1|) over all spans of a tensor. The sum is exact, so that no order shows in it."""
    primary_squared, secondary_squared, dot = (
        exact_sum(value for part in sums for value in getattr(part, name))
        for name in ("primary_squared", "secondary_squared", "dot")
    )
    return dot, math.sqrt(primary_squared), math.sqrt(secondary_squared)


class ChunkArithmetic:
    """The arithmetic on one chunk, with one worker's scratch memory on one device.

    Precision: float32, or float64 where a source is float64. Results are rounded once, to the child's dtype.
    """

    def __init__(self, device: str, cast_dtype: str | None = None) -> None:
        self.device = device
        self.cast = getattr(torch, cast_dtype) if cast_dtype else None
        self._scratch: dict[tuple[int, Any], torch.Tensor] = {}

    def scratch(self, side: int, dtype: torch.dtype) -> torch.Tensor:
        if (side, dtype) not in self._scratch:
            self._scratch[side, dtype] = torch.empty(CHUNK_ELEMENTS, dtype=dtype, device=self.device)
        return self._scratch[side, dtype]

    def give_back(self) -> None:
        """Gives its memory on the device back."""
        self._scratch.clear()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def load(self, side: int, raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The chunk in working precision on the device; itself where it already is."""
        raw = self.round(raw)
        if raw.dtype == dtype and self.device == "cpu":
            return raw
        return self.scratch(side, dtype)[: raw.numel()].copy_(raw)

    def round(self, raw: torch.Tensor) -> torch.Tensor:
        """The chunk rounded to the recipe's dtype, where it has one."""
        return raw if self.cast is None or raw.dtype == self.cast else raw.to(self.cast)

    def load_pair(self, chunk: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """v0 and v1 in working precision; with a third part, the base, what each learned since; and the base."""
        loaded = [self.load(side, raw, dtype) for side, raw in enumerate(chunk)]
        if len(loaded) == 3:
            for side in (0, 1):
                out = self.scratch(side, dtype)[: loaded[2].numel()]
                loaded[side] = torch.sub(loaded[side], loaded[2], out=out)
        return loaded

    def measure(self, chunk: Sequence[torch.Tensor], dtype: torch.dtype) -> tuple[float, float, float]:
        """(v0 . v0, v1 . v1, v0 . v1) of one chunk, summed in working precision."""
        v0, v1, *_ = self.load_pair(chunk, dtype)
        # torch.sum adds pairwise and is off by 1e-7 here; torch.dot in float32 was measured off by 1e-5.
        squares = squared_norm(v0), squared_norm(v1)
        room = self.scratch(3, dtype)[: v0.numel()] if v0 is chunk[0] else v0  # what was read is compared later
        sums = *squares, torch.mul(v0, v1, out=room).sum().item()
        if not math.isfinite(sum(sums)) and dtype == torch.float32 and self.device != "mps":
            return self.measure(chunk, torch.float64)  # large values overflow a float32 square
        return sums

    def measure_vectors(self, chunk: Sequence[torch.Tensor], dtype: torch.dtype, width: int, axis: int) -> torch.Tensor:
        """The same three sums for each vector of a chunk of whole rows `width` long: (3, vectors), float64, on the cpu.

        axis 1: the rows are the vectors; axis 0: the columns are.
        """
        v0, v1 = (part.view(-1, width) for part in self.load_pair(chunk, dtype)[:2])
        # In float64, for a vector is short and its sum has no digits to spare. MPS knows none.
        wide = dtype if self.device == "mps" else torch.float64
        if wide != dtype:
            rooms = [self.scratch(side, wide)[: v0.numel()].view(-1, width) for side in (0, 1)]
            v0, v1 = rooms[0].copy_(v0), rooms[1].copy_(v1)
        room = self.scratch(3, wide)[: v0.numel()].view(-1, width)
        sums = [torch.mul(a, b, out=room).sum(dim=axis) for a, b in ((v0, v0), (v1, v1), (v0, v1))]
        return torch.stack(sums).cpu().double()

    def blend(
        self,
        chunk: Sequence[torch.Tensor],
        dtype: torch.dtype,
        weights: tuple[float, float],
        out: torch.Tensor,
    ) -> None:
        """out = w0 * v0 + w1 * v1, and the base where there is one, rounded to out's dtype."""
        v0, v1, *base = self.load_pair(chunk, dtype)
        result = torch.mul(v0, weights[0], out=self.scratch(0, dtype)[: v0.numel()])
        result.add_(v1, alpha=weights[1])
        if base:
            result.add_(base[0])
        out.copy_(self.round(result))

    def blend_vectors(
        self,
        chunk: Sequence[torch.Tensor],
        dtype: torch.dtype,
        weights: Sequence[torch.Tensor],  # two, shaped to stand beside the rows or above the columns
        width: int,
        out: torch.Tensor,
    ) -> None:
        """The same with weights of its own for each vector."""
        v0, v1, *base = (part.view(-1, width) for part in self.load_pair(chunk, dtype))
        first, second = (part.to(self.device, dtype) for part in weights)
        result = torch.mul(v0, first, out=self.scratch(0, dtype)[: v0.numel()].view(-1, width))
        result.addcmul_(v1, second)
        if base:
            result += base[0]
        out.view(-1, width).copy_(self.round(result))


def squared_norm(values: torch.Tensor) -> float:
    """v . v of a flat tensor, in its own precision.

    torch's norm runs through memory once and writes nothing, but adds one after the other: in float32 it was
    measured off by 2e-8 over rows of 256 random values (9e-7 where all are equal), by 3e-6 over 16,384.
    torch.sum then adds the rows pairwise.
    """
    whole = values.numel() // NORM_ROW * NORM_ROW
    if whole < NORM_ROW * NORM_ROW:  # few rows: their roundings would not even out
        return values.square().sum().item()
    rows = torch.linalg.vector_norm(values[:whole].view(-1, NORM_ROW), dim=1).square_().sum()
    return (rows + values[whole:].square().sum()).item() if whole < values.numel() else rows.item()


def could_be_equal(sums: tuple[float, float, float]) -> bool:
    """Equal bytes have equal norms, or sums that are no number; only then is it worth looking at every byte."""
    return sums[0] == sums[1] or not math.isfinite(sum(sums))


def count_non_finite(tensor: torch.Tensor) -> int:
    """Infinite or not-a-number values of a floating-point tensor; 0 of any other."""
    if not tensor.is_floating_point():
        return 0
    if math.isfinite(tensor.sum().item()):
        return 0  # one infinite or undefined value would have made the sum so; this is 40 times as fast
    return tensor.numel() - int(torch.isfinite(tensor).sum())
