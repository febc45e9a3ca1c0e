"""A model's folder: found by what people call it, its files checked, opened as a Checkpoint."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import check_path, clean_path, is_inside, nested_files, read_json
from slerpkit.lazy import huggingface_hub
from slerpkit.messages import SlerpMergeError, format_bytes, format_count, format_names
from slerpkit.parents.pickle_header import read_pickle_header
from slerpkit.parents.safetensors_header import read_header
from slerpkit.parents.tensors import TORCH_NAMES, broken_file

if TYPE_CHECKING:
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.recipe import MergeRecipe

WEIGHTS_SINGLE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
CARD_NAME = "README.md"
# Copied whole from the tokenizer's donor, so that no two halves of a tokenizer ever meet.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
)
# How the tokenizer's donor, or the parent that was asked for, puts a conversation.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
# The files without which a folder has no tokenizer at all.
TOKENIZER_CORES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "*.tiktoken",
    "tekken.json",
)
GENERATION_NAME = "generation_config.json"
# Copied from the primary: how it prepares its inputs, the code it ships.
COMPANION_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
)
# All that a merge reads of a parent.
PARENT_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*",
    GENERATION_NAME,
    *TOKENIZER_FILES,
    *TEMPLATE_FILES,
    *COMPANION_FILES,
)


@dataclass(frozen=True)
class Checkpoint:
    """A parent as far as its headers tell: nothing here holds a weight."""

    folder: Path
    name: str  # what people call it: org/name from a cache or config, else the folder's name
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    storage: str  # "safetensors" or "pickle"
    file_stats: dict[str, tuple[int, int]] = dataclasses.field(
        default_factory=dict
    )  # file name: bytes, ns of its last change

    @property
    def parameter_count(self) -> int:
        return sum(info.element_count for info in self.tensors.values())

    @property
    def byte_count(self) -> int:
        return sum(info.byte_count for info in self.tensors.values())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtypes in torch's names, the one with the most bytes first."""
        bytes_by_dtype: dict[str, int] = {}
        for info in self.tensors.values():
            bytes_by_dtype[info.dtype] = bytes_by_dtype.get(info.dtype, 0) + info.byte_count
        ranked = sorted(bytes_by_dtype, key=lambda dtype: -bytes_by_dtype[dtype])
        return tuple(TORCH_NAMES.get(dtype, dtype) for dtype in ranked)

    @property
    def architecture(self) -> str:
        architectures = self.config.get("architectures")
        return str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown architecture"


HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")  # org/name, as the Hugging Face hub has it


def find_model(text: str) -> Path:
    """A model's folder as people type it: a path, or the org/name of a model in the Hugging Face cache."""
    path = clean_path(text)
    if not path.exists():
        # As Windows writes it, or completed behind a quote that was opened and not closed.
        for other in (str(path).replace("\\", "/"), str(path).lstrip("'\"")):
            if Path(other).exists():
                return Path(other)
        if HUB_NAME.fullmatch(path.as_posix()) and (snapshot := cached_snapshot(path.as_posix())) is not None:
            return snapshot
    return path


def cached_snapshot(name: str) -> Path | None:
    """The newest snapshot of org/name in the Hugging Face cache that is there whole; None where there is none."""
    folder = Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "snapshots"
    snapshots = sorted(folder.iterdir(), key=lambda path: -path.stat().st_mtime) if folder.is_dir() else []
    return next((snapshot for snapshot in snapshots if open_if_whole(snapshot) is not None), None)


def open_if_whole(folder: Path) -> Checkpoint | None:
    """A model's headers; None where the folder holds no whole model."""
    try:
        return open_checkpoint(folder)
    except (SlerpMergeError, OSError):
        return None


