"""What the person decided (MergeRecipe), apart from how the run goes (RunOptions), and whether each can be.

All that determines the child's values stands in MergeRecipe. No file is opened here and none is written: a recipe's
file is read by recipe_file.py, flags and answers become a recipe in screen/. Read schedule.py before this.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slerpkit.chat_templates import CHAT_TEMPLATES, is_template_text
from slerpkit.maths import COLINEAR_DOT, TINY_NORM
from slerpkit.messages import SlerpMergeError
from slerpkit.schedule import Schedule

MAX_SHARD_BYTES = 5_000_000_000  # 5 GB, the shard size that hubs and loaders expect
MAX_THREADS = 8  # reading and writing saturate before more cores than this help
CHILD_DTYPES = ("auto", "bfloat16", "float16", "float32")
TOKENIZER_CHOICES = ("auto", "primary", "secondary", "union")
TEMPLATE_CHOICES = ("auto", "primary", "secondary", "either", *CHAT_TEMPLATES)
METHODS = ("slerp", "slerp-norm", "lerp", "nuslerp")
DEVICES = ("auto", "cpu", "cuda", "mps")
PARENTS = ("primary", "secondary")
# What nuslerp takes as one vector, and the word that people type for it.
VECTORS = {"tensor": "tensor", "row": "first_dim", "column": "last_dim"}


@dataclass(frozen=True)
class LayerSlice:
    """A run of the child's layers and the layers of both parents that make them, one by one.

    `schedule` gives t. Where a recipe weights each parent instead, `weights` holds both schedules. A start of None
    leaves that parent out: the other's layers are copied, whatever the schedule.
    """

    primary_start: int | None
    secondary_start: int | None
    length: int
    schedule: Schedule
    weights: tuple[Schedule, Schedule] | None = None
    base_start: int | None = None  # None: as in the primary

    @property
    def alone(self) -> str | None:
        """The parent, "primary" or "secondary", whose layers are copied; None where both are blended."""
        if None not in (self.primary_start, self.secondary_start):
            return None
        return PARENTS[self.primary_start is None]

    def range_of(self, role: str) -> range:
        """The layers of a parent, "primary" or "secondary", that take part."""
        start = self.primary_start if role == "primary" else self.secondary_start
        return range(0) if start is None else range(start, start + self.length)

    def describe(self, blend: str) -> str:
        """Its layers in words, with how they are blended."""
        ranges = [(role, self.range_of(role)) for role in PARENTS]
        if self.alone is not None:
            return next(f"layers {part[0]} to {part[-1]} of the {role}, copied" for role, part in ranges if part)
        first, second = (f"{part[0]} to {part[-1]}" for _, part in ranges)
        return f"layers {first} with {second}: {blend}"


@dataclass(frozen=True)
class RecordedModel:
    """What a saved recipe says of a model that it was saved with."""

    role: str  # "primary", "secondary" or "base"
    name: str = ""
    headers: str = ""  # fingerprints, as recipe_identity.py makes them; empty where none was written
    sample: str = ""


@dataclass(frozen=True)
class RecipeOrigin:
    """What a recipe's file says that makes no difference to the child, and the person may want to know."""

    remarks: tuple[str, ...] = ()
    recorded: tuple[RecordedModel, ...] = ()


@dataclass(frozen=True)
class TokenSource:
    """What stands for a token where a parent has no row for it; with `force`, in both parents, whatever they have."""

    token: str
    role: str | None  # whose row: "primary" or "secondary"; None: zeros
    row_of: str | int | None = None  # the token, or the id, whose row that is; None: the token's own
    force: bool = False


@dataclass(frozen=True)
class MergeRecipe:
    """Everything the person decided. Order matters: t = 0 is the primary, t = 1 the secondary."""

    primary: Path
    secondary: Path
    schedule: Schedule = Schedule.constant(0.5)
    method: str = "slerp"  # one of METHODS
    vectors: str = "tensor"  # what nuslerp takes as one: the tensor, or each slice along its "last_dim" or "first_dim"
    base: Path | None = None  # where given, what each parent learned since is blended, and added to it
    weights: tuple[Schedule, Schedule] | None = None  # instead of t: t = w1 / (w0 + w1)
    normalize: bool = True  # False: LERP with the weights as they are, whatever their sum
    slices: tuple[LayerSlice, ...] = ()  # none: every layer with its own counterpart
    cast_dtype: str | None = None  # the parents are rounded to this before they are blended
    extrapolate: bool = False  # allows t outside 0 to 1
    dot_threshold: float = COLINEAR_DOT
    epsilon: float = TINY_NORM
    dtype: str = "auto"  # one of CHILD_DTYPES; auto keeps the primary's, tensor by tensor
    tokenizer: str = "auto"  # one of TOKENIZER_CHOICES
    token_sources: tuple[TokenSource, ...] = ()  # tokens whose rows are said, and not only matched
    pad_to_multiple_of: int = 1  # the child's rows are rounded up to a multiple of this
    accept: tuple[str, ...] = ()  # config keys, or "vocabulary", whose difference may pass
    chat_template: str = "auto"  # one of TEMPLATE_CHOICES, or Jinja; auto is that of the tokenizer
    origin: RecipeOrigin = dataclasses.field(default=RecipeOrigin(), compare=False)  # of the file, where one is read

    @property
    def compared_vectors(self) -> str:
        """What the angles of this merge lie between."""
        return "weights" if self.base is None else "task vectors"

    def describe_method(self) -> str:
        """The method, with what is taken as one vector, and of what."""
        vectors = "" if self.vectors == "tensor" else f" by {granularity_of(self.vectors)}"
        task = "" if self.base is None else " of task vectors"
        extrapolated = ", beyond the parents" if self.extrapolate else ""
        return f"{self.method}{vectors}{task}{extrapolated}"

    def describe_blend(self) -> str:
        """t, or the weights, in words; slice by slice where there are slices."""

        def words(part: LayerSlice | MergeRecipe) -> str:
            if part.weights is None:
                return part.schedule.describe()
            first, second = (weight.describe().replace("t = ", "") for weight in part.weights)
            return f"weights {first} and {second}"

        if not self.slices:
            return words(self)
        return " · ".join(part.describe(words(part)) for part in self.slices)


