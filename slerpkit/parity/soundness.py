"""A parent that is broken by itself, as names, shapes and config tell before anything is written.

Adapters left among the weights, shards of nothing, a head that nobody stored, a vocab_size that its rows belie, names
that a wrapper spoiled. Whether two parents fit each other is not asked here. Read embeddings.py before this.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from slerpkit.messages import format_names
from slerpkit.parents.tensors import natural_order
from slerpkit.parents.wrappers import unsure_prefix
from slerpkit.parity.embeddings import UNSTORED_HEAD, belied_sizes, lacks_head, stores_head, vocabulary_rows
from slerpkit.parity.report import Mismatch

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint

# Parts of names that peft gives to adapters and to what it keeps beside them.
ADAPTER_NAME = re.compile(
    r"(^|\.)(lora_(A|B|embedding_A|embedding_B|magnitude_vector)|hada_[wt][12](_[ab])?|lokr_[wt][12](_[ab])?|ia3_l"
    r"|oft_[rR]|boft_[RS]|vera_lambda_[bd]|modules_to_save|original_module)(\.|$)"
)
CAUSAL_CLASS = re.compile(r"ForCausalLM$|LMHeadModel$")


def check_soundness(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """What is wrong with either of two models: blocking, or resolved where the weights tell what is meant."""
    return [
        *check_adapters(primary, secondary),
        *check_gathered(primary, secondary),
        *check_heads(primary, secondary),
        *check_stated_rows(primary, secondary),
    ]


def check_adapters(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """One blocking line where either parent still has adapters beside its weights."""
    left = adapter_names(primary), adapter_names(secondary)
    if not any(left):
        return []
    why = (
        "Adapters (LoRA) stand among the weights, and blending their halves is not blending what they learned. Load "
        "that model with peft, merge them into it (merge_and_unload), and save it again."
    )
    return [Mismatch("blocking", "adapters", *(format_names(names) if names else "none" for names in left), why)]


def adapter_names(checkpoint: Checkpoint) -> list[str]:
    """The tensors of adapters in a checkpoint; none of them where its config says that they are the model's own."""
    if any(key.endswith("lora") and isinstance(value, dict) for key, value in checkpoint.config.items()):
        return []
    return sorted((name for name in checkpoint.tensors if ADAPTER_NAME.search(name)), key=natural_order)


def check_gathered(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """One blocking line where either parent has tensors of no elements that should have some."""
    empty = [
        sorted(
            (
                name
                for name, info in parent.tensors.items()
                if info.is_float
                and not info.element_count
                # No weight is a list of nothing; ZeRO-3 leaves that where a process did not gather its shards.
                and ((info.shape == (0,) and name.endswith("weight")) or has_elements(other, name))
            ),
            key=natural_order,
        )
        for parent, other in ((primary, secondary), (secondary, primary))
    ]
    if not any(empty):
        return []
    why = (
        "These weights are empty: their shards were not gathered when the model was saved (DeepSpeed ZeRO-3). Save it "
        "again with stage3_gather_16bit_weights_on_model_save, or restore them with zero_to_fp32.py."
    )
    names = (f"{len(names)} empty: {format_names(names)}" if names else "all there" for names in empty)
    return [Mismatch("blocking", "empty weights", *names, why)]


def has_elements(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a checkpoint has a tensor of this name, and numbers in it."""
    return name in checkpoint.tensors and checkpoint.tensors[name].element_count > 0


def check_heads(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """One blocking line where a parent has no head that the other could show to be missing, and none is tied."""
    lacking = [
        bool(CAUSAL_CLASS.search(parent.architecture)) and lacks_head(parent) and not stores_head(other)
        for parent, other in ((primary, secondary), (secondary, primary))
    ]
    if not any(lacking):
        return []
    stored = ("not tied, not stored" if is_lacking else "not stored" for is_lacking in lacking)
    return [Mismatch("blocking", "head", *stored, UNSTORED_HEAD)]


def check_stated_rows(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """One line where a config states another vocab_size than its embedding has rows."""
    parents = primary, secondary
    sizes = [belied_sizes(parent) for parent in parents]
    if not any(sizes):
        return []
    rows = [vocabulary_rows(parent) for parent in parents]
    stated = (f"{own[0]} stated, {count} rows" if own else f"{count} rows" for own, count in zip(sizes, rows))
    why = "The embedding's rows belie it; the child's config states how many the child has."
    return [Mismatch("resolved", "vocab_size", *stated, why)]


def check_wrappers(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """What to know of names that were not the model's own, or may not be."""
    parents = primary, secondary
    taken = [", ".join(parent.wrappers) or "none" for parent in parents]
    left = [unsure_prefix(parent.tensors) or "none" for parent in parents]
    mismatches = []
    if taken != ["none", "none"]:
        why = "What a wrapper around the model put into its tensors' names is taken off; the child is without it."
        mismatches.append(Mismatch("resolved", "wrappers", *taken, why))
    if left != ["none", "none"]:
        why = (
            "All names begin so, as a wrapper leaves them. The child keeps the primary's; see that its class has them."
        )
        mismatches.append(Mismatch("notice", "prefix of names", *left, why))
    return mismatches
