"""A recipe's YAML as it is written: its nodes, each with the line that a complaint can name.

Knows words, numbers and lists, and nothing of merging; what the words mean stands in recipe_file.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slerpkit.files import read_bytes
from slerpkit.lazy import yaml
from slerpkit.messages import SlerpMergeError
from slerpkit.schedule import ScheduleRule


class RecipeFile:
    """A recipe as nodes of YAML, so that every complaint can name its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.root = yaml.compose(read_bytes(path, 1_000_000).decode("utf-8"), Loader=yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            reason = getattr(error, "problem", None) or str(error)
            raise SlerpMergeError(f"{path}{place}: this is not valid YAML: {reason}.", "Correct that line.") from error
        if self.root is None:
            raise SlerpMergeError(f"{path} is empty.", "A recipe names at least merge_method and two models.")

    def fault(self, node: Any, what: str, hint: str) -> SlerpMergeError:
        return SlerpMergeError(f"{self.path}, line {node.start_mark.line + 1}: {what}.", hint)

    def mapping(self, node: Any, allowed: Sequence[str], what: str) -> dict[str, Any]:
        """The nodes of a mapping by key. Unknown keys are refused, with the nearest known one."""
        if node.id != "mapping":
            raise self.fault(node, f"{what} should be a mapping of keys to values", f"Known: {', '.join(allowed)}.")
        found: dict[str, Any] = {}
        for key, value in node.value:
            name = self.text(key, "a key")
            if name not in allowed:
                near = difflib.get_close_matches(name, allowed, 1)
                hint = f"Did you mean {near[0]}?" if near else f"Known here: {', '.join(allowed)}."
                raise self.fault(key, f"{name!r} is not known in {what}", hint)
            if name in found:
                raise self.fault(key, f"{name!r} stands twice in {what}", "Keep one of them.")
            found[name] = value
        return found

    def items(self, node: Any, what: str) -> list[Any]:
        if node.id != "sequence" or not node.value:
            raise self.fault(node, f"{what} should be a list", "Write each entry on a line of its own, after a dash.")
        return node.value

    def text(self, node: Any, what: str) -> str:
        if node.id != "scalar":
            raise self.fault(node, f"{what} should be a single value", "Write it on the same line.")
        return node.value

    def number(self, node: Any, what: str) -> float:
        text = self.text(node, what)
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if node.tag not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float") or not math.isfinite(value):
            raise self.fault(node, f"{what} should be a number, not {text!r}", "Write it like 0.5.")
        return value

    def truth(self, node: Any, what: str) -> bool:
        text = self.text(node, what).lower()
        if text not in ("true", "false"):
            raise self.fault(node, f"{what} should be true or false, not {text!r}", "Write true or false.")
        return text == "true"

    def rules(self, node: Any, what: str) -> tuple[ScheduleRule, ...]:
        """A number, a list of numbers (a gradient), or a list of {filter, value}, as mergekit reads them."""
        if node.id == "sequence" and node.value and node.value[0].id == "mapping":
            found = []
            for entry in node.value:
                parts = self.mapping(entry, ("filter", "value"), f"an entry of {what}")
                if "value" not in parts:
                    hint = "Write `value:` with a number or a list."
                    raise self.fault(entry, f"an entry of {what} has no value", hint)
                silent = "filter" not in parts or parts["filter"].tag == "tag:yaml.org,2002:null"
                name_filter = "*" if silent else self.text(parts["filter"], "filter")
                found.append(ScheduleRule(self.gradient(parts["value"], what), name_filter))
            return tuple(found)
        return (ScheduleRule(self.gradient(node, what)),)

    def gradient(self, node: Any, what: str) -> tuple[float, ...]:
        if node.id == "sequence":
            return tuple(self.number(entry, f"each value of {what}") for entry in self.items(node, what))
        return (self.number(node, what),)