def list_shards(folder: Path, index_name: str) -> tuple[Path, ...]:
    """The files an index names, each inside the folder and there. Raises SlerpMergeError otherwise."""
    index_path = folder / index_name
    weight_map = read_json(index_path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SlerpMergeError(f"{index_path} names no weights.", "Download this file again.")
    shards = []
    for file_name in sorted({str(file_name) for file_name in weight_map.values()}):
        if file_name in ("", ".", "..") or any(mark in file_name for mark in "/\\:\0"):
            raise SlerpMergeError(
                f"{index_path} names a file outside its own folder: {file_name!r}.",
                "An index has no business there. Do not trust this download; get the model from its source.",
            )
        check_path(folder / file_name, "file")
        if not (folder / file_name).is_file():
            raise SlerpMergeError(
                f"{index_path} names {file_name}, which is not there.", "Download the missing file into that folder."
            )
        shards.append(folder / file_name)
    return tuple(shards)


def find_weight_files(folder: Path) -> tuple[str, tuple[Path, ...]]:
    """("safetensors" or "pickle", files) of a model folder; safetensors wins where both stand."""
    for storage, single, index in (
        ("safetensors", WEIGHTS_SINGLE, WEIGHTS_INDEX),
        ("pickle", PICKLE_SINGLE, PICKLE_INDEX),
    ):
        if (folder / single).is_file():
            return storage, (folder / single,)
        if (folder / index).is_file():
            return storage, list_shards(folder, index)
    if any(folder.glob("*.gguf")):
        raise SlerpMergeError(
            f"{folder} holds a GGUF model, which is quantised.",
            "Merge the original safetensors models, then convert the child to GGUF.",
        )
    if (folder / "adapter_config.json").is_file():
        raise SlerpMergeError(
            f"{folder} holds a LoRA adapter, not a whole model.",
            "Merge the adapter into its base model first (peft: merge_and_unload), and save that.",
        )
    if any(folder.glob("*-of-*.safetensors")) or any(folder.glob("*-of-*.bin")):
        raise SlerpMergeError(
            f"{folder} holds shards of weights, but not their index ({WEIGHTS_INDEX} or {PICKLE_INDEX}).",
            "Download the index into that folder too; it says which shard holds what.",
        )
    raise SlerpMergeError(
        f"{folder} holds no weights ({WEIGHTS_SINGLE}, {WEIGHTS_INDEX}, {PICKLE_SINGLE} or {PICKLE_INDEX}).",
        "Choose the folder that holds config.json and the weights of a transformers model.",
    )


def public_name(folder: Path, config: Mapping[str, Any]) -> str:
    """What people call the model of a folder: org/name where the place or the config tells, else its name."""
    for part in (folder, *folder.parents):
        if part.name.startswith("models--"):  # a Hugging Face cache: models--org--name/snapshots/revision
            return part.name[len("models--") :].replace("--", "/")
    claimed = config.get("_name_or_path")
    if isinstance(claimed, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", claimed) and claimed.endswith("/" + folder.name):
        return claimed
    return folder.name


def open_checkpoint(folder: Path) -> Checkpoint:
    """A parent's config and tensor table, from a local folder. Reads headers only.

    Raises SlerpMergeError where there is no folder, no config, no weights, or where they are damaged.
    """
    check_path(folder, "folder")
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        hint = "Give the folder that holds a model's config.json and weights."
        if HUB_NAME.fullmatch(folder.as_posix()):
            hint += f" A model of the hub must be there first: hf download {folder.as_posix()}"
        raise SlerpMergeError(f"The folder {folder} {what}.", hint)
    if not (folder / "config.json").is_file():
        find_weight_files(folder)  # a GGUF or adapter folder is told so by name
        raise SlerpMergeError(f"{folder} has no config.json.", "Download config.json from where the model comes from.")
    check_files(folder)
    storage, files = find_weight_files(folder)
    for file in files:
        check_kind(file, folder)
    file_stats = file_stats_of(folder, [file.name for file in files])
    config = read_json(folder / "config.json")
    read = read_header if storage == "safetensors" else read_pickle_header
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, info in read(file).items():
            if name in tensors:
                raise broken_file(file, f"the tensor {name!r} also stands in {tensors[name].file.name}")
            tensors[name] = info
    check_index_is_met(folder, storage, tensors)
    if not tensors:
        raise SlerpMergeError(f"{folder} holds no tensors.", "Download the model's weights again.")
    return Checkpoint(folder, public_name(folder.resolve(), config), config, tensors, storage, file_stats)


def stays_within(path: Path, folder: Path) -> bool:
    """Whether a file of a model lies in its folder, links followed, or where a hub's cache keeps what it links to."""
    real = path.resolve()
    of_cache = real.parent.name == "blobs" and real.parent.parent.name.startswith("models--")
    return of_cache or is_inside(real, folder.resolve())


def check_kind(path: Path, folder: Path) -> None:
    """Raises SlerpMergeError where a file of a model is a link to somewhere else, or no file at all."""
    if not stays_within(path, folder):
        raise SlerpMergeError(
            f"{path} is a link that leads outside its folder, to {path.resolve()}.",
            "A model has no business there. If you made the link yourself, put the file itself in its place.",
        )
    if path.exists() and not (path.is_file() or (path.is_dir() and not path.is_symlink())):
        raise SlerpMergeError(f"{path} is neither a file nor a folder.", "Remove it, or download the model again.")


def check_files(folder: Path) -> None:
    """Holds every file of a model that a merge may read or copy against `check_kind`."""
    for path in [path for pattern in PARENT_FILES for path in folder.glob(pattern)]:
        check_kind(path, folder)
        for inside in nested_files(path) if path.is_dir() else ():
            check_kind(inside, folder)


def file_stats_of(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(bytes, nanoseconds of the last change) of every file of a parent that a merge reads, `names` among them."""
    found = {}
    known = {path for pattern in PARENT_FILES for path in folder.glob(pattern)}
    for path in sorted(known | {folder / name for name in names}):
        with contextlib.suppress(OSError):  # gone meanwhile; whoever needs it will say so
            status = path.stat()
            found[path.name] = (status.st_size, status.st_mtime_ns)
    return found


def check_index_is_met(folder: Path, storage: str, tensors: Mapping[str, TensorInfo]) -> None:
    """What an index promises must stand where it says, or a shard is from another model."""
    single, index = (WEIGHTS_SINGLE, WEIGHTS_INDEX) if storage == "safetensors" else (PICKLE_SINGLE, PICKLE_INDEX)
    if (folder / single).is_file():
        return
    weight_map = read_json(folder / index)["weight_map"]
    astray = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file.name != file]
    if astray:
        raise SlerpMergeError(
            f"{folder / index} promises tensors that its files do not hold: {format_names(astray)}.",
            "The shards and the index are from different downloads. Download the model again.",
        )


def companion_bytes(parents: Sequence[Checkpoint]) -> int:
    """An upper bound for the tokenizer, config and card beside the weights."""
    patterns = ("config.json", GENERATION_NAME, *TOKENIZER_FILES, *TEMPLATE_FILES, *COMPANION_FILES)
    files = (file for parent in parents for pattern in patterns for file in parent.folder.glob(pattern))
    every = (inside for file in files for inside in ([file] if file.is_file() else nested_files(file)))
    return 65_536 + sum(file.stat().st_size for file in every if file.is_file())


def stat_items(file_stats: Mapping[str, Sequence[int]]) -> set[tuple[str, tuple[int, ...]]]:
    """Stamps as a set, to be held against others."""
    return {(name, tuple(stamp)) for name, stamp in file_stats.items()}


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """A parent in one line: name, architecture, size, dtypes."""
    dtypes = ", ".join(checkpoint.dtypes[:3])
    size = f"{format_count(checkpoint.parameter_count)} parameters, {format_bytes(checkpoint.byte_count)}"
    return f"{checkpoint.name}: {checkpoint.architecture}, {size}, {dtypes}"


def short_name(folder: Path) -> str:
    """The shortest text that finds a model again: org/name in the cache, a path from here, or its whole path."""
    name = public_name(folder, {})
    if folder.parent.name == "snapshots" and HUB_NAME.fullmatch(name) and find_model(name) == folder:
        return name
    with contextlib.suppress(ValueError):
        return str(folder.resolve().relative_to(Path.cwd()))
    return str(folder)


@dataclass(frozen=True)
class Parents:
    """The models of one merge, opened."""

    primary: Checkpoint
    secondary: Checkpoint
    base: Checkpoint | None = None  # of the task vectors, where these are blended

    @property
    def by_role(self) -> dict[str, Checkpoint]:
        """Those that there are, under "primary", "secondary" and "base", in this order."""
        base = {} if self.base is None else {"base": self.base}
        return {"primary": self.primary, "secondary": self.secondary, **base}


def open_parents(recipe: MergeRecipe) -> Parents:
    """The models that a recipe names. Reads headers only; raises SlerpMergeError as open_checkpoint does."""
    base = None if recipe.base is None else open_checkpoint(recipe.base)
    return Parents(open_checkpoint(recipe.primary), open_checkpoint(recipe.secondary), base)
