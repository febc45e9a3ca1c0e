"""The tensors of a safetensors file, from its header alone.

The format's own library judges whether a header is right; the places are then read from it. Of folders, indexes and
what tensors mean nothing is known here. Read tensors.py before this; pickle_header.py is the twin for torch's files.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

from slerpkit.files import file_size, parse_json_object
from slerpkit.lazy import safetensors
from slerpkit.messages import explain_os_error
from slerpkit.parents.tensors import MAX_DIMENSIONS, MAX_NAME_LENGTH, TensorInfo, broken_file

MAX_HEADER_BYTES = 16_000_000  # of tensors' names and places; the largest models have a tenth of it in a file


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
            if header_length > min(size - 8, MAX_HEADER_BYTES):
                raise broken_file(path, f"its header should be {header_length} bytes, the file has {size}")
            raw_header = stream.read(header_length)
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    header = parse_json_object(raw_header, path)  # it also refuses a name that stands there twice
    check_with_library(path)
    header.pop("__metadata__", None)
    return {name: parse_header_entry(path, name, entry, 8 + header_length) for name, entry in header.items()}


def check_with_library(path: Path) -> None:
    """Raises SlerpMergeError where the format's library does not accept a header.

    It knows dtypes and refuses holes, overlaps, and sizes that shapes, offsets or the file contradict.
    """
    try:
        with safetensors.safe_open(path, framework="np"):
            pass
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise broken_file(path, f"the safetensors library says: {error}") from error


def parse_header_entry(path: Path, name: str, entry: Any, data_start: int) -> TensorInfo:
    """One tensor's line of a header that the library has accepted; data_start: bytes before the first tensor.

    Raises SlerpMergeError for what the library reads and torch cannot hold, or what it takes in an odd spelling.
    """
    well_formed = isinstance(entry, dict) and isinstance(entry["dtype"], str)  # a list, or {"F32": null}
    if not well_formed or len(entry["shape"]) > MAX_DIMENSIONS or any(n >= 1 << 63 for n in entry["shape"]):
        raise broken_file(path, f"its entry for {name!r} is not understood")
    if len(name) > MAX_NAME_LENGTH:
        raise broken_file(path, f"it has a tensor whose name is {len(name):,} characters long")
    begin, end = entry["data_offsets"]
    return TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, data_start + begin, end - begin)
