"""Each tensor of the child with its sources: other names, slices of layers, shapes, buffers."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.messages import format_names
from slerpkit.parents.tensors import TORCH_NAMES, find_layer, layer_positions, natural_order, renumber
from slerpkit.parity.configs import stated_depth
from slerpkit.parity.embeddings import find_tied_source, shape_per_token
from slerpkit.parity.report import LayerSource, Mismatch, TensorSources

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.parity.report import RowMap, Vocabulary
    from slerpkit.recipe import LayerSlice

# Buffers that older versions saved and newer ones recompute.
BUFFER_NAME = re.compile(r"rotary_emb\w*\.(inv_freq|cos_cached|sin_cached)$|attn\.masked_bias$|position_ids$")
MASK_NAME = re.compile(r"(attn|attention)\.bias$")


def is_known_buffer(info: TensorInfo) -> bool:
    """A tensor that a model recomputes when it loads: rotary frequencies, causal masks, position ids."""
    is_mask = MASK_NAME.search(info.name) and len(info.shape) == 4 and info.shape[2] == info.shape[3]
    return bool(BUFFER_NAME.search(info.name) or is_mask)


def main_stack(checkpoint: Checkpoint) -> tuple[str, int]:
    """(stack, layers) of the language model's layers: the stack as deep as the config says, else the largest."""
    sizes: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        if (place := find_layer(name)) is not None:
            sizes[place[0]] = sizes.get(place[0], 0) + info.byte_count
            depths[place[0]] = max(depths.get(place[0], 0), place[1] + 1)
    stated = [stack for stack in sizes if depths[stack] == stated_depth(checkpoint.config)]
    stack = max(stated or sizes, key=lambda stack: sizes[stack], default="")
    return stack, depths.get(stack, 0)


def child_layout(primary: Checkpoint, slices: Sequence[LayerSlice]) -> Iterator[tuple[str, TensorInfo, LayerSource]]:
    """(the child's name, the primary's tensor, the layer's place) for every tensor of the child."""
    positions = layer_positions(primary.tensors)
    stack = main_stack(primary)[0] if slices else None
    layers: dict[int, list[TensorInfo]] = {}
    for name, info in primary.tensors.items():
        found = find_layer(name)
        if found is not None and found[0] == stack:
            layers.setdefault(found[1], []).append(info)
        else:
            yield name, info, LayerSource(-1, -1, positions[name], -1)
    child_index = 0
    for number, cut in enumerate(slices):
        for step in range(cut.length):
            source = cut.primary_start + step
            place = LayerSource(
                secondary=cut.secondary_start + step,
                base=source if cut.base_start is None else cut.base_start + step,
                position=step / (cut.length - 1) if cut.length > 1 else 1.0,
                slice_number=number,
            )
            for info in layers.get(source, []):
                yield renumber(info.name, child_index), info, place
            child_index += 1


def name_in(info: TensorInfo, index: int) -> str:
    """The name that the primary's tensor has in the layer `index` of another model; its own at -1."""
    return info.name if index < 0 else renumber(info.name, index)


