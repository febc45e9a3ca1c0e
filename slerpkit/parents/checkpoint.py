"""A model's folder: its files checked, opened as a Checkpoint.

Headers and small files are read here, never a weight. What a config says of a model, and whether two models fit each
other, is not known here (parity/). Read tensors.py and the two headers' modules before this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import check_kind, check_path, nested_files, read_bytes, read_json
from slerpkit.messages import SlerpMergeError, format_bytes, format_count, format_names
from slerpkit.parents.hub_cache import REMOTE_MODELS, HubName, RemoteModel, name_of_snapshot, public_name
from slerpkit.parents.modules import EMBEDDING_SETTINGS, MODULES_NAME, PICKLE_SINGLE, WEIGHTS_SINGLE, read_modules
from slerpkit.parents.pickle_header import read_pickle_header
from slerpkit.parents.safetensors_header import read_header
from slerpkit.parents.tensors import TORCH_NAMES, broken_file
from slerpkit.parents.wrappers import unwrap

if TYPE_CHECKING:
    from slerpkit.parents.modules import Module
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.recipe import MergeRecipe

WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"
CARD_NAME = "README.md"
# The files without any of which a folder has no tokenizer at all.
TOKENIZER_CORE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "vocab-src.json",
    "vocab-tgt.json",
    "vocab.txt",
    "prophetnet.tokenizer",
    "tokenizer.model",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "*.spm",
    "tiktoken.model",
    "*.tiktoken",
    "tekken.json",
)
# Copied whole from the parent that the tokenizer is from, so that no two halves of a tokenizer ever meet.
TOKENIZER_FILES = (
    *TOKENIZER_CORE_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "target_vocab.json",
    "entity_vocab.json",
    "normalizer.json",
)
# How that parent, or the one that was asked for, puts a conversation.
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
GENERATION_NAME = "generation_config.json"
# Copied from the primary: how it prepares its inputs, the code it ships.
COMPANION_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "*.py",
)
# How an embedding model's parts follow each other, and its settings; the modules' own folders are named in the first.
MODULE_FILES = (MODULES_NAME, *EMBEDDING_SETTINGS)
NAMED_BELOW = 50  # models one level below a folder that is none, which its refusal may name
POINTER, MAX_POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
SHOWN_DIGITS = 10  # of a commit
MAX_CARD_BYTES = 65_536  # a child's card, report, map and recipe, which no parent has
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
    *MODULE_FILES,
)


@dataclass(frozen=True)
class Checkpoint:
    """A parent as far as its headers tell: nothing here holds a weight."""

    folder: Path
    name: str  # what people call it: org/name from a cache or config, else the folder's name
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    storage: str  # "safetensors" or "pickle"
    # Of each file that a merge reads, by name: (bytes, nanoseconds of its last change).
    file_stats: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    modules: tuple[Module, ...] = ()  # of sentence-transformers; their tensors are not among those above
    wrappers: tuple[str, ...] = ()  # what was taken off the names that its tensors are stored under
    remote: RemoteModel | None = None  # of a model whose weights are not all here: what the Hub has of it

    @property
    def hub_name(self) -> HubName | None:
        """Its name on the Hub, and its commit; None for a folder that came from elsewhere."""
        return name_of_snapshot(self.folder)

    @property
    def awaited(self) -> dict[str, int]:
        """Bytes of each file of weights that is still on the Hub alone."""
        return {} if self.remote is None else self.remote.awaited

    @property
    def public_place(self) -> str:
        """What finds it again anywhere: org/name@commit; for a folder of this machine its own name."""
        return str(self.hub_name or self.name)

    @property
    def parameter_count(self) -> int:
        """Elements of all stored tensors together; a tied head that is not stored counts once."""
        return sum(info.element_count for info in self.tensors.values())

    @property
    def byte_count(self) -> int:
        """Bytes of all stored tensors together, without headers."""
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
        """The model class that the config names first."""
        architectures = self.config.get("architectures")
        return str(architectures[0]) if isinstance(architectures, list) and architectures else "unknown architecture"


def open_if_whole(folder: Path) -> Checkpoint | None:
    """A model's headers; None where the folder holds no whole model."""
    try:
        return open_checkpoint(folder)
    except (SlerpMergeError, OSError):
        return None


# Weights as they are first published beside those that transformers reads: pattern, whose layout, whose script.
CONSOLIDATED = (("consolidated*.safetensors", "Mistral", "mistral"), ("consolidated*.pth", "Meta", "llama"))


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a model's weights."""

    storage: str  # "safetensors" or "pickle"
    files: tuple[Path, ...]
    index: Path | None = None  # None: there is one file, and no index is asked
    weight_map: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the index: tensor's name, file's name


