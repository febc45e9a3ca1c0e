"""A LoRA adapter's folder as peft saves it: whose tensors it changes, and how.

adapter_config.json and headers are read, never a weight. What it cannot do the way peft does is refused by name. The
base's tensors come from checkpoint.py, which reads this module; read adapted_tensor.py and resolver.py before it.
https://huggingface.co/docs/peft/developer_guides/checkpoint
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slerpkit.files import check_kind, read_json, written_path
from slerpkit.messages import SlerpMergeError, format_names, shorten
from slerpkit.parents.adapted_tensor import AdaptedTensor
from slerpkit.parents.hub_cache import REMOTE_MODELS
from slerpkit.parents.pickle_header import read_pickle_header
from slerpkit.parents.resolver import find_model
from slerpkit.parents.safetensors_header import read_header
from slerpkit.parents.tensors import TensorInfo, broken_file, find_layer

CONFIG_NAME = "adapter_config.json"
WEIGHTS = {"adapter_model.safetensors": read_header, "adapter_model.bin": read_pickle_header}
MERGE_WITH_PEFT = "Merge it into its base first (peft: merge_and_unload), save that, and name the result."
# peft's names of kinds, where people write them otherwise.
KINDS = {
    "ADALORA": "AdaLoRA", "LOHA": "LoHa", "LOKR": "LoKr", "IA3": "IA3", "VERA": "VeRA", "PROMPT_TUNING":
    "prompt tuning", "P_TUNING": "p-tuning", "PREFIX_TUNING": "prefix tuning", "ADAPTION_PROMPT": "adaption prompt",
    "TRAINABLE_TOKENS": "trainable tokens", "XLORA": "X-LoRA",
}  # fmt: skip
# Settings of LoRA under which the weight is not W + scale * B A.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "Arrow",
    "alora_invocation_tokens": "aLoRA",
    "layer_replication": "LoRA over replicated layers",
    "target_parameters": "LoRA of parameters that are no module's weight (target_parameters), such as fused experts",
    "trainable_token_indices": "LoRA with single trained tokens (trainable_token_indices)",
}
# Initialisations that change the base too, so that the base as it was published is not what the factors were made for.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
FACTOR_NAME = re.compile(r"(.+)\.lora_(embedding_)?(A|B)(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(weight|bias))?")
# What peft puts into the name of a tensor that it trains whole, and of one that it only keeps.
TRAINED_WHOLE = re.compile(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)")
UNTRAINED = re.compile(r"\.original_module\.")
UNSTORED_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")
# A group that is repeated, or many repetitions: it can take a lifetime to find that such a pattern does not match.
REPEATED_GROUP, REPETITION = re.compile(r"\)\s*[*+?{]"), re.compile(r"[*+?{]")
MAX_REPETITIONS = 4
MAX_PATTERNS = 2000  # the largest models have a few hundred modules that an adapter changes
TOKEN_TABLE = re.compile(r"emb|wte|shared|head|output|logits")
MAX_NUMBER = 1e9


@dataclass(frozen=True)
class Adapter:
    """An adapter as far as its config and headers tell."""

    folder: Path
    settings: Mapping[str, Any]  # of adapter_config.json
    tensors: Mapping[str, TensorInfo]  # by their names in its file, without peft's own prefix
    file: Path

    @property
    def way_to_name_base(self) -> str:
        """What to do where its base is not found, or is the wrong one."""
        return f"Name its base beside it: BASE+{self.folder}, as --primary takes it too."

    def refuse(self, what: str, hint: str = MERGE_WITH_PEFT) -> SlerpMergeError:
        """The error for an adapter that cannot be a parent."""
        return SlerpMergeError(f"The adapter {self.folder} {what}.", hint)


def find_with_base(text: str, find: Callable[[str], Path] = find_model) -> tuple[Path, Path | None]:
    """(a model's folder, an adapter's base where it is named too) as people type it: BASE+ADAPTER, as mergekit has it.

    find: for each of the two. Raises SlerpMergeError as that does.
    """
    whole = find(text)
    if whole.exists():
        return whole, None
    bare = text.strip().strip("'\"")
    cuts = [match.start() for match in re.finditer(r"(?<=.)\+(?=.)", bare)]
    found = [(find(bare[cut + 1 :]), find(bare[:cut])) for cut in cuts]
    both = next((pair for pair in found if pair[0].exists() and pair[1].exists()), None)
    if both is not None or not cuts:
        return both or (whole, None)
    return found[0] if "://" not in bare else (whole, None)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter; a whole model may stand beside one, and is then what counts."""
    whole = ("model*.safetensors*", "pytorch_model*.bin*")
    if folder in REMOTE_MODELS and REMOTE_MODELS[folder].weights:  # of a whole model, still to be fetched
        return False
    return (folder / CONFIG_NAME).is_file() and not any(path for pattern in whole for path in folder.glob(pattern))


