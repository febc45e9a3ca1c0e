"""Each tensor of the child with its sources: slices of layers, shapes, buffers, what a single parent has.

Names, shapes and dtypes are all that is known of a tensor here. How it is blended is decided later (merge/plan.py).
Read report.py and embeddings.py before this.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.messages import format_names
from slerpkit.parents.tensors import TORCH_NAMES, find_layer, layer_positions, natural_order, renumber
from slerpkit.parity.configs import have_other_classes, stated_depth
from slerpkit.parity.embeddings import (
    UNSTORED_HEAD,
    find_tied_source,
    has_token_rows,
    lacks_head,
    row_count,
    shape_per_token,
    token_tensors,
)
from slerpkit.parity.labels import is_last_layer
from slerpkit.parity.prediction import judge_predictions, prediction_tensors
from slerpkit.parity.report import OF_BASE, LayerSource, Mismatch, TensorSources
from slerpkit.recipe import PARENTS

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parents.tensors import TensorInfo
    from slerpkit.parity.report import Labels, RowMap, Vocabulary
    from slerpkit.recipe import LayerSlice

# Buffers that older versions saved and newer ones recompute.
BUFFER_NAME = re.compile(
    r"rotary_emb\w*\.(inv_freq|cos_cached|sin_cached)$|(attn|attention)\.masked_bias$|position_ids$"
)
MASK_NAME = re.compile(r"(attn|attention)\.bias$")
# What a pre-training leaves among the weights, by classes that do not read it; fine-tunes are saved without it.
LEFT_OVER = (
    (re.compile("ForMaskedLM$"), re.compile(r"(^|\.)pooler\.dense\.|^cls\.seq_relationship\.")),
    (re.compile("^M?T5For"), re.compile(r"^decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.")),
)
MAX_ALONE = 3  # tensors that block for the same reason, each in a line of its own
VALUE_HEAD = (
    "A value head, as TRL trains it beside a policy; the other parent has none. Take the tensors of v_head out of that "
    "model's weights, and of their index if there is one, and merge the policies."
)


def is_known_buffer(info: TensorInfo) -> bool:
    """A tensor that a model recomputes when it loads: rotary frequencies, causal masks, position ids."""
    is_mask = MASK_NAME.search(info.name) and len(info.shape) == 4 and info.shape[2] == info.shape[3]
    return bool(BUFFER_NAME.search(info.name) or is_mask)


def is_left_over(name: str, owner: Checkpoint) -> bool:
    """Whether the class of a checkpoint does not read a tensor of this name, which is from its pre-training."""
    return any(kind.search(owner.architecture) and names.search(name) for kind, names in LEFT_OVER)


def why_kept(info: TensorInfo, counterpart: TensorInfo | None, primary: Checkpoint) -> str | None:
    """Why the child has a tensor of the primary's as it is; None where it is to be blended."""
    if is_known_buffer(info):  # the model computes it, and versions store it differently
        return "A buffer; the primary's is kept."
    if counterpart is None and is_left_over(info.name, primary):
        return "Not read by its class; the primary's is kept."
    return None


def main_stack(checkpoint: Checkpoint) -> tuple[str, int]:
    """(stack, layers) of the language model's layers: the stack as deep as the config says, else the largest.

    Layers behind it that predict further tokens are not counted.
    """
    apart = prediction_tensors(checkpoint)
    sizes: dict[str, int] = {}
    depths: dict[str, int] = {}
    for name, info in checkpoint.tensors.items():
        if (layer := find_layer(name)) is not None and name not in apart:
            stack, index = layer
            sizes[stack] = sizes.get(stack, 0) + info.byte_count
            depths[stack] = max(depths.get(stack, 0), index + 1)
    stated = [stack for stack in sizes if depths[stack] == stated_depth(checkpoint.config)]
    stack = max(stated or sizes, key=lambda stack: sizes[stack], default="")
    return stack, depths.get(stack, 0)


