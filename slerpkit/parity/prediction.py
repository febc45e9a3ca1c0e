"""Layers that predict further tokens (multi-token prediction), which classes of transformers leave out when they load.

So an original has them and most of its fine-tunes do not, and a model is whole without them. Names and configs tell
which they are. Read configs.py before this.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.lazy import numpy
from slerpkit.parents.tensors import find_layer
from slerpkit.parity.configs import PREDICTION_KEY, language_scopes, stated_depth
from slerpkit.parity.report import Mismatch

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.parity.report import TensorSources, Vocabulary

PREDICTION_NAME = re.compile(r"(^|\.)mtp(_\w+)?\.")
COUNT_KEY = re.compile(r"(layers|modules|depth)$")


def stated_predictions(config: Mapping[str, Any]) -> int:
    """How many layers that predict further tokens a config states beside its others."""
    counts = (
        value
        for scope in language_scopes(config)
        for key, value in scope.items()
        if PREDICTION_KEY.search(key) and COUNT_KEY.search(key) and type(value) is int
    )
    return max(counts, default=0)


def prediction_tensors(checkpoint: Checkpoint) -> frozenset[str]:
    """The tensors of layers that predict further tokens: named so, or numbered on behind the last layer that counts."""
    depth, count = stated_depth(checkpoint.config), stated_predictions(checkpoint.config)
    layers = {name: find_layer(name) or ("", -1) for name in checkpoint.tensors}
    last: dict[str, int] = {}
    sizes: Counter[str] = Counter()
    for name, (stack, index) in layers.items():
        last[stack] = max(index, last.get(stack, -1))
        sizes[stack] += checkpoint.tensors[name].byte_count
    deep = [stack for stack, index in last.items() if depth is not None and depth <= index + 1 <= depth + count]
    own = max(deep, key=lambda stack: sizes[stack], default=None)  # a vision tower may be as deep by chance
    return frozenset(
        name
        for name, (stack, index) in layers.items()
        if PREDICTION_NAME.search(name) or (stack == own and index >= depth)
    )


def judge_predictions(
    alone: Sequence[TensorSources], left_out: int, counts: Sequence[int], vocabulary: Vocabulary | None
) -> tuple[list[TensorSources], list[Mismatch]]:
    """(which of the primary's tensors of such layers the child keeps, one line on those that it does not blend).

    alone: the primary's that nothing is to be blended with. left_out: how many the secondary alone has. counts: how
    many such tensors each parent has.
    """
    if not alone and not left_out:
        return [], []
    kept = [] if needs_other_rows([sources.primary for sources in alone], vocabulary) else list(alone)
    why = "The child is made without them, as the primary is."
    if kept:
        why = f"The child has {len(kept)} of the primary's as they are."
    elif alone:
        why = "The child is made without them: some have a row for each of the primary's tokens, and it has others."
    why += " Only where several tokens are predicted at once are they used."
    shown = (f"{count} tensors" if count else "none" for count in counts)
    return kept, [Mismatch("resolved", "multi-token prediction", *shown, why)]


def needs_other_rows(infos: Collection[TensorInfo], vocabulary: Vocabulary | None) -> bool:
    """Whether some of the primary's tensors have a row for each of its tokens, and the child has others."""
    if vocabulary is None or vocabulary.row_map is None:
        return False
    rows, own = vocabulary.parent_rows[0], vocabulary.map_of(vocabulary.parent_rows).sources[0]
    has_table = any(len(info.shape) == 2 and info.shape[0] == rows for info in infos)
    return has_table and not numpy.array_equal(own, numpy.arange(rows))
