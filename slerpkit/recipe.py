"""MergeRecipe: everything the person decided, and whether it can be."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path

from slerpkit.maths import COLINEAR_DOT, TINY_NORM
from slerpkit.messages import SlerpMergeError
from slerpkit.schedule import Schedule

MAX_SHARD_BYTES = 5_000_000_000  # 5 GB, the shard size that hubs and loaders expect
CHILD_DTYPES = ("auto", "bfloat16", "float16", "float32")
TOKENIZER_CHOICES = ("auto", "primary", "secondary", "union")
TEMPLATE_CHOICES = ("auto", "primary", "secondary")
METHODS = ("slerp", "slerp-norm", "lerp", "nuslerp")
GRANULARITIES = ("tensor", "row", "column")


@dataclass(frozen=True)
class LayerSlice:
    """A run of the child's layers and the layers of both parents that make them, one by one.

    `schedule` gives t. Where a recipe weights each parent instead, `weights` holds both schedules.
    """

    primary_start: int
    secondary_start: int
    length: int
    schedule: Schedule
    weights: tuple[Schedule, Schedule] | None = None
    base_start: int | None = None  # None: as in the primary


@dataclass(frozen=True)
class MergeRecipe:
    """Everything the person decided. Order matters: t = 0 is the primary, t = 1 the secondary."""

    primary: Path
    secondary: Path
    save_directory: Path
    schedule: Schedule = Schedule.constant(0.5)
    method: str = "slerp"  # one of METHODS
    granularity: str = "tensor"  # one of GRANULARITIES; what nuslerp takes as one vector
    base: Path | None = None  # where given, what each parent learned since is blended, and added to it
    weights: tuple[Schedule, Schedule] | None = None  # instead of t: t = w1 / (w0 + w1)
    normalize: bool = True  # False: LERP with the weights as they are, whatever their sum
    slices: tuple[LayerSlice, ...] = ()  # none: every layer with its own counterpart
    cast_dtype: str | None = None  # the parents are rounded to this before they are blended
    extrapolate: bool = False  # allows t outside 0 to 1
    dot_threshold: float = COLINEAR_DOT
    epsilon: float = TINY_NORM
    dtype: str = "auto"  # one of CHILD_DTYPES; auto keeps the primary's, tensor by tensor
    max_shard_bytes: int = MAX_SHARD_BYTES
    tokenizer: str = "auto"  # one of TOKENIZER_CHOICES
    chat_template: str = "auto"  # one of TEMPLATE_CHOICES; auto is the tokenizer donor's
    device: str = "auto"  # auto, cpu, cuda or mps
    threads: int = 0  # 0 chooses
    overwrite: bool = False
    restart: bool = False  # discards what an earlier run left unfinished
    recipe_file: Path | None = None  # where the blend was read from, if from a file

    def describe_blend(self) -> str:
        """t, or the weights, in words; slice by slice where there are slices."""

        def words(part: LayerSlice | MergeRecipe) -> str:
            if part.weights is None:
                return part.schedule.describe()
            first, second = (weight.describe().replace("t = ", "") for weight in part.weights)
            return f"weights {first} and {second}"

        if not self.slices:
            return words(self)
        return " · ".join(
            f"layers {part.primary_start} to {part.primary_start + part.length - 1}"
            f" with {part.secondary_start} to {part.secondary_start + part.length - 1}: {words(part)}"
            for part in self.slices
        )


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


def check_recipe(recipe: MergeRecipe) -> None:
    """Raises SlerpMergeError where a recipe asks for what cannot be."""
    for name, value, allowed in (
        ("method", recipe.method, METHODS),
        ("granularity", recipe.granularity, GRANULARITIES),
        ("child's dtype", recipe.dtype, CHILD_DTYPES),
        ("tokenizer", recipe.tokenizer, TOKENIZER_CHOICES),
        ("chat template", recipe.chat_template, TEMPLATE_CHOICES),
        ("device", recipe.device, ("auto", "cpu", "cuda", "mps")),
    ):
        if value not in allowed:
            raise SlerpMergeError(f"The {name} cannot be {value!r}.", f"Choose one of: {', '.join(allowed)}.")
    if recipe.granularity != "tensor" and recipe.method != "nuslerp":
        raise SlerpMergeError(
            f"The granularity {recipe.granularity!r} goes with the method nuslerp alone.", "Add --method nuslerp."
        )
    for part in recipe.slices or (recipe,):
        for schedule in part.weights or (part.schedule,):
            check_schedule(schedule, recipe)
    if not 0 < recipe.dot_threshold <= 1:
        raise SlerpMergeError(
            f"The dot threshold {recipe.dot_threshold:g} is no cosine between 0 and 1.", f"Usual is {COLINEAR_DOT}."
        )
    if not 0 <= recipe.epsilon < math.inf:
        raise SlerpMergeError(f"Epsilon cannot be {recipe.epsilon:g}.", f"Usual is {TINY_NORM:g}.")
    if recipe.max_shard_bytes < 1 or recipe.threads < 0:
        raise SlerpMergeError("Shard size and threads cannot be negative or zero.", "Leave them out for good values.")


def vectors_of(recipe: MergeRecipe) -> str:
    """What the angles of a recipe's merge lie between."""
    return "weights" if recipe.base is None else "task vectors"


def describe_method(recipe: MergeRecipe) -> str:
    """The method, with what is taken as one vector, and of what."""
    granularity = f" by {recipe.granularity}" if recipe.granularity != "tensor" else ""
    vectors = " of task vectors" if recipe.base is not None else ""
    extrapolated = ", beyond the parents" if recipe.extrapolate else ""
    return f"{recipe.method}{granularity}{vectors}{extrapolated}"


RECIPE_FIELDS = tuple(field.name for field in dataclasses.fields(MergeRecipe))