def child_layout(
    primary: Checkpoint, secondary: Checkpoint, slices: Sequence[LayerSlice], predicting: Collection[str]
) -> Iterator[tuple[str, TensorInfo, LayerSource]]:
    """(the child's name, the primary's tensor, the layers it comes from) for every tensor of the child.

    The tensor is the secondary's where a slice copies its layers. predicting: the primary's tensors of layers that
    predict further tokens, which have no place among the others.
    """
    positions = layer_positions(primary.tensors.keys() - predicting)
    sliced_stack, depth = main_stack(primary) if slices else (None, 0)
    for name, info in primary.tensors.items():
        if sliced_stack is None or (find_layer(name) or (None,))[0] != sliced_stack:
            yield name, info, LayerSource(positions.get(name, 1.0))
    layers = {role: stacked_layers(model) for role, model in zip(PARENTS, (primary, secondary))} if slices else {}
    child_index = 0
    for number, cut in enumerate(slices):
        first, second = cut.range_of("primary"), cut.range_of("secondary")
        for step in range(cut.length):
            of_base = first if cut.base_start is None else range(cut.base_start, cut.base_start + cut.length)
            layer_source = LayerSource(
                position=step / (cut.length - 1) if cut.length > 1 else 1.0,
                secondary_layer=None if cut.alone else second[step],
                base_layer=None if cut.alone else of_base[step],
                slice_number=number,
                alone=cut.alone,
            )
            of_secondary = cut.alone == "secondary"
            for info in layers[PARENTS[of_secondary]].get((second if of_secondary else first)[step], []):
                yield renumber(info.name, child_index), info, layer_source
            child_index += 1
    for index, infos in sorted(layers["primary"].items() if slices else ()):
        for info in infos if index >= depth else []:  # they follow the last layer, however many there are
            yield renumber(info.name, child_index + index - depth), info, LayerSource(1.0)


