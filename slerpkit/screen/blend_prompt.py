"""The question `Blend`: what is listed and drawn, what an answer means, and what is asked about it.

How a prompt behaves is said in prompts.py, what a schedule is in schedule.py; when it is asked, in wizard.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.completion import WordCompleter
from questionary.prompts.path import GreatUXPathCompleter
from rich.padding import Padding
from rich.text import Text

from slerpkit.files import clean_path
from slerpkit.lazy import LazyModule
from slerpkit.messages import SlerpMergeError, printable
from slerpkit.schedule import BLENDS, Schedule, name_of_blend, order_rules, parse_blend, parse_rule
from slerpkit.screen.answers import Answers, Blend
from slerpkit.screen.console import WIDEST_PANEL, is_unicode
from slerpkit.screen.prompts import GoBack, Prompter

if TYPE_CHECKING:
    from slerpkit import recipe_file
    from slerpkit.evaluation import objectives, perplexity
    from slerpkit.parents import resolver
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity import check
    from slerpkit.recipe import MergeRecipe
    from slerpkit.screen import panels
else:  # the first prompt waits for none of them
    objectives, perplexity = LazyModule("slerpkit.evaluation.objectives"), LazyModule("slerpkit.evaluation.perplexity")
    resolver, check = LazyModule("slerpkit.parents.resolver"), LazyModule("slerpkit.parity.check")
    recipe_file, panels = LazyModule("slerpkit.recipe_file"), LazyModule("slerpkit.screen.panels")

OTHER_BLENDS = (
    ("a number", "from 0 to 1, or a gradient of your own, such as 0,0.5,1"),
    ("filter=gradient ...", "for each component, such as self_attn=0,1 mlp=1,0 0.5"),
    ("task vectors", "blend what each parent learned since a common base"),
    ("find a good blend", "on a text of yours: tries several, makes the best"),
    ("a recipe file", "its path, ending in .yaml or .yml"),
)
NAME_COLUMNS = 22  # of a blend, where they are listed

TASK_VECTORS = "task vectors"
FIND_BLEND = "find a good blend"
NOTHING = "none"  # typed for a setting that may be left out


class BlendQuestion:
    """Asks how the parents are blended, until that is known with all that belongs to it.

    ask_model: asks for a model's folder, as the wizard does for the parents. open_model: opens one that was named.
    """

    def __init__(
        self, prompt: Prompter, ask_model: Callable[..., Path | None], open_model: Callable[[Path], Checkpoint]
    ) -> None:
        self.prompt = prompt
        self.ask_model = ask_model
        self.open_model = open_model

    def ask(self, answers: Answers, before: Answers) -> Answers:
        """How the parents, or what they learned since a base, are blended. What is drawn before it is taken."""
        self.show_blends()
        names = [name for name, _, _ in BLENDS] + [TASK_VECTORS, FIND_BLEND]
        completer = WordCompleter(names, sentence=True, ignore_case=True)
        last, common = before.blend, self.common_base(answers)
        if common is not None and answers.settings.get("base") is None:
            name = resolver.short_name(common)
            self.prompt.say(f"  Both are adapters of {name}; {TASK_VECTORS} blend what each of them learned.")
        while True:
            if (base := answers.settings.get("base")) is not None:
                self.prompt.say(f"  What each parent learned since {resolver.short_name(base)} is blended.")
            proposes_base = common is not None and base is None and last is None
            default = TASK_VECTORS if proposes_base else usable_blend(last)
            parse = functools.partial(parse_answer, default, answers)
            last = self.prompt.text(
                "Blend", "blend", parse, functools.partial(str, default), default, completer, words_of=words_of
            )
            with contextlib.suppress(GoBack):
                if last.text == TASK_VECTORS:
                    answers = answers.with_setting("base", self.ask_base(answers))
                elif (blend := self.settle(last, answers)) is not None:
                    return dataclasses.replace(answers, blend=blend)

    def settle(self, blend: Blend, answers: Answers) -> Blend | None:
        """A blend with all that is asked about it; None where another is wanted. Raises GoBack."""
        if blend.text == FIND_BLEND:
            return dataclasses.replace(blend, objective=objectives.Objective(ask_texts(self.prompt)))
        if blend.recipe is not None and not is_of_models(blend.recipe, answers):
            names = [printable(folder.name) for folder in (blend.recipe.primary, blend.recipe.secondary)]
            question = f"The recipe has {names[0]} at t = 0 and {names[1]} at t = 1. Use only its t?"
            taken = self.prompt.confirm(question, "recipe_t", default=True)
            return Blend(blend.schedule, text=blend.text) if taken else None
        is_drawn = blend.recipe is not None or name_of_blend(blend.schedule) is not None
        return blend if is_drawn or self.accept_curves(blend.schedule) else None

    def ask_base(self, answers: Answers) -> Path | None:
        """The model that both parents come from; neither of them, since nothing was learned from a model by itself.

        None where the person wants none. Raises GoBack.
        """
        parents = (answers.primary.resolve(), answers.secondary.resolve())

        def check_base(folder: Path) -> None:
            if folder.resolve() in parents:
                raise SlerpMergeError(f"{folder} is a parent itself.", "Give the model that both were fine-tuned from.")
            check.check_fit_of_base(self.open_model(answers.primary), self.open_model(folder))

        default = answers.settings.get("base") or self.common_base(answers)
        return self.ask_model("base", "Base model", check_base, default, False)

    def common_base(self, answers: Answers) -> Path | None:
        """The model that both parents are adapters of; None where they are not."""
        bases = [self.open_model(folder).base for folder in (answers.primary, answers.secondary)]
        folders = [model.folder for model in bases if model is not None]
        return folders[0] if len({folder.resolve() for folder in folders}) == 1 and len(folders) == 2 else None

    def show_blends(self) -> None:
        """Every blend with its curve over the layers, so that none is taken unseen."""
        taller = "Taller" if is_unicode(self.prompt.console) else "Higher"
        self.prompt.say(f"  {taller} is more of the secondary; first layer at the left.")
        rows = []
        for name, text, meaning in BLENDS:
            curves = panels.schedule_curves(self.prompt.console, order_rules(map(parse_rule, text.split())), layers=8)
            curves = curves if len(curves) == 1 else [row for row in curves if len(set(row[1])) > 1]
            drawn = curves[0][1] if len(curves) == 1 else "  ".join(f"{part} {curve}" for part, curve in curves)
            rows.append((f"{name:<{NAME_COLUMNS}}{drawn}", meaning))
        for line, meaning in [*rows, *((f"{name:<{NAME_COLUMNS - 2}}", meaning) for name, meaning in OTHER_BLENDS)]:
            text = Text(f"  {line}", style="bold")
            if len(text) + len(meaning) + 2 < min(self.prompt.console.width, WIDEST_PANEL):
                self.prompt.console.print(text.append(f"  {meaning}", style="not bold"))
            else:
                self.prompt.console.print(text, Padding(Text(meaning), (0, 0, 0, 6)))

    def accept_curves(self, schedule: Schedule) -> bool:
        """Draws a schedule; whether it is taken. One t for everything needs no picture."""
        for component, curve in panels.schedule_curves(self.prompt.console, schedule):
            self.prompt.say(f"    {component:<12}{curve}")
        one_t = len(schedule.rules) == 1 and len(schedule.rules[0].gradient) == 1
        return one_t or self.prompt.confirm("Take it?", "curves", True)


def parse_answer(default: str, answers: Answers, text: str) -> Blend:
    """What a text typed at `Blend` means. Raises SlerpMergeError where it means nothing."""
    text = text.strip() or default
    for name in (TASK_VECTORS, FIND_BLEND):
        if len(text) > 1 and name.startswith(text.lower()):
            return Blend(text=name)
    if not text.strip("'\"").lower().endswith((".yaml", ".yml")):
        return Blend(parse_blend(text), text=text)
    path = clean_path(text)
    recipe = recipe_file.read_recipe(path)
    if is_of_models(recipe, answers):
        if clashing := answers.words_of_recipes():
            raise SlerpMergeError(
                f"A recipe already says what {', '.join(f'--{word}' for word in clashing)} would.",
                "Answer with another blend, or start again without.",
            )
    elif recipe.slices or recipe.weights is not None:
        raise SlerpMergeError(
            f"The recipe has {recipe.primary} at t = 0 and {recipe.secondary} at t = 1, not the models you gave,"
            " and no single t that could be used for others.",
            "Run it as it is with --recipe, or answer with another blend.",
        )
    return Blend(recipe.schedule, recipe=recipe, recipe_file=path, text=text)


def ask_texts(prompt: Prompter) -> tuple[Path, ...]:
    """One text file to find a blend on, or two for its balance. Raises GoBack."""
    while True:
        first = ask_text_file(prompt, "Text file", "text")
        with contextlib.suppress(GoBack):
            second = ask_text_file(prompt, "A second one, for the other parent's skill", "second_text", NOTHING)
            return (first,) if second is None else (first, second)


def ask_text_file(prompt: Prompter, message: str, subject: str, default: str | None = None) -> Path | None:
    """A text that can be predicted. Enter goes back, or where there is a default leaves it out, which is None."""

    def parse(text: str) -> Path | None:
        return clean_path(text) if text.strip() else None

    def check_text(path: Path | None) -> None:
        if path is not None:
            perplexity.read_judged_text(path)

    shown = "Enter: back; Tab completes, ? helps" if default is None else f"Enter: {default}"
    completer = GreatUXPathCompleter(expanduser=True)
    return prompt.text(message, subject, parse, lambda: shown, default, completer, check_text)


def words_of(blend: Blend) -> str:
    """A blend by its whole name where it has one, else as it was typed."""
    has_name = blend.text not in (TASK_VECTORS, FIND_BLEND) and blend.recipe is None
    return (name_of_blend(blend.schedule) if has_name else None) or blend.text


def is_of_models(recipe: MergeRecipe, answers: Answers) -> bool:
    """Whether a recipe has the models that were answered, at the same ends of t."""
    named, given = (recipe.primary, recipe.secondary), (answers.primary, answers.secondary)
    return [folder.resolve() for folder in named] == [folder.resolve() for folder in given]


def usable_blend(last: Blend | None) -> str:
    """The words of the last blend, where they can be used again; else those of the even one."""
    text = last.text if last is not None else None
    try:
        if text is not None and (text == FIND_BLEND or parse_blend(text)):
            return text
    except SlerpMergeError:  # a recipe file, or from an older version, or from a stranger's hand
        pass
    return "even"
