"""The tensors of a torch .bin file, without running what is in it.

A pickle is a program. Here it can do nothing but describe tensors, and what it describes is held against the file.
Of folders, indexes and what tensors mean nothing is known here, and torch is not asked. Read tensors.py before this.
"""

from __future__ import annotations

import bisect
import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slerpkit.files import file_size
from slerpkit.messages import SlerpMergeError, explain_os_error, format_bytes, is_utf8
from slerpkit.parents.safetensors_header import MAX_HEADER_BYTES
from slerpkit.parents.tensors import DTYPE_BYTES, MAX_DIMENSIONS, TensorInfo, broken_file, foreign_file


class WholeObject(pickle.UnpicklingError):
    """A pickle makes an object of some class, as torch.save makes it of a model that is not asked for its weights."""


class Description:
    """What a pickle is given for an object that it wants to build."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a pickle has no business changing what describes a tensor")


@dataclass(frozen=True)
class PickledStorage(Description):
    """A stretch of a `.bin` file that tensors are cut from."""

    key: str
    dtype: str  # safetensors' name
    element_count: int


@dataclass(frozen=True)
class PickledTensor(Description):
    """A tensor as a `.bin` file's pickle describes it."""

    storage: PickledStorage
    first_element: int  # of the storage
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in elements, as torch counts them


class UnpickledDict(OrderedDict):
    """An OrderedDict that takes the attributes torch leaves on a state dict, and drops them."""

    def __setstate__(self, state: Any) -> None:
        """`_metadata` and the like say nothing about tensors."""


