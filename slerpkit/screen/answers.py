"""What flags and the person have said: one field for each setting, whoever gives it.

Knows neither how flags are spelt nor how prompts look, and opens no file. Read recipe.py before this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.recipe import (
    CHILD_DTYPES,
    METHODS,
    OPTION_FIELDS,
    PARENTS,
    RECIPE_FIELDS,
    TEMPLATE_CHOICES,
    TOKENIZER_CHOICES,
    VECTORS,
    MergeRecipe,
    RunOptions,
)
from slerpkit.schedule import Schedule

if TYPE_CHECKING:
    from slerpkit.evaluation.objectives import Objective

# The fields of Answers that are asked for, in their order, and the words that people have for them.
QUESTIONS = {"primary": "primary", "secondary": "secondary", "save_directory": "save directory", "blend": "blend"}
# The settings that a recipe's file decides where one is read, and the words that people have for them.
SETTLED_BY_RECIPES = {"base": "base", "method": "method", "vectors": "granularity"}
# The other settings that make a difference to the child, and the words that people have for them.
SETTINGS = {
    "method": "method",
    "base": "base",
    "tokenizer": "tokenizer",
    "chat_template": "chat template",
    "dtype": "dtype",
    "vectors": "granularity",
    "dot_threshold": "dot threshold",
    "epsilon": "epsilon",
    "extrapolate": "extrapolate",
    "accept": "accept",
}
RARE_SETTINGS = ("vectors", "dot_threshold", "epsilon", "extrapolate", "accept")  # of those somebody may never hear
# What a setting can be, by the words that people type for it; of the others there is no list.
CHOICES: dict[str, Mapping[str, Any]] = {
    "method": {name: name for name in METHODS},
    "tokenizer": {name: name for name in TOKENIZER_CHOICES},
    "chat_template": {name: name for name in TEMPLATE_CHOICES},
    "dtype": {name: name for name in CHILD_DTYPES},
    "vectors": VECTORS,
    "extrapolate": {"yes": True, "no": False},
}


@dataclass(frozen=True)
class Blend:
    """How the parents are blended: the answer to `Blend`, or what flags say in its place."""

    schedule: Schedule = Schedule.constant(0.5)
    objective: Objective | None = None  # where given, t is found by it, and the schedule is where that begins
    recipe: MergeRecipe | None = None  # of a recipe file, which decides all this and more
    recipe_file: Path | None = None
    text: str | None = None  # as it was typed, to be offered again


@dataclass(frozen=True)
class Answers:
    """What is known so far. A field of QUESTIONS that is None is still to be asked."""

    primary: Path | None = None
    secondary: Path | None = None
    save_directory: Path | None = None
    blend: Blend | None = None
    overwrite: bool | None = None  # a model that stands in the save directory; None: nobody has said
    restart: bool | None = None  # what an earlier run left unfinished for it; None: nobody has said
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # other fields of MergeRecipe and RunOptions

    def unanswered(self) -> list[str]:
        """The questions that are still to be asked."""
        return [name for name in QUESTIONS if getattr(self, name) is None]

    def words_of_recipes(self) -> list[str]:
        """What is settled here that only a recipe's file may say where one is read, in the words of who asks for it."""
        return [word for name, word in SETTLED_BY_RECIPES.items() if self.settings.get(name) is not None]

    def changeable(self) -> list[str]:
        """The questions and settings that can be answered anew; of what is rarely asked for, what somebody gave."""
        decided = SETTLED_BY_RECIPES if self.blend is not None and self.blend.recipe is not None else ()
        settings = [name for name in SETTINGS if name not in RARE_SETTINGS or name in self.settings]
        return [*QUESTIONS, *(name for name in settings if name not in decided)]

    def with_setting(self, name: str, value: Any) -> Answers:
        """The answers with another setting; None: as it is where nobody says."""
        others = {key: kept for key, kept in self.settings.items() if key != name}
        return dataclasses.replace(self, settings=others if value is None else {**others, name: value})

    def without(self, question: str) -> Answers:
        """All but one answer, which is to be given anew; a recipe's file goes with the models that it is for."""
        gone = [question]
        gone += ["overwrite", "restart"] if question == "save_directory" else []
        is_of_models = self.blend is not None and self.blend.recipe is not None
        gone += ["blend"] if question in PARENTS and is_of_models else []
        return dataclasses.replace(self, **dict.fromkeys(gone))

    @property
    def recipe(self) -> MergeRecipe:
        """What is to be made. Both parents must be known."""
        blend = self.blend or Blend()
        recipe = blend.recipe or MergeRecipe(self.primary, self.secondary, blend.schedule)
        chosen = {name: value for name, value in self.settings.items() if name in RECIPE_FIELDS}
        chosen["adapter_bases"] = {**recipe.adapter_bases, **chosen.get("adapter_bases", {})}
        return dataclasses.replace(recipe, primary=self.primary, secondary=self.secondary, **chosen)

    @property
    def options(self) -> RunOptions:
        """How it is to be made. Where no save directory is known, nothing may be written by them."""
        chosen = {name: value for name, value in self.settings.items() if name in OPTION_FIELDS}
        return RunOptions(
            self.save_directory or Path(), overwrite=bool(self.overwrite), restart=bool(self.restart), **chosen
        )


def words_of_blend(answers: Answers) -> list[str]:
    """What a proposed save directory is called after, beside the parents: the method, and t where it is one."""
    words = [answers.recipe.method]
    if answers.blend is not None and answers.blend.objective is None:
        values = list(answers.blend.schedule.values())
        words += [f"{values[0]:g}"] if len(values) == 1 else []
    return words
