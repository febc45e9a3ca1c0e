"""A tensor: where its bytes lie, what its name tells, and the one reader of bytes.

It knows neither file formats (safetensors_header.py, pickle_header.py) nor models (checkpoint.py); whatever is told of
a TensorInfo has been checked by the module that made it. Read files.py before this.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from slerpkit.files import FileHandles
from slerpkit.lazy import numpy
from slerpkit.messages import SlerpMergeError, explain_os_error

COMPARED_BYTES = 1 << 20  # of two tensors, read and held against each other at once
MAX_DIMENSIONS = 64  # as torch has them
MAX_LAYER_INDEX = 99_999  # a number in a tensor's name above this is not a layer
# safetensors' names; bytes per element. Sub-byte types are packed quantised weights: refused by name.
DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
    "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "C64": 8,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "C64": "complex64",
}  # fmt: skip
SAFETENSORS_NAMES = {torch_name: name for name, torch_name in TORCH_NAMES.items()}
MAX_FINITE = {
    "F64": 1.7976931348623157e308,
    "F32": 3.4028234663852886e38,
    "F16": 65504.0,
    "BF16": 3.3895313892515355e38,
}
COMPONENTS = (("attention", ("attn", "attention")), ("mlp", ("mlp", "feed_forward", "ffn", "fc1", "fc2")))


def component_of(tensor_name: str) -> str:
    """attention, mlp or other (norms among them): what people give a gradient of its own."""
    if "norm" in tensor_name:
        return "other"
    components = (component for component, marks in COMPONENTS if any(mark in tensor_name for mark in marks))
    return next(components, "other")


@functools.lru_cache(maxsize=1 << 18)  # large models have tens of thousands of names, each asked for many times
def find_layer(tensor_name: str) -> tuple[str, int] | None:
    """(stack, index) of a tensor inside a stack of layers: its name up to the first number, and that number.

    The first number is the layer; later ones are experts or parts of it. None outside every stack.
    """
    parts = tensor_name.split(".")
    for depth, part in enumerate(parts):
        if part.isascii() and part.isdigit() and len(part) < 9 and int(part) <= MAX_LAYER_INDEX:
            return ".".join(parts[:depth]), int(part)
    return None


def renumber(tensor_name: str, index: int) -> str:
    """The name of the same tensor in another layer. The name must be that of a tensor inside a stack."""
    stack, _ = find_layer(tensor_name)
    parts = tensor_name.split(".")
    parts[len(stack.split(".")) if stack else 0] = str(index)
    return ".".join(parts)


def stands_before_layers(tensor_name: str) -> bool:
    """Whether a tensor outside the layers is read before them: an embedding, and no head, of whatever name."""
    return bool(re.search(r"emb(?!ed_out)|wte|wpe|relative_pe|^shared\.", tensor_name))


def layer_positions(names: Iterable[str]) -> dict[str, float]:
    """Where each tensor stands in its stack of layers: 0 first, 1 last, 0 outside layers, 1 in a stack of one."""
    layers = {name: find_layer(name) for name in names}
    last_index: dict[str, int] = {}
    for stack, index in filter(None, layers.values()):
        last_index[stack] = max(index, last_index.get(stack, 0))
    positions = dict.fromkeys(layers, 0.0)
    for name, layer in layers.items():
        if layer is not None:
            stack, index = layer
            positions[name] = index / last_index[stack] if last_index[stack] else 1.0
    return positions


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts layer 2 before layer 10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isascii() and part.isdigit() else (1, 0, part) for part in parts]


def dtype_width(name: str) -> int:
    """Bytes of one element of the dtype that torch calls by this name."""
    return DTYPE_BYTES[SAFETENSORS_NAMES[name]]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor's bytes lie, as its file's header says and its file's size confirms."""

    name: str
    dtype: str  # safetensors' name: BF16, F32, ...
    shape: tuple[int, ...]
    file: Path
    offset: int  # bytes from the start of the file
    byte_count: int

    @property
    def element_count(self) -> int:
        """1 for a tensor of no dimension."""
        return math.prod(self.shape)

    @property
    def is_float(self) -> bool:
        """Whether its values are real numbers that can be blended; quantised ones are not."""
        return self.dtype in FLOAT_DTYPES


def broken_file(path: Path, reason: str) -> SlerpMergeError:
    """The error for a file whose content cannot be believed."""
    return SlerpMergeError(
        f"{path} is damaged or incomplete: {reason}.",
        "Its download was probably cut short. Delete this file and download it again.",
    )


class TensorReader:
    """Reads stretches of tensors into buffers: the one way weights come in, for every format. For one thread.

    It owns the files that it opens and closes them at the end of a `with`. Several tensors can be read by turns, each
    as a `source` of its own: the number of the parent, or of whatever else the tensors are made from.
    """

    def __init__(self) -> None:
        self._handles = FileHandles()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its files; others, and the same ones, can be read afterwards."""
        self._handles.close()

    def begin(self, info: TensorInfo, start: int, source: int = 0) -> Callable[[memoryview], None]:
        """A function that fills one buffer after another with the tensor's bytes, from byte `start` on.

        Both raise SlerpMergeError where the file cannot be read or ends early.
        """
        try:
            handle = self._handles.at(info.file, "r", info.offset + start, source)
        except OSError as error:
            raise explain_os_error(error, info.file, f"read the tensor {info.name} from") from error
        return functools.partial(self._fill, handle, info)

    def read_into(self, info: TensorInfo, start: int, view: memoryview) -> None:
        """Fills `view` with the tensor's bytes from byte `start` on."""
        self.begin(info, start)(view)

    def read_rows(self, info: TensorInfo, rows: numpy.ndarray, view: memoryview, source: int = 0) -> None:
        """Fills `view` with the rows of a tensor whose numbers are in `rows` (int64); with zeros where one is below 0.

        Rows that follow one another in the file are read at once.
        """
        if not len(rows):
            return
        width = len(view) // len(rows)
        continues = (numpy.diff(rows) == 1) & (rows[:-1] >= 0) | (rows[1:] < 0) & (rows[:-1] < 0)
        starts = [0, *(numpy.flatnonzero(~continues) + 1).tolist(), len(rows)]
        for start, stop in zip(starts, starts[1:]):
            stretch = view[start * width : stop * width]
            if rows[start] < 0:
                stretch[:] = bytes(len(stretch))
            else:
                self.begin(info, int(rows[start]) * width, source)(stretch)

    @staticmethod
    def _fill(handle: io.FileIO, info: TensorInfo, view: memoryview) -> None:
        try:
            filled = handle.readinto(view)
            while filled < len(view):  # a signal or a network disk may cut a read short
                count = handle.readinto(view[filled:])
                if not count:
                    raise broken_file(info.file, f"it ends inside {info.name!r}; it changed since it was opened")
                filled += count
        except OSError as error:
            raise explain_os_error(error, info.file, f"read the tensor {info.name} from") from error


def have_same_bytes(first: TensorInfo, second: TensorInfo) -> bool:
    """Whether two tensors of one shape hold the same bytes; stops at the first difference.

    Raises SlerpMergeError where a file cannot be read.
    """
    if first.dtype != second.dtype:
        return False
    if (first.file, first.offset) == (second.file, second.offset):
        return True
    with TensorReader() as reader:
        for start in range(0, first.byte_count, COMPARED_BYTES):
            stretches = [bytearray(min(COMPARED_BYTES, first.byte_count - start)) for _ in range(2)]
            for info, stretch in zip((first, second), stretches):
                reader.read_into(info, start, memoryview(stretch))
            if stretches[0] != stretches[1]:
                return False
    return True
