"""The questions: what no flag has answered is asked for, in their order.

Merges nothing, and knows no flag. How a prompt behaves is said in prompts.py, what an answer is in answers.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import clean_path, existing_folder, is_plain_file, replace_files
from slerpkit.lazy import LazyModule, lazy_modules
from slerpkit.messages import SlerpMergeError, format_bytes, printable
from slerpkit.recipe import PARENTS, check_recipe
from slerpkit.schedule import parse_number
from slerpkit.screen.answers import CHOICES, QUESTIONS, SETTINGS, Answers, words_of_blend
from slerpkit.screen.blend_prompt import NOTHING, BlendQuestion
from slerpkit.screen.finder import ModelCompleter, ModelFinder
from slerpkit.screen.prompts import GoBack, Prompter, answer_check

if TYPE_CHECKING:
    from slerpkit import recipe_file, story
    from slerpkit.merge import journal, save_directory
    from slerpkit.parents import adapters, checkpoint, hub, resolver
    from slerpkit.parents.checkpoint import Checkpoint
else:  # the first prompt waits for none of them
    journal, save_directory = LazyModule("slerpkit.merge.journal"), LazyModule("slerpkit.merge.save_directory")
    adapters, checkpoint, hub = lazy_modules("slerpkit.parents", "adapters", "checkpoint", "hub")
    (resolver,) = lazy_modules("slerpkit.parents", "resolver")
    recipe_file, story = lazy_modules("slerpkit", "recipe_file", "story")

DECISIONS = ("start", "leave", "change", "inspect", "save")


class Wizard:
    """Asks what no flag has answered."""

    def __init__(
        self, prompt: Prompter, finder: ModelFinder, on_primary: Callable[[Checkpoint, Answers], object]
    ) -> None:
        self.prompt = prompt
        self.finder = finder
        self.blend = BlendQuestion(prompt, self.ask_model, self.open)
        self.on_primary = on_primary  # told the primary once it is known; the person thinks on meanwhile
        self.adapter_bases = finder.adapter_bases  # of models that were named with their base before them
        self.proposed: Path | None = None  # the last proposed save directory
        self.last_question = "primary"  # that was answered

    def complete(
        self,
        answers: Answers,
        before: Answers,
        questions: Sequence[str] = tuple(QUESTIONS),
        leads_back: bool = False,
    ) -> Answers:
        """The answers with those that are missing. before: an earlier run's, or those to be changed; offered again.

        leads_back: whether there is something before the first question that is missing; GoBack is then raised there.
        """
        self.adapter_bases.update(answers.settings.get("adapter_bases", {}))
        missing = [question for question in questions if getattr(answers, question) is None]
        number = 0
        while number < len(missing):
            question = missing[number]
            try:
                answers = getattr(self, f"ask_{question}")(answers, before)
                self.last_question = question
                number += 1
            except GoBack:
                if number == 0 and leads_back:
                    raise
                if number == 0:
                    self.prompt.say("  This is the first question. Ctrl-C leaves.")
                    continue
                number -= 1
                before = dataclasses.replace(before, **{missing[number]: getattr(answers, missing[number])})
                answers = answers.without(missing[number])
        return answers.with_setting("adapter_bases", dict(self.adapter_bases)) if self.adapter_bases else answers

    def open(self, folder: Path) -> Checkpoint:
        """A model that was named. Raises SlerpMergeError as open_checkpoint does."""
        located = hub.locate(folder)
        return checkpoint.open_checkpoint(located, hub.locate_base(located, self.adapter_bases.get(folder)))

    def change(self, answers: Answers, is_planned: bool) -> Answers | None:
        """The answers with one given anew; None where the person thinks better of it.

        A save directory that was named after the parents follows them. is_planned: whether there is a plan to return
        to; where there is none, the last question is the one before.
        """
        try:
            question = self.which_answer(answers.changeable())
        except GoBack:
            if is_planned:
                return None
            question = self.last_question
        with contextlib.suppress(GoBack):
            if question in SETTINGS:
                return self.ask_setting(question, answers)
            if question in PARENTS and answers.save_directory == self.proposed:
                answers = answers.without("save_directory")
            return self.complete(answers.without(question), before=answers, leads_back=True)
        return None

    def ask_model(
        self,
        question: str,
        message: str,
        check_folder: Callable[[Path], object],
        default: Path | None,
        is_needed: bool = True,
    ) -> Path | None:
        """The folder of a model that passes a check; Tab completes those that were found.

        None where it is not needed, and the person wants none. Raises GoBack.
        """
        is_here = default is not None and not hub.must_be_looked_up(default)
        if is_here and answer_check(check_folder)(default) is not True:
            default = None
        shown = resolver.short_name(default) if default is not None else None

        def find(text: str) -> Path | None:
            if not is_needed and text.strip().lower() == NOTHING:
                return None
            # Looked up late, so that the first prompt does not wait for it.
            folder, base = adapters.find_with_base(text)
            if base is None:
                self.adapter_bases.pop(folder, None)
            else:
                self.adapter_bases[folder] = base
            return folder

        def check_what_is_here(folder: Path | None) -> None:
            if folder is not None and not hub.must_be_looked_up(folder):
                check_folder(folder)

        def hint() -> str:
            found = "still looking for models" if self.finder.is_looking else "Tab lists what is here"
            return shown or f"{found}, ? helps"

        completer = ModelCompleter(self.finder)
        while True:
            folder = self.prompt.path(
                message, question, find, hint, completer, check_what_is_here, default, shown, is_needed
            )
            if folder is None or not hub.must_be_looked_up(folder):
                return folder
            self.prompt.say(f"  Looking at {resolver.short_name(folder)} on the Hub ...")
            try:
                base, folder = self.adapter_bases.pop(folder, None), hub.locate(folder)
                if base is not None:
                    self.adapter_bases[folder] = base
                check_folder(folder)
                return folder
            except SlerpMergeError as error:
                self.prompt.say(printable(f"  {error.message} {error.hint}"))

    def ask_primary(self, answers: Answers, before: Answers) -> Answers:
        """The model at t = 0."""
        folder = self.ask_model("primary", "Primary model", self.open, before.primary)
        self.on_primary(self.open(folder), answers)
        return dataclasses.replace(answers, primary=folder)

    def ask_secondary(self, answers: Answers, before: Answers) -> Answers:
        """The model at t = 1: one that fits the primary."""
        primary = self.finder.primary = answers.primary
        default = before.secondary
        if default is not None and default.resolve() == primary.resolve():
            default = None
        folder = self.ask_model(
            "secondary",
            "Secondary model",
            lambda folder: story.check_fit(primary, folder, self.adapter_bases),
            default,
        )
        if folder.resolve() == primary.resolve():
            self.prompt.say("  That is the primary itself; the child will be a copy of it.")
        return dataclasses.replace(answers, secondary=folder)

    def ask_save_directory(self, answers: Answers, before: Answers) -> Answers:
        """The child's folder, and what is to happen to what stands there."""
        parents = answers.primary, answers.secondary
        needed = self.open(answers.primary).byte_count
        free = save_directory.free_bytes(existing_folder(Path()))
        here = "" if free is None else f"; {format_bytes(free)} are free here"
        self.prompt.say(f"  The child needs about {format_bytes(needed)}{here}.")
        self.proposed = save_directory.proposed_save_directory(*parents, words_of_blend(answers))

        def check_folder(folder: Path) -> None:
            save_directory.check_save_directory(folder, parents, overwrite=True)

        proposed = before.save_directory or self.proposed
        if answer_check(check_folder)(proposed) is not True:
            proposed = self.proposed
        completer = ModelCompleter(None)
        while True:
            hint = functools.partial(str, proposed)
            folder = self.prompt.path(
                "Save directory", "save_directory", clean_path, hint, completer, check_folder, proposed, hint()
            )
            with contextlib.suppress(GoBack):
                settled = self.settle_what_stands(dataclasses.replace(answers, save_directory=folder))
                if settled is not None:
                    return settled
            proposed = self.proposed

    def settle_what_stands(self, answers: Answers) -> Answers | None:
        """What is to happen to a model or an unfinished one at the child's place; None where another is wanted."""
        folder = answers.save_directory
        if folder.is_dir() and any(folder.iterdir()) and not answers.overwrite:
            question = f"{folder} holds a model; replace it once the child is whole?"
            is_replaced = self.prompt.confirm(question, "overwrite", default=False)
            return dataclasses.replace(answers, overwrite=True) if is_replaced else None
        unfinished = is_plain_file(save_directory.staging_area(folder) / journal.JOURNAL_NAME)
        if unfinished and answers.restart is None:
            question = "An unfinished merge stands there. Carry on with it?"
            return dataclasses.replace(answers, restart=not self.prompt.confirm(question, "carry_on", default=True))
        return answers

    def ask_blend(self, answers: Answers, before: Answers) -> Answers:
        """How the parents are blended."""
        return self.blend.ask(answers, before)

    def ask_setting(self, name: str, answers: Answers) -> Answers:
        """The answers with one setting given anew. Raises GoBack."""
        if name == "base":
            return answers.with_setting(name, self.blend.ask_base(answers))
        message = SETTINGS[name].capitalize()
        now = getattr(answers.recipe, name)

        def check_setting(value: Any) -> None:
            check_recipe(answers.with_setting(name, value).recipe)

        if name in CHOICES:
            known = CHOICES[name]
            default = next((word for word, value in known.items() if value == now), None)
            hint = ", ".join(known) + ("" if default is None else f"; Enter: {default}")
            words = {word: word for word in known}
            word = self.prompt.choose(
                message, name, words, hint, default, check=lambda word: check_setting(known[word])
            )
            return answers.with_setting(name, known[word])
        default = " ".join(now) or NOTHING if name == "accept" else f"{now:g}"

        def parse(text: str) -> Any:
            text = text.strip() or default
            if name == "accept":
                return None if text == NOTHING else tuple(text.split())
            return parse_number(text)

        value = self.prompt.text(message, name, parse, lambda: default, default, check=check_setting)
        return answers.with_setting(name, value)

    def ask_next(self, choices: Mapping[str, str]) -> str:
        """After a merge: one of the choices, or "leave". choices: what each is asked for by, and is."""
        hint = "".join(f"{word[0]} {word}, " for word in choices)
        every = {**choices, "leave": "leave"}
        try:
            return self.prompt.choose("What now?", "next", every, f"{hint}Enter leaves, ? helps", "leave")
        except GoBack:
            return "leave"

    def ask_upload(self, proposed: str, parse: Callable[[str], str]) -> tuple[str, bool]:
        """(a name on the Hub, whether only its owner sees it). Raises GoBack."""

        def find(text: str) -> str:
            return parse(text) if text.strip() else proposed

        while True:
            proposed = self.prompt.text("Name on the Hub", "upload", find, functools.partial(str, proposed), proposed)
            with contextlib.suppress(GoBack):
                return proposed, self.prompt.confirm("Private?", "private", default=True)

    def ask_prompts(self) -> list[str]:
        """Prompts for a taste, until an empty one. Raises GoBack where there is none."""
        prompts: list[str] = []
        while True:
            default, shown = ("begin", "Enter: begin") if prompts else (None, "Enter: back")
            prompt = self.prompt.text("Prompt", "prompt", str.strip, functools.partial(str, shown), default)
            if not prompt:
                return prompts
            prompts.append(prompt)

    def decide(self, default_start: bool) -> str:
        """After the panels: "start", "leave", "change", "inspect" or "save"."""
        choices = {"yes": "start", "no": "leave", "s": "save", **{name: name for name in DECISIONS}}
        starts, leaves = ("Enter start", "n leave") if default_start else ("y start", "Enter leave")
        hint = f"{starts}, c change, i inspect, s save recipe, {leaves}"
        try:
            return self.prompt.choose("Start the merge?", "start", choices, hint, "yes" if default_start else "no")
        except GoBack:
            return "change"

    def which_answer(self, names: Sequence[str]) -> str:
        """The question or setting to be answered anew. Raises GoBack."""
        words = {name: {**QUESTIONS, **SETTINGS}[name] for name in names}
        shown, choices = ", ".join(words.values()), {word: word for word in words.values()}
        word = self.prompt.choose(
            "Change which answer?", "change", choices, shown, complaint="is none of them", remedy=f"Say {shown}."
        )
        return next(name for name in words if words[name] == word)

    def save_recipe(self, text_in: Callable[[Path], str]) -> Path:
        """Asks for a new file until one takes the recipe. text_in: the recipe's text for a folder that it stands in.

        Raises GoBack.
        """
        usual = Path(recipe_file.RECIPE_NAME)
        proposed = save_directory.free_path(usual.stem, usual.suffix)

        def parse(text: str) -> Path:
            path = clean_path(text) if text.strip() else proposed
            if path.suffix not in (".yaml", ".yml") or os.path.lexists(path) or not path.parent.is_dir():
                raise SlerpMergeError(f"{path} is no new .yaml file in a folder that is there.", "Give another name.")
            return path

        while True:
            path = self.prompt.text("Recipe file", "recipe", parse, lambda: str(proposed), str(proposed)).resolve()
            try:
                replace_files({path: text_in(path.parent).encode("utf-8", "backslashreplace")})
                return path
            except SlerpMergeError as error:
                self.prompt.say(printable(f"  {error.message} {error.hint}"))
