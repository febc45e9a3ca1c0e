"""The modules behind two embedding models, held against each other: their order, their settings, their weights.

What makes an embedding of a model's output must be the same in both, or be weights that can be blended. Read
parents/modules.py and pairing.py before this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import matching_files, parse_json, read_bytes, read_json_if_there
from slerpkit.messages import format_names, shorten
from slerpkit.parents.modules import EMBEDDING_SETTINGS, MODULES_NAME
from slerpkit.parity.pairing import check_base_tensor, compare_tensors
from slerpkit.parity.report import Mismatch, TensorSources

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.modules import Module

MAX_MODULE_FILE_BYTES = 64_000_000
# As sentence-transformers combines them; older versions state each by itself, newer ones list them.
POOLING_MODES = ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken")
POOLING_KEYS = (
    "pooling_mode_cls_token", "pooling_mode_max_tokens", "pooling_mode_mean_tokens",
    "pooling_mode_mean_sqrt_len_tokens", "pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken",
)  # fmt: skip
NEW_NAMES = {"word_embedding_dimension": "embedding_dimension"}
# What the library does where a module's settings are silent.
DEFAULTS = (
    ("include_prompt", True), ("use_residual", False), ("module_input_name", "sentence_embedding"),
    ("module_output_name", "sentence_embedding"), ("module_output_name", None),
)  # fmt: skip


def modules_source(primary: Checkpoint, secondary: Checkpoint) -> str | None:
    """The parent whose modules and settings of embeddings the child has; None where neither has any."""
    if not primary.modules and secondary.modules:
        return "secondary"
    return "primary" if primary.modules or settings_of(primary) else None


def settings_of(checkpoint: Checkpoint) -> dict[str, dict[str, Any]]:
    """What a model says of its embeddings beside modules.json, by file, without the versions it was made with."""
    files = {
        path.name: read_json_if_there(path) for path in matching_files(checkpoint.companion_folder, EMBEDDING_SETTINGS)
    }
    return {name: {k: v for k, v in stated.items() if k != "__version__"} for name, stated in files.items()}


def pair_modules(
    primary: Checkpoint, secondary: Checkpoint, base: Checkpoint | None = None
) -> tuple[list[TensorSources], list[Mismatch]]:
    """(each tensor of the child's modules with its sources, what does not fit and what is to know)."""
    notices = compare_settings(primary, secondary)
    parents = primary, secondary
    if not (primary.modules and secondary.modules):
        return [], [*judge_single(primary, secondary), *notices]
    if len(set(map(describe_modules, parents))) > 1:
        why = "What follows the model must be the same in both; else they embed in different ways."
        return [], [Mismatch("blocking", MODULES_NAME, *map(describe_modules, parents), why), *notices]
    pairs: list[TensorSources] = []
    mismatches: list[Mismatch] = []
    for first, second in zip(primary.modules, secondary.modules):
        mismatches += compare_files(parents, (first, second))
        found, unfit = pair_tensors_of(parents, (first, second), base)
        pairs += found
        mismatches += unfit
    return pairs, [*mismatches, *notices]


def describe_modules(checkpoint: Checkpoint) -> str:
    """A model's modules in their order, by folder and class; the library has moved its classes about."""
    described = []
    for module in checkpoint.modules:
        own = module.kind.startswith("sentence_transformers.")
        described.append(f"{module.path} {module.kind.rpartition('.')[2] if own else module.kind}".strip())
    return ", ".join(described) or "none"


def judge_single(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """What follows where a single parent is said to be an embedding model."""
    weights = [name for parent in (primary, secondary) for module in parent.modules for name in module.tensors]
    described = describe_modules(primary), describe_modules(secondary)
    if described[0] == described[1]:
        return []
    if weights:
        why = f"Its modules have weights that the other lacks: {format_names(weights)}."
        return [Mismatch("blocking", MODULES_NAME, *described, why)]
    role = modules_source(primary, secondary)
    return [Mismatch("notice", MODULES_NAME, *described, f"Only the {role} has it; the child embeds as that does.")]


def compare_settings(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """A notice of each file in which the parents say different things of prompts, lengths or likeness."""
    stated = settings_of(primary), settings_of(secondary)
    why = f"The child has the {modules_source(primary, secondary)}'s."
    return [
        Mismatch("notice", name, *(shorten(s[name]) if name in s else "none" for s in stated), why)
        for name in sorted(stated[0].keys() | stated[1].keys())
        if stated[0].get(name) != stated[1].get(name)
    ]


def compare_files(parents: Sequence[Checkpoint], modules: Sequence[Module]) -> list[Mismatch]:
    """A blocking line for each file of a module that says another thing in the other parent."""
    names = sorted({*modules[0].files, *modules[1].files})
    mismatches = []
    for name in names:
        contents = [content_of(parent.companion_folder / name) for parent in parents]
        if contents[0] == contents[1]:
            continue
        if isinstance(contents[0], dict) and isinstance(contents[1], dict):
            keys = [key for key in {**contents[0], **contents[1]} if contents[0].get(key) != contents[1].get(key)]
            words = [shorten({key: content[key] for key in keys if key in content}) for content in contents]
        else:
            words = ["one" if contents[0] else "missing", "another" if contents[1] else "missing"]
        why = "What follows the model must be the same in both; else they embed in different ways."
        mismatches.append(Mismatch("blocking", name, *words, why))
    return mismatches


def content_of(path: Path) -> Any:
    """What a module's file says: settings by their meaning, the bytes of what is no JSON; empty where there is none."""
    data = read_bytes(path, MAX_MODULE_FILE_BYTES) if path.is_file() else b""
    if path.suffix != ".json":
        return data
    value = parse_json(data, path) if data else {}
    return meaning_of(value) if isinstance(value, dict) else value


def meaning_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A module's settings as the newest sentence-transformers spells them, without those that it would add itself."""
    meaning = {NEW_NAMES.get(key, key): value for key, value in settings.items() if key not in POOLING_KEYS}
    stated = [mode for key, mode in zip(POOLING_KEYS, POOLING_MODES) if settings.get(key)]
    if "pooling_mode" in meaning or len(meaning) < len(settings):
        modes = meaning.get("pooling_mode") or stated or ["mean"]
        meaning["pooling_mode"] = modes if isinstance(modes, list) else [modes]
    return {key: value for key, value in meaning.items() if not any((key, value) == default for default in DEFAULTS)}


def pair_tensors_of(
    parents: Sequence[Checkpoint], modules: Sequence[Module], base: Checkpoint | None
) -> tuple[list[TensorSources], list[Mismatch]]:
    """(the tensors of one module with their sources, what does not fit)."""
    tables = [module.tensors for module in modules]
    of_base = {} if base is None else {name: info for module in base.modules for name, info in module.tensors.items()}
    pairs, mismatches = [], []
    for name in dict.fromkeys([*tables[0], *tables[1]]):
        first, second = (table.get(name) for table in tables)
        if first is None or second is None:
            words = ("present" if info is not None else "missing" for info in (first, second))
            why = "A module's weights without a counterpart cannot be blended."
            mismatches.append(Mismatch("blocking", name, *words, why))
            continue
        mismatches += compare_tensors(first, second)
        if base is not None:
            mismatches += check_base_tensor(first, of_base.get(name), None)
        folder = first.file.parent.relative_to(parents[0].companion_folder).as_posix()
        pairs.append(TensorSources(name, first, second, of_base.get(name), folder=folder))
    return pairs, mismatches
