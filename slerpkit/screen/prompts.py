"""One prompt: help with ?, a refusal in place, Tab; Ctrl-C leaves.

Knows how to ask and what help there is; what is asked, and in which order, is the wizard's business. questionary's own
confirm and select are not used: they have no help, take a key for an answer before Enter, and refuse nothing in place.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import questionary
from prompt_toolkit.filters import to_filter
from prompt_toolkit.layout import FormattedTextControl

from slerpkit.messages import SlerpMergeError, explain_refusal, printable

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer
    from rich.console import Console

HELP = {
    "primary": "The model at t = 0. Its config, names and dtype are the child's. Give its folder, or the"
    " org/name of one in the Hugging Face cache; of an adapter, BASE+ADAPTER names its base too. Tab lists what was"
    " found here.",
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


def answer_check(check: Callable[[Any], object]) -> Callable[[Any], bool | str]:
    """A validator for a prompt from a function that raises: the answer stays, its reason is shown below."""

    def validate(answer: Any) -> bool | str:
        try:
            check(answer)
        except (SlerpMergeError, OSError) as fault:
            error = explain_refusal(fault) if isinstance(fault, OSError) else fault
            width = max(20, shutil.get_terminal_size().columns - 2)
            return textwrap.fill(printable(f"{error.message} {error.hint}"), width, break_on_hyphens=False)
        return True

    return validate


def let_refusals_wrap(question: questionary.Question) -> None:
    """The library shows the reason of a refusal in a single line, cut at the terminal's edge."""
    for window in question.application.layout.find_all_windows():
        if isinstance(window.content, FormattedTextControl) and window.height == 1:
            window.height = None
            window.wrap_lines = to_filter(True)
            window.dont_extend_height = to_filter(True)


class Prompter:
    """Puts questions to the person at the terminal, one at a time.

    on_first_prompt: called once the first prompt stands on the screen, so that nobody waits for what it begins.
    """

    def __init__(self, console: Console, on_first_prompt: Callable[[], object]) -> None:
        self.console = console
        self.waiting = [on_first_prompt]

    def ask(self, question: questionary.Question) -> str:
        """The answer. Raises KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D."""
        let_refusals_wrap(question)
        if self.waiting:
            question.application.after_render += lambda _: self.waiting and self.waiting.pop()()
        return question.unsafe_ask()

    def say(self, line: str) -> None:
        """A dim line between prompts."""
        self.console.print(line, style="dim", highlight=False, markup=False)

    def text(
        self,
        message: str,
        parse: Callable[[str], Any],
        subject: str,  # of HELP
        instruction: str | None = None,
        completer: Completer | None = None,
        check: Callable[[Any], object] = lambda value: None,
    ) -> Any:
        """What `parse` makes of the answer. Where it or `check` raises SlerpMergeError, that is refused in place.

        A ? asks for help, also behind an answer that was refused and stays in the line.
        """

        def asks_help(text: str) -> bool:
            refused = answer_check(lambda text: check(parse(text)))
            return text.rstrip().endswith("?") and (text.strip() == "?" or refused(text) is not True)

        while True:
            question = questionary.text(
                message,
                completer=completer,
                complete_while_typing=False,
                validate=answer_check(lambda text: asks_help(text) or check(parse(text))),
                validate_while_typing=False,
                instruction=instruction,
            )
            answer = self.ask(question)
            if not asks_help(answer):
                return parse(answer)
            self.say(HELP[subject])

    def path(
        self,
        message: str,
        find: Callable[[str], Path],
        subject: str,
        instruction: str,
        completer: Completer,
        check: Callable[[Path], object],
        default: Path | None = None,
        kind: str = "folder",
    ) -> Path:
        """A path that passes `check`; find: makes it of what was typed."""

        def parse(text: str) -> Path:
            if text.strip():
                return find(text)
            if default is None:
                raise SlerpMergeError(f"A {kind} is needed.", "Type or paste its path; Tab completes it, ? helps.")
            return default

        return self.text(message, parse, subject, f"({instruction})", completer, check)

    def choose(
        self,
        message: str,
        choices: Mapping[str, Any],
        subject: str,
        instruction: str,
        default: str | None = None,
        complaint: str = "is no answer to this",
    ) -> Any:
        """The value of the choice whose name the answer begins; default: the name that Enter alone takes."""

        def parse(text: str) -> Any:
            wanted = " ".join(text.lower().split()) or default
            meant = [name for name in choices if wanted and name.startswith(wanted)]
            if len(meant) != 1:
                what = "could be more than one of them" if meant else complaint
                hint = f"Say {', '.join(choices)}." if subject == "change" else HELP[subject]
                raise SlerpMergeError(f"{text!r} {what}.", hint)
            return choices[meant[0]]

        return self.text(message, parse, subject, f"({instruction})")

    def confirm(self, message: str, default: bool) -> bool:
        """Yes or no."""
        capitals, word = ("Y/n", "yes") if default else ("y/N", "no")
        return self.choose(message, {"yes": True, "no": False}, "confirm", capitals, word, "is neither yes nor no")