def open_adapter(folder: Path) -> Adapter:
    """An adapter's config and tensor table. Raises SlerpMergeError where it is damaged, or of a kind not done here."""
    check_kind(folder / CONFIG_NAME)
    settings = read_json(folder / CONFIG_NAME)
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        what = f"The adapter {folder} has no weights ({' or '.join(WEIGHTS)})."
        raise SlerpMergeError(what, "Download them into that folder.")
    adapter = Adapter(folder, settings, {}, file)
    check_supported(adapter)
    check_kind(file)
    stored = WEIGHTS[file.name](file)
    return dataclasses.replace(
        adapter, tensors={name.removeprefix("base_model.model."): info for name, info in stored.items()}
    )


def check_supported(adapter: Adapter) -> None:
    """Raises SlerpMergeError, by its name, for an adapter that is not plain LoRA."""
    settings = adapter.settings
    kind = settings.get("peft_type")
    if kind != "LORA":
        name = KINDS.get(str(kind), shorten(str(kind), 40))
        raise adapter.refuse(f"is {name if kind else 'of no stated kind'}, where LoRA alone is merged here")
    for key, name in VARIANTS.items():
        if settings.get(key) not in (None, False, [], {}):
            raise adapter.refuse(f"is {name}, which is not merged here")
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        hint = "Save it again with peft's path_initial_model_for_weight_conversion, which makes plain LoRA of it."
        raise adapter.refuse(f"was begun as {shorten(start, 20)}, which changes the base's weights too", hint)


def named_base(adapter: Adapter) -> Path:
    """The model that an adapter was trained on, by its config, whether it is here or not.

    Raises SlerpMergeError where none is named.
    """
    named, revision = adapter.settings.get("base_model_name_or_path"), adapter.settings.get("revision")
    if not isinstance(named, str) or not named.strip():
        what = f"does not say what its base is ({CONFIG_NAME}: base_model_name_or_path)"
        raise adapter.refuse(what, adapter.way_to_name_base)
    return find_model(named, revision if isinstance(revision, str) and revision else None, written_path)


def base_of(adapter: Adapter) -> Path:
    """The folder of that model. Raises SlerpMergeError where it is not here."""
    folder = named_base(adapter)
    if not folder.is_dir():
        named = shorten(str(adapter.settings["base_model_name_or_path"]), 200)
        what = f"is one of {named}, which is not here"
        raise adapter.refuse(what, f"Download that first. {adapter.way_to_name_base}")
    return folder


