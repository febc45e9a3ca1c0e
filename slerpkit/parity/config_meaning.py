"""What a config.json means: one spelling for each setting, and the defaults of the class that reads it.

A class is one of the installed transformers; no code of a model's own runs and nothing is fetched. What follows from a
difference is not known here (configs.py).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from slerpkit.lazy import transformers
from slerpkit.parents.tensors import MAX_LAYER_INDEX

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Rotary settings that stood by themselves, and their names among the others.
ROPE_KEYS = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "global_rope_theta": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}
# What a model whose class knows nothing of a rotary setting does.
ROPE_DEFAULTS = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
TRAINED_LENGTH_KEY = "original_max_position_embeddings"  # of texts, before they were made longer
LOCAL_THETA_KEYS = ("rope_local_base_freq", "local_rope_theta")  # of layers with a sliding window, by themselves
FULL, SLIDING = "full_attention", "sliding_attention"
# Sections of a position are told by keys of their own, whatever a version calls their kind.
ROPE_TYPES = {"su": "longrope", "mrope": "default", "axial": "default"}
LAYER_TYPES = {"mamba": "linear_attention", "attention": FULL}
LAYER_TYPE_KEYS = ("layer_types", "layers_block_type")
NEWER_NAMES = {"num_local_experts": "num_experts"}  # of settings that version 5 renamed in some classes
LAYER_COUNT_KEY = re.compile(r"layers?$|depth$")
# What classes need not read: it is judged by other means, and versions disagree on what they take.
UNREAD_KEYS = ("quantization_config", "auto_map", "dtype", "torch_dtype", "id2label", "label2id")
UNNESTED_KEYS = ("id2label", "label2id", "quantization_config")  # dicts that are one value


def canonical_value(value: Any) -> Any:
    """A value as every version writes it: lists for tuples, numbers for what JSON has no number for."""
    if isinstance(value, (list, tuple)):
        return [canonical_value(item) for item in value]
    if isinstance(value, dict):
        if value.keys() == {"__float__"}:
            return float(value["__float__"]) if value["__float__"] in ("Infinity", "-Infinity", "NaN") else value
        return {str(key): canonical_value(item) for key, item in value.items()}
    return value


def canonical_rope_types(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings of one kind of layer, with one name for their kind."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rest = {key: value for key, value in rope.items() if key not in ("type", "rope_type")}
    return {"rope_type": ROPE_TYPES.get(kind, kind) if isinstance(kind, str) else kind, **rest}


def canonical_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under one spelling: transformers 5 keeps them together, earlier versions apart."""
    canonical = dict(config)
    together = canonical.pop("rope_parameters", None)
    scaling = canonical.pop("rope_scaling", None)
    rope = dict(together) if isinstance(together, dict) else {}
    rope.update(scaling if isinstance(scaling, dict) else {})
    shared: dict[str, Any] = {}
    for key, name in ROPE_KEYS.items():  # a second spelling that says another thing stays, under its own name
        if canonical.get(key) is not None and canonical[key] == shared.setdefault(name, canonical[key]):
            del canonical[key]
    local = [canonical.pop(key) for key in LOCAL_THETA_KEYS if canonical.get(key) is not None]
    by_layer_type = {key: {**shared, **value} for key, value in rope.items() if isinstance(value, dict)}
    if local and not by_layer_type:
        by_layer_type = {FULL: {**shared, **rope}, SLIDING: {"rope_theta": local[0]}}
    trained = canonical.get(TRAINED_LENGTH_KEY)
    kinds = [canonical_rope_types(value) for value in by_layer_type.values() or [{**shared, **rope}]]
    for kind in kinds:
        if trained is not None and kind["rope_type"] != "default":
            kind[TRAINED_LENGTH_KEY] = trained  # stated by itself, it goes before the one among the others
            canonical.pop(TRAINED_LENGTH_KEY, None)
    if by_layer_type:
        canonical["rope_parameters"] = dict(zip(by_layer_type, kinds))
    elif rope or shared or "num_attention_heads" in canonical:
        canonical["rope_parameters"] = kinds[0]  # unscaled, where nothing is said
    return canonical


def canonical_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """A sliding window that is switched off is none, however wide it would be; a null says so too."""
    canonical = dict(config)
    if not {"sliding_window", "use_sliding_window"} & canonical.keys():
        return canonical
    if not (canonical.get("sliding_window") and canonical.get("use_sliding_window", True)):
        canonical["sliding_window"] = False
    if canonical.get("use_sliding_window") is False:
        canonical.pop("max_window_layers", None)
    return canonical


def canonical_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Head counts that are implied, written out, so that saying less is not a difference."""
    canonical = dict(config)
    heads, hidden = canonical.get("num_attention_heads"), canonical.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        if canonical.get("head_dim") is None:
            canonical["head_dim"] = hidden // heads
        if canonical.get("num_key_value_heads") is None:
            canonical["num_key_value_heads"] = heads
    return canonical


def canonical_layers(config: Mapping[str, Any]) -> dict[str, Any]:
    """Kinds of layers under the names of transformers 5."""
    canonical = dict(config)
    for key in LAYER_TYPE_KEYS:
        if isinstance(canonical.get(key), list):
            canonical[key] = [LAYER_TYPES.get(kind, kind) if isinstance(kind, str) else kind for kind in canonical[key]]
    return canonical


def flatten_config(config: Mapping[str, Any], with_nulls: bool = False, prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys, each in its one spelling.

    with_nulls: of a class's settings a null is a value. In a file it says the same as silence, and is left out.
    """
    flat: dict[str, Any] = {}
    if "rope_type" not in config:  # else these are the rotary settings themselves
        config = canonical_layers(canonical_window(canonical_heads(canonical_rope(config))))
    for key, value in config.items():
        value = canonical_value(value)
        if isinstance(value, dict) and key not in UNNESTED_KEYS:
            flat.update(flatten_config(value, with_nulls, f"{prefix}{key}."))
        elif value is not None or with_nulls:
            flat[prefix + key] = value
    return flat


