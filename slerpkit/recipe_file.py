"""A mergekit recipe read into a MergeRecipe, with the line of every fault.

Knows the folders that a recipe names; whether the models in them fit is not known here. Read recipe_yaml.py before
this; how a recipe is written stands in recipe_writer.py.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slerpkit.files import clean_path
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import has_tokenizer
from slerpkit.parents.tensors import MAX_LAYER_INDEX
from slerpkit.recipe import CHILD_DTYPES, LayerSlice, MergeRecipe
from slerpkit.recipe_yaml import RecipeFile
from slerpkit.schedule import Schedule

RECIPE_NAME = "merge_recipe.yaml"
RECIPE_METHODS = {"slerp": "slerp", "nuslerp": "nuslerp", "linear": "lerp"}
RECIPE_KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "slerpmerge",
)  # fmt: skip
RECIPE_PARAMETERS = {
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "linear": ("weight", "normalize"),
}
OWN_SETTINGS = (
    "version", "method", "t", "slices_t", "dot_threshold", "epsilon", "extrapolate", "primary", "secondary", "base",
    "chat_template", "accept",
)  # fmt: skip


class RecipeReader:
    """Makes of a mergekit recipe a MergeRecipe. Refuses by name, and with its line, what it cannot do."""

    def __init__(self, path: Path) -> None:
        self.file = RecipeFile(path)
        self.top = self.file.mapping(self.file.root, RECIPE_KEYS, "a recipe")
        self.method = self.read_method()
        self.scopes: list[dict[str, Any]] = []  # nodes of `parameters`, the widest last
        self.body = self.top
        if "parameters" in self.top:
            self.scopes.insert(0, self.parameters(self.top["parameters"]))
        if "modules" in self.top:
            self.body = self.only_module(self.top["modules"])
            if "parameters" in self.body:
                self.scopes.insert(0, self.parameters(self.body["parameters"]))

    def read_method(self) -> str:
        if "merge_method" not in self.top:
            raise self.file.fault(self.file.root, "merge_method is missing", "Write `merge_method: slerp`.")
        method = self.file.text(self.top["merge_method"], "merge_method")
        if method not in RECIPE_METHODS:
            known = ", ".join(RECIPE_METHODS)
            near = difflib.get_close_matches(method, RECIPE_METHODS, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Known here: {known}. For others use mergekit."
            raise self.file.fault(self.top["merge_method"], f"the method {method!r} is not done here", hint)
        return method

    def parameters(self, node: Any) -> dict[str, Any]:
        return self.file.mapping(node, RECIPE_PARAMETERS[self.method], f"parameters of {self.method}")

    def only_module(self, node: Any) -> dict[str, Any]:
        if node.id != "mapping" or len(node.value) != 1:
            raise self.file.fault(node, "modules should name exactly one", "Merge one module at a time.")
        return self.file.mapping(node.value[0][1], ("models", "slices", "parameters"), "a module")

    def model(self, node: Any, what: str) -> Path:
        """A model's folder: relative to the recipe's own where it exists there."""
        if node.id == "mapping":
            node = self.file.mapping(node, ("model", "path", "name"), what).get("model", node)
        text = self.file.text(node, what)
        folder = clean_path(text)
        beside = self.file.path.parent / folder
        folder = beside if beside.exists() else folder
        if "+" in text and not folder.exists():
            hint = "Merge the adapter into its model first, and name the result."
            raise self.file.fault(node, f"{text!r} adds a LoRA adapter to a model", hint)
        return folder

    def base_model(self) -> Path | None:
        return self.model(self.top["base_model"], "base_model") if "base_model" in self.top else None

    def schedule(self, name: str, scopes: Sequence[dict[str, Any]], node: Any) -> Schedule:
        """A parameter's rules, from the narrowest scope to the widest: the next is asked where no filter matches."""
        rules = [rule for scope in scopes if name in scope for rule in self.file.rules(scope[name], name)]
        if not rules:
            hint = f"Write `{name}:` under parameters."
            raise self.file.fault(node, f"{self.method} needs the parameter {name}", hint)
        return Schedule(tuple(rules))

    def flag(self, name: str, default: bool) -> bool:
        for scope in self.scopes:
            if name in scope:
                return self.file.truth(scope[name], name)
        return default

    def read(self) -> MergeRecipe:
        """The recipe. Raises SlerpMergeError with file and line."""
        own = self.own_settings()
        models = self.models()
        folders = [folder for folder, _, _ in models[0][1]]
        sides, base = self.sides(folders)
        fields: dict[str, Any] = {"primary": sides[0], "secondary": sides[1], "method": RECIPE_METHODS[self.method]}
        if base is not None:
            fields["base"] = base
        cuts = [self.slice(scope, sources, sides, base) for scope, sources in models]
        if "slices_t" in own:
            exact = own.pop("slices_t")
            cuts = [dataclasses.replace(cut, schedule=t, weights=None) for cut, t in zip(cuts, exact)]
        if "slices" in self.body:
            fields["slices"] = tuple(cuts)
        fields["schedule"], fields["weights"] = cuts[0].schedule, cuts[0].weights
        if self.method == "linear":
            fields["normalize"] = self.flag("normalize", True)
        if self.method == "nuslerp" and not self.flag("nuslerp_flatten", True):
            fields["vectors"] = "first_dim" if self.flag("nuslerp_row_wise", False) else "last_dim"
        return MergeRecipe(**{**fields, **self.dtypes(), **self.tokenizer(sides), **own})

    def models(self) -> list[tuple[list[dict[str, Any]], list[tuple[Path, Any, dict[str, Any]]]]]:
        """For each slice, or the one whole: (scopes of its parameters, [(folder, node, keys) of each source])."""
        if ("models" in self.body) == ("slices" in self.body):
            raise self.file.fault(self.file.root, "a recipe needs either models or slices", "Give one of them.")
        if "models" in self.body:
            entries = self.file.items(self.body["models"], "models")
            return [(self.scopes, [self.source(entry, ("model", "parameters")) for entry in entries])]
        found = []
        for node in self.file.items(self.body["slices"], "slices"):
            keys = self.file.mapping(node, ("sources", "parameters", "base_model"), "a slice")
            if "sources" not in keys:
                raise self.file.fault(node, "a slice has no sources", "List its models with their layer_range.")
            scopes = [self.parameters(keys["parameters"]), *self.scopes] if "parameters" in keys else self.scopes
            entries = self.file.items(keys["sources"], "sources")
            found.append((scopes, [self.source(entry, ("model", "layer_range", "parameters")) for entry in entries]))
        return found

    def source(self, node: Any, allowed: Sequence[str]) -> tuple[Path, Any, dict[str, Any]]:
        keys = self.file.mapping(node, allowed, "a model's entry")
        if "model" not in keys:
            raise self.file.fault(node, "an entry names no model", "Write `model:` with a folder.")
        return self.model(keys["model"], "model"), node, keys

    def sides(self, folders: Sequence[Path]) -> tuple[tuple[Path, Path], Path | None]:
        """((t = 0, t = 1), base of the task vectors) from the models listed and base_model."""
        stated = self.base_model()
        node = self.body.get("models") or self.body["slices"]
        if self.method != "slerp":
            others = [folder for folder in folders if folder != stated or self.method == "linear"]
            if len(others) != 2:
                raise self.file.fault(node, f"{len(others)} models are listed", f"{self.method} blends two here.")
            return (others[0], others[1]), None if self.method == "linear" else stated
        if stated is None:
            raise self.file.fault(self.file.root, "base_model is missing", "slerp needs it: it decides which is t = 0.")
        others = [folder for folder in folders if folder != stated]
        if len(others) != 1:
            what = f"{len(others)} models beside base_model are listed"
            raise self.file.fault(node, what, "slerp blends base_model with exactly one other.")
        return (stated, others[0]), None

    def slice(
        self,
        scopes: list[dict[str, Any]],
        sources: Sequence[tuple[Path, Any, dict[str, Any]]],
        sides: tuple[Path, Path],
        base: Path | None,
    ) -> LayerSlice:
        by_folder = {folder: (node, keys) for folder, node, keys in sources}
        for folder in sides:
            if folder not in by_folder:
                raise self.file.fault(sources[0][1], f"a slice leaves out {folder}", "Name both models in each slice.")
        for folder, node, _ in sources:
            if folder not in (*sides, base):
                raise self.file.fault(node, f"a third model, {folder}", "Only two models are blended here.")
        listed = [folder for folder in (*sides, base) if folder in by_folder]
        ranges = [self.layer_range(*by_folder[folder]) for folder in listed]
        for folder, layers in zip(listed, ranges):
            if len(layers) != len(ranges[0]):
                what = f"layer ranges of different length: {len(ranges[0])} and {len(layers)}"
                raise self.file.fault(by_folder[folder][0], what, "Each layer needs its counterpart.")
        weights = None
        schedule = Schedule.constant(0.5)
        if self.method == "slerp":
            schedule = self.schedule("t", scopes, sources[0][1])
        else:
            own = [by_folder[folder][1].get("parameters") for folder in sides]
            own_scopes = [[self.parameters(node)] if node is not None else [] for node in own]
            first, second = (self.schedule("weight", [*extra, *scopes], sources[0][1]) for extra in own_scopes)
            weights = first, second
        base_start = ranges[2].start if len(ranges) > 2 else None
        return LayerSlice(ranges[0].start, ranges[1].start, len(ranges[0]), schedule, weights, base_start)

    def layer_range(self, node: Any, keys: Mapping[str, Any]) -> range:
        if "slices" not in self.body:
            return range(0)
        if "layer_range" not in keys:
            raise self.file.fault(node, "layer_range is missing", "Write `layer_range: [first, one past the last]`.")
        ends = [self.file.number(end, "layer_range") for end in self.file.items(keys["layer_range"], "layer_range")]
        if len(ends) != 2 or any(end != int(end) for end in ends) or not 0 <= ends[0] < ends[1] <= MAX_LAYER_INDEX:
            raise self.file.fault(
                keys["layer_range"], "layer_range should be two rising whole numbers", "Write it like [0, 32]."
            )
        return range(int(ends[0]), int(ends[1]))

    def dtypes(self) -> dict[str, Any]:
        """`dtype` rounds the parents first and is the child's too, unless `out_dtype` says otherwise."""
        found: dict[str, Any] = {}
        for key, field in (("dtype", "cast_dtype"), ("out_dtype", "dtype")):
            if key in self.top:
                value = self.file.text(self.top[key], key)
                if value not in CHILD_DTYPES[1:]:
                    known = ", ".join(CHILD_DTYPES[1:])
                    raise self.file.fault(self.top[key], f"{key} cannot be {value!r}", f"Known: {known}.")
                found[field] = value
        if "cast_dtype" in found:
            found.setdefault("dtype", found["cast_dtype"])
        return found

    def tokenizer(self, sides: tuple[Path, Path]) -> dict[str, Any]:
        """tokenizer_source, or tokenizer with its source: base, or one of the two models."""
        node = self.top.get("tokenizer_source")
        if "tokenizer" in self.top:
            node = self.file.mapping(self.top["tokenizer"], ("source",), "tokenizer").get("source")
        if "chat_template" in self.top:
            chosen = self.file.text(self.top["chat_template"], "chat_template")
            if chosen != "auto":
                what = f"chat_template {chosen!r} is not done here"
                raise self.file.fault(self.top["chat_template"], what, "Leave it out, or write auto.")
        if node is None:  # this tool's own recipes, where they are silent, mean its own rule
            return {} if "slerpmerge" in self.top else self.tokenizer_of_base_model(sides)
        source = self.file.text(node, "tokenizer_source")
        if source == "union":
            return {"tokenizer": "union"}
        folder = self.base_model() if source == "base" else self.model(node, "tokenizer_source")
        if folder not in sides:
            what = f"the tokenizer's source {source!r} is not one of the two models"
            raise self.file.fault(node, what, "Name one of them.")
        return {"tokenizer": "primary" if folder == sides[0] else "secondary"}

    def tokenizer_of_base_model(self, sides: tuple[Path, Path]) -> dict[str, Any]:
        """base_model's, as mergekit has it, where that is one of the two models and has one; else nothing is said."""
        stated = self.base_model()
        roles = [role for role, folder in zip(("primary", "secondary"), sides) if folder == stated]
        return {"tokenizer": roles[0]} if roles and has_tokenizer(stated) else {}

    def own_settings(self) -> dict[str, Any]:
        """What this tool's own recipes say beyond mergekit's; the parents' identity there is for people."""
        if "slerpmerge" not in self.top:
            return {}
        keys = self.file.mapping(self.top["slerpmerge"], OWN_SETTINGS, "slerpmerge")
        found: dict[str, Any] = {}
        if "method" in keys:
            found["method"] = self.file.text(keys["method"], "method")
        for name in ("dot_threshold", "epsilon"):
            if name in keys:
                found[name] = self.file.number(keys[name], name)
        if "chat_template" in keys:
            found["chat_template"] = self.file.text(keys["chat_template"], "chat_template")
        if "accept" in keys:
            nodes = self.file.items(keys["accept"], "accept")
            found["accept"] = tuple(self.file.text(node, "accept") for node in nodes)
        if "extrapolate" in keys:
            found["extrapolate"] = self.file.truth(keys["extrapolate"], "extrapolate")
        if "t" in keys:  # t as it was given, which weights would only reproduce up to a rounding
            found["schedule"], found["weights"] = Schedule(self.file.rules(keys["t"], "t")), None
        if "slices_t" in keys:
            nodes = self.file.items(keys["slices_t"], "slices_t")
            found["slices_t"] = [Schedule(self.file.rules(node, "slices_t")) for node in nodes]
        return found


def read_recipe(path: Path) -> MergeRecipe:
    """The recipe that a file of mergekit's YAML states.

    Raises SlerpMergeError with the line where it is wrong or asks for what is not done here.
    """
    return RecipeReader(path).read()