def read_index(storage: str, index: Path, awaited: Container[str] = ()) -> WeightFiles:
    """The files that an index names. Raises SlerpMergeError where one is not there, or lies outside its folder.

    awaited: names of files that need not be there yet.
    """
    stated = read_json(index).get("weight_map")
    if not isinstance(stated, dict) or not stated:
        raise SlerpMergeError(f"{index} names no weights.", "Download this file again.")
    weight_map = {tensor_name: str(file_name) for tensor_name, file_name in stated.items()}
    files = []
    for file_name in sorted(set(weight_map.values())):
        if file_name in ("", ".", "..") or any(mark in file_name for mark in "/\\:\0"):
            raise SlerpMergeError(
                f"{index} names a file outside its own folder: {file_name!r}.",
                "An index has no business there. Do not trust this download; get the model from its source.",
            )
        file = index.parent / file_name
        check_path(file, "file")
        if file_name not in awaited and not file.is_file():
            raise SlerpMergeError(
                f"{index} names {file_name}, which is not there.", "Download the missing file into that folder."
            )
        files.append(file)
    return WeightFiles(storage, tuple(files), index, weight_map)


def find_weight_files(folder: Path, awaited: Container[str] = ()) -> WeightFiles:
    """The files of weights in a model's folder; safetensors wins where both formats stand.

    awaited: names of files that the Hub has and this machine has not yet.
    Raises SlerpMergeError where there are none, or where they are of a kind that cannot be merged.
    """
    for storage, single, index in (
        ("safetensors", WEIGHTS_SINGLE, WEIGHTS_INDEX),
        ("pickle", PICKLE_SINGLE, PICKLE_INDEX),
    ):
        if single in awaited or (folder / single).is_file():
            return WeightFiles(storage, (folder / single,))
        if (folder / index).is_file():
            return read_index(storage, folder / index, awaited)
    for pattern, maker, family in CONSOLIDATED:
        if (file := min(folder.glob(pattern), default=None)) is not None:
            raise SlerpMergeError(
                f"{folder} holds its weights as {file.name} alone, in {maker}'s own layout.",
                f"Download {WEIGHTS_SINGLE}, or its shards and their index, where the model's repository has them; "
                f"otherwise convert it with convert_{family}_weights_to_hf.py from the source of transformers.",
            )
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


def open_checkpoint(folder: Path) -> Checkpoint:
    """A parent's config and tensor table, from a local folder. Reads headers only.

    Raises SlerpMergeError where there is no folder, no config, no weights, or where they are damaged.
    """
    check_path(folder, "folder")
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.is_file() else "does not exist"
        raise SlerpMergeError(
            f"The folder {folder} {what}.", "Give the folder that holds a model's config.json and weights."
        )
    remote = REMOTE_MODELS.get(folder)
    awaited = remote.awaited if remote is not None else {}
    remote = remote if awaited else None
    try:
        weights = find_weight_files(folder, awaited)  # a GGUF or adapter folder is told so by name
        if not (folder / "config.json").is_file():
            raise SlerpMergeError(f"{folder} has no config.json.", "Download it from where the model comes from.")
    except SlerpMergeError as error:
        raise half_downloaded(folder, error) or folder_of_models(folder) or error from None
    check_files(folder)
    for file in weights.files:
        check_kind(file)
    modules = read_modules(folder)
    nested = [name for module in modules for name in (*module.files, *module_weights(module, folder))]
    file_stats = file_stats_of(folder, [file.name for file in weights.files] + nested)
    config = read_json(folder / "config.json")
    tensors = read_tensor_table(weights, {} if remote is None else remote.weights)
    if not tensors:
        raise SlerpMergeError(f"{folder} holds no tensors.", "Download the model's weights again.")
    name = public_name(folder.resolve(), config)
    if remote is not None:  # its weights may come and go while they are merged
        file_stats = {name: stat for name, stat in file_stats.items() if name not in remote.weights}
    return Checkpoint(folder, name, config, tensors, weights.storage, file_stats, modules, remote=remote)


def folder_of_models(folder: Path) -> SlerpMergeError | None:
    """The refusal of a folder that is no model and holds some one level below; None for any other."""
    below = [path.parent.name for path in sorted(itertools.islice(folder.glob("*/config.json"), NAMED_BELOW))]
    if not below or (folder / "config.json").is_file():
        return None
    what = f"{folder} is no model itself; it holds {format_names(below)}."
    return SlerpMergeError(what, f"Give one of them: {folder / below[0]}")


def half_downloaded(folder: Path, error: SlerpMergeError) -> SlerpMergeError | None:
    """The refusal of a model in the cache that lacks files; None for what is no such model."""
    named = name_of_snapshot(folder)
    if named is None or "GGUF" in error.message:
        return None
    reason = error.message.replace(f"{folder}{os.sep}", "").replace(str(folder), "its folder").rstrip(".")
    revision = "" if HubName(named.name).snapshot == folder else f" --revision {named.revision}"
    return SlerpMergeError(
        f"{named.name} is only half downloaded: {reason}.", f"Fetch the rest: hf download {named.name}{revision}"
    )


def module_weights(module: Module, folder: Path) -> set[str]:
    """The files that a module's tensors lie in, from the model's folder."""
    return {info.file.relative_to(folder).as_posix() for info in module.tensors.values()}


