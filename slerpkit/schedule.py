"""Which t each tensor gets: gradients, filters, the named blends, and how people type them.

A tensor is known here by its name and its position among the layers alone; t's range is checked where a recipe says
what is allowed (recipe.py). Read messages.py before this.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from slerpkit.messages import SlerpMergeError


@dataclass(frozen=True)
class ScheduleRule:
    """One line of a schedule: the gradient that tensors get whose name holds `name_filter`."""

    gradient: tuple[float, ...]  # one value is a constant; more are anchors over the layers
    name_filter: str = "*"  # a case-sensitive substring; "*" matches every name

    def matches(self, tensor_name: str) -> bool:
        """Whether a tensor of this name gets this rule's gradient, if none before it does."""
        return self.name_filter == "*" or self.name_filter in tensor_name

    def value_at(self, position: float) -> float:
        """The gradient's value at `position` (0 to 1), linear between anchors, as mergekit reads a list."""
        scaled = position * (len(self.gradient) - 1)
        index = int(scaled)
        following = self.gradient[min(index + 1, len(self.gradient) - 1)]
        return (1 - (scaled - index)) * self.gradient[index] + (scaled - index) * following


@dataclass(frozen=True)
class Schedule:
    """Which t each tensor gets. The first rule whose filter matches wins."""

    rules: tuple[ScheduleRule, ...]

    @classmethod
    def constant(cls, t: float) -> Schedule:
        """The same t for every tensor."""
        return cls((ScheduleRule((t,)),))

    def t_for(self, tensor_name: str, position: float) -> float:
        """t for a tensor whose layer stands at `position` in its stack (0 first, 1 last; 0 outside layers).

        Raises SlerpMergeError when no rule matches the name.
        """
        for rule in self.rules:
            if rule.matches(tensor_name) and rule.gradient:
                return rule.value_at(position)
        raise SlerpMergeError(
            f"The schedule of t has no value for the tensor {tensor_name}.",
            "Add a last value without a filter; it is used for everything that no filter matches.",
        )

    def mirrored(self) -> Schedule:
        """The schedule that does the same where the models change places."""
        return Schedule(tuple(ScheduleRule(tuple(1 - t for t in r.gradient), r.name_filter) for r in self.rules))

    def values(self) -> Iterator[float]:
        """Every anchor of every gradient."""
        for rule in self.rules:
            yield from rule.gradient

    def describe(self) -> str:
        """In words: t = 0.5, or each filter with its gradient."""
        descriptions = []
        for rule in self.rules:
            gradient = ", ".join(f"{value:g}" for value in rule.gradient)
            scope = "" if rule.name_filter == "*" else f"{rule.name_filter}: "
            descriptions.append(f"{scope}t = {gradient}")
        return "; ".join(descriptions)


# (name, what would be typed for it, what it means)
BLENDS = (
    ("even", "0.5", "both parents alike"),
    ("lean to primary", "0.3", "more of the primary"),
    ("lean to secondary", "0.7", "more of the secondary"),
    (
        "attention and mlp",
        "self_attn=0,0.5,0.3,0.7,1 mlp=1,0.5,0.7,0.3,0 0.5",
        "the well-known pair",
    ),
    ("primary at the ends", "0,0.5,1,0.5,0", "secondary in the middle"),
    ("secondary at the ends", "1,0.5,0,0.5,1", "primary in the middle"),
    ("ramp", "0,0.1,0.5,0.9,1", "from primary to secondary, smoothly"),
)
BLEND_NAMES = ", ".join(name for name, _, _ in BLENDS)
BLEND_HELP = f"Say {BLEND_NAMES}; or a number: 0 is the primary alone, 1 the secondary alone"


def parse_number(text: str) -> float:
    """A number. Raises SlerpMergeError, in words for the prompt."""
    try:
        t = float(text)
    except ValueError:
        t = math.nan
    if not math.isfinite(t):
        raise SlerpMergeError(f"{text!r} is not a number.", f"{BLEND_HELP}.")
    return t


def parse_rule(text: str) -> ScheduleRule:
    """`0.5`, a gradient `0,0.5,1`, or either for names that hold a text: `self_attn=0,1`.

    Raises SlerpMergeError, in words for the prompt, where it is none of these.
    """
    name_filter, equals, values = text.rpartition("=")
    if equals and not name_filter:
        raise SlerpMergeError(f"{text!r} has no name before the =.", "Write it like self_attn=0,0.5,1.")
    return ScheduleRule(tuple(parse_number(value.strip()) for value in values.split(",")), name_filter or "*")


def order_rules(rules: Iterable[ScheduleRule]) -> Schedule:
    """Filters as they were given, then the bare value, which is for the rest. Raises SlerpMergeError for two such."""
    rules = list(rules)
    if sum(rule.name_filter == "*" for rule in rules) > 1:
        raise SlerpMergeError("There are two values for the rest of the tensors.", "A gradient has commas: 0.5,0.6.")
    return Schedule(tuple(sorted(rules, key=lambda rule: rule.name_filter == "*")))


def parse_rules(text: str) -> list[ScheduleRule]:
    """The rules that a text means: a blend's name or the beginning of one, a number, a gradient, filters with theirs.

    Raises SlerpMergeError, in words for the prompt, where it is none of these.
    """
    wanted = " ".join(text.lower().split())
    matches = [name for name, _, _ in BLENDS if wanted and name.startswith(wanted)]
    if len(matches) > 1:
        raise SlerpMergeError(f"{text!r} could be {' or '.join(matches)}.", "Type more of it.")
    definition = next((typed for name, typed, _ in BLENDS if name in matches), text)
    words = re.sub(r"\s*([,=])\s*", r"\1", definition).split()  # commas may have spaces beside them
    return list(map(parse_rule, words or [text]))


def parse_blend(text: str) -> Schedule:
    """An answer to `Blend`, as parse_rules has it.

    Raises SlerpMergeError, in words for the prompt, where it is no blend or a t lies outside 0 to 1.
    """
    schedule = order_rules(parse_rules(text))
    for t in schedule.values():
        if not 0 <= t <= 1:
            raise SlerpMergeError(f"{t:g} is not a number from 0 to 1.", f"{BLEND_HELP}.")
    if not schedule.rules or schedule.rules[-1].name_filter != "*":
        raise SlerpMergeError(f"{text!r} leaves out the other tensors.", "Add a value for the rest, such as 0.5.")
    return schedule


def name_of_blend(schedule: Schedule) -> str | None:
    """What the blend is called that a schedule is; None where it has no name."""
    return next((name for name, _, _ in BLENDS if parse_blend(name) == schedule), None)
