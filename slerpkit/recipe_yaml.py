"""A recipe's YAML as it is written: its nodes, each with the line that a complaint can name.

Knows words, numbers and lists, and nothing of merging; what the words mean stands in recipe_file.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from slerpkit.files import MAX_DIGITS, read_bytes
from slerpkit.lazy import yaml
from slerpkit.messages import SlerpMergeError, shorten
from slerpkit.schedule import ScheduleRule

MAX_RECIPE_BYTES = 1_000_000
MAX_ENTRIES = 200_000  # a few lines of aliases to aliases can stand for more than any memory holds
MERGE_TAG, NULL_TAG = "tag:yaml.org,2002:merge", "tag:yaml.org,2002:null"
NUMBER_TAGS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
TRUTHS = {"true": True, "yes": True, "on": True, "y": True, "t": True, "1": True, "1.0": True,
          "false": False, "no": False, "off": False, "n": False, "f": False, "0": False, "0.0": False}  # fmt: skip
# Keys whose empty value has a meaning of its own, or that mergekit itself writes so.
SPEAKING_NULLS = ("filter", "lora", "revision", "override_architecture")


def is_null(node: Any) -> bool:
    """Whether nothing stands there: `null`, `~`, or no value at all."""
    return node.id == "scalar" and node.tag == NULL_TAG


def nearest_key(name: str, known: Iterable[str]) -> str | None:
    """The known key that a name is a misspelling of; None where it is a word of its own.

    Word by word, since people's own keys often share one with a known key: copy_tokenizer is no tokenizer.
    """

    def likeness(left: str, right: str) -> float:
        one_letter = abs(len(left) - len(right)) == 1 and (left in right or right in left)
        return 0.8 if one_letter else difflib.SequenceMatcher(None, left, right).ratio()

    def score(key: str) -> float:
        words = name.lower().split("_"), key.split("_")
        whole = difflib.SequenceMatcher(None, name.lower(), key).ratio()
        if len(words[0]) != len(words[1]):
            return whole if whole >= 0.85 else 0.0
        return max(min(map(likeness, *words)), whole if whole >= 0.85 else 0.0)

    best = max(known, key=score, default="")
    return best if best and score(best) >= 0.8 else None


def until_all_match(rules: tuple[ScheduleRule, ...]) -> tuple[ScheduleRule, ...]:
    """The rules up to the first that matches every tensor, behind which none is reached."""
    last = next((number for number, rule in enumerate(rules) if rule.name_filter in ("*", "")), len(rules))
    return rules[: last + 1]


class RecipeFile:
    """A recipe as nodes of YAML, so that every complaint can name its line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.remarks: dict[str, None] = {}  # what stands there in vain, in its order
        self.entries = 0  # looked at so far, aliases followed
        try:
            text = read_bytes(path, MAX_RECIPE_BYTES).decode("utf-8-sig")
            roots = [root for root in yaml.compose_all(text, Loader=yaml.SafeLoader) if not is_null(root)]
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            mark = getattr(error, "problem_mark", None)
            place = f", line {mark.line + 1}" if mark else ""
            reason = getattr(error, "problem", None) or str(error)
            raise SlerpMergeError(f"{path}{place}: this is not valid YAML: {reason}.", "Correct that line.") from error
        if not roots:
            raise SlerpMergeError(f"{path} is empty.", "A recipe names at least merge_method and two models.")
        if len(roots) > 1:
            raise self.fault(
                roots[1],
                f"a second recipe begins; {len(roots)} stand here, one after the other, as mergekit-multi takes them",
                "Here a merge has a file of its own: save each part as one, run them in turn, and name the folder of "
                "the earlier child where the later recipe means it.",
            )
        self.root = roots[0]

    def fault(self, node: Any, what: str, hint: str) -> SlerpMergeError:
        return SlerpMergeError(f"{self.path}, line {node.start_mark.line + 1}: {what}.", hint)

    def remark(self, node: Any, what: str) -> None:
        """Keeps what the person may want to know of a line that does nothing."""
        self.remarks[f"{self.path.name}, line {node.start_mark.line + 1}: {what}."] = None

    def visit(self, node: Any) -> Any:
        """The entries of a mapping or a list. Raises SlerpMergeError where aliases make too many of them."""
        self.entries += 1 + len(node.value)
        if self.entries > MAX_ENTRIES:
            what = f"the recipe unfolds into more than {MAX_ENTRIES:,} entries"
            raise self.fault(node, what, "Its aliases name each other over and over. Write it without them.")
        return node.value

    def pairs(self, node: Any, what: str, hint: str) -> Iterator[tuple[str, Any, Any]]:
        """(name, key, value) of a mapping: its own, then what merge keys (`<<`) bring of others, in their order."""
        seen: set[str] = set()
        pending = [node]
        while pending:
            current = pending.pop(0)
            if current.id != "mapping":
                raise self.fault(current, f"{what} should be a mapping of keys to values", hint)
            own: set[str] = set()
            merged: list[Any] = []
            for key, value in self.visit(current):
                if key.tag == MERGE_TAG:
                    merged += self.visit(value) if value.id == "sequence" else [value]
                    continue
                name = self.text(key, "a key")
                if name in own:
                    raise self.fault(key, f"{name!r} stands twice in {what}", "Keep one of them.")
                own.add(name)
                if name not in seen:
                    yield name, key, value
            seen |= own
            pending = merged + pending

    def mapping(self, node: Any, allowed: Sequence[str], what: str, is_strict: bool = False) -> dict[str, Any]:
        """The nodes of a mapping by key, without those that are empty.

        Unknown keys are passed over with a remark, as mergekit passes over them; refused where one is a misspelling
        of a known one, or where the mapping is read by nobody else (is_strict).
        """
        hint = f"Known here: {', '.join(allowed)}."
        found: dict[str, Any] = {}
        for name, key, value in self.pairs(node, what, hint):
            if name not in allowed:
                near = nearest_key(name, allowed)
                if near is not None or is_strict:
                    meant = f"Did you mean {near}?" if near else hint
                    raise self.fault(key, f"{name!r} is not known in {what}", meant)
                self.remark(key, f"{name!r} in {what} is passed over, as mergekit does")
            elif not is_null(value):
                found[name] = value
            elif name not in SPEAKING_NULLS:
                self.remark(key, f"{name!r} in {what} is empty and says nothing")
        return found

    def items(self, node: Any, what: str) -> list[Any]:
        if node.id != "sequence" or not node.value:
            raise self.fault(node, f"{what} should be a list", "Write each entry on a line of its own, after a dash.")
        return self.visit(node)

    def text(self, node: Any, what: str) -> str:
        if node.id != "scalar":
            raise self.fault(node, f"{what} should be a single value", "Write it on the same line.")
        return node.value

    def number(self, node: Any, what: str) -> float:
        """A number however it is spelt: YAML's own, one in quotes, or `5e-1`, which YAML 1.1 takes for a word."""
        text = self.text(node, what)
        try:
            if len(text) > MAX_DIGITS:  # Python takes minutes over a million
                value = math.nan
            elif node.tag in NUMBER_TAGS:
                value = float(yaml.constructor.SafeConstructor().construct_object(node))
            elif node.tag == "tag:yaml.org,2002:bool":
                value = float(TRUTHS[text.lower()])
            else:
                value = float(text)
        except (ValueError, OverflowError, IndexError, KeyError):
            value = math.nan
        if not math.isfinite(value):
            raise self.fault(node, f"{what} should be a number, not {shorten(text, 60)!r}", "Write it like 0.5.")
        return value

    def truth(self, node: Any, what: str) -> bool:
        if node.id != "scalar":
            hint = "Here it holds for every tensor: write true or false."
            raise self.fault(node, f"{what} differs from tensor to tensor", hint)
        text = node.value
        if text.lower() not in TRUTHS:
            raise self.fault(node, f"{what} should be true or false, not {text!r}", "Write true or false.")
        return TRUTHS[text.lower()]

    def rules(self, node: Any, what: str) -> tuple[ScheduleRule, ...]:
        """A number, a list of numbers (a gradient), or one or a list of {filter, value}, as mergekit reads them."""
        if node.id == "mapping":
            return (self.rule(node, what),)
        if node.id == "sequence" and node.value and node.value[0].id == "mapping":
            entries = self.items(node, what)
            rules = tuple(self.rule(entry, what) for entry in entries)
            reached = until_all_match(rules)
            for entry in entries[len(reached) :]:
                self.remark(entry, f"an entry of {what} stands behind one that matches every tensor, and says nothing")
            return reached
        return (ScheduleRule(self.gradient(node, what)),)

    def rule(self, node: Any, what: str) -> ScheduleRule:
        """{filter, value}; without a filter it matches every tensor."""
        parts = self.mapping(node, ("filter", "value"), f"an entry of {what}")
        if "value" not in parts:
            raise self.fault(node, f"an entry of {what} has no value", "Write `value:` with a number or a list.")
        name_filter = self.text(parts["filter"], "filter") if "filter" in parts else "*"
        return ScheduleRule(self.gradient(parts["value"], what), name_filter)

    def gradient(self, node: Any, what: str) -> tuple[float, ...]:
        if node.id == "sequence":
            return tuple(self.number(entry, f"each value of {what}") for entry in self.items(node, what))
        return (self.number(node, what),)
