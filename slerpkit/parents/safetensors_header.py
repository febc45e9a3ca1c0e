"""The tensors of a safetensors file, from its header alone.

What a header says is believed once it is held against the file's size, as the format's own library does it; that maps
the whole file for it, which not every disk and not every limit of memory lets it. Of folders, indexes and what tensors
mean nothing is known here. Read tensors.py before this; pickle_header.py is the twin for torch's files.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slerpkit.files import file_size, parse_json_object
from slerpkit.messages import explain_os_error, format_bytes
from slerpkit.parents.tensors import (
    DTYPE_BYTES,
    MAX_DIMENSIONS,
    MAX_NAME_LENGTH,
    TensorInfo,
    broken_file,
    foreign_file,
)

MAX_HEADER_BYTES = 16_000_000  # of tensors' names and places; the largest models have a tenth of it in a file
FORMAT_HEADER_BYTES = 100_000_000  # the format allows no longer one
ELEMENT_BITS = {**{dtype: 8 * width for dtype, width in DTYPE_BYTES.items()}, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file by name, from its header alone; no weight is read.

    Format: 8 bytes little-endian header length, JSON header, data. https://github.com/huggingface/safetensors
    Raises SlerpMergeError where the header is not valid, or promises what the file does not hold.
    """
    size = file_size(path)
    try:
        with open(path, "rb") as stream:
            start = stream.read(8)
            header_length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if header_length > min(size - 8, FORMAT_HEADER_BYTES):
                raise broken_file(path, f"its header should be {header_length} bytes, the file has {size}")
            if header_length > MAX_HEADER_BYTES:
                raise foreign_file(path, f"has a header of more than {format_bytes(MAX_HEADER_BYTES)}")
            raw_header = stream.read(header_length)
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    header = parse_json_object(raw_header, path)  # it also refuses a name that stands there twice
    metadata = header.pop("__metadata__", None)
    is_text = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    if metadata is not None and not is_text:
        raise broken_file(path, "its metadata is not understood")
    tensors = {name: parse_header_entry(path, name, entry, 8 + header_length) for name, entry in header.items()}
    check_layout(path, tensors.values(), 8 + header_length, size)
    return tensors


def parse_header_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor's line of a header; data_start: bytes before the first tensor.

    Raises SlerpMergeError where it is no such line, or means what torch cannot hold.
    """
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise broken_file(path, f"its entry for {name!r} is not understood") from error
    are_counts = all(type(number) is int and 0 <= number < 1 << 63 for number in numbers)
    if not are_counts or not isinstance(dtype, str) or len(shape) > MAX_DIMENSIONS or end < begin:
        raise broken_file(path, f"its entry for {name!r} is not understood")
    if len(name) > MAX_NAME_LENGTH:
        raise broken_file(path, f"it has a tensor whose name is {len(name):,} characters long")
    if dtype not in ELEMENT_BITS:
        raise foreign_file(path, f"holds {name!r} in the dtype {dtype!r}, which is not known here")
    return TensorInfo(name, dtype, tuple(shape), path, data_start + begin, end - begin)


def check_layout(path: Path, tensors: Iterable[TensorInfo], data_start: int, size: int) -> None:
    """Raises SlerpMergeError where tensors leave holes, overlap, or contradict their shapes or the file's size."""
    place = data_start
    for info in sorted(tensors, key=lambda info: (info.offset, info.byte_count)):
        if info.offset != place:
            raise broken_file(path, f"{info.name!r} does not begin where the tensor before it ends")
        if info.byte_count * 8 != info.element_count * ELEMENT_BITS[info.dtype]:
            raise broken_file(path, f"{info.name!r} has {info.byte_count} bytes, which are not those of its shape")
        place += info.byte_count
    if place != size:
        raise broken_file(path, f"its tensors end at byte {place}, the file at byte {size}")
