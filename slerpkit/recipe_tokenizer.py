"""What a recipe says of the child's tokenizer: whose it is, which rows stand for tokens, how it talks.

Knows words, lines and folders; no tokenizer is opened. Read recipe_yaml.py and recipe_models.py before this.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.chat_templates import CHAT_TEMPLATES, is_template_text
from slerpkit.parents.checkpoint import has_tokenizer
from slerpkit.recipe import PARENTS, TokenSource

if TYPE_CHECKING:
    from slerpkit.recipe_models import RecipeModels
    from slerpkit.recipe_yaml import RecipeFile

TOKENIZER_KEYS = ("source", "tokens", "pad_to_multiple_of")


class TokenizerReader:
    """Makes of a recipe's keys what MergeRecipe says of the tokenizer. Refuses by name, and with its line."""

    def __init__(self, file: RecipeFile, names: RecipeModels, roles: Mapping[str, Path], base_model: Path | None):
        self.file = file
        self.names = names
        self.roles = {role: roles[role] for role in PARENTS}
        self.base_model = base_model

    def read(self, top: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of MergeRecipe that a recipe's own keys give."""
        return {**self.tokenizer(top), **self.chat_template(top)}

    def tokenizer(self, top: Mapping[str, Any]) -> dict[str, Any]:
        """tokenizer_source, or tokenizer with more; base_model's, as mergekit has it, where both are silent."""
        if "tokenizer" in top:
            if "tokenizer_source" in top:
                hint = "Keep one of them; `source` under tokenizer says the same as tokenizer_source."
                raise self.file.fault(top["tokenizer"], "tokenizer stands beside tokenizer_source", hint)
            keys = self.file.mapping(top["tokenizer"], TOKENIZER_KEYS, "tokenizer")
            found = {"tokenizer": self.source(keys["source"]) if "source" in keys else "union"}
            if "tokens" in keys:
                entries = self.file.pairs(keys["tokens"], "tokens", "Write `TOKEN: {source: MODEL}`.")
                found["token_sources"] = tuple(self.token(name, node) for name, _, node in entries)
            if "pad_to_multiple_of" in keys:
                found["pad_to_multiple_of"] = self.multiple(keys["pad_to_multiple_of"])
            return found
        if "tokenizer_source" in top:
            return {"tokenizer": self.source(top["tokenizer_source"])}
        if "slerpmerge" in top or self.base_model is None or not has_tokenizer(self.base_model):
            return {}  # this tool's own recipes, where they are silent, mean its own rule
        role = next((role for role, folder in self.roles.items() if folder == self.base_model), None)
        return {} if role is None else {"tokenizer": role}

    def source(self, node: Any) -> str:
        """union, or the parent whose tokenizer a recipe asks for: `base`, a model, or `model:` before it."""
        stated = node.value if node.id == "scalar" else None
        if stated == "union":
            return "union"
        if stated == "base" and self.base_model is None:
            hint = "Write base_model, or name one of the two models."
            raise self.file.fault(node, "the tokenizer is to be the base's, and there is no base_model", hint)
        return self.role_of(node, self.base_model if stated == "base" else None, "the tokenizer's source")

    def role_of(self, node: Any, folder: Path | None, what: str) -> str:
        """The parent that a model is. folder: its own where it is known before."""
        folder = folder or self.names.find(node, what, prefix="model:")
        role = next((role for role, place in self.roles.items() if place == folder), None)
        if role is None:
            what = f"{what} {self.names.names[folder]!r} is not one of the two models"
            raise self.file.fault(node, what, "Name one of them.")
        return role

    def token(self, token: str, node: Any) -> TokenSource:
        """A token's entry: the model that gives its row, zero, or another token of a model."""
        what = f"the entry of {token!r}"
        keys = self.file.mapping(node, ("source", "force"), what)
        force = "force" in keys and self.file.truth(keys["force"], "force")
        source = keys.get("source")
        if source is None:
            hint = "Write `source:` with a model, zero, or {kind: model_token, model: MODEL, token: TOKEN}."
            raise self.file.fault(node, f"{what} says nothing of where its row is from", hint)
        is_own = source.id == "mapping" and any(name == "kind" for name, _, _ in self.file.pairs(source, what, ""))
        if not is_own:
            if source.id == "scalar" and source.value == "zero":
                return TokenSource(token, None, force=force)
            return TokenSource(token, self.role_of(source, None, f"the row of {token!r} is from"), force=force)
        keys = self.file.mapping(source, ("kind", "model", "token", "token_id"), f"the source of {token!r}")
        kind = self.file.text(keys["kind"], "kind")
        if kind == "zero":
            return TokenSource(token, None, force=force)
        if kind != "model_token" or "model" not in keys or ("token" in keys) == ("token_id" in keys):
            hint = "Write {kind: zero}, or {kind: model_token, model: MODEL} with either token or token_id."
            raise self.file.fault(source, f"the source of {token!r} is no row", hint)
        row_of: str | int = self.file.text(keys["token"], "token") if "token" in keys else 0
        if "token_id" in keys:
            row_of = self.whole(keys["token_id"], "token_id", 0)
        return TokenSource(token, self.role_of(keys["model"], None, f"the row of {token!r} is from"), row_of, force)

    def multiple(self, node: Any) -> int:
        """To what multiple rows are padded; 0 stands for not at all, as in mergekit."""
        return self.whole(node, "pad_to_multiple_of", 0) or 1

    def whole(self, node: Any, what: str, least: int) -> int:
        """A whole number, no less than another."""
        number = self.file.number(node, what)
        if number != int(number) or not least <= number < 1 << 31:
            raise self.file.fault(node, f"{what} should be a whole number from {least} on", "Write it like 64.")
        return int(number)

    def chat_template(self, top: Mapping[str, Any]) -> dict[str, Any]:
        """A template by name, or Jinja text; auto is whichever of the models has one."""
        if "chat_template" not in top:
            return {}
        chosen = self.file.text(top["chat_template"], "chat_template")
        if not chosen:
            self.file.remark(top["chat_template"], "'chat_template' is empty and says nothing")
            return {}
        if chosen not in ("auto", *CHAT_TEMPLATES) and not is_template_text(chosen):
            known = f"Known: auto, {', '.join(CHAT_TEMPLATES)}, or a template in Jinja."
            raise self.file.fault(top["chat_template"], f"no chat template is called {chosen!r}", known)
        return {"chat_template": "either" if chosen == "auto" else chosen}
