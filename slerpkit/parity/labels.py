"""Classification heads: which of the parents' rows stand for the child's labels.

Names of labels are what configs state; the rows that stand for them are those of a head's last layer, found by name
and number. Read report.py before this.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import numpy
from slerpkit.messages import format_names
from slerpkit.parents.tensors import natural_order
from slerpkit.parity.report import OF_BASE, Labels, Mismatch, RowMap

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint

LABELLED_CLASS = re.compile(r"Classification|Detection|Segmentation")
# Of a head of several layers, only what comes last in the classes of transformers; a number is one of a Sequential.
LAST_LAYER = re.compile(
    r"((?:\d*[^.\d][^.]*\.)*"
    r"(?:score|logits_proj|classification_head|sequence_summary|(?:(?!pre_)\w+_)?classifier)\.)"
    r"(?:(?:out_proj|linear_out|linear|summary|(\d+))\.)?(?:weight|bias)"
)
NAMELESS = "LABEL_n is a number and no name, so whether both have their rows in one order cannot be told."


def stated_labels(config: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of a head's rows in their order; None where a config has none that say more than a number."""
    by_number, by_name = config.get("id2label"), config.get("label2id")
    tables = [list(by_number.items())] if isinstance(by_number, dict) else []
    tables += [[(number, name) for name, number in by_name.items()]] if isinstance(by_name, dict) else []
    for table in tables:
        names = {str(number): str(name) for number, name in table}
        labels = tuple(names.get(str(number), "") for number in range(len(table)))
        if all(labels) and any(label not in (f"LABEL_{n}", str(n)) for n, label in enumerate(labels)):
            return labels
    return None


def label_tensors(checkpoint: Checkpoint, labels: Sequence[str]) -> frozenset[str]:
    """The tensors with a row for each of these labels: the last layer of a head, never a hidden one as wide."""
    heads = {name: match for name in checkpoint.tensors if (match := LAST_LAYER.fullmatch(name))}
    last: dict[str, int] = {}
    for match in heads.values():
        last[match[1]] = max(int(match[2] or -1), last.get(match[1], -1))
    return frozenset(
        name
        for name, match in heads.items()
        if int(match[2] or -1) == last[match[1]] and checkpoint.tensors[name].shape[:1] == (len(labels),)
    )


def is_last_layer(tensor_name: str) -> bool:
    """Whether a tensor can have a row for each label, by its name."""
    return LAST_LAYER.fullmatch(tensor_name) is not None


def has_labels(checkpoint: Checkpoint) -> bool:
    """Whether a model answers with labels, as its class or its tensors tell."""
    return bool(LABELLED_CLASS.search(checkpoint.architecture)) or any(map(is_last_layer, checkpoint.tensors))


def align_labels(
    primary: Checkpoint, secondary: Checkpoint, base: Checkpoint | None = None
) -> tuple[Labels, list[Mismatch]]:
    """(which rows of heads stand for the child's labels, what is to know of it). The child has the primary's labels."""
    models = [model for model in (primary, secondary, base) if model is not None]
    labels = [stated_labels(model.config) for model in models]
    tensors = tuple(label_tensors(model, names) if names else frozenset() for model, names in zip(models, labels))
    orders: list[Sequence[int] | None] = []
    mismatches = []
    for number, other in enumerate(labels[1:], 1):
        if other == labels[0]:
            orders.append(None)
            continue
        is_classified = has_labels(primary) or has_labels(models[number])
        found = tensors[number] and tensors[0]
        order, mismatch = judge_labels(labels[0], other, found, is_classified, OF_BASE * (number > 1))
        orders.append(order)
        mismatches += [mismatch] if mismatch else []
    if not any(orders):
        return Labels(tensors), mismatches
    rows = range(len(labels[0]))
    return Labels(tensors, RowMap(tuple(numpy.array(order or rows) for order in (rows, *orders)))), mismatches


def judge_labels(
    own: Sequence[str] | None, other: Sequence[str] | None, found: frozenset[str], is_classified: bool, of_whom: str
) -> tuple[list[int] | None, Mismatch | None]:
    """(where the primary's labels are among another model's, or None for the same places, what is to know of it).

    found: the tensors with a row for each label. is_classified: whether the models answer with labels at all.
    """
    folded = [[label.strip().casefold() for label in labels or ()] for labels in (own, other)]
    if folded[0] == folded[1]:
        return None, None
    subject, shown = f"id2label{of_whom}", [format_names(labels) if labels else "LABEL_n" for labels in (own, other)]
    if not is_classified or (None in (own, other) and len(own or other) == 1):
        return None, Mismatch("notice", subject, *shown, "The child keeps the primary's.")
    block = functools.partial(Mismatch, "blocking", subject, accepted_as="id2label")
    if None in (own, other):
        return None, block(*shown, NAMELESS)
    if sorted(folded[0]) != sorted(folded[1]):
        why = "The heads answer with different labels, so their rows stand for different things."
        return None, block(only_in(own, folded[1]), only_in(other, folded[0]), why)
    if not found or len(set(folded[0])) < len(own):
        why = "The same labels in another order, and which row stands for which cannot be told."
        return None, block(*shown, why)
    tensors = format_names(sorted(found, key=natural_order))
    why = f"The same labels in another order: rows of {tensors} follow labels, and the child has the primary's order."
    return [folded[1].index(label) for label in folded[0]], Mismatch("resolved", subject, *shown, why)


def only_in(labels: Sequence[str], others: Sequence[str]) -> str:
    """The labels that another model lacks, in words; how many there are where it has all."""
    alone = [label for label in labels if label.strip().casefold() not in others]
    return f"{format_names(alone)} of {len(labels)} labels" if alone else f"{len(labels)} labels, none alone"
