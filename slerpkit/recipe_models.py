"""The models that a recipe names: found however they are spelt, and which of them is t = 0 and which t = 1.

Knows folders and lines; whether the models fit each other is not known here. Read recipe_yaml.py before this.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import check_path, written_path
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.adapters import find_with_base
from slerpkit.parents.resolver import find_model, hub_name_of

if TYPE_CHECKING:
    from slerpkit.recipe_yaml import RecipeFile

UNMERGED = {
    "override_architecture": ("gives a model another architecture", "Write it into the model's own config.json."),
}


@dataclass(frozen=True)
class Source:
    """A model's entry in a list."""

    folder: Path
    node: Any
    keys: Mapping[str, Any]
    parameters: Mapping[str, Any]


@dataclass(frozen=True)
class Cut:
    """A slice as its nodes have it; or the whole, where a recipe has none."""

    node: Any
    scopes: Sequence[Mapping[str, Any]]  # nodes of `parameters` by name, the narrowest first
    sources: Sequence[Source]
    base: Path | None  # base_model, its own or the recipe's


class RecipeModels:
    """The models of one recipe. A model is one Path, whatever its spellings."""

    def __init__(self, file: RecipeFile) -> None:
        self.file = file
        self.folders: dict[tuple[str, str | None], Path] = {}  # by what is written
        self.by_place: dict[Path, Path] = {}
        self.names: dict[Path, str] = {}  # as each was written first
        self.adapter_bases: dict[Path, Path] = {}  # of adapters: the models that they are written with

    def find(self, node: Any, what: str, prefix: str = "") -> Path:
        """A model's folder: beside the recipe, else from where the program runs, else in the Hugging Face cache.

        prefix: what may stand before it.
        """
        revision = None
        while node.id == "mapping":  # mergekit itself writes {model: {path: ..., revision: ...}, lora: null}
            keys = self.file.mapping(node, ("model", "path", "revision", "lora", *UNMERGED), what)
            for key in UNMERGED.keys() & keys.keys():
                raise self.file.fault(keys[key], f"{key} {UNMERGED[key][0]}", UNMERGED[key][1])
            inner = keys.get("model", keys.get("path"))
            if inner is None:
                raise self.file.fault(node, f"{what} names no model", "Write `model:` with a folder.")
            if "lora" in keys:
                return self.with_base(self.find(keys["lora"], what), self.find(inner, what), node)
            revision = self.file.text(keys["revision"], "revision") if "revision" in keys else revision
            node = inner
        text = self.file.text(node, what).removeprefix(prefix)
        if not text.strip():
            raise self.file.fault(node, f"{what} names no model", "Write a folder, or org/name.")
        if (text, revision) not in self.folders:
            try:
                folder, base = find_with_base(text, lambda part: self.locate(part, revision))
            except SlerpMergeError as error:
                raise self.file.fault(node, error.message.rstrip("."), error.hint) from error
            folder = self.by_place.setdefault(folder.resolve(), folder)
            self.folders[text, revision] = folder if base is None else self.with_base(folder, base, node)
            self.names.setdefault(folder, text)
        return self.folders[text, revision]

    def with_base(self, adapter: Path, base: Path, node: Any) -> Path:
        """An adapter, whose base is remembered. Raises SlerpMergeError where it was written with another."""
        if self.adapter_bases.setdefault(adapter, base).resolve() != base.resolve():
            hint = "An adapter belongs to one model: name that wherever the adapter is."
            raise self.file.fault(node, f"{self.names.get(adapter, adapter)} stands there with two models", hint)
        return adapter

    def locate(self, text: str, revision: str | None) -> Path:
        """The folder that a text means."""
        folder = self.look_for(text, revision)
        if not folder.exists() and "@" in text:  # of a folder, which has no revisions
            beside = self.look_for(text.partition("@")[0], None)
            folder = beside if hub_name_of(beside) is None else folder
        return folder

    def look_for(self, text: str, revision: str | None) -> Path:
        beside = self.file.path.parent / written_path(text)
        check_path(beside, "folder")
        return beside if beside.exists() else find_model(text, revision, written_path)

    def sides(self, method: str, cuts: Sequence[Cut], stated: Path | None, node: Any) -> tuple[Path, Path]:
        """(t = 0, t = 1) of what a recipe lists. stated: its base_model. node: of the lists, for complaints."""
        listed = list(dict.fromkeys(source.folder for cut in cuts for source in cut.sources))
        base = stated or cuts[0].base
        if method == "slerp":
            found = self.sides_of_slerp(listed, base, node)
        elif method == "nuslerp":
            found = [folder for folder in listed if folder != base]
        else:
            found = self.sides_by_weight(method, listed, stated, cuts[0], node)
        if len(found) != 2:
            beside = " beside base_model" if method == "nuslerp" and base is not None else ""
            what = f"{len(found)} model{'s are' * (len(found) != 1) or ' is'} listed{beside}"
            raise self.file.fault(node, what, f"{method} blends two here.")
        return found[0], found[1]

    def sides_of_slerp(self, listed: Sequence[Path], base: Path | None, node: Any) -> list[Path]:
        """base_model, and the one listed beside it."""
        if base is None:
            raise self.file.fault(
                self.file.root,
                "base_model is missing, which slerp needs",
                f"Write `base_model: {self.names[listed[0]]}` to have that model at t = 0 and the other at t = 1, as "
                "is usual for the first one listed. The order of the list says nothing.",
            )
        others = [folder for folder in listed if folder != base]
        if len(others) == 2 and base not in listed:
            first, second = (self.names[folder] for folder in others)
            raise self.file.fault(
                node,
                f"base_model is a third model, {self.names[base]}, beside the two that are listed",
                f"Until January 2024 that was allowed, and the second model listed was t = 0: write `base_model: "
                f"{second}` for what was meant then, or `base_model: {first}` to have that one at t = 0.",
            )
        if len(others) != 1:
            what = f"{len(others)} models beside base_model are listed"
            raise self.file.fault(node, what, "slerp blends base_model with exactly one other.")
        return [base, others[0]]

    def sides_by_weight(
        self, method: str, listed: list[Path], stated: Path | None, first: Cut, node: Any
    ) -> list[Path]:
        """The two listed, base_model first: its config and tokenizer are the child's. linear and passthrough."""
        is_partner = len(listed) == 1 and (method == "passthrough" or first.node is None)
        if stated in listed or (stated is not None and is_partner):
            listed = list(dict.fromkeys([stated, *listed]))
        elif stated is not None and len(listed) > 1:
            what = f"base_model is another model, {self.names[stated]}, beside the {len(listed)} that are listed"
            hint = "It would be blended in, or lend its config and tokenizer. Name a listed one, or leave it out."
            raise self.file.fault(node, what, hint)
        return listed * 2 if method == "passthrough" and len(listed) == 1 else listed