def is_too_deep(config: Mapping[str, Any]) -> bool:
    """Whether a config states more layers than any model has; a class would write out a setting for each."""
    for key, value in config.items():
        if key in UNREAD_KEYS:
            continue
        if isinstance(value, dict) and is_too_deep(value):
            return True
        if LAYER_COUNT_KEY.search(key) and isinstance(value, (int, float)) and value > MAX_LAYER_INDEX:
            return True
    return False


class Older(NamedTuple):
    """How classes of version 4 spell what version 5 spells in one way; rotary settings stand by themselves in each."""

    rope_type: str  # the key that holds the kind of scaling
    layer_types: Mapping[str, str]


# Tried one after another: a class refuses what it does not know.
OLDER = (
    Older("rope_type", {}),
    Older("rope_type", {new: old for old, new in LAYER_TYPES.items()}),
    Older("type", {}),
)


def readable_config(config: Mapping[str, Any], older: Older | None = None) -> dict[str, Any]:
    """A config as a class of the installed transformers reads it. older: how, where that is of version 4."""
    readable: dict[str, Any] = {}
    for key, value in config.items():
        if key in UNREAD_KEYS:
            continue
        nested = isinstance(value, dict) and "rope" not in key and value.keys() != {"__float__"}
        readable[key] = readable_config(value, older) if nested else canonical_value(copy.deepcopy(value))
        if older is not None and key in LAYER_TYPE_KEYS and isinstance(value, list):
            readable[key] = [older.layer_types.get(kind, kind) if isinstance(kind, str) else kind for kind in value]
    rope = readable.get("rope_parameters")
    if older is None or not isinstance(rope, dict):
        return readable
    del readable["rope_parameters"]
    if isinstance(rope.get(SLIDING), dict):
        theta = rope[SLIDING].get("rope_theta")
        readable |= {key: theta for key in LOCAL_THETA_KEYS if theta is not None}
    rope = rope[FULL] if isinstance(rope.get(FULL), dict) else rope
    readable |= {key: rope[name] for key, name in ROPE_KEYS.items() if rope.get(name) is not None}
    scaling = {key: value for key, value in rope.items() if key not in (*ROPE_KEYS, "rope_type")}
    if TRAINED_LENGTH_KEY in readable:
        scaling.pop(TRAINED_LENGTH_KEY, None)  # some take no more than they know
    kind = rope.get("rope_type", "default")
    readable["rope_scaling"] = {older.rope_type: kind, **scaling} if scaling or kind != "default" else None
    return readable


def as_class_of(readable: dict[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """A readable config under the names that a class knows. known: the settings of its defaults."""
    inner = readable.get("text_config")
    if isinstance(inner, dict) and "text_config" not in known:
        own_type = str(readable.get("model_type"))
        if str(inner.get("model_type", "")).startswith(own_type):  # else it is no part that once stood by itself
            readable = {**inner, **{key: value for key, value in readable.items() if key != "text_config"}}
    for newer, name in NEWER_NAMES.items():
        if newer in readable and newer not in known and name in known:
            readable = {**readable, name: readable[newer]}
            del readable[newer]
    return readable


def as_typed(value: Any, default: Any) -> Any:
    """A value of the type that a class has for it, where it says the same: 30 for 30.0, or null for no.

    Older versions took what they found; version 5 refuses another type. default: the class's own value.
    """
    if isinstance(value, dict) and isinstance(default, dict):
        return {key: as_typed(item, default.get(key)) for key, item in value.items()}
    if isinstance(default, bool):
        return bool(value) if value is None or isinstance(value, int) else value
    if isinstance(default, float) and type(value) is int:
        return float(value)
    return int(value) if type(default) is int and isinstance(value, float) and value.is_integer() else value


def read_meaning(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """A config's settings as the class of its model_type fills them in; None where no class reads it."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or is_too_deep(config):
        return None
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    is_older = int(transformers.__version__.partition(".")[0]) < 5
    try:
        for spelling in OLDER if is_older else (None,):
            try:
                config_class: type[PretrainedConfig] = transformers.CONFIG_MAPPING[model_type]
                known = config_class().to_dict()
                readable = as_typed(as_class_of(readable_config(config, spelling), known), known)
                return config_class.from_dict(readable).to_dict()
            except Exception:  # a class refuses in ways of its own; the caller then compares what the files say
                continue
        return None
    finally:
        transformers.logging.set_verbosity(verbosity)


def read_meanings(*configs: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The meanings of configs of one model_type; None where a class cannot read every one."""
    if len({str(config.get("model_type")) for config in configs}) > 1:
        return None
    meanings = [read_meaning(config) for config in configs]
    return None if None in meanings else meanings