def check_slices(slices: Sequence[LayerSlice], primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """Layers that a recipe asks for and a parent does not have."""
    found = []
    depths = [main_stack(parent)[1] for parent in (primary, secondary)]
    for cut in slices:
        ends = cut.primary_start + cut.length, cut.secondary_start + cut.length
        if ends[0] > depths[0] or ends[1] > depths[1]:
            shown = [f"{depth} layers, asked up to {end}" for depth, end in zip(depths, ends)]
            found.append(Mismatch("blocking", "layer_range", *shown, "A slice asks for layers that are not there."))
    return found


def pair_tensors(
    primary: Checkpoint,
    secondary: Checkpoint,
    slices: Sequence[LayerSlice] = (),
    base: Checkpoint | None = None,
    vocabulary: Vocabulary | None = None,
) -> tuple[list[TensorSources], list[Mismatch]]:
    """Each tensor of the child with its sources, and every tensor that does not pair."""
    pairs: list[TensorSources] = []
    found: list[Mismatch] = []
    only_primary: list[str] = []
    used: set[str] = set()
    for name, left, place in child_layout(primary, slices):
        there = name_in(left, place.secondary)
        used.add(there)
        right = secondary.tensors.get(there)
        if is_known_buffer(left):  # never blended: the model computes it, and versions store it in their own ways
            if right is None:
                found.append(Mismatch("resolved", name, "saved", "not saved", "A buffer; the primary's is kept."))
            pairs.append(TensorSources(name, left, None, None, place))
            continue
        if right is None and (right := find_tied_source(left, primary, secondary)) is not None:
            why = f"The secondary's head is tied to {right.name}, which takes part in its place."
            found.append(Mismatch("resolved", name, "stored", "tied", why))
        if right is None:
            only_primary.append(name)
            continue
        base_tensor = None
        if base is not None:
            base_tensor = base.tensors.get(name_in(left, place.base)) or find_tied_source(left, primary, base)
        rows = rows_of(vocabulary, left, right, base_tensor)
        found += compare_tensors(left, right, rows)
        if base is not None:
            found += check_base_tensor(left, base_tensor, rows)
        pairs.append(TensorSources(name, left, right, base_tensor, place, rows))
    stack = main_stack(secondary)[0] if slices else None
    extra = [n for n in secondary.tensors if n not in used and not (stack and (find_layer(n) or ("",))[0] == stack)]
    return pairs, found + judge_unpaired(primary, secondary, only_primary, extra)


def rows_of(vocabulary: Vocabulary | None, *sources: TensorInfo | None) -> RowMap | None:
    """The map of rows for tensors that have one for each token on every side; None where rows go by number."""
    if vocabulary is None or vocabulary.row_map is None:
        return None
    follows = all(info is None or info.name in names for info, names in zip(sources, vocabulary.tensors))
    return vocabulary.row_map if follows else None


def check_base_tensor(left: TensorInfo, base_tensor: TensorInfo | None, rows: RowMap | None) -> list[Mismatch]:
    """The base model's tensor that a pair's task vectors start from must be there, of the same shape."""
    if base_tensor is not None and same_shape(left, base_tensor, rows):
        return []
    there = "missing" if base_tensor is None else str(list(base_tensor.shape))
    why = "The base model must hold every tensor that both parents learned on."
    return [Mismatch("blocking", f"{left.name} of the base", str(list(left.shape)), there, why)]


def same_shape(left: TensorInfo, right: TensorInfo, rows: RowMap | None) -> bool:
    """Whether two tensors can be blended: of one shape, or of one shape for each token where rows follow tokens."""
    if rows is None:
        return left.shape == right.shape
    return len(left.shape) == len(right.shape) and shape_per_token(left.shape) == shape_per_token(right.shape)


DIFFERENT_VOCABULARIES = "Vocabularies of different size."


def compare_tensors(left: TensorInfo, right: TensorInfo, rows: RowMap | None = None) -> list[Mismatch]:
    """Shape and dtype of one tensor on both sides. rows: where rows follow tokens, their number may differ."""
    found = []
    if not same_shape(left, right, rows):
        shapes = str(list(left.shape)), str(list(right.shape))
        rows_only = len(left.shape) == len(right.shape) and left.shape[1:] == right.shape[1:]
        why = DIFFERENT_VOCABULARIES if rows_only else "Tensors of different shape cannot be blended."
        found.append(Mismatch("blocking", left.name, *shapes, why))
    if left.dtype != right.dtype and not (left.is_float and right.is_float):
        why = "Only real numbers of different dtypes can be blended."
        found.append(Mismatch("blocking", left.name, left.dtype, right.dtype, why))
    return found


def judge_unpaired(
    primary: Checkpoint, secondary: Checkpoint, only_primary: Sequence[str], extra: Iterable[str]
) -> list[Mismatch]:
    """Tensors that a single parent has: left out where a rule says why, blocking otherwise."""
    found, unexplained = [], []
    for name in extra:
        info = secondary.tensors[name]
        if is_known_buffer(info):
            found.append(Mismatch("resolved", name, "not saved", "saved", "A buffer; the child is made without it."))
        elif (source := find_tied_source(info, secondary, primary)) is not None:
            why = f"The child's head stays tied to {source.name}, as the primary's; the secondary's is left out."
            found.append(Mismatch("resolved", name, "tied", "stored", why))
        else:
            unexplained.append(name)
    found.sort(key=lambda m: m.subject)
    sizes = [
        elements_by_layer(parent.tensors[name] for name in names)
        for parent, names in ((primary, only_primary), (secondary, unexplained))
    ]
    if sizes[0] and sizes[0] == sizes[1] and len(only_primary) != len(unexplained):
        shown = [f"{len(names)} tensors, such as {names[0]}" for names in (only_primary, unexplained)]
        why = (
            "The same weights laid out in two ways, fused in one parent and apart in the other. Load each parent "
            "with the same version of transformers (from_pretrained, then save_pretrained) and merge those copies."
        )
        return [*found, Mismatch("blocking", f"layout of {len(sizes[0])} layers", *shown, why)]
    missing = missing_tensors(primary, only_primary, "primary") + missing_tensors(secondary, unexplained, "secondary")
    return found + missing


def elements_by_layer(infos: Iterable[TensorInfo]) -> dict[Any, int]:
    """How many elements each layer's tensors hold together."""
    sizes: dict[Any, int] = {}
    for info in infos:
        place = find_layer(info.name)
        sizes[place] = sizes.get(place, 0) + info.element_count
    return {} if None in sizes else sizes


OLD_ENDINGS = ((".gamma", ".weight"), (".beta", ".bias"))  # layer norms, as checkpoints of 2019 have them


def rename_to_match(other: Checkpoint, model: Checkpoint) -> tuple[Checkpoint, list[Mismatch]]:
    """`other` with its tensors under the names that `model` has for them, where only prefixes differ.

    A prefix is exchanged if it has the other's parts, or some of them, in whatever order (`language_model.model` for
    `model.language_model`), and every tensor under it then meets one of the same shape without a counterpart.
    """
    free = {modern_name(name): info for name, info in model.tensors.items() if name not in other.tensors}
    strange = [name for name, info in other.tensors.items() if name not in model.tensors and not is_known_buffer(info)]
    if not free or not strange:
        return other, []
    renamed: dict[str, str] = {}

    def rename(targets: Mapping[str, str]) -> None:
        """Takes the new names if they are all there, each for one tensor, of its shape."""
        met = {free[there].name for name, there in targets.items() if fits(other.tensors[name], free.get(there))}
        if len(met) == len(targets):
            renamed.update({name: free.pop(there).name for name, there in targets.items()})

    for name in strange:
        rename({name: modern_name(name)})
    for old, new in exchangeable_prefixes(other, [name for name in strange if name not in renamed], free):
        rename(
            {name: exchange_prefix(name, old, new) for name in strange if name not in renamed and has_prefix(name, old)}
        )
    if not renamed:
        return other, []
    tensors = {
        renamed.get(name, name): dataclasses.replace(info, name=renamed.get(name, name))
        for name, info in other.tensors.items()
    }
    first = next(iter(renamed))
    why = f"The same tensors under other names, {len(renamed)} of them; the child has the primary's names."
    return dataclasses.replace(other, tensors=tensors), [Mismatch("resolved", "names", renamed[first], first, why)]


def exchangeable_prefixes(
    other: Checkpoint, strange: Iterable[str], free: Mapping[str, TensorInfo]
) -> list[tuple[str, str]]:
    """(prefix there, prefix here), the longest first, and of one length the one that most tensors speak for.

    free: tensors without a counterpart yet, by modern name.
    """
    by_ending: dict[tuple[Any, ...], list[str]] = {}
    for name in free:
        by_ending.setdefault(ending_of(name), []).append(name)
    votes: Counter[tuple[str, str]] = Counter()
    for name in map(modern_name, strange):
        for candidate in by_ending.get(ending_of(name), []):
            pair = different_prefixes(name, candidate)
            parts = [set(prefix.split(".")) - {""} for prefix in pair]
            of_one_kind = parts[0] <= parts[1] or parts[1] <= parts[0]
            if of_one_kind and not any(part.isdecimal() for part in parts[0] | parts[1]):
                votes[pair] += 1
    return sorted(votes, key=lambda pair: (-len(pair[0]), -votes[pair], pair))


def ending_of(name: str) -> tuple[Any, ...]:
    """What two names of one tensor share: their last part, and every number."""
    parts = name.split(".")
    return parts[-1], *(part for part in parts if part.isdecimal())


def modern_name(name: str) -> str:
    """A tensor's name with the ending that it has today."""
    for old, new in OLD_ENDINGS:
        name = name[: -len(old)] + new if name.endswith(old) else name
    return name


def different_prefixes(left: str, right: str) -> tuple[str, str]:
    """Two dotted names without the parts they end in alike."""
    parts = left.split("."), right.split(".")
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


def fits(info: TensorInfo, counterpart: TensorInfo | None) -> bool:
    """Same shape, rows aside where both are matrices: these may follow other tokens."""
    if counterpart is None or len(info.shape) != len(counterpart.shape):
        return False
    return info.shape == counterpart.shape or (len(info.shape) == 2 and info.shape[1] == counterpart.shape[1])


def missing_tensors(holder: Checkpoint, names: Sequence[str], role: str) -> list[Mismatch]:
    """One blocking line for all the tensors that a single side holds."""
    if not names:
        return []
    shown = ("present", "missing") if role == "primary" else ("missing", "present")
    subject = format_names(sorted(names, key=natural_order))
    why = f"{len(names)} tensor{'s' * (len(names) > 1)} of {holder.name} without a counterpart."
    return [Mismatch("blocking", subject, *shown, why)]


def check_dtypes(primary: Checkpoint, secondary: Checkpoint, recipe_dtype: str) -> list[Mismatch]:
    """Tensors stored in different floating-point dtypes, in one line a combination."""
    combinations: dict[tuple[str, str], int] = {}
    for name, left in primary.tensors.items():
        right = secondary.tensors.get(name) if not is_known_buffer(left) else None
        if right is not None and left.is_float and right.is_float and left.dtype != right.dtype:
            combinations[left.dtype, right.dtype] = combinations.get((left.dtype, right.dtype), 0) + 1
    kept = "the primary's" if recipe_dtype == "auto" else recipe_dtype
    return [
        Mismatch(
            "resolved",
            f"dtype of {count} tensor{'s' * (count > 1)}",
            TORCH_NAMES.get(left, left),
            TORCH_NAMES.get(right, right),
            f"Blended in float32 (float64 where one is), saved in {kept}.",
        )
        for (left, right), count in combinations.items()
    ]
