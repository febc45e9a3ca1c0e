"""The questions."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.evaluation.perplexity import read_judged_text
from slerpkit.files import clean_path, existing_folder, is_plain_file
from slerpkit.merge.journal import JOURNAL_NAME
from slerpkit.merge.save_directory import check_save_directory, proposed_save_directory, staging_area
from slerpkit.messages import SlerpMergeError, format_bytes, printable
from slerpkit.parents.checkpoint import find_model, open_checkpoint, open_if_whole, short_name
from slerpkit.parity.check import check_fit, check_fit_of_base
from slerpkit.recipe_file import RECIPE_NAME, read_recipe
from slerpkit.schedule import BLENDS, Schedule, order_rules, parse_blend, parse_rule
from slerpkit.screen.console import WIDEST_PANEL
from slerpkit.screen.finder import ModelFinder, model_completer
from slerpkit.screen.panels import schedule_curves

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from rich.console import Console

    from slerpkit.recipe import MergeRecipe
    from slerpkit.screen.finder import History

OTHER_BLENDS = (
    ("a number", "or a gradient of your own, such as 0,0.5,1"),
    ("filter=gradient ...", "one for each component, such as self_attn=0,1 mlp=1,0 0.5"),
    ("task vectors", "blend what each parent learned since a common base"),
    ("find a good blend", "on a text of yours: tries several, and makes the best"),
    ("a recipe file", "its path, ending in .yaml or .yml"),
)
TASK_VECTORS = "task vectors"
FIND_BLEND = "find a good blend"


def answer_check(check: Callable[[Any], object]) -> Callable[[Any], bool | str]:
    """A validator for a prompt from a function that raises: the answer stays, its reason is shown below."""

    def validate(answer: Any) -> bool | str:
        try:
            check(answer)
        except SlerpMergeError as error:
            width = max(20, shutil.get_terminal_size().columns - 2)
            return textwrap.fill(printable(f"{error.message} {error.hint}"), width, break_on_hyphens=False)
        return True

    return validate


def check_recipe_parents(recipe: MergeRecipe, parents: tuple[Path, Path]) -> dict[str, Any]:
    """A recipe's fields, where it merges the parents that were answered. Raises SlerpMergeError where it does not."""
    named = recipe.primary, recipe.secondary
    if [folder.resolve() for folder in named] != [folder.resolve() for folder in parents]:
        raise SlerpMergeError(
            f"The recipe has {named[0]} at t = 0 and {named[1]} at t = 1, not the models you gave.",
            "Run it as it is with --recipe, or answer with another blend.",
        )
    return dict(vars(recipe))


HELP = {
    "primary": "The model at t = 0. Its config, names and dtype are the child's. Give its folder, or the"
    " org/name of one in the Hugging Face cache; Tab lists what was found here.",
    "secondary": "The model at t = 1: best another fine-tune of the same base. Tab lists what fits the primary first.",
    "save_directory": "A new folder for the child. It appears there whole and checked, or not at all.",
    "blend": "How much of the secondary each layer gets. A name from the list; a number from 0 to 1; a gradient such as"
    " 0,0.5,1; filters such as self_attn=0,1 mlp=1,0 0.5; task vectors; or a recipe file.",
    "start": "y starts, n leaves, c changes an answer and keeps the rest, i inspects how the parents differ, s saves"
    " the merge as a recipe and leaves.",
    "text": "A text file that a good child should predict well: some pages, such as neither parent was trained on. With"
    " a second one, for the other parent's skill, the best balance is sought.",
    "next": "t lets parents and child answer the same prompts side by side, p compares how well they predict a text"
    " file; what is found joins the child's card. Enter leaves.",
    "prompt": "A question, or the beginning of a sentence. Each model answers it; Enter alone begins.",
    "change": "Say which answer to give anew; the others stay as they are.",
    "confirm": "Type y or n; Enter alone takes the one in capitals.",
    "base": "The model that both parents were fine-tuned from.",
    "recipe": "Where the recipe goes; --recipe reads it again, and mergekit understands it.",
}
ANSWER_NAMES = {"primary": "primary", "secondary": "secondary", "save_directory": "save directory", "schedule": "blend"}


