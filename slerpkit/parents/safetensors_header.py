"""The tensors of a safetensors file, from its header alone."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slerpkit.files import file_size, parse_json_object
from slerpkit.lazy import safetensors
from slerpkit.messages import explain_os_error
from slerpkit.parents.tensors import DTYPE_BYTES, MAX_DIMENSIONS, TensorInfo, broken_file

MAX_HEADER_BYTES = 16_000_000  # of tensors' names and places; the largest models have a tenth of it in a file


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file, from its header alone; no weight is read.

    Format: 8 bytes little-endian header length, JSON header, data. https://github.com/huggingface/safetensors
    Raises SlerpMergeError where the header is not valid, or promises what the file does not hold.
    """
    size = file_size(path)
    try:
        with open(path, "rb") as stream:
            start = stream.read(8)
            header_length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if header_length > min(size - 8, MAX_HEADER_BYTES):
                raise broken_file(path, f"its header should be {header_length} bytes, the file has {size}")
            raw_header = stream.read(header_length)
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    header = parse_json_object(raw_header, path)
    header.pop("__metadata__", None)
    data_start = 8 + header_length
    tensors = {name: parse_header_entry(path, name, entry, data_start) for name, entry in header.items()}
    check_extents(path, tensors.values(), data_start, size)
    validate_with_library(path)
    return tensors


def parse_header_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor's line of a safetensors header, believed only after its parts agree with each other."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        well_typed = isinstance(dtype, str) and len(shape) <= MAX_DIMENSIONS
        well_typed = well_typed and all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        well_typed = False
    if not well_typed:
        raise broken_file(path, f"its entry for {name!r} is not understood")
    expected = math.prod(shape) * DTYPE_BYTES[dtype] if dtype in DTYPE_BYTES else end - begin
    if end - begin != expected:
        raise broken_file(path, f"{name!r} has {end - begin} bytes where its shape and dtype need {expected}")
    return TensorInfo(name, dtype, shape, path, data_start + begin, end - begin)


def check_extents(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Tensors must lie end to end and fill the file exactly, as the format demands."""
    position = data_start
    for info in sorted(tensors, key=lambda info: (info.offset, info.byte_count)):
        if info.offset != position:
            fault = "overlaps the tensor before it" if info.offset < position else "leaves a hole before it"
            raise broken_file(path, f"{info.name!r} {fault}")
        position += info.byte_count
    if position != size:
        raise broken_file(path, f"its header speaks of {position} bytes, the file has {size}")


def validate_with_library(path: Path) -> None:
    """The format's own library has the last word on whether a header is valid."""
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise broken_file(path, f"the safetensors library says: {error}") from error