def stacked_layers(checkpoint: Checkpoint) -> dict[int, list[TensorInfo]]:
    """The tensors of each layer of the language model."""
    stack, _ = main_stack(checkpoint)
    layers: dict[int, list[TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        if (layer := find_layer(name)) is not None and layer[0] == stack:
            layers.setdefault(layer[1], []).append(info)
    return layers


def name_in_layer(info: TensorInfo, index: int | None) -> str:
    """The name that the primary's tensor has in this layer of another model; its own for None."""
    return info.name if index is None else renumber(info.name, index)


def check_slices(slices: Sequence[LayerSlice], primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """Layers that a recipe asks for and a parent does not have, or that the primary's class could not take."""
    if not slices:
        return []
    mismatches = []
    depths = [main_stack(parent)[1] for parent in (primary, secondary)]
    for layer_slice in slices:
        ends = [layer_slice.range_of(role).stop for role in PARENTS]
        if ends[0] > depths[0] or ends[1] > depths[1]:
            asked = [f"{depth} layers, asked up to {end}" for depth, end in zip(depths, ends)]
            why = "A slice asks for layers that are not there."
            mismatches.append(Mismatch("blocking", "layer_range", *asked, why))
    copied = {layer for cut in slices if cut.alone == "secondary" for layer in cut.range_of("secondary")}
    if not copied:
        return mismatches
    known = {layer_form(infos) for infos in stacked_layers(primary).values()}
    layers = stacked_layers(secondary)
    strange = [str(layer) for layer in sorted(copied) if layer in layers and layer_form(layers[layer]) not in known]
    if strange:
        why = "These layers are copied from the secondary, and no layer of the primary has the same tensors."
        mismatches.append(Mismatch("blocking", "layers of a slice", "other tensors", format_names(strange), why))
    return mismatches


def layer_form(infos: Iterable[TensorInfo]) -> frozenset[tuple[str, tuple[int, ...]]]:
    """What a layer's tensors are called and how large they are, whichever layer it is."""
    return frozenset((renumber(info.name, 0), info.shape) for info in infos if not is_known_buffer(info))


def pair_tensors(
    primary: Checkpoint,
    secondary: Checkpoint,
    slices: Sequence[LayerSlice] = (),
    base: Checkpoint | None = None,
    vocabulary: Vocabulary | None = None,
    labels: Labels | None = None,
) -> tuple[list[TensorSources], list[Mismatch]]:
    """(each tensor of the child with its sources, every tensor that does not pair and what does not fit)."""
    pairs: list[TensorSources] = []
    mismatches: list[Mismatch] = []
    only_primary: list[str] = []
    used_names: set[str] = set()
    predicting, alone = [prediction_tensors(parent) for parent in (primary, secondary)], []
    for name, primary_tensor, layer_source in child_layout(primary, secondary, slices, predicting[0]):
        if layer_source.alone is not None:
            pairs.append(TensorSources(name, primary_tensor, None, None, layer_source))
            continue
        secondary_name = name_in_layer(primary_tensor, layer_source.secondary_layer)
        used_names.add(secondary_name)
        secondary_tensor = secondary.tensors.get(secondary_name)
        base_tensor = None
        if base is not None:
            base_tensor = base.tensors.get(name_in_layer(primary_tensor, layer_source.base_layer))
        why = why_kept(primary_tensor, secondary_tensor, primary)
        if why is not None:
            if secondary_tensor is None:
                mismatches.append(Mismatch("resolved", name, "saved", "not saved", why))
            pairs.append(TensorSources(name, primary_tensor, None, None, layer_source))
            continue
        if primary_tensor.name in predicting[0]:
            # Where slices make layers of another number, its name may be that of one of the secondary's usual layers.
            is_alone = secondary_tensor is None or (slices and secondary_name not in predicting[1])
            if is_alone or (base is not None and base_tensor is None):
                alone.append(TensorSources(name, primary_tensor, None, None, layer_source))
                continue
        if secondary_tensor is None:
            secondary_tensor = find_tied_source(primary_tensor, primary, secondary)
            if secondary_tensor is None:
                only_primary.append(name)
                continue
            why = f"The secondary's head is tied to {secondary_tensor.name}, which takes part in its place."
            mismatches.append(Mismatch("resolved", name, "stored", "tied", why))
        if base is not None:
            base_tensor = base_tensor or find_tied_source(primary_tensor, primary, base)
        sources = primary_tensor, secondary_tensor, base_tensor
        rows = rows_of(labels, *sources) or rows_of(vocabulary, *sources)
        mismatches += compare_tensors(primary_tensor, secondary_tensor, rows)
        if base is not None:
            mismatches += check_base_tensor(primary_tensor, base_tensor, rows)
        pairs.append(TensorSources(name, primary_tensor, secondary_tensor, base_tensor, layer_source, rows))
    only_secondary = unused_names(secondary, used_names, bool(slices))
    left_out = [name for name in only_secondary if name in predicting[1]]
    only_secondary = [name for name in only_secondary if name not in predicting[1]]
    kept, told = judge_predictions(alone, len(left_out), [*map(len, predicting)], vocabulary)
    unpaired = judge_unpaired(primary, secondary, only_primary, only_secondary)
    return pairs + kept, [*group_tensors(mismatches), *told, *unpaired]


def unused_names(secondary: Checkpoint, used_names: set[str], is_sliced: bool) -> list[str]:
    """The secondary's tensors that the child is made without; layers that slices leave out do not count."""
    sliced_stack = main_stack(secondary)[0] if is_sliced else ""
    return [
        name
        for name in secondary.tensors
        if name not in used_names and not (sliced_stack and (find_layer(name) or ("",))[0] == sliced_stack)
    ]


def rows_of(meaning: Vocabulary | Labels | None, *sources: TensorInfo | None) -> RowMap | None:
    """The map of rows for tensors that have one for each token or label on every side; None where they go by number."""
    if meaning is None or not all(i is None or i.name in names for i, names in zip(sources, meaning.tensors)):
        return None
    # A base without the tensor is told of elsewhere.
    return meaning.map_of(tuple(row_count(info or sources[0]) for info in sources[: len(meaning.tensors)]))


def check_base_tensor(
    primary_tensor: TensorInfo, base_tensor: TensorInfo | None, rows: RowMap | None
) -> list[Mismatch]:
    """The base model's tensor that a pair's task vectors start from must be there, of the same shape."""
    if base_tensor is not None and same_shape(primary_tensor, base_tensor, rows):
        return []
    base_shape = "missing" if base_tensor is None else str(list(base_tensor.shape))
    why = "The base model must hold every tensor that both parents learned on, in the same shape."
    subject, primary_shape = primary_tensor.name + OF_BASE, str(list(primary_tensor.shape))
    return [Mismatch("blocking", subject, primary_shape, base_shape, why)]


def same_shape(first: TensorInfo, second: TensorInfo, rows: RowMap | None) -> bool:
    """Whether two tensors can be blended: of one shape, or of one shape for each token where rows follow tokens."""
    if rows is None:
        return first.shape == second.shape
    return len(first.shape) == len(second.shape) and shape_per_token(first.shape) == shape_per_token(second.shape)


DIFFERENT_VOCABULARIES = "Vocabularies of different size."
DIFFERENT_HEADS = "A row for each label, and the heads answer with a different number of them."


def compare_tensors(primary: TensorInfo, secondary: TensorInfo, rows: RowMap | None = None) -> list[Mismatch]:
    """Shape and dtype of one tensor in both parents. rows: where rows follow tokens, their number may differ."""
    mismatches = []
    if not same_shape(primary, secondary, rows):
        shapes = str(list(primary.shape)), str(list(secondary.shape))
        rows_only = len(primary.shape) == len(secondary.shape) and primary.shape[1:] == secondary.shape[1:]
        why = "Tensors of different shape cannot be blended."
        if rows_only and is_last_layer(primary.name):
            why = DIFFERENT_HEADS
        elif rows_only and has_token_rows(primary, row_count(primary)):
            why = DIFFERENT_VOCABULARIES
        mismatches.append(Mismatch("blocking", primary.name, *shapes, why))
    if primary.dtype != secondary.dtype and not (primary.is_float and secondary.is_float):
        why = "Only real numbers of different dtypes can be blended."
        mismatches.append(Mismatch("blocking", primary.name, primary.dtype, secondary.dtype, why))
    return mismatches


def group_tensors(mismatches: Iterable[Mismatch]) -> list[Mismatch]:
    """One line with an example for more than a few tensors that block for the same reason."""
    groups: dict[tuple[str, str], list[Mismatch]] = {}
    for m in mismatches:
        groups.setdefault((m.severity, m.consequence), []).append(m)
    grouped = []
    for (severity, _), group in groups.items():
        first = group[0]
        if severity == "blocking" and len(group) > MAX_ALONE:
            grouped.append(dataclasses.replace(first, subject=f"{len(group)} tensors, such as {first.subject}"))
        else:
            grouped += group
    return grouped


def judge_unpaired(
    primary: Checkpoint, secondary: Checkpoint, only_primary: Sequence[str], only_secondary: Iterable[str]
) -> list[Mismatch]:
    """Tensors that a single parent has: left out where a rule says why, blocking otherwise."""
    resolved, unexplained = [], []
    for name in only_secondary:
        info = secondary.tensors[name]
        if is_known_buffer(info):
            resolved.append(Mismatch("resolved", name, "not saved", "saved", "A buffer; the child is made without it."))
        elif is_left_over(name, secondary):
            why = "Not read by its class; the child is made without it."
            resolved.append(Mismatch("resolved", name, "not saved", "saved", why))
        elif (embedding := find_tied_source(info, secondary, primary)) is not None:
            why = f"The child's head stays tied to {embedding.name}, as the primary's; the secondary's is left out."
            resolved.append(Mismatch("resolved", name, "tied", "stored", why))
        else:
            unexplained.append(name)
    resolved.sort(key=lambda mismatch: mismatch.subject)
    sizes = [
        elements_by_layer(parent.tensors[name] for name in names)
        for parent, names in ((primary, only_primary), (secondary, unexplained))
    ]
    if sizes[0] and sizes[0] == sizes[1] and len(only_primary) != len(unexplained):
        examples = [f"{len(names)} tensors, such as {names[0]}" for names in (only_primary, unexplained)]
        why = (
            "The same weights laid out in two ways, fused in one parent and apart in the other. Load each parent "
            "with the same version of transformers (from_pretrained, then save_pretrained) and merge those copies."
        )
        return [*resolved, Mismatch("blocking", f"layout of {len(sizes[0])} layers", *examples, why)]
    return [
        *resolved,
        *missing_tensors(primary, only_primary, "primary", secondary),
        *missing_tensors(secondary, unexplained, "secondary", primary),
    ]


def elements_by_layer(infos: Iterable[TensorInfo]) -> dict[Any, int]:
    """How many elements each layer's tensors hold together; empty where one of them is in no layer."""
    sizes: Counter[Any] = Counter()
    for info in infos:
        sizes[find_layer(info.name)] += info.element_count
    return {} if None in sizes else sizes


def missing_tensors(holder: Checkpoint, names: Sequence[str], role: str, other: Checkpoint) -> list[Mismatch]:
    """One blocking line for all the tensors that a single parent, `holder`, has and the other lacks.

    None where they are of other classes: that blocks, and says why.
    """
    if not names or have_other_classes(holder.config, other.config):
        return []
    presence = ("present", "missing") if role == "primary" else ("missing", "present")
    subject = format_names(sorted(names, key=natural_order))
    why = f"{len(names)} tensor{'s' * (len(names) > 1)} of {holder.name} without a counterpart."
    if lacks_head(other) and token_tensors(holder).keys() >= set(names):
        why = UNSTORED_HEAD
    elif all("v_head" in name.split(".") for name in names):
        why = VALUE_HEAD
    return [Mismatch("blocking", subject, *presence, why)]


def check_dtypes(primary: Checkpoint, secondary: Checkpoint, recipe_dtype: str) -> list[Mismatch]:
    """Tensors stored in different floating-point dtypes, in one line a combination."""
    combinations: Counter[tuple[str, str]] = Counter()
    for name, info in primary.tensors.items():
        counterpart = secondary.tensors.get(name) if info.is_float and not is_known_buffer(info) else None
        if counterpart is not None and counterpart.is_float and counterpart.dtype != info.dtype:
            combinations[info.dtype, counterpart.dtype] += 1
    kept = "the primary's" if recipe_dtype == "auto" else recipe_dtype
    return [
        Mismatch(
            "resolved",
            f"dtype of {count} tensor{'s' * (count > 1)}",
            *(TORCH_NAMES[dtype] for dtype in dtypes),
            f"Blended in float32 (float64 where one is), saved in {kept}.",
        )
        for dtypes, count in combinations.items()
    ]