class Wizard:
    """Asks what no flag has answered. Merges nothing."""

    def __init__(self, console: Console, memory: History, on_first_prompt: Callable[[], object]) -> None:
        self.console = console
        self.memory = memory
        self.finder = ModelFinder(memory.places)
        self.on_first_prompt = on_first_prompt
        self.asked = False
        self.blend_text: str | None = None  # the last answer to Blend, as it was typed
        self.proposed: Path | None = None  # the last proposed save directory

    def ask(self, question: Any) -> Any:
        """The answer. Raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D."""
        self.let_refusals_wrap(question)
        if not self.asked:
            self.asked = True

            def begin() -> None:
                self.finder.start()
                self.on_first_prompt()

            # Models are found and libraries load behind the first prompt's back, once it stands on the screen.
            once = iter([begin])
            question.application.after_render += lambda _: next(once, lambda: None)()
        return question.unsafe_ask()

    @staticmethod
    def let_refusals_wrap(question: Any) -> None:
        """The library shows the reason of a refusal in a single line, cut at the terminal's edge."""
        from prompt_toolkit.filters import to_filter
        from prompt_toolkit.layout import FormattedTextControl

        for window in question.application.layout.find_all_windows():
            if isinstance(window.content, FormattedTextControl) and window.height == 1:
                window.height = None
                window.wrap_lines = to_filter(True)
                window.dont_extend_height = to_filter(True)

    def ask_text(
        self,
        message: str,
        parse: Callable[[str], Any],
        subject: str,  # of HELP
        instruction: str | None = None,
        completer: Completer | None = None,
        check: Callable[[Any], object] = lambda value: None,
    ) -> Any:
        """What `parse` makes of the answer. Where it or `check` raises, that is refused in place. A ? shows help."""
        import questionary

        while True:
            question = questionary.text(
                message,
                completer=completer,
                complete_while_typing=False,
                validate=answer_check(lambda text: text.strip() == "?" or check(parse(text))),
                validate_while_typing=False,
                instruction=instruction,
            )
            answer = self.ask(question)
            if answer.strip() != "?":
                return parse(answer)
            self.say(HELP[subject])

    def ask_folder(
        self,
        message: str,
        subject: str,
        check: Callable[[Path], object],
        default: Path | None = None,
        finder: ModelFinder | None = None,
    ) -> Path:
        """A folder that passes `check`: a model's where there is a finder for models."""

        def parse(text: str) -> Path:
            if not text.strip() and default is None:
                raise SlerpMergeError("A folder is needed.", "Type or paste its path; Tab completes it, ? helps.")
            if not text.strip():
                return default
            return find_model(text) if finder is not None else clean_path(text)

        shown = "Tab lists what is here, ? helps"
        if default is not None:
            shown = short_name(default) if finder is not None else str(default)
        return self.ask_text(message, parse, subject, f"({shown})", model_completer(finder), check)

    def ask_primary(self, default: Path | None) -> dict[str, Any]:
        default = default if default is not None and open_if_whole(default) is not None else None
        return {"primary": self.ask_folder("Primary model", "primary", open_checkpoint, default, self.finder)}

    def ask_secondary(self, primary: Path, default: Path | None) -> dict[str, Any]:
        def check(folder: Path) -> None:
            check_fit(primary, folder)

        self.finder.primary = primary
        if default is not None and (default.resolve() == primary.resolve() or answer_check(check)(default) is not True):
            default = None
        found = self.ask_folder("Secondary model", "secondary", check, default, self.finder)
        if found.resolve() == primary.resolve():
            self.say("  That is the primary itself; the child will be a copy of it.")
        return {"secondary": found}

    def ask_save_directory(self, answers: Mapping[str, Any], default: Path | None) -> dict[str, Any]:
        """The child's folder, and what is to happen to what stands there."""
        parents = answers["primary"], answers["secondary"]
        needed, free = open_checkpoint(parents[0]).byte_count, shutil.disk_usage(existing_folder(Path())).free
        self.say(f"  The child needs about {format_bytes(needed)}; {format_bytes(free)} are free here.")
        blend = [answers.get("method", "slerp")]
        if (schedule := answers.get("schedule")) is not None and len(list(schedule.values())) == 1:
            blend.append(f"{next(schedule.values()):g}")
        self.proposed = proposed_save_directory(*parents, blend)
        proposed = default or self.proposed
        while True:
            folder = self.ask_folder(
                "Save directory",
                "save_directory",
                lambda folder: check_save_directory(folder, parents, overwrite=True),
                proposed,
            )
            stands = folder.is_dir() and any(folder.iterdir())
            if stands and not answers.get("overwrite"):
                if not self.confirm(f"{folder} holds a model; replace it once the child is whole?", default=False):
                    proposed = self.proposed
                    continue
                return {"save_directory": folder, "overwrite": True}
            unfinished = is_plain_file(staging_area(folder) / JOURNAL_NAME) and "restart" not in answers
            if unfinished and not self.confirm("An unfinished merge stands there. Carry on with it?", default=True):
                return {"save_directory": folder, "restart": True}
            return {"save_directory": folder}

    def ask_blend(self, parents: tuple[Path, Path]) -> dict[str, Any]:
        """The fields of MergeRecipe that a blend decides. What is drawn before it is taken."""
        from prompt_toolkit.completion import WordCompleter

        self.show_blends()
        names = [name for name, _, _ in BLENDS] + [TASK_VECTORS, FIND_BLEND]
        completer: Completer = WordCompleter(names, sentence=True, ignore_case=True)
        default = self.default_blend()

        def parse(text: str) -> tuple[str, dict[str, Any]]:
            text = text.strip() or default
            if len(text) > 1 and TASK_VECTORS.startswith(text.lower()):
                return TASK_VECTORS, {"method": "slerp"}
            if len(text) > 1 and FIND_BLEND.startswith(text.lower()):
                return FIND_BLEND, {}
            if text.strip("'\"").lower().endswith((".yaml", ".yml")):
                path = clean_path(text)
                return text, {**check_recipe_parents(read_recipe(path), parents), "recipe_file": path}
            return text, {"schedule": parse_blend(text)}

        while True:
            answer, fields = self.ask_text("Blend", parse, "blend", f"({default})", completer)
            self.blend_text = answer
            if fields == {"method": "slerp"}:
                self.finder.primary = parents[0]
                base = self.ask_folder(
                    "Base model", "base", lambda folder: check_fit_of_base(parents[0], folder), finder=self.finder
                )
                return {"base": base, "schedule": Schedule.constant(0.5)}
            if not fields:
                return {"schedule": Schedule.constant(0.5), "sweep_texts": self.ask_texts()}
            drawn_already = answer.lower() in names
            if drawn_already or "primary" in fields or self.accept_curves(fields["schedule"]):
                return fields

    def ask_texts(self) -> tuple[Path, ...]:
        """One text file to find a blend on, or two for its balance."""
        texts = [self.ask_text_file("Text file")]
        if (second := self.ask_text_file("A second one, for the other parent's skill", optional=True)) is not None:
            texts.append(second)
        return tuple(texts)

    def ask_text_file(self, message: str, optional: bool = False) -> Path | None:
        """A text that can be predicted; None where it may be left out, and was."""
        from questionary.prompts.path import GreatUXPathCompleter

        def parse(text: str) -> Path | None:
            if not text.strip() and not optional:
                raise SlerpMergeError("A text file is needed.", "Type or paste its path; Tab completes it, ? helps.")
            return clean_path(text) if text.strip() else None

        def check(path: Path | None) -> None:
            if path is not None:
                read_judged_text(path)

        shown = "(Enter: none)" if optional else "(Tab completes, ? helps)"
        return self.ask_text(message, parse, "text", shown, GreatUXPathCompleter(expanduser=True), check)

    def ask_next(self) -> str:
        """After a merge: "taste", "perplexity" or "leave"."""
        words = {"t": "taste", "taste": "taste", "p": "perplexity", "perplexity": "perplexity", "": "leave"}

        def parse(text: str) -> str:
            wanted = text.strip().lower()
            if wanted not in words:
                raise SlerpMergeError(f"{text!r} is no answer to this.", HELP["next"])
            return words[wanted]

        return self.ask_text("What now?", parse, "next", "(t taste, p perplexity, Enter leaves, ?)")

    def ask_prompts(self) -> list[str]:
        """Prompts for a taste, until an empty one."""
        prompts: list[str] = []
        while prompt := self.ask_text("Prompt", str.strip, "prompt", "(Enter: begin)" if prompts else "(Enter: none)"):
            prompts.append(prompt)
        return prompts

    def default_blend(self) -> str:
        """The last blend, where it can be used again; else even."""
        last = self.blend_text or self.memory.content.get("blend")
        try:
            if isinstance(last, str) and (last == TASK_VECTORS or parse_blend(last)):
                return last
        except SlerpMergeError:  # from an older version, or a stranger's hand
            pass
        return "even"

    def show_blends(self) -> None:
        """Every blend with its curve over the layers, so that none is taken unseen."""
        from rich.padding import Padding
        from rich.text import Text

        rows = []
        for name, text, meaning in BLENDS:
            curves = schedule_curves(self.console, order_rules(map(parse_rule, text.split())), layers=8)
            drawn = curves[0][1] if len(curves) == 1 else "  ".join(f"{part} {curve}" for part, curve in curves)
            rows.append((f"{name:<22}{drawn}", meaning))
        for line, meaning in [*rows, *((f"{name:<22}", meaning) for name, meaning in OTHER_BLENDS)]:
            text = Text(f"  {line:<32}", style="bold")
            if len(text) + len(meaning) < min(self.console.width, WIDEST_PANEL):
                self.console.print(text.append(f"  {meaning}", style="not bold"))
            else:
                self.console.print(text, Padding(Text(meaning), (0, 0, 0, 6)))

    def accept_curves(self, schedule: Schedule) -> bool:
        for component, curve in schedule_curves(self.console, schedule):
            self.say(f"    {component:<12}{curve}")
        return len(schedule.rules) == 1 and len(schedule.rules[0].gradient) == 1 or self.confirm("Take it?", True)

    def decide(self, default_start: bool) -> str:
        """After the panels: "start", "leave", "change", "inspect" or "save"."""
        words = {"y": "start", "yes": "start", "n": "leave", "no": "leave"}
        words |= {"c": "change", "i": "inspect", "s": "save"}

        def parse(text: str) -> str:
            text = text.strip().lower() or ("y" if default_start else "n")
            if text not in words:
                raise SlerpMergeError(f"{text!r} is no answer to this.", HELP["start"])
            return words[text]

        return self.ask_text("Start the merge?", parse, "start", "(Y/n/c/i/s/?)" if default_start else "(y/N/c/i/s/?)")

    def which_answer(self, names: Sequence[str]) -> str:
        """The field of MergeRecipe to be answered anew."""
        fields = {ANSWER_NAMES[name]: name for name in names}

        def parse(text: str) -> str:
            wanted = " ".join(text.lower().split())
            meant = [field for shown, field in fields.items() if wanted and shown.startswith(wanted)]
            if len(meant) != 1:
                what = "could be more than one of them" if meant else "is none of them"
                raise SlerpMergeError(f"{text!r} {what}.", f"Say {', '.join(fields)}.")
            return meant[0]

        return self.ask_text("Change which answer?", parse, "change", f"({', '.join(fields)})")

    def ask_recipe_file(self) -> Path:
        """Where to save a recipe: a new file."""

        def parse(text: str) -> Path:
            path = clean_path(text) if text.strip() else Path(RECIPE_NAME)
            if path.suffix not in (".yaml", ".yml") or path.exists() or not path.resolve().parent.is_dir():
                raise SlerpMergeError(f"{path} is no new .yaml file in a folder that is there.", "Give another name.")
            return path

        return self.ask_text("Recipe file", parse, "recipe", f"({RECIPE_NAME})")

    def say(self, line: str) -> None:
        self.console.print(line, style="dim", highlight=False, markup=False)

    def confirm(self, message: str, default: bool) -> bool:
        """Yes or no."""

        def parse(text: str) -> bool:
            wanted = text.strip().lower() or ("yes" if default else "no")
            if not ("yes".startswith(wanted) or "no".startswith(wanted)):
                raise SlerpMergeError(f"{text!r} is neither yes nor no.", HELP["confirm"])
            return "yes".startswith(wanted)

        return self.ask_text(message, parse, "confirm", "(Y/n)" if default else "(y/N)")


def ask_answers(preset: Mapping[str, Any], wizard: Wizard, before: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of MergeRecipe: those that `preset` gives, and the person's answers for the rest.

    before: what was answered earlier, or in an earlier run, and is offered again.
    """
    answers = dict(preset)
    if "primary" not in answers:
        answers |= wizard.ask_primary(before.get("primary"))
    if "secondary" not in answers:
        answers |= wizard.ask_secondary(answers["primary"], before.get("secondary"))
    if "save_directory" not in answers:
        answers |= wizard.ask_save_directory(answers, before.get("save_directory"))
    if "schedule" not in answers:
        parents = answers["primary"], answers["secondary"]
        answers = {**wizard.ask_blend(parents), **answers}  # what was answered or given by a flag goes first
    return answers


BLEND_FIELDS = (
    "schedule",
    "weights",
    "normalize",
    "slices",
    "base",
    "method",
    "vectors",
    "recipe_file",
    "cast_dtype",
    "sweep_texts",
)


def without_answer(answers: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The answers that stay where one is to be given anew."""
    gone = {"schedule": BLEND_FIELDS, "save_directory": ("save_directory", "overwrite", "restart")}.get(name, (name,))
    return {key: value for key, value in answers.items() if key not in gone}
