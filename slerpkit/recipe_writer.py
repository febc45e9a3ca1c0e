"""A merge written as a recipe: mergekit's YAML, which recipe_file.py reads to the same bits again.

What mergekit's keys cannot say stands under `slerpmerge`, where mergekit passes over it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit import __version__
from slerpkit.lazy import yaml
from slerpkit.recipe import PARENTS, LayerSlice, MergeRecipe
from slerpkit.recipe_identity import header_fingerprint, sample_fingerprint
from slerpkit.schedule import Schedule

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint


def recipe_text(recipe: MergeRecipe, parents: Mapping[str, Checkpoint], child: Path) -> str:
    """merge_recipe.yaml, in mergekit's syntax: --recipe makes the same bits of it again.

    parents: by role, "primary", "secondary" and, where there is one, "base". A model of the Hub stands there by its
    name and commit; paths run from the child's folder. What mergekit's keys cannot say stands under `slerpmerge`.
    """
    places = {
        role: relative_place(parent.folder, child) if parent.hub_name is None else str(parent.hub_name)
        for role, parent in parents.items()
    }
    method = method_of(recipe)
    content: dict[str, Any] = {"merge_method": method}
    if recipe.base is not None:
        content["base_model"] = places["base"]
    elif method != "nuslerp":  # which does without: elsewhere it says whose config the child has
        content["base_model"] = places["primary"]
    if recipe.slices:
        content["slices"] = [recipe_slice(part, places, method) for part in recipe.slices]
    else:
        whole = LayerSlice(0, None if method == "passthrough" else 0, 0, recipe.schedule, recipe.weights)
        cut = recipe_slice(whole, places, method)
        content["models"] = [{k: v for k, v in source.items() if k != "layer_range"} for source in cut["sources"]]
        content.update({"parameters": cut["parameters"]} if "parameters" in cut else {})
    settings = {"normalize": False} if method == "linear" and not recipe.normalize else {}
    if method == "nuslerp" and recipe.vectors != "tensor":
        settings |= {"nuslerp_flatten": False, "nuslerp_row_wise": recipe.vectors == "first_dim"}
    if settings:
        content["parameters"] = {**content.get("parameters", {}), **settings}
    if recipe.cast_dtype is not None:
        content["dtype"] = recipe.cast_dtype
    if recipe.dtype not in ("auto", recipe.cast_dtype):
        content["out_dtype"] = recipe.dtype
    source = places.get(recipe.tokenizer, recipe.tokenizer)
    if recipe.token_sources or recipe.pad_to_multiple_of > 1:
        content["tokenizer"] = {"source": source, **recipe_tokens(recipe, places)}
    elif recipe.tokenizer != "auto":
        content["tokenizer_source"] = source
    if recipe.chat_template not in ("auto", "primary", "secondary"):
        content["chat_template"] = "auto" if recipe.chat_template == "either" else recipe.chat_template
    own: dict[str, Any] = {
        "version": __version__,
        "method": recipe.method,
        "dot_threshold": recipe.dot_threshold,
        "epsilon": recipe.epsilon,
        "extrapolate": recipe.extrapolate,
        **({"chat_template": recipe.chat_template} if recipe.chat_template in ("primary", "secondary") else {}),
        **({"accept": list(recipe.accept)} if recipe.accept else {}),
    }
    blended = [part for part in recipe.slices if part.alone is None]
    if method != "slerp" and any(part.weights is None for part in blended):
        own["slices_t"] = [recipe_rules(part.schedule) for part in recipe.slices]
    elif method != "slerp" and not recipe.slices and recipe.weights is None:
        own["t"] = recipe_rules(recipe.schedule)
    for role, parent in parents.items():
        fingerprints = {"headers": header_fingerprint(parent)}
        if parent.remote is None:  # else they are not here any more; the commit in its name says which they were
            fingerprints["sample"] = sample_fingerprint(parent)
        own[role] = {"name": parent.public_place, **fingerprints}
    return yaml.safe_dump({**content, "slerpmerge": own}, sort_keys=False, allow_unicode=True)


def method_of(recipe: MergeRecipe) -> str:
    """The method as mergekit calls it, or that of its methods which reads a merge in the same keys."""
    is_copy = recipe.weights is None and set(recipe.schedule.values()) == {0.0}  # of one model, which no other takes
    is_copy = is_copy and recipe.primary.resolve() == recipe.secondary.resolve()
    if recipe.base is None and (all(part.alone for part in recipe.slices) if recipe.slices else is_copy):
        return "passthrough"
    if recipe.method == "nuslerp" or recipe.base is not None:
        return "nuslerp"
    return "linear" if recipe.method == "lerp" else "slerp"


def recipe_tokens(recipe: MergeRecipe, places: Mapping[str, str]) -> dict[str, Any]:
    """Which rows stand for tokens, and padding, as a recipe writes them."""
    tokens: dict[str, Any] = {}
    for want in recipe.token_sources:
        source: Any = {"kind": "zero"} if want.role is None else places[want.role]
        if want.row_of is not None:
            key = "token" if isinstance(want.row_of, str) else "token_id"
            source = {"kind": "model_token", "model": source, key: want.row_of}
        tokens[want.token] = {"source": source, **({"force": True} if want.force else {})}
    found: dict[str, Any] = {"tokens": tokens} if tokens else {}
    return found | ({"pad_to_multiple_of": recipe.pad_to_multiple_of} if recipe.pad_to_multiple_of > 1 else {})


def recipe_slice(part: LayerSlice, places: Mapping[str, str], method: str) -> dict[str, Any]:
    """One slice as a recipe writes it: slerp has its t, the others a weight for each model."""
    sources: list[dict[str, Any]] = [
        {"model": places[role], "layer_range": [layers.start, layers.stop]}
        for role, layers in ((role, part.range_of(role)) for role in PARENTS)
        if part.alone in (None, role)
    ]
    if part.alone is not None:  # linear asks for a weight all the same
        return {"sources": [{**sources[0], **({"parameters": {"weight": 1}} if method == "linear" else {})}]}
    if method == "slerp":
        return {"sources": sources, "parameters": {"t": recipe_rules(part.schedule)}}
    for source, weight in zip(sources, part.weights or (part.schedule.mirrored(), part.schedule)):
        source["parameters"] = {"weight": recipe_rules(weight)}
    if "base" in places:
        start = part.primary_start if part.base_start is None else part.base_start
        sources.append({"model": places["base"], "layer_range": [start, start + part.length]})
    return {"sources": sources}


def recipe_rules(schedule: Schedule) -> Any:
    """A schedule as mergekit writes it: a number, a list, or filters with their values."""
    values = [list(rule.gradient) if len(rule.gradient) > 1 else rule.gradient[0] for rule in schedule.rules]
    if len(values) == 1 and schedule.rules[0].name_filter == "*":
        return values[0]
    return [
        {"value": value} if rule.name_filter == "*" else {"filter": rule.name_filter, "value": value}
        for rule, value in zip(schedule.rules, values)
    ]


def relative_place(folder: Path, child: Path) -> str:
    """A parent's path from the child's folder; its own where the two stand on different drives."""
    try:
        place = Path(os.path.relpath(folder.resolve(), child)).as_posix()
    except ValueError:
        place = str(folder.resolve())
    return place