@dataclass(frozen=True)
class RunOptions:
    """How the run goes: where the child is put, and by what means it is made."""

    save_directory: Path
    device: str = "auto"  # one of DEVICES
    threads: int = 0  # 0 chooses
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False
    restart: bool = False  # discards what an earlier run left unfinished
    follow_links: bool = False  # copies what a link leads to outside a parent's folder
    stream_parents: bool = False  # fetches each of their files when the merge comes to it, and drops it afterwards


RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(MergeRecipe))
OPTION_FIELDS = tuple(field.name for field in dataclasses.fields(RunOptions))


def recipe_and_options(settings: dict[str, Any]) -> tuple[MergeRecipe, RunOptions]:
    """Settings by their names in MergeRecipe and RunOptions, told apart. Raises TypeError where a name is neither's."""
    recipe = {name: value for name, value in settings.items() if name in RECIPE_FIELDS}
    return MergeRecipe(**recipe), RunOptions(**{name: settings[name] for name in settings.keys() - recipe.keys()})


def granularity_of(vectors: str) -> str:
    """The word that people type for what is taken as one vector."""
    return next(word for word, meaning in VECTORS.items() if meaning == vectors)


def check_t(t: float, recipe: MergeRecipe, tensor_name: str = "") -> None:
    """Raises SlerpMergeError where t lies outside 0 to 1 and the recipe does not allow it."""
    if not (0 <= t <= 1 or (recipe.extrapolate and math.isfinite(t))):
        raise SlerpMergeError(
            f"t = {t:g}{' for ' + tensor_name if tensor_name else ''} lies outside 0 to 1.",
            "0 is the primary, 1 the secondary, 0.5 the middle between them; beyond them only with --extrapolate.",
        )


def check_schedule(schedule: Schedule, recipe: MergeRecipe) -> None:
    """Raises SlerpMergeError where a schedule has no value, or a t that is not allowed. Weights may be any number."""
    if not schedule.rules or not all(rule.gradient for rule in schedule.rules):
        raise SlerpMergeError("The schedule of t has a rule without a value.", "Give each at least one, such as 0.5.")
    if recipe.weights is None:
        for t in schedule.values():
            check_t(t, recipe)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises SlerpMergeError where a value is none of those that it can be."""
    if value not in allowed:
        raise SlerpMergeError(f"The {name} cannot be {value!r}.", f"Choose one of: {', '.join(allowed)}.")


def check_recipe(recipe: MergeRecipe) -> None:
    """Raises SlerpMergeError where a recipe asks for what cannot be."""
    check_choice("method", recipe.method, METHODS)
    check_choice("setting vectors", recipe.vectors, tuple(VECTORS.values()))
    check_choice("child's dtype", recipe.dtype, CHILD_DTYPES)
    check_choice("tokenizer", recipe.tokenizer, TOKENIZER_CHOICES)
    if recipe.pad_to_multiple_of < 1:
        what = f"Rows cannot be padded to a multiple of {recipe.pad_to_multiple_of}."
        raise SlerpMergeError(what, "Usual is 64; 1 adds none.")
    if not is_template_text(recipe.chat_template):
        check_choice("chat template", recipe.chat_template, TEMPLATE_CHOICES)
    if recipe.vectors != "tensor" and recipe.method != "nuslerp":
        raise SlerpMergeError(
            f"The granularity {granularity_of(recipe.vectors)!r} goes with the method nuslerp alone.",
            "Add --method nuslerp.",
        )
    if any(part.primary_start is None and part.secondary_start is None for part in recipe.slices):
        raise SlerpMergeError("A slice has layers of neither model.", "Say where its layers begin in one, or in both.")
    for part in recipe.slices or (recipe,):
        for schedule in part.weights or (part.schedule,):
            check_schedule(schedule, recipe)
    if not 0 < recipe.dot_threshold <= 1:
        raise SlerpMergeError(
            f"The dot threshold {recipe.dot_threshold:g} is no cosine between 0 and 1.", f"Usual is {COLINEAR_DOT}."
        )
    if not 0 <= recipe.epsilon < math.inf:
        raise SlerpMergeError(f"Epsilon cannot be {recipe.epsilon:g}.", f"Usual is {TINY_NORM:g}.")


def check_options(options: RunOptions) -> None:
    """Raises SlerpMergeError where a run cannot go as asked."""
    check_choice("device", options.device, DEVICES)
    if options.max_shard_bytes < 1 or options.threads < 0:
        raise SlerpMergeError("Shard size and threads cannot be negative or zero.", "Leave them out for good values.")
