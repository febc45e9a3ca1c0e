"""The questions: what no flag has answered is asked for, in their order.

Merges nothing, and knows no flag. How a prompt behaves is said in prompts.py, what an answer is in answers.py.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.completion import WordCompleter
from questionary.prompts.path import GreatUXPathCompleter
from rich.padding import Padding
from rich.text import Text

from slerpkit.files import clean_path, existing_folder, free_path, is_plain_file, replace_files
from slerpkit.lazy import LazyModule
from slerpkit.messages import SlerpMergeError, format_bytes, printable
from slerpkit.schedule import BLENDS, Schedule, order_rules, parse_blend, parse_rule
from slerpkit.screen.answers import QUESTIONS, Answers, Blend, words_of_blend
from slerpkit.screen.console import WIDEST_PANEL
from slerpkit.screen.finder import ModelCompleter, ModelFinder
from slerpkit.screen.prompts import Prompter, answer_check

if TYPE_CHECKING:
    from slerpkit import recipe_file
    from slerpkit.evaluation import objectives, perplexity
    from slerpkit.merge import journal, save_directory
    from slerpkit.parents import checkpoint, resolver
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity import check
    from slerpkit.recipe import MergeRecipe
    from slerpkit.screen import panels
else:  # the first prompt waits for none of them
    objectives, perplexity = LazyModule("slerpkit.evaluation.objectives"), LazyModule("slerpkit.evaluation.perplexity")
    journal, save_directory = LazyModule("slerpkit.merge.journal"), LazyModule("slerpkit.merge.save_directory")
    checkpoint, resolver = LazyModule("slerpkit.parents.checkpoint"), LazyModule("slerpkit.parents.resolver")
    check = LazyModule("slerpkit.parity.check")
    recipe_file, panels = LazyModule("slerpkit.recipe_file"), LazyModule("slerpkit.screen.panels")

OTHER_BLENDS = (
    ("a number", "or a gradient of your own, such as 0,0.5,1"),
    ("filter=gradient ...", "one for each component, such as self_attn=0,1 mlp=1,0 0.5"),
    ("task vectors", "blend what each parent learned since a common base"),
    ("find a good blend", "on a text of yours: tries several, and makes the best"),
    ("a recipe file", "its path, ending in .yaml or .yml"),
)
TASK_VECTORS = "task vectors"
FIND_BLEND = "find a good blend"


class Wizard:
    """Asks what no flag has answered."""

    def __init__(
        self, prompt: Prompter, finder: ModelFinder, on_primary: Callable[[Checkpoint, Answers], object]
    ) -> None:
        self.prompt = prompt
        self.finder = finder
        self.on_primary = on_primary  # told the primary once it is known; the person thinks on meanwhile
        self.proposed: Path | None = None  # the last proposed save directory

    def complete(self, answers: Answers, before: Answers, questions: Sequence[str] = tuple(QUESTIONS)) -> Answers:
        """The answers with those that are missing. before: an earlier run's, or those to be changed; offered again."""
        for question in questions:
            if getattr(answers, question) is None:
                answers = getattr(self, f"ask_{question}")(answers, before)
        return answers

    def change(self, answers: Answers, changeable: Sequence[str]) -> Answers:
        """One of the answers given anew; a save directory that was named after the parents follows them."""
        question = self.which_answer(changeable)
        if question in ("primary", "secondary") and answers.save_directory == self.proposed:
            answers = answers.without("save_directory")
        return self.complete(answers.without(question), before=answers)

    def ask_model(
        self, question: str, message: str, check_folder: Callable[[Path], object], default: Path | None
    ) -> Path:
        """The folder of a model that passes a check; Tab completes those that were found."""
        if default is not None and answer_check(check_folder)(default) is not True:
            default = None
        shown = resolver.short_name(default) if default is not None else "Tab lists what is here, ? helps"
        completer = ModelCompleter(self.finder)

        def find(text: str) -> Path:
            return resolver.find_model(text)  # looked up late, so that the first prompt does not wait for it

        return self.prompt.path(message, find, question, shown, completer, check_folder, default)

    def ask_primary(self, answers: Answers, before: Answers) -> Answers:
        """The model at t = 0."""
        folder = self.ask_model(
            "primary", "Primary model", lambda folder: checkpoint.open_checkpoint(folder), before.primary
        )
        self.on_primary(checkpoint.open_checkpoint(folder), answers)
        return dataclasses.replace(answers, primary=folder)

    def ask_secondary(self, answers: Answers, before: Answers) -> Answers:
        """The model at t = 1: one that fits the primary."""
        primary = self.finder.primary = answers.primary
        default = before.secondary
        if default is not None and default.resolve() == primary.resolve():
            default = None
        folder = self.ask_model(
            "secondary", "Secondary model", lambda folder: check.check_fit(primary, folder), default
        )
        if folder.resolve() == primary.resolve():
            self.prompt.say("  That is the primary itself; the child will be a copy of it.")
        return dataclasses.replace(answers, secondary=folder)

    def ask_save_directory(self, answers: Answers, before: Answers) -> Answers:
        """The child's folder, and what is to happen to what stands there."""
        parents = answers.primary, answers.secondary
        needed = checkpoint.open_checkpoint(answers.primary).byte_count
        free = shutil.disk_usage(existing_folder(Path())).free
        self.prompt.say(f"  The child needs about {format_bytes(needed)}; {format_bytes(free)} are free here.")
        self.proposed = save_directory.proposed_save_directory(*parents, words_of_blend(answers))

        def check_folder(folder: Path) -> None:
            save_directory.check_save_directory(folder, parents, overwrite=True)

        proposed = before.save_directory or self.proposed
        if answer_check(check_folder)(proposed) is not True:
            proposed = self.proposed
        while True:
            folder = self.prompt.path(
                "Save directory",
                clean_path,
                "save_directory",
                str(proposed),
                ModelCompleter(None),
                check_folder,
                proposed,
            )
            answers = dataclasses.replace(answers, save_directory=folder)
            if not (folder.is_dir() and any(folder.iterdir())) or answers.overwrite:
                break
            if self.prompt.confirm(f"{folder} holds a model; replace it once the child is whole?", default=False):
                return dataclasses.replace(answers, overwrite=True)
            proposed = self.proposed
        unfinished = is_plain_file(save_directory.staging_area(folder) / journal.JOURNAL_NAME)
        if unfinished and answers.restart is None:
            carries_on = self.prompt.confirm("An unfinished merge stands there. Carry on with it?", default=True)
            return dataclasses.replace(answers, restart=not carries_on)
        return answers

    def ask_blend(self, answers: Answers, before: Answers) -> Answers:
        """How the parents are blended. What is drawn before it is taken."""
        self.show_blends()
        names = [name for name, _, _ in BLENDS] + [TASK_VECTORS, FIND_BLEND]
        completer = WordCompleter(names, sentence=True, ignore_case=True)
        while True:
            default = usable_blend(before.blend)
            parse = functools.partial(self.parse_blend, default, answers)
            blend = self.prompt.text("Blend", parse, "blend", f"({default})", completer)
            before = dataclasses.replace(before, blend=blend)
            if blend.recipe is not None and not is_of_models(blend.recipe, answers):
                names = [printable(folder.name) for folder in (blend.recipe.primary, blend.recipe.secondary)]
                what = f"The recipe has {names[0]} at t = 0 and {names[1]} at t = 1. Use only its t?"
                if not self.prompt.confirm(what, True):
                    continue
                blend = Blend(blend.schedule, text=blend.text)
            elif blend.text == TASK_VECTORS:
                blend = dataclasses.replace(blend, base=self.ask_base(answers))
            elif blend.text == FIND_BLEND:
                blend = dataclasses.replace(blend, objective=objectives.Objective(self.ask_texts()))
            elif blend.recipe is None and blend.text.lower() not in names and not self.accept_curves(blend.schedule):
                continue
            return dataclasses.replace(answers, blend=blend)

    @staticmethod
    def parse_blend(default: str, answers: Answers, text: str) -> Blend:
        """What a text typed at `Blend` means. Raises SlerpMergeError where it means nothing."""
        text = text.strip() or default
        for name in (TASK_VECTORS, FIND_BLEND):
            if len(text) > 1 and name.startswith(text.lower()):
                return Blend(text=name)
        if not text.strip("'\"").lower().endswith((".yaml", ".yml")):
            return Blend(parse_blend(text), text=text)
        path = clean_path(text)
        if clashing := answers.words_of_recipes():
            raise SlerpMergeError(
                f"A recipe already says what {', '.join(f'--{word}' for word in clashing)} would.",
                "Answer with another blend, or start again without.",
            )
        recipe = recipe_file.read_recipe(path)
        if (recipe.slices or recipe.weights) and not is_of_models(recipe, answers):
            raise SlerpMergeError(
                f"The recipe has {recipe.primary} and {recipe.secondary}, not the models you gave; and more than a t.",
                "Run it as it is with --recipe, or answer with another blend.",
            )
        return Blend(recipe.schedule, recipe=recipe, recipe_file=path, text=text)

    def ask_base(self, answers: Answers) -> Path:
        """The model that both parents come from; neither of them, since nothing was learned from a model by itself."""
        parents = (answers.primary.resolve(), answers.secondary.resolve())
        self.finder.primary = answers.primary

        def check_base(folder: Path) -> None:
            if folder.resolve() in parents:
                raise SlerpMergeError(f"{folder} is a parent itself.", "Give the model that both were fine-tuned from.")
            check.check_fit_of_base(answers.primary, folder)

        return self.ask_model("base", "Base model", check_base, None)

    def ask_texts(self) -> tuple[Path, ...]:
        """One text file to find a blend on, or two for its balance."""
        first = self.ask_text_file("Text file")
        second = self.ask_text_file("A second one, for the other parent's skill", optional=True)
        return (first,) if second is None else (first, second)

    def ask_text_file(self, message: str, optional: bool = False) -> Path | None:
        """A text that can be predicted; None where it may be left out, and was."""

        def parse(text: str) -> Path | None:
            if not text.strip() and not optional:
                raise SlerpMergeError("A text file is needed.", "Type or paste its path; Tab completes it, ? helps.")
            return clean_path(text) if text.strip() else None

        def check_text(path: Path | None) -> None:
            if path is not None:
                perplexity.read_judged_text(path)

        shown = "(Enter: none)" if optional else "(Tab completes, ? helps)"
        return self.prompt.text(message, parse, "text", shown, GreatUXPathCompleter(expanduser=True), check_text)

    def ask_next(self) -> str:
        """After a merge: "taste", "perplexity" or "leave"."""
        choices = {"taste": "taste", "perplexity": "perplexity", "leave": "leave"}
        return self.prompt.choose("What now?", choices, "next", "t taste, p perplexity, Enter leaves, ?", "leave")

    def ask_prompts(self) -> list[str]:
        """Prompts for a taste, until an empty one."""
        prompts: list[str] = []
        while answer := self.prompt.text(
            "Prompt", str.strip, "prompt", "(Enter: begin)" if prompts else "(Enter: none)"
        ):
            prompts.append(answer)
        return prompts

    def show_blends(self) -> None:
        """Every blend with its curve over the layers, so that none is taken unseen."""
        rows = []
        for name, text, meaning in BLENDS:
            curves = panels.schedule_curves(self.prompt.console, order_rules(map(parse_rule, text.split())), layers=8)
            drawn = curves[0][1] if len(curves) == 1 else "  ".join(f"{part} {curve}" for part, curve in curves)
            rows.append((f"{name:<22}{drawn}", meaning))
        for line, meaning in [*rows, *((f"{name:<22}", meaning) for name, meaning in OTHER_BLENDS)]:
            text = Text(f"  {line:<32}", style="bold")
            if len(text) + len(meaning) < min(self.prompt.console.width, WIDEST_PANEL):
                self.prompt.console.print(text.append(f"  {meaning}", style="not bold"))
            else:
                self.prompt.console.print(text, Padding(Text(meaning), (0, 0, 0, 6)))

    def accept_curves(self, schedule: Schedule) -> bool:
        """Draws a schedule; whether it is taken. One t for everything needs no picture."""
        for component, curve in panels.schedule_curves(self.prompt.console, schedule):
            self.prompt.say(f"    {component:<12}{curve}")
        one_t = len(schedule.rules) == 1 and len(schedule.rules[0].gradient) == 1
        return one_t or self.prompt.confirm("Take it?", True)

    def decide(self, default_start: bool) -> str:
        """After the panels: "start", "leave", "change", "inspect" or "save"."""
        choices = {"yes": "start", "no": "leave", "change": "change", "inspect": "inspect", "save": "save"}
        shown, default = ("Y/n/c/i/s/?", "yes") if default_start else ("y/N/c/i/s/?", "no")
        return self.prompt.choose("Start the merge?", choices, "start", shown, default)

    def which_answer(self, questions: Sequence[str]) -> str:
        """The question to be answered anew."""
        choices = {QUESTIONS[question]: question for question in questions}
        shown = ", ".join(choices)
        only = shown if len(choices) == 1 else None  # Enter alone takes it, as it stands there like a default
        return self.prompt.choose("Change which answer?", choices, "change", shown, only, "is none of them")

    def save_recipe(self, text_in: Callable[[Path], str]) -> Path:
        """Asks for a new file until one takes the recipe. text_in: the recipe's text for a folder that it stands in."""
        usual = Path(recipe_file.RECIPE_NAME)
        proposed = free_path(usual.stem, usual.suffix)

        def parse(text: str) -> Path:
            path = clean_path(text) if text.strip() else proposed
            if path.suffix not in (".yaml", ".yml") or os.path.lexists(path) or not path.parent.is_dir():
                raise SlerpMergeError(f"{path} is no new .yaml file in a folder that is there.", "Give another name.")
            return path

        while True:
            path = self.prompt.text("Recipe file", parse, "recipe", f"({proposed})").resolve()
            try:
                replace_files({path: text_in(path.parent).encode("utf-8", "backslashreplace")})
                return path
            except SlerpMergeError as error:
                self.prompt.say(printable(f"  {error.message} {error.hint}"))


def is_of_models(recipe: MergeRecipe, answers: Answers) -> bool:
    """Whether a recipe has the models that were answered, at the same ends of t."""
    named, given = (recipe.primary, recipe.secondary), (answers.primary, answers.secondary)
    return [folder.resolve() for folder in named] == [folder.resolve() for folder in given]


def usable_blend(last: Blend | None) -> str:
    """The words of the last blend, where they can be used again; else those of the even one."""
    text = last.text if last is not None else None
    try:
        if text is not None and (text in (TASK_VECTORS, FIND_BLEND) or parse_blend(text)):
            return text
    except SlerpMergeError:  # a recipe file, or from an older version, or from a stranger's hand
        pass
    return "even"
