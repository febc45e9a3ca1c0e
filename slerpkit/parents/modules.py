"""What sentence-transformers puts behind a model: pooling, dense layers, and where their settings and weights lie.

modules.json names a folder for each. Headers and small files are read, and no code; what two parents have in common is
not known here (parity/modules.py). Read the two headers' modules before this.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from slerpkit.files import check_kind, nested_files, read_json_list
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.pickle_header import read_pickle_header
from slerpkit.parents.safetensors_header import read_header

if TYPE_CHECKING:
    from slerpkit.parents.tensors import TensorInfo

MODULES_NAME = "modules.json"
# Beside it: prompts, how embeddings are compared, how long a text may be.
EMBEDDING_SETTINGS = ("config_sentence_transformers.json", "sentence_*_config.json")
WEIGHTS_SINGLE = "model.safetensors"
PICKLE_SINGLE = "pytorch_model.bin"


@dataclass(frozen=True)
class Module:
    """One entry of modules.json."""

    path: str  # its folder, from the model's; empty for the model itself
    kind: str  # the class that reads it
    tensors: dict[str, TensorInfo]  # by their folder and name, as in 2_Dense/linear.weight
    files: tuple[str, ...]  # all else in it, from the model's folder


def read_modules(folder: Path) -> tuple[Module, ...]:
    """The modules that a model's folder states; none where it is no embedding model's.

    Raises SlerpMergeError where a path leads out of the folder, or where a file of a module is damaged.
    """
    index = folder / MODULES_NAME
    modules: list[Module] = []
    for entry in read_json_list(index) if index.is_file() else ():
        path, kind = (entry.get("path"), entry.get("type")) if isinstance(entry, dict) else (None, None)
        if not isinstance(path, str) or not isinstance(kind, str):
            raise SlerpMergeError(f"{index} does not say the path and type of each module.", "Download it again.")
        place = safe_place(path, index)
        for other in modules:
            if place.parts and other.path and have_common_files(place, PurePosixPath(other.path)):
                raise SlerpMergeError(f"{index} gives two modules the folder {path!r}.", "Download it again.")
        modules.append(read_module(folder, place, kind) if place.parts else Module("", kind, {}, ()))
    return tuple(modules)


def safe_place(path: str, index: Path) -> PurePosixPath:
    """A module's path, from the model's folder. Raises SlerpMergeError where it could lead out of that."""
    place = PurePosixPath(path)
    if place.is_absolute() or ".." in place.parts or any(mark in path for mark in "\\:\0"):
        raise SlerpMergeError(
            f"{index} names a folder outside its own: {path!r}.",
            "A list of modules has no business there. Do not trust this download; get the model from its source.",
        )
    return place


def have_common_files(first: PurePosixPath, second: PurePosixPath) -> bool:
    """Whether one of two folders is, or lies in, the other."""
    return first == second or first in second.parents or second in first.parents


def read_module(folder: Path, place: PurePosixPath, kind: str) -> Module:
    """A module's tensors and files. Raises SlerpMergeError as read_modules does."""
    tensors: dict[str, TensorInfo] = {}
    files = []
    for path in sorted(nested_files(folder / place)):
        check_kind(path)
        relative = path.relative_to(folder)
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.name == WEIGHTS_SINGLE:
            found = read_header(path)
        elif path.name == PICKLE_SINGLE:
            found = {} if (path.parent / WEIGHTS_SINGLE).is_file() else read_pickle_header(path)
        else:
            files.append(relative.as_posix())
            continue
        for name, info in found.items():
            full_name = f"{relative.parent.as_posix()}/{name}"
            tensors[full_name] = dataclasses.replace(info, name=full_name)
    return Module(place.as_posix(), kind, tensors, tuple(files))