class DescriptionUnpickler(pickle.Unpickler):
    """Reads what tensors a `.bin` file describes and can build nothing else.

    A pickle names the functions that rebuild its objects. Here each of the few names that a state dict
    needs stands for a plain description; every other name is refused. Nothing of torch is called, so
    no weight is loaded and nothing of the file's choosing runs: stricter than `weights_only=True`.
    """

    storage_dtypes = {
        "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
        "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
        "BoolStorage": "BOOL",
    }  # fmt: skip
    # Opcodes of a state dict. What is left out can allocate without limit, or has no place in one.
    allowed_opcodes = frozenset(
        """
        PROTO FRAME STOP MARK POP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 BINFLOAT
        STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
        EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE BUILD
        GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE BINPERSID
        """.split()  # noqa: SIM905
    )

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream, encoding="utf-8")
        self.path = path
        self.storages: dict[str, PickledStorage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name. Raises SlerpMergeError for every name that a state dict does not need."""
        if module in ("torch", "torch.storage") and name in self.storage_dtypes:
            return self.storage_dtypes[name]
        stand_ins = {
            ("collections", "OrderedDict"): UnpickledDict,
            ("torch._utils", "_rebuild_tensor_v2"): self.rebuild_tensor,
            ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
        }
        if (module, name) not in stand_ins:
            raise SlerpMergeError(
                f"{self.path} wants to run code ({module}.{name}); it was not loaded.",
                "Weights need no code. Use a safetensors copy of this model from a source that you trust.",
            )
        return stand_ins[module, name]

    @staticmethod
    def rebuild_tensor(storage: Any, first: Any, shape: Any, strides: Any, *_: Any) -> PickledTensor:
        """The description of a tensor. Raises UnpicklingError where its numbers cannot be one's."""
        numbers = (first, *shape, *strides)
        if not isinstance(storage, PickledStorage) or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
            raise pickle.UnpicklingError("a tensor's description is not understood")
        if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
            raise pickle.UnpicklingError("a tensor has not as many strides as dimensions")
        return PickledTensor(storage, first, tuple(shape), tuple(strides))

    def persistent_load(self, identifier: Any) -> PickledStorage:
        """The description of a storage. Raises UnpicklingError where it cannot be one."""
        kind, dtype, key, _location, count, *_ = identifier
        if kind != "storage" or dtype not in DTYPE_BYTES or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage's description is not understood")
        return self.storages.setdefault(str(key), PickledStorage(str(key), dtype, count))

    @classmethod
    def measure(cls, data: bytes) -> int:
        """The length of the pickle that `data` begins with. Raises ValueError where it does not end there.

        Refuses opcodes and memo numbers that could exhaust memory before find_class is ever asked.
        """
        for opcode, argument, position in pickletools.genops(data):
            if opcode.name in ("NEWOBJ", "NEWOBJ_EX", "OBJ", "INST"):
                raise WholeObject
            if opcode.name not in cls.allowed_opcodes:
                raise pickle.UnpicklingError(f"the opcode {opcode.name} has no place in a state dict")
            if "PUT" in opcode.name and int(argument) > len(data):
                raise pickle.UnpicklingError("a memo number is out of range")
            if opcode.name == "STOP":
                return position + 1
        raise ValueError("it has no end")

    @classmethod
    def load_next(cls, stream: BinaryIO, path: Path) -> tuple[Any, dict[str, PickledStorage]]:
        """(the next pickle of a stream, the storages it speaks of), described. Leaves the stream behind it."""
        start = stream.tell()
        for window in (1 << 20, MAX_HEADER_BYTES):  # a table of tensors seldom needs more than the first
            stream.seek(start)
            data = stream.read(window)
            try:
                length = cls.measure(data)
                break
            except ValueError:
                if len(data) < window or window == MAX_HEADER_BYTES:
                    raise
        stream.seek(start + length)
        unpickler = cls(io.BytesIO(data[:length]), path)
        return unpickler.load(), unpickler.storages


LEGACY_PICKLE_MAGIC = 0x1950A86A20F9469CFC6C  # torch's number for files written before version 1.6


def read_pickle_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one `.bin` file of torch, either format, without reading a weight.

    Raises SlerpMergeError where the file is damaged, wants to run code, or holds what is no tensor.
    """
    try:
        with open(path, "rb") as stream:
            if zipfile.is_zipfile(stream):
                state, extents = read_zip_pickle(stream, path)
            else:
                state, extents = read_legacy_pickle(stream, path)
    except SlerpMergeError:
        raise
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    except WholeObject as error:
        raise foreign_file(path, "holds a whole object, as torch.save(model) writes it, and no state dict") from error
    except Exception as error:
        # Damaged pickles fail in as many ways as there are opcodes; every one of them means the same.
        raise broken_file(path, f"its table of tensors cannot be read ({error})") from error
    if not isinstance(state, dict):
        raise foreign_file(path, "holds no state dict")
    size = file_size(path)
    for name in state:
        if not isinstance(name, str) or not is_utf8(name) or name == "__metadata__":
            raise foreign_file(path, f"names a tensor {name!r}, which is no name that a safetensors file can hold")
    return {name: pickled_tensor_info(path, name, entry, extents, size) for name, entry in state.items()}


def read_zip_pickle(stream: BinaryIO, path: Path) -> tuple[Any, dict[str, range]]:
    """(the state dict's description, the bytes of the file that each storage has), of torch's zip format."""
    with zipfile.ZipFile(stream) as archive:
        members = {member.filename: member for member in archive.infolist()}
        table = next((name for name in members if name.split("/", 1)[-1] == "data.pkl"), None)
        if table is None:
            raise broken_file(path, "it has no table of tensors")
        if members[table].file_size > MAX_HEADER_BYTES:
            raise foreign_file(path, f"has a table of tensors of more than {format_bytes(MAX_HEADER_BYTES)}")
        if any(member.compress_type != zipfile.ZIP_STORED for member in members.values()):
            raise foreign_file(path, "is an archive of which a part is compressed, which torch never does")
        root = table[: -len("data.pkl")]
        byte_order = members.get(root + "byteorder")
        if byte_order is not None and (byte_order.file_size > 16 or archive.read(byte_order) != b"little"):
            raise foreign_file(path, "was written on a big-endian machine")
        state, _ = DescriptionUnpickler.load_next(io.BytesIO(archive.read(table)), path)
        header_offsets = sorted([*(member.header_offset for member in members.values()), archive.start_dir])
        extents = {
            name[len(root + "data/") :]: member_extent(stream, member, header_offsets, path)
            for name, member in members.items()
            if name.startswith(root + "data/")
        }
    return state, extents


def member_extent(stream: BinaryIO, member: zipfile.ZipInfo, header_offsets: list[int], path: Path) -> range:
    """The bytes of the file that a member of an archive has. Raises SlerpMergeError where the archive contradicts
    itself: the directory at its end, the header before the member, and where the next header (sorted) begins.
    """
    stream.seek(member.header_offset)
    mark, name_length, extra_length = struct.unpack("<4s22xHH", stream.read(30))
    begin = member.header_offset + 30 + name_length + extra_length
    extent = range(begin, begin + member.file_size)
    # What follows is the next header, behind a description of the data at most.
    following = header_offsets[bisect.bisect_right(header_offsets, member.header_offset)]
    stated = mark, stream.read(name_length)
    if stated != (b"PK\3\4", member.filename.encode()) or not 0 <= following - extent.stop <= 24:
        raise broken_file(path, f"the place of its storage {member.filename!r} is stated in two ways")
    return extent


def read_legacy_pickle(stream: BinaryIO, path: Path) -> tuple[Any, dict[str, range]]:
    """As read_zip_pickle, of the format before torch 1.6: five pickles, each storage behind its 8-byte length."""
    stream.seek(0)
    magic, _ = DescriptionUnpickler.load_next(stream, path)
    if magic != LEGACY_PICKLE_MAGIC:
        raise broken_file(path, "it is not a file that torch wrote")
    DescriptionUnpickler.load_next(stream, path)  # protocol version
    system, _ = DescriptionUnpickler.load_next(stream, path)
    if not system.get("little_endian", True):
        raise foreign_file(path, "was written on a big-endian machine")
    state, storages = DescriptionUnpickler.load_next(stream, path)
    keys, _ = DescriptionUnpickler.load_next(stream, path)
    extents = {}
    for key in keys:
        storage = storages[key]
        if struct.unpack("<q", stream.read(8))[0] != storage.element_count:
            raise broken_file(path, "a storage is not as long as its description")
        begin = stream.tell()
        extents[key] = range(begin, begin + storage.element_count * DTYPE_BYTES[storage.dtype])
        stream.seek(extents[key].stop)
    return state, extents


def pickled_tensor_info(path: Path, name: str, entry: Any, extents: Mapping[str, range], size: int) -> TensorInfo:
    """Where a described tensor's bytes lie in its file of `size` bytes, once everything it claims has been checked.

    extents: as read_zip_pickle has them. Raises SlerpMergeError where a claim is false, or the tensor is not dense.
    """
    if not isinstance(entry, PickledTensor):
        raise SlerpMergeError(
            f"{path} holds something other than a tensor under {name!r}.",
            "This looks like a training checkpoint. Load it in its own framework and save the model's weights alone.",
        )
    dense_stride = 1
    for length, stride in zip(reversed(entry.shape), reversed(entry.strides)):
        if length > 1 and stride != dense_stride:
            raise SlerpMergeError(
                f"{path} holds the tensor {name!r} transposed or sliced.",
                "Load this model with transformers and save it with save_pretrained, then merge that copy.",
            )
        dense_stride *= max(length, 1)
    width = DTYPE_BYTES[entry.storage.dtype]
    byte_count = math.prod(entry.shape) * width
    first_byte = entry.first_element * width
    if first_byte + byte_count > entry.storage.element_count * width:
        raise broken_file(path, f"{name!r} reaches beyond its storage")
    extent = extents.get(entry.storage.key, range(0))
    offset = extent.start + first_byte
    if offset + byte_count > min(extent.stop, size):
        raise broken_file(path, f"the bytes of {name!r} are not all there")
    return TensorInfo(name, entry.storage.dtype, entry.shape, path, offset, byte_count)
