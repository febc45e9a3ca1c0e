"""The same tensors under other names: which of another model's are which of the primary's.

Names and shapes are all that is asked. Read pairing.py before this.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from slerpkit.parity.pairing import is_known_buffer
from slerpkit.parity.report import Mismatch

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.tensors import TensorInfo

OLD_ENDINGS = ((".gamma", ".weight"), (".beta", ".bias"))  # layer norms, as checkpoints of 2019 have them


def rename_to_match(other: Checkpoint, primary: Checkpoint) -> tuple[Checkpoint, list[Mismatch]]:
    """(`other` with its tensors under the names that the primary has for them, what is to know of it).

    Old endings are made modern. A prefix is exchanged if it has the other's parts, or some of them, in whatever order
    (`language_model.model` for `model.language_model`), and every tensor under it then meets one of the same shape
    without a counterpart.
    """
    unmet = {modern_name(name): info for name, info in primary.tensors.items() if name not in other.tensors}
    foreign = [n for n, info in other.tensors.items() if n not in primary.tensors and not is_known_buffer(info)]
    if not unmet or not foreign:
        return other, []
    new_names: dict[str, str] = {}

    def rename(targets: Mapping[str, str]) -> None:
        """Takes the new names if they are all there, each for one tensor, of its shape."""
        fitting = (new for name, new in targets.items() if same_shape_per_token(other.tensors[name], unmet.get(new)))
        if len(set(fitting)) == len(targets):
            new_names.update({name: unmet.pop(new).name for name, new in targets.items()})

    for name in foreign:
        rename({name: modern_name(name)})
    for old, new in exchangeable_prefixes([name for name in foreign if name not in new_names], unmet):
        under_prefix = [name for name in foreign if name not in new_names and has_prefix(name, old)]
        rename({name: exchange_prefix(name, old, new) for name in under_prefix})
    if not new_names:
        return other, []
    renamed = (dataclasses.replace(info, name=new_names.get(name, name)) for name, info in other.tensors.items())
    example = next(iter(new_names))
    why = f"The same tensors under other names, {len(new_names)} of them; the child has the primary's names."
    mismatch = Mismatch("resolved", "names", new_names[example], example, why)
    return dataclasses.replace(other, tensors={info.name: info for info in renamed}), [mismatch]


def exchangeable_prefixes(foreign: Iterable[str], unmet: Iterable[str]) -> list[tuple[str, str]]:
    """(prefix of a foreign name, the primary's for it), the longest first; of one length, the one most names speak for.

    foreign: names of the other model. unmet: modern names of the primary's tensors without a counterpart.
    """
    by_ending: dict[tuple[str, ...], list[str]] = {}
    for name in unmet:
        by_ending.setdefault(ending_of(name), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in map(modern_name, foreign):
        for candidate in by_ending.get(ending_of(name), []):
            prefixes = different_prefixes(name, candidate)
            parts = [set(prefix.split(".")) - {""} for prefix in prefixes]
            of_one_kind = parts[0] <= parts[1] or parts[1] <= parts[0]
            if of_one_kind and not any(part.isdecimal() for part in parts[0] | parts[1]):
                votes[prefixes] += 1
    return sorted(votes, key=lambda prefixes: (-len(prefixes[0]), -votes[prefixes], prefixes))


def ending_of(name: str) -> tuple[str, ...]:
    """What two names of one tensor share: their last part, and every number."""
    parts = name.split(".")
    return parts[-1], *(part for part in parts if part.isdecimal())


def modern_name(name: str) -> str:
    """A tensor's name with the ending that it has today."""
    for old, new in OLD_ENDINGS:
        name = name[: -len(old)] + new if name.endswith(old) else name
    return name


def different_prefixes(first: str, second: str) -> tuple[str, str]:
    """Two dotted names without the parts they end in alike."""
    parts = first.split("."), second.split(".")
    shared = 0
    while shared < min(map(len, parts)) and parts[0][-1 - shared] == parts[1][-1 - shared]:
        shared += 1
    return ".".join(parts[0][: len(parts[0]) - shared]), ".".join(parts[1][: len(parts[1]) - shared])


def has_prefix(name: str, prefix: str) -> bool:
    """Whether a name stands under a prefix; every name does under an empty one."""
    return not prefix or name.startswith(prefix + ".")


def exchange_prefix(name: str, old: str, new: str) -> str:
    """A name, its ending made modern, with another prefix."""
    rest = modern_name(name)[len(old) + bool(old) :]
    return f"{new}.{rest}" if new else rest


def same_shape_per_token(info: TensorInfo, counterpart: TensorInfo | None) -> bool:
    """Same shape, rows aside where both are matrices: these may follow other tokens."""
    if counterpart is None or len(info.shape) != len(counterpart.shape):
        return False
    return info.shape == counterpart.shape or (len(info.shape) == 2 and info.shape[1] == counterpart.shape[1])
