"""A mergekit recipe read into a MergeRecipe, with the line of every fault.

Whether the models that it names fit each other is not known here. Read recipe_yaml.py and recipe_models.py before this;
how a recipe is written stands in recipe_writer.py.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slerpkit.parents.tensors import MAX_LAYER_INDEX
from slerpkit.recipe import CHILD_DTYPES, PARENTS, LayerSlice, MergeRecipe, RecipeOrigin, RecordedModel
from slerpkit.recipe_models import Cut, RecipeModels, Source
from slerpkit.recipe_tokenizer import TokenizerReader
from slerpkit.recipe_yaml import RecipeFile, until_all_match
from slerpkit.schedule import Schedule

RECIPE_NAME = "merge_recipe.yaml"
# What a recipe calls a method, and what it is here; passthrough copies, and blends nothing.
RECIPE_METHODS = {"slerp": "slerp", "nuslerp": "nuslerp", "linear": "lerp", "passthrough": "slerp"}
RECIPE_KEYS = (
    "merge_method", "base_model", "models", "slices", "modules", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "chat_template", "name", "slerpmerge",
)  # fmt: skip
RECIPE_PARAMETERS = {
    "slerp": ("t",),
    "nuslerp": ("weight", "nuslerp_flatten", "nuslerp_row_wise"),
    "linear": ("weight", "normalize"),
    "passthrough": ("scale",),
}
MODEL_PARAMETERS = ("weight", "scale")  # of these, what may differ from model to model
OWN_SETTINGS = (
    "version", "method", "t", "slices_t", "dot_threshold", "epsilon", "extrapolate", "primary", "secondary", "base",
    "chat_template", "accept",
)  # fmt: skip
RECORDED_KEYS = tuple(field.name for field in dataclasses.fields(RecordedModel) if field.name != "role")


class RecipeReader:
    """Makes of a mergekit recipe a MergeRecipe. Refuses by name, and with its line, what it cannot do."""

    def __init__(self, path: Path) -> None:
        self.file = RecipeFile(path)
        self.names = RecipeModels(self.file)
        self.top = self.file.mapping(self.file.root, RECIPE_KEYS, "a recipe")
        self.method = self.read_method()
        self.body = self.top
        scopes = [self.top]
        if "modules" in self.top:
            self.body = self.only_module(self.top["modules"])
            scopes.insert(0, self.body)
        self.scopes = [self.parameters(scope) for scope in scopes]  # the widest last
        self.is_whole = "models" in self.body
        if self.is_whole == ("slices" in self.body):
            raise self.file.fault(self.file.root, "a recipe needs either models or slices", "Give one of them.")
        self.entries = self.body["models"] if self.is_whole else self.body["slices"]
        self.base_model = self.names.find(self.top["base_model"], "base_model") if "base_model" in self.top else None

    def read_method(self) -> str:
        if "merge_method" not in self.top:
            raise self.file.fault(self.file.root, "merge_method is missing", "Write `merge_method: slerp`.")
        method = self.file.text(self.top["merge_method"], "merge_method")
        if method not in RECIPE_METHODS:
            known = ", ".join(RECIPE_METHODS)
            near = difflib.get_close_matches(method.lower(), RECIPE_METHODS, 1)
            hint = f"Did you mean {near[0]}?" if near else f"Known here: {known}. For others use mergekit."
            raise self.file.fault(self.top["merge_method"], f"the method {method!r} is not done here", hint)
        return method

    def parameters(self, keys: Mapping[str, Any], of_model: bool = False) -> dict[str, Any]:
        """The nodes of the parameters that a scope states: a recipe, a module, a slice or a model's entry."""
        if "parameters" not in keys:
            return {}
        known = [name for name in RECIPE_PARAMETERS[self.method] if not of_model or name in MODEL_PARAMETERS]
        what = f"parameters of {self.method}" + " for a single model" * of_model
        found = self.file.mapping(keys["parameters"], known, what)
        if "scale" in found:
            hint = "Leave it out: here passthrough copies layers as they are."
            raise self.file.fault(found["scale"], "scale is not done here", hint)
        return found

    def only_module(self, node: Any) -> dict[str, Any]:
        if node.id != "mapping" or len(node.value) != 1:
            raise self.file.fault(node, "modules should name exactly one", "Merge one module at a time.")
        return self.file.mapping(node.value[0][1], ("models", "slices", "parameters"), "a module")

    def schedule(self, name: str, scopes: Sequence[Mapping[str, Any]], node: Any) -> Schedule:
        """A parameter's rules, from the narrowest scope to the widest: the next is asked where no filter matches."""
        rules = tuple(rule for scope in scopes if name in scope for rule in self.file.rules(scope[name], name))
        if not rules:
            hint = f"Write `{name}:` under parameters."
            raise self.file.fault(node, f"{self.method} needs the parameter {name}", hint)
        return Schedule(until_all_match(rules))

    def flag(self, name: str, scopes: Sequence[Mapping[str, Any]], default: bool) -> bool:
        node = next((scope[name] for scope in scopes if name in scope), None)
        return default if node is None else self.file.truth(node, name)

    def flag_of_all(self, name: str, cuts: Sequence[Cut], default: bool) -> bool:
        """A setting that holds for the whole merge here, though mergekit asks it of each slice."""
        values = [self.flag(name, cut.scopes, default) for cut in cuts]
        if len(set(values)) > 1:
            node = next(scope[name] for cut in cuts for scope in cut.scopes[:1] if name in scope)
            hint = "Here it holds for the whole: write it once, under the recipe's own parameters."
            raise self.file.fault(node, f"{name} differs from slice to slice", hint)
        return values[0] if values else default

    def read(self) -> MergeRecipe:
        """The recipe. Raises SlerpMergeError with file and line."""
        own = self.own_settings()
        cuts = self.cuts()
        roles = self.roles(cuts)
        fields: dict[str, Any] = {**roles, "method": RECIPE_METHODS[self.method]}
        slices = [self.slice(cut, roles, cuts) for cut in cuts]
        if "slices_t" in own:
            exact = own.pop("slices_t")
            if len(exact) != len(slices):
                what = f"slices_t has {len(exact)} entries for {len(slices)} slices"
                raise self.file.fault(self.top["slerpmerge"], what, "Leave slices_t out where you change slices.")
            slices = [dataclasses.replace(part, schedule=t, weights=None) for part, t in zip(slices, exact)]
        if not self.is_whole:
            if sum(part.length for part in slices) > MAX_LAYER_INDEX:
                raise self.file.fault(self.entries, "these slices make too many layers", "Check each layer_range.")
            fields["slices"] = tuple(slices)
        fields["schedule"], fields["weights"] = slices[0].schedule, slices[0].weights
        blended = [cut for cut, part in zip(cuts, slices) if part.alone is None]
        if self.method == "linear":
            fields["normalize"] = self.flag_of_all("normalize", blended, True)
        if self.method == "nuslerp" and not self.flag_of_all("nuslerp_flatten", blended, True):
            row_wise = self.flag_of_all("nuslerp_row_wise", blended, False)
            fields["vectors"] = "first_dim" if row_wise else "last_dim"
        of_tokenizer = TokenizerReader(self.file, self.names, roles, self.base_model).read(self.top)
        fields |= {**self.dtypes(), **of_tokenizer, **own}
        recorded = fields.pop("recorded", ())
        fields["adapter_bases"] = self.names.adapter_bases
        return MergeRecipe(**fields, origin=RecipeOrigin(tuple(self.file.remarks), recorded))

    def cuts(self) -> list[Cut]:
        """Each slice, or the one whole, with the sources that it lists."""
        if self.is_whole:
            nodes = self.file.items(self.entries, "models")
            sources = [self.source(node, ("model", "parameters")) for node in nodes]
            return [Cut(None, self.scopes, sources, self.base_model)]
        found = []
        for node in self.file.items(self.entries, "slices"):
            keys = self.file.mapping(node, ("sources", "parameters", "base_model"), "a slice")
            if "sources" not in keys:
                raise self.file.fault(node, "a slice has no sources", "List its models with their layer_range.")
            nodes = self.file.items(keys["sources"], "sources")
            sources = [self.source(entry, ("model", "layer_range", "parameters")) for entry in nodes]
            base = self.base_model
            if "base_model" in keys and self.method in ("linear", "passthrough"):
                self.file.remark(keys["base_model"], f"base_model in a slice decides nothing in {self.method}")
            elif "base_model" in keys:
                base = self.names.find(keys["base_model"], "base_model")
            found.append(Cut(node, [self.parameters(keys), *self.scopes], sources, base))
        return found

    def source(self, node: Any, allowed: Sequence[str]) -> Source:
        keys = self.file.mapping(node, allowed, "a model's entry")
        if "model" not in keys:
            raise self.file.fault(node, "an entry names no model", "Write `model:` with a folder.")
        return Source(self.names.find(keys["model"], "model"), node, keys, self.parameters(keys, of_model=True))

    def roles(self, cuts: Sequence[Cut]) -> dict[str, Path]:
        """The models by their part: "primary" at t = 0, "secondary", and "base" of the task vectors where one is."""
        sides = self.sides_in_order(cuts) or self.names.sides(self.method, cuts, self.base_model, self.entries)
        found = dict(zip(PARENTS, sides))
        if self.method not in ("slerp", "nuslerp"):
            return found
        base = cuts[0].base if self.method == "nuslerp" else None
        for cut in cuts:
            if cut.base != base and (self.method == "nuslerp" or cut.base not in sides):
                name = "none" if cut.base is None else self.names.names[cut.base]
                what = f"base_model is another here than before, {name}"
                raise self.file.fault(cut.node, what, "Only two models are blended here, from one base at most.")
        return found if base is None else {**found, "base": base}

    def sides_in_order(self, cuts: Sequence[Cut]) -> tuple[Path, Path] | None:
        """Ours list the primary first, which alone tells the roles where a model has two; None where it has one."""
        pair = next((cut.sources[:2] for cut in cuts if len(cut.sources) > 1), [])
        folders = [source.folder for source in pair]
        has_two_roles = len(set(folders)) == 1 or (self.method == "nuslerp" and self.base_model in folders)
        return (folders[0], folders[1]) if folders and has_two_roles and "slerpmerge" in self.top else None

    def slice(self, cut: Cut, roles: Mapping[str, Path], cuts: Sequence[Cut]) -> LayerSlice:
        """A slice with the layers that each role gives to it."""
        parts = self.parts(cut, roles)
        sides = [role for role in PARENTS if role in parts]
        is_listed = any(source.folder == roles["primary"] for other in cuts for source in other.sources)
        is_alone = self.method == "passthrough" or (is_listed if self.method == "slerp" else not self.is_whole)
        if sides == ["secondary"] and not is_alone:
            # base_model alone beside what is listed: its layers are the other's counterparts.
            parts["primary"] = dataclasses.replace(parts["secondary"], folder=roles["primary"], parameters={})
            sides = list(PARENTS)
        ranges = {role: self.layer_range(source) for role, source in parts.items()}
        lengths = {role: len(layers) for role, layers in ranges.items()}
        for role, length in lengths.items():
            if length != lengths[sides[0]]:
                what = f"layer ranges of different length: {lengths[sides[0]]} and {length}"
                raise self.file.fault(parts[role].node, what, "Each layer needs its counterpart.")
        starts = {f"{role}_start": ranges[role].start if role in ranges else None for role in (*PARENTS, "base")}
        schedule, weights = self.blend(cut, parts, sides, roles)
        return LayerSlice(**starts, length=lengths[sides[0]], schedule=schedule, weights=weights)

    def parts(self, cut: Cut, roles: Mapping[str, Path]) -> dict[str, Source]:
        """The sources of a slice by role. Raises SlerpMergeError where one has none, or no parent is among them."""
        found: dict[str, Source] = {}
        for source in cut.sources:
            name = self.names.names[source.folder]
            fitting = [role for role, folder in roles.items() if folder == source.folder]
            role = next((role for role in fitting if role not in found), None)
            if role is None:
                what = f"{name} is listed twice" if fitting else f"a third model, {name}"
                raise self.file.fault(source.node, what, "Only two models are blended here, each named once.")
            found[role] = source
        if not found.keys() & set(PARENTS):
            raise self.file.fault(cut.node, "a slice has the base model alone", "List one of the two models, or both.")
        return found

    def blend(
        self, cut: Cut, parts: Mapping[str, Source], sides: Sequence[str], roles: Mapping[str, Path]
    ) -> tuple[Schedule, tuple[Schedule, Schedule] | None]:
        """(t's schedule, the weights' where the method has them) of a slice; layers of one model alone are copied."""
        node = cut.sources[0].node
        if len(sides) == 1:
            if self.method == "linear":
                self.check_weight_of_one(parts[sides[0]], cut)
            return Schedule.constant(float(sides[0] == "secondary")), None
        if self.method == "passthrough":
            raise self.file.fault(node, "passthrough takes one model in a slice", "Use slerp or linear to blend two.")
        if self.method == "slerp":
            if cut.base is None:
                raise self.file.fault(cut.node, "base_model is missing in this slice", "Write it for the whole recipe.")
            t = self.schedule("t", cut.scopes, node)
            return (t.mirrored() if cut.base == roles["secondary"] != roles["primary"] else t), None
        first, second = (self.schedule("weight", [parts[side].parameters, *cut.scopes], node) for side in sides)
        return Schedule.constant(0.5), (first, second)

    def check_weight_of_one(self, source: Source, cut: Cut) -> None:
        """Raises SlerpMergeError where its weight would not leave the layers of a single model as they are."""
        scopes = [source.parameters, *cut.scopes]
        is_normalized = self.flag("normalize", cut.scopes, True)
        if is_normalized and not any("weight" in scope for scope in scopes):
            return
        weights = set(self.schedule("weight", scopes, source.node).values())
        if is_normalized and 0.0 in weights:
            what = "a weight of 0 leaves nothing of the layers of a single model"
            raise self.file.fault(source.node, what, "Write weight 1, or leave the slice out.")
        if not is_normalized and weights != {1.0}:
            hint = "Write weight 1, or normalize: true."
            raise self.file.fault(source.node, "a weight would scale the layers of a single model", hint)

    def layer_range(self, source: Source) -> range:
        if self.is_whole:
            return range(0)
        if "layer_range" not in source.keys:
            hint = "Write `layer_range: [first, one past the last]`."
            raise self.file.fault(source.node, "layer_range is missing", hint)
        node = source.keys["layer_range"]
        ends = [self.file.number(end, "layer_range") for end in self.file.items(node, "layer_range")]
        if len(ends) != 2 or any(end != int(end) for end in ends) or not 0 <= ends[0] < ends[1] <= MAX_LAYER_INDEX:
            raise self.file.fault(node, "layer_range should be two rising whole numbers", "Write it like [0, 32].")
        return range(int(ends[0]), int(ends[1]))

    def dtypes(self) -> dict[str, Any]:
        """`dtype` rounds the parents first and is the child's too, unless `out_dtype` says otherwise."""
        found: dict[str, Any] = {}
        for key, field in (("dtype", "cast_dtype"), ("out_dtype", "dtype")):
            if key in self.top:
                value = self.file.text(self.top[key], key)
                name = value.removeprefix("torch.")
                if name not in CHILD_DTYPES[1:]:
                    known = ", ".join(CHILD_DTYPES[1:])
                    raise self.file.fault(self.top[key], f"{key} cannot be {value!r}", f"Known: {known}.")
                found[field] = name
        if "cast_dtype" in found:
            found.setdefault("dtype", found["cast_dtype"])
        return found

    def own_settings(self) -> dict[str, Any]:
        """What this tool's own recipes say beyond mergekit's."""
        if "slerpmerge" not in self.top:
            return {}
        keys = self.file.mapping(self.top["slerpmerge"], OWN_SETTINGS, "slerpmerge", is_strict=True)
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
        found["recorded"] = tuple(
            RecordedModel(role, **{key: self.file.text(node, key) for key, node in self.recorded(keys[role]).items()})
            for role in (*PARENTS, "base")
            if role in keys
        )
        return found

    def recorded(self, node: Any) -> dict[str, Any]:
        return self.file.mapping(node, RECORDED_KEYS, "a model in slerpmerge", is_strict=True)


def read_recipe(path: Path) -> MergeRecipe:
    """The recipe that a file of mergekit's YAML states.

    Raises SlerpMergeError with the line where it is wrong or asks for what is not done here.
    """
    return RecipeReader(path).read()
