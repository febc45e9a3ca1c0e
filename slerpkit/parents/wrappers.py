"""Names of tensors as a model's class has them, without what wrappers around the model put into them.

torch.compile, FSDP, DDP, DeepSpeed, PEFT and Lightning leave such names when the wrapped model is saved, and
transformers cannot load them. Names and configs are all that is asked. Read tensors.py before this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slerpkit.parents.tensors import TensorInfo

# Parts that torch and DeepSpeed put in anywhere in a name; nobody calls a module so.
WRAPPER_PARTS = ("_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
# What transformers 4.5x makes, when it saves a Gemma 3n, of a part that holds `model` too: per_layer_model_projection.
SPLIT_PART, WHOLE_PART = "_model.language_model_", "_model_"
# What DDP and DeepSpeed, PEFT, Lightning and TRL put before every name. A model's own names may begin so too.
WRAPPER_PREFIXES = ("module.", "base_model.model.", "pretrained_model.", "model.")
# Of one more `model.` before all names these tell: no class has a model inside so, or its head.
DOUBLED = ("model.model.", "model.lm_head.")
# What names begin with in the classes of transformers: the model inside, by its usual names, and heads.
USUAL_ROOTS = (
    "model", "transformer", "backbone", "lm_head", "embed_out", "score", "cls", "bert", "roberta",
    "final_logits_bias", "shared", "encoder", "decoder", "language_model", "vision_tower", "multi_modal_projector",
    "visual",
)  # fmt: skip


def unwrap(
    tables: Sequence[Mapping[str, TensorInfo]], configs: Sequence[Mapping[str, Any]]
) -> list[tuple[dict[str, TensorInfo], tuple[str, ...]]]:
    """(each model's tensors under their own names, what was taken off these) for models that are to be merged.

    What a model may have called so itself goes only where the rest is what another model's names, or the classes of
    transformers, have in its place; and nothing goes where two tensors would come to have one name.
    """
    unmarked = [renamed(table, {name: without_parts(name) for name in table}) for table in tables]
    unwrapped = []
    for number, (table, config) in enumerate(zip(unmarked, configs)):
        others = [other.keys() for place, other in enumerate(unmarked) if place != number]
        prefix = wrapper_prefix(table, config, others)
        parts = {part for name in tables[number] if name not in table for part in name.split(".")}
        taken = [f"{part}." for part in WRAPPER_PARTS if part in parts]
        taken += [SPLIT_PART] * any(SPLIT_PART in name for name in tables[number] if name not in table)
        table = renamed(table, {name: name[len(prefix) :] for name in table})
        unwrapped.append((table, (*taken, *filter(None, [prefix]))))
    return unwrapped


def renamed(table: Mapping[str, TensorInfo], names: Mapping[str, str]) -> dict[str, TensorInfo]:
    """Tensors under other names; under their own where these are not as many."""
    if len(set(names.values())) < len(names):
        return dict(table)
    return {
        new: table[name] if new == name else dataclasses.replace(table[name], name=new) for name, new in names.items()
    }


def without_parts(name: str) -> str:
    """A name without the parts that are a wrapper's wherever they stand."""
    return ".".join(part for part in name.split(".") if part not in WRAPPER_PARTS).replace(SPLIT_PART, WHOLE_PART)


def wrapper_prefix(names: Collection[str], config: Mapping[str, Any], others: Iterable[Collection[str]]) -> str:
    """What wrappers put before all of a model's names; empty where that cannot be said."""
    sure, prefix, rest = "", "", set(names)
    while wrapper := unsure_prefix(rest):
        prefix += wrapper
        rest = {name[len(wrapper) :] for name in rest}
        if is_usual(rest, config) or any(meets_more(rest, names, set(other)) for other in others):
            sure = prefix
    return sure


def unsure_prefix(names: Collection[str]) -> str:
    """What all names begin with as if a wrapper had put it there; empty where there is none."""
    return next((wrapper for wrapper in WRAPPER_PREFIXES if may_wrap(wrapper, names)), "")


def may_wrap(wrapper: str, names: Collection[str]) -> bool:
    """Whether every name begins with what a wrapper puts there. `model` is a name that most models have once."""
    doubled = wrapper != "model." or any(name.startswith(DOUBLED) for name in names)
    return doubled and bool(names) and all(name.startswith(wrapper) and name != wrapper for name in names)


def is_usual(names: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether all names begin as in a class of transformers. A model that brings its own code has names of its own."""
    roots = {name.partition(".")[0] for name in names}
    return "auto_map" not in config and roots <= {*USUAL_ROOTS, str(config.get("model_type"))}


def meets_more(names: Collection[str], wrapped: Iterable[str], other: Collection[str]) -> bool:
    """Whether another model has most of these names, and none of them as they are stored."""
    return not any(name in other for name in wrapped) and 2 * sum(name in other for name in names) > len(names)