def read_tensor_table(
    weights: WeightFiles, remote: Mapping[str, Mapping[str, TensorInfo]] | None = None
) -> dict[str, TensorInfo]:
    """Every tensor of a model by name, from the headers of its files.

    remote: the tables of files that are still on the Hub, by their names.
    Raises SlerpMergeError where a file is damaged, where two hold one tensor, or where the index is another model's.
    """
    read = read_header if weights.storage == "safetensors" else read_pickle_header
    tensors: dict[str, TensorInfo] = {}
    for file in weights.files:
        table = (remote or {}).get(file.name) if not file.is_file() else None
        for name, info in (read(file) if table is None else table).items():
            if name in tensors:
                raise broken_file(file, f"the tensor {name!r} also stands in {tensors[name].file.name}")
            tensors[name] = info
    broken_promises = [
        name
        for name, file_name in weights.weight_map.items()
        if name not in tensors or tensors[name].file.name != file_name
    ]
    if broken_promises:
        raise SlerpMergeError(
            f"{weights.index} promises tensors that its files do not hold: {format_names(broken_promises)}.",
            "The shards and the index are from different downloads. Download the model again.",
        )
    return tensors


def check_files(folder: Path) -> None:
    """Raises SlerpMergeError where what a merge may read or copy is no file, or only a pointer to one."""
    for path in matching_files(folder, PARENT_FILES):
        for file in nested_files(path) if path.is_dir() else (path,):
            check_kind(file)
            check_no_pointer(file)


def check_no_pointer(path: Path) -> None:
    """Raises SlerpMergeError for what Git leaves in a file's place until Git LFS fetches it."""
    with contextlib.suppress(OSError):  # whoever needs it will say so
        if path.is_file() and path.stat().st_size <= MAX_POINTER_BYTES and read_bytes(path).startswith(POINTER):
            raise SlerpMergeError(
                f"{path} is a Git LFS pointer, and not the file itself.",
                "Fetch the files: `git lfs pull` in that folder, or download the model with `hf download`.",
            )


def matching_files(folder: Path, patterns: Iterable[str]) -> Iterator[Path]:
    """The files and folders directly in a folder whose names match."""
    return (path for pattern in patterns for path in folder.glob(pattern))


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds a tokenizer of any kind."""
    return any(matching_files(folder, TOKENIZER_CORE_FILES))


def file_stats_of(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(bytes, nanoseconds of the last change) of every file of a parent that a merge reads, `names` among them.

    By their paths from the folder, which a module's files are named by.
    """
    stats = {}
    for path in sorted({*matching_files(folder, PARENT_FILES), *(folder / name for name in names)}):
        with contextlib.suppress(OSError):  # gone meanwhile; whoever needs it will say so
            status = path.stat()
            stats[path.relative_to(folder).as_posix()] = (status.st_size, status.st_mtime_ns)
    return stats


def companion_bytes(parents: Sequence[Checkpoint]) -> int:
    """An upper bound, in bytes, for the tokenizer, config and card beside the weights."""
    patterns = ("config.json", GENERATION_NAME, *TOKENIZER_FILES, *TEMPLATE_FILES, *COMPANION_FILES, *MODULE_FILES)
    paths = [path for parent in parents for path in matching_files(parent.folder, patterns)]
    paths += [parent.folder / name for parent in parents for module in parent.modules for name in module.files]
    nested = (inner for path in paths if path.is_dir() for inner in nested_files(path))
    return MAX_CARD_BYTES + sum(path.stat().st_size for path in (*paths, *nested) if path.is_file())


def stat_items(file_stats: Mapping[str, Sequence[int]]) -> set[tuple[str, tuple[int, ...]]]:
    """What file_stats_of tells, as a set to be held against another; from JSON too, which has lists for tuples."""
    return {(name, tuple(stat)) for name, stat in file_stats.items()}


def describe_checkpoint(checkpoint: Checkpoint) -> str:
    """A parent in one line: name, architecture, size, dtypes."""
    dtypes = ", ".join(checkpoint.dtypes[:3])
    size = f"{format_count(checkpoint.parameter_count)} parameters, {format_bytes(checkpoint.byte_count)}"
    named = checkpoint.hub_name
    name = checkpoint.name if named is None else f"{named.name} at {(named.revision or '')[:SHOWN_DIGITS]}"
    return f"{name}: {checkpoint.architecture}, {size}, {dtypes}"


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


def without_wrappers(*models: Checkpoint) -> tuple[Checkpoint, ...]:
    """Models that are to be merged, their tensors under the names that their classes have for them."""
    unwrapped = unwrap([model.tensors for model in models], [model.config for model in models])
    return tuple(
        dataclasses.replace(model, tensors=tensors, wrappers=taken)
        for model, (tensors, taken) in zip(models, unwrapped)
    )


def open_parents(recipe: MergeRecipe) -> Parents:
    """The models that a recipe names. Reads headers only; raises SlerpMergeError as open_checkpoint does."""
    folders = [folder for folder in (recipe.primary, recipe.secondary, recipe.base) if folder is not None]
    return Parents(*without_wrappers(*map(open_checkpoint, folders)))