def adapt(adapter: Adapter, base: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """A base's tensors, by their names there, with those that an adapter changes, or brings along, in their place.

    config: the base's. Raises SlerpMergeError where the two do not belong together.
    """
    if config.get("quantization_config") is not None:
        hint = f"Name the unquantised one: BASE+{adapter.folder}, as --primary takes it too."
        raise adapter.refuse("has a quantised base, whose weights are not here as numbers", hint)
    names = BaseNames(adapter, base)
    factors, embeddings = factors_of(adapter)
    tensors = {**base, **trained_whole(adapter, base, names)}
    if tensors == base and not factors:
        raise broken_file(adapter.file, "it changes nothing")
    targets = {module: names.find(f"{module}.weight") for module in factors}
    squares = are_transposed(
        adapter, [(own, tensors[targets[module]]) for module, own in factors.items() if module not in embeddings]
    )
    for module, own in factors.items():
        scale, name = scale_of(adapter, module, own), targets[module]
        tensors[name] = with_factors(adapter, tensors[name], own, scale, squares or module in embeddings)
        if "B.bias" in own:
            name = names.find(f"{module}.bias")
            tensors[name] = with_bias(adapter, tensors[name], own["B.bias"], scale)
    return tensors


def factors_of(adapter: Adapter) -> tuple[dict[str, dict[str, TensorInfo]], set[str]]:
    """(the factors of each module: A, B and, of some, B.bias; the modules that are embeddings)."""
    factors: dict[str, dict[str, TensorInfo]] = {}
    embeddings = set()
    for name, info in adapter.tensors.items():
        if (match := FACTOR_NAME.fullmatch(name)) is not None:
            module, of_embedding, side, kind = match.groups()
            key = side if kind == "weight" or (of_embedding and kind is None) else f"{side}.{kind}"
            if key in factors.setdefault(module, {}):
                raise adapter.refuse(f"has {name} twice")
            factors[module][key] = info
            embeddings |= {module} if of_embedding else set()
    return factors, embeddings


def trained_whole(adapter: Adapter, base: Mapping[str, TensorInfo], names: BaseNames) -> dict[str, TensorInfo]:
    """The tensors that an adapter brings along in place of its base's, by their names there."""
    found: dict[str, TensorInfo] = {}
    whole = [name for name in adapter.tensors if not FACTOR_NAME.fullmatch(name) and not UNTRAINED.search(name)]
    # peft saves one that it made longer under its plain name too, which is then the one that it loads.
    for name in sorted(whole, key=lambda name: not TRAINED_WHOLE.search(name)):
        info, target = adapter.tensors[name], names.find(TRAINED_WHOLE.sub("", name), may_be_new=True)
        if target in base and not may_replace(info, base[target]):
            raise adapter.refuse(f"has {name} in the shape {info.shape}, its base in {base[target].shape}")
        found[target] = dataclasses.replace(info, name=target)
    return found


def may_replace(info: TensorInfo, target: TensorInfo) -> bool:
    """Whether a tensor has the shape of the one that it takes the place of; tables of tokens may be longer."""
    starts_alike = info.shape[:1] == target.shape[:1] or bool(TOKEN_TABLE.search(target.name))
    return len(info.shape) == len(target.shape) and info.shape[1:] == target.shape[1:] and starts_alike


def fields_of(info: TensorInfo) -> dict[str, Any]:
    """A tensor's fields by their names."""
    return {field.name: getattr(info, field.name) for field in dataclasses.fields(TensorInfo)}


def scale_of(adapter: Adapter, module: str, factors: Mapping[str, TensorInfo]) -> float:
    """alpha / rank of a module, or alpha / sqrt(rank) in rsLoRA.

    Raises SlerpMergeError where the factors are not whole, or of another rank than the config says.
    """
    if factors.keys() - {"B.bias"} != {"A", "B"} or not all(info.is_float for info in factors.values()):
        raise adapter.refuse(f"has no whole pair of factors for {module}, but {format_names(sorted(factors))}")
    settings = adapter.settings
    rank = number_of(adapter, "r", settings.get("rank_pattern"), module, settings.get("r", 8))
    alpha = number_of(adapter, "lora_alpha", settings.get("alpha_pattern"), module, settings.get("lora_alpha", 8))
    if not rank > 0 or factors["A"].shape[:1] != (rank,):
        raise adapter.refuse(f"says that {module} has the rank {rank:g}; its factor A has {factors['A'].shape}")
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def number_of(adapter: Adapter, what: str, patterns: Any, module: str, otherwise: Any) -> float:
    """A module's own rank or alpha: that of the first pattern that its name ends with, as peft has it."""
    found = otherwise
    if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
        raise adapter.refuse(f"has {len(patterns):,} patterns for {what}, more than any model has modules")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if ends_with(adapter, pattern, module):
            found = value
            break
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not abs(found) < MAX_NUMBER:
        raise adapter.refuse(f"has {shorten(str(found), 40)} for {what}, which is no number")
    return found


@functools.lru_cache(maxsize=2 * MAX_PATTERNS)  # each is held against every module
def compiled(pattern: str) -> re.Pattern[str]:
    """A pattern, ready to match. Raises re.error and the like where it is none."""
    return re.compile(pattern)


def ends_with(adapter: Adapter, pattern: str, module: str) -> bool:
    """Whether a pattern of a stranger's config is the end of a module's name, behind a dot, or all of it."""
    if REPEATED_GROUP.search(pattern) or len(REPETITION.findall(pattern)) > MAX_REPETITIONS:
        raise adapter.refuse(f"has a pattern that could take for ever to match: {shorten(pattern, 60)!r}")
    try:
        return compiled(rf"(.*\.)?({pattern})$").match(module) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise adapter.refuse(f"has a pattern that is none: {shorten(pattern, 60)!r} ({error})") from error


def as_matrix(info: TensorInfo) -> tuple[int, int]:
    """(rows, all other elements of one) of a tensor; (0, 0) of a number."""
    return (info.shape[0], math.prod(info.shape[1:])) if info.shape else (0, 0)


def fits(factors: Mapping[str, TensorInfo], target: TensorInfo, is_transposed: bool) -> bool:
    """Whether B A, or its transpose, has the shape of a tensor. Of a convolution, B is that of one by one."""
    (rank, columns), (rows, inner) = as_matrix(factors["A"]), as_matrix(factors["B"])
    made = (columns, rows) if is_transposed else (rows, columns)
    return rank == inner and rank * rows * columns > 0 and made == as_matrix(target)


def are_transposed(adapter: Adapter, pairs: Collection[tuple[Mapping[str, TensorInfo], TensorInfo]]) -> bool:
    """Whether square weights are stored (in, out), as GPT-2 does: as those beside them are, or as the config says."""
    whole = [(own, target) for own, target in pairs if own.keys() >= {"A", "B"}]
    known = {fits(own, target, True) for own, target in whole if fits(own, target, True) != fits(own, target, False)}
    return known.pop() if len(known) == 1 else bool(adapter.settings.get("fan_in_fan_out"))


def with_factors(
    adapter: Adapter, target: TensorInfo, factors: Mapping[str, TensorInfo], scale: float, are_squares_transposed: bool
) -> AdaptedTensor:
    """A tensor with what its factors add to it. Raises SlerpMergeError where they have other shapes."""
    ways = [is_transposed for is_transposed in (False, True) if fits(factors, target, is_transposed)]
    if not target.is_float or not ways or isinstance(target, AdaptedTensor):
        shapes = f"{factors['B'].shape} and {factors['A'].shape}"
        what = f"adds factors of {shapes} to {target.name}, which is {target.dtype} {target.shape}"
        hint = f"This is hardly its base. Name the right one: BASE+{adapter.folder}, as --primary takes it too."
        raise adapter.refuse(what, hint)
    is_transposed = ways[0] if len(ways) == 1 else are_squares_transposed
    left, right = (factors["A"], factors["B"]) if is_transposed else (factors["B"], factors["A"])
    return AdaptedTensor(**fields_of(target), left=left, right=right, scale=scale, is_transposed=is_transposed)


def with_bias(adapter: Adapter, target: TensorInfo, bias: TensorInfo, scale: float) -> AdaptedTensor:
    """A bias with what a factor's own bias adds to it. Raises SlerpMergeError where it has another shape."""
    if target.shape != bias.shape or isinstance(target, AdaptedTensor) or not (target.is_float and bias.is_float):
        raise adapter.refuse(f"adds a bias of {bias.shape} to {target.name}, which is {target.dtype} {target.shape}")
    return AdaptedTensor(**fields_of(target), left=bias, right=None, scale=scale)


class BaseNames:
    """The names that a base's tensors are stored under, for names as its class has them.

    The two differ before the layers: a model is stored with or without what its head's class puts there.
    """

    def __init__(self, adapter: Adapter, names: Collection[str]) -> None:
        self.adapter = adapter
        self.names = names
        self.by_end: dict[tuple[str, ...], list[list[str]]] = {}  # by the last two parts: all parts of each
        for name in names:
            parts = name.split(".")
            self.by_end.setdefault(tuple(parts[-2:]), []).append(parts)

    def find(self, name: str, may_be_new: bool = False) -> str:
        """The name in the base: the same, or the only one that ends alike from before the layers on.

        may_be_new: a head may have been tied there, and is one of its own now. Raises SlerpMergeError where there is
        none.
        """
        if name in self.names:
            return name
        parts, layer = name.split("."), find_layer(name)
        needed = len(parts) - len(layer[0].split(".")) if layer is not None else 2
        lengths = {".".join(other): common_end(parts, other) for other in self.by_end.get(tuple(parts[-2:]), ())}
        longest = max(lengths.values(), default=0)
        found = [other for other, length in lengths.items() if length == longest]
        if longest >= needed and len(found) == 1:
            return found[0]
        if UNSTORED_HEAD.search(name):
            if may_be_new:
                return name
            raise self.adapter.refuse(f"changes {name}, which its base does not store: it is tied to the embedding")
        what = "twice, in different places" if longest >= needed else "not"
        hint = f"Name its right base: BASE+{self.adapter.folder}, as --primary takes it too. {MERGE_WITH_PEFT}"
        raise self.adapter.refuse(f"changes {name}, which its base has {what}", hint)


def common_end(parts: list[str], other: list[str]) -> int:
    """How many parts two names have in common, from their ends."""
    count = 0
    while count < min(len(parts), len(other)) and parts[-1 - count] == other[-1 - count]:
        count += 1
    return count
