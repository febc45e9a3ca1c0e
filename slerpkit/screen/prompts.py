"""One prompt: help with ?, a refusal in place, Tab; Esc goes back, Ctrl-C leaves.

Knows how to ask and what help there is; what is asked, and in which order, is the wizard's business. questionary's own
confirm and select are not used: they have no help, take a key for an answer before Enter, and refuse nothing in place.
"""

from __future__ import annotations

import contextlib
import shutil
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import questionary
from prompt_toolkit.buffer import ValidationState
from prompt_toolkit.filters import to_filter
from prompt_toolkit.key_binding import KeyBindings
from prompt_toolkit.layout import FormattedTextControl
from rich.text import Text

from slerpkit.messages import SlerpMergeError, explain_refusal, printable
from slerpkit.screen.console import displayable

if TYPE_CHECKING:
    from prompt_toolkit.application import Application
    from prompt_toolkit.completion import Completer
    from prompt_toolkit.key_binding import KeyPressEvent
    from rich.console import Console


class GoBack(Exception):
    """The person wants to return to the question before."""


@dataclass(frozen=True)
class Guide:
    """What ? says at a prompt."""

    help: str
    flag: str  # that answers it on the command line
    back: str = "the question before"  # where Esc goes

    def __str__(self) -> str:
        return f"{self.help} Esc: {self.back}. Flag: {self.flag}."


GUIDES = {
    "primary": Guide(
        "The model at t = 0. Its config, names and dtype are the child's. Give its folder, or its name on the Hugging"
        " Face Hub (org/name, org/name@revision); of an adapter, BASE+ADAPTER names its base too. Tab lists what was"
        " found here.",
        "--primary",
    ),
    "secondary": Guide(
        "The model at t = 1: best another fine-tune of the same base. Tab lists what fits the primary first.",
        "--secondary",
    ),
    "save_directory": Guide(
        "A new folder for the child. It appears there whole and checked, or not at all.", "--save-dir"
    ),
    "overwrite": Guide(
        "y replaces the model that stands there, once the child is whole; n asks for another folder.", "--overwrite"
    ),
    "carry_on": Guide(
        "y keeps the weight files that are finished and makes the others; n begins anew.", "--restart begins anew"
    ),
    "blend": Guide(
        "How much of the secondary each layer gets. A name from the list; a number from 0 to 1; a gradient such as"
        " 0,0.5,1; filters such as self_attn=0,1 mlp=1,0 0.5; task vectors; or a recipe file.",
        "--t",
    ),
    "curves": Guide(
        "The bars are t over the layers, first to last: a taller one is more of the secondary. n asks for another.",
        "--t",
    ),
    "recipe_t": Guide(
        "y takes how much of the secondary each layer gets from the recipe, and nothing else; n asks for another.",
        "--t",
    ),
    "text": Guide(
        "A text file that a good child should predict well: some pages, such as neither parent was trained on. Enter"
        " alone asks for another blend.",
        "--sweep --perplexity",
    ),
    "second_text": Guide(
        "A text for the skill of the other parent: t is then sought that serves both best. Enter leaves it out.",
        "--perplexity, given twice",
    ),
    "differences": Guide(
        "y blends the weights although the settings above tell that the parents use them differently; the child may be"
        " useless. n changes an answer instead.",
        "--accept",
        "another answer",
    ),
    "template_offer": Guide(
        "A chat template tells how a talk is written for the model. y gives the child this one, n gives it none.",
        "--chat-template",
        "another answer",
    ),
    "start": Guide(
        "y starts, c changes an answer and keeps the rest, i inspects how the parents differ, s saves the merge as a"
        " recipe and leaves, n leaves.",
        "--yes",
        "another answer",
    ),
    "fetch": Guide(
        "y fetches the parents' weights into the Hugging Face cache; what is there already is not fetched again.",
        "--download",
    ),
    "stream": Guide(
        "y fetches each of the parents' files when the merge comes to it, and drops it when it is read.",
        "--stream-parents",
        "another answer",
    ),
    "change": Guide("Say which answer to give anew; the others stay as they are.", "each answer has its own"),
    "recipe": Guide("Where the recipe goes; --recipe reads it again, and mergekit understands it.", "--recipe FILE"),
    "next": Guide(
        "t lets parents and child answer the same prompts side by side, p compares how well they predict a text file;"
        " what is found joins the child's card. v loads the child with transformers, without memory for its weights."
        " u uploads it to the Hugging Face Hub. Enter leaves.",
        "--taste, --perplexity, --verify full",
        "leaves; the child stands",
    ),
    "upload": Guide(
        "Where the child is to stand on the Hugging Face Hub: a name of yours, or org/name. Enter takes the one shown.",
        "--upload",
        "what to do now",
    ),
    "private": Guide("y lets you alone see it there; n lets everybody.", "--public", "its name"),
    "prompt": Guide(
        "A question, or the beginning of a sentence. Each model answers it; Enter alone begins, or goes back where"
        " there is no prompt yet.",
        "--taste",
    ),
    "measured_text": Guide(
        "A text file, some pages long. Parents and child are compared by how well each predicts it: best such as none"
        " of them was trained on. Enter alone goes back.",
        "--perplexity",
    ),
    "base": Guide(
        "The model that both parents were fine-tuned from: what each learned since is blended, and added to it."
        " `none` blends the models themselves.",
        "--base",
    ),
    "method": Guide(
        "slerp follows the arc between the parents; slerp-norm does, and blends their lengths apart; lerp takes the"
        " straight line; nuslerp is mergekit's, and can take rows or columns as vectors.",
        "--method",
    ),
    "tokenizer": Guide(
        "Whose tokenizer the child has; auto chooses, union adds the other parent's tokens to the primary's.",
        "--tokenizer",
    ),
    "chat_template": Guide(
        "How a talk is written for the child: auto is the tokenizer's, either is any that a parent has, and the other"
        " names are formats that are well known.",
        "--chat-template",
    ),
    "dtype": Guide("How the child's numbers are stored; auto is as the primary's are.", "--dtype"),
    "vectors": Guide("What nuslerp takes as one vector: the whole tensor, a row or a column.", "--granularity"),
    "dot_threshold": Guide("The cosine above which SLERP is a straight line.", "--dot-threshold"),
    "epsilon": Guide("The norm below which a tensor counts as zero.", "--epsilon"),
    "extrapolate": Guide("Whether t may lie outside 0 to 1.", "--extrapolate"),
    "accept": Guide(
        "The settings whose difference may pass, with spaces between them; `none` takes it back.", "--accept"
    ),
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


def escape_goes_back() -> KeyBindings:
    """Esc closes the menu that is open; where there is none, it leaves the prompt for the question before."""
    keys = KeyBindings()

    @keys.add("escape")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.complete_state is not None:
            event.current_buffer.cancel_completion()
        elif not event.app.is_done:  # as by a second Esc
            event.app.exit(exception=GoBack())

    return keys


class LiveHint:
    """A hint that is put into words each time that the prompt is drawn."""

    def __init__(self, words: Callable[[], str]) -> None:
        self.words = words

    def __str__(self) -> str:
        return f"({self.words()})"


def take_back(application: Application[Any]) -> None:
    """Empties the line whose answer is being refused; the reason stays, and what comes next is looked at anew."""
    buffer = application.current_buffer
    buffer.text = ""
    application.loop.call_soon(setattr, buffer, "validation_state", ValidationState.UNKNOWN)


def refresh(application: Application[Any]) -> None:
    """Draws a prompt anew, with what its menu would offer now; a menu that somebody chooses from stays."""
    buffer = application.current_buffer
    if buffer.complete_state is not None and buffer.complete_state.complete_index is None:
        buffer.cancel_completion()
        buffer.start_completion()
    application.invalidate()


class Prompter:
    """Puts questions to the person at the terminal, one at a time.

    on_first_prompt: called once the first prompt stands on the screen, so that nobody waits for what it begins.
    """

    # In seconds: Esc alone is told from the first byte of another key by what does not follow it.
    escape_seconds = (0.2, 0.1)

    def __init__(self, console: Console, on_first_prompt: Callable[[], object]) -> None:
        self.console = console
        self.waiting = [on_first_prompt]
        self.application: Application[Any] | None = None  # of the prompt that stands

    def ask(self, question: questionary.Question) -> str:
        """The answer. Raises GoBack on Esc, KeyboardInterrupt on Ctrl-C and EOFError on Ctrl-D."""
        let_refusals_wrap(question)
        application = self.application = question.application
        application.ttimeoutlen, application.timeoutlen = self.escape_seconds
        application.erase_when_done = True  # what stays is record's line, without hints
        if self.waiting:
            application.after_render += lambda _: self.waiting and self.waiting.pop()()
        return question.unsafe_ask()

    def refresh(self) -> None:
        """Something else can be said or offered at the prompt that stands. Called from any thread."""
        loop = self.application.loop if self.application is not None else None
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # it has been answered meanwhile
                loop.call_soon_threadsafe(refresh, self.application)

    def say(self, line: str) -> None:
        """A dim line between prompts."""
        self.console.print(line, style="dim", highlight=False, markup=False)

    def record(self, message: str, answer: str = "") -> None:
        """What stays on the screen of a prompt: the question, and what was taken for an answer."""
        answer = displayable(self.console, answer)
        line = Text.assemble(("? ", "#5f819d"), (message, "bold"), "  ", (answer, "bold #ff9d00"))
        self.console.print(line, soft_wrap=True)

    def text(
        self,
        message: str,
        subject: str,  # of GUIDES
        parse: Callable[[str], Any],
        hint: Callable[[], str],  # in parentheses beside the message, put into words each time that it is drawn
        default: str | None = None,  # what an empty answer is recorded as; None: it goes back
        completer: Completer | None = None,
        check: Callable[[Any], object] = lambda value: None,
        words_of: Callable[[Any], str] | None = None,  # what an answer is recorded as; None: as it was typed
        stays: bool = True,  # whether an answer that was refused stays in the line; a single letter never does
    ) -> Any:
        """What `parse` makes of the answer. Where it or `check` raises SlerpMergeError, that is refused in place.

        A ? asks for help, also behind an answer that was refused and stays in the line. Raises GoBack.
        """

        def refusal(text: str) -> bool | str:
            """True where the text is an answer."""
            goes_back = default is None and not text.strip()
            return goes_back or answer_check(lambda text: check(parse(text)))(text)

        def asks_help(text: str) -> bool:
            return text.rstrip().endswith("?") and (text.strip() == "?" or refusal(text) is not True)

        def validate(text: str) -> bool | str:
            found = True if asks_help(text) else refusal(text)
            if found is not True and not (stays and len(text.strip()) > 1):
                take_back(question.application)
            return found

        while True:
            question = questionary.text(
                message,
                completer=completer,
                complete_while_typing=False,
                validate=validate,
                validate_while_typing=False,
                instruction=LiveHint(hint),
                key_bindings=escape_goes_back(),
            )
            try:
                answer = self.ask(question)
            except (KeyboardInterrupt, EOFError):
                with contextlib.suppress(OSError):  # the terminal may be what was lost
                    self.record(message)
                raise
            if asks_help(answer):
                self.say(str(GUIDES[subject]))
                continue
            if default is None and not answer.strip():
                raise GoBack
            value = parse(answer)
            self.record(message, words_of(value) if words_of is not None else answer.strip() or default)
            return value

    def path(
        self,
        message: str,
        subject: str,
        find: Callable[[str], Path],
        hint: Callable[[], str],
        completer: Completer,
        check: Callable[[Path], object],
        default: Path | None = None,
        shown: str | None = None,  # the default as people call it
        is_needed: bool = True,  # where there is no default; else Enter goes back
    ) -> Any:
        """A path that passes `check`, or whatever `find` makes of what was typed."""

        def parse(text: str) -> Path:
            if text.strip():
                return find(text)
            if default is None:
                raise SlerpMergeError("A folder is needed.", "Type or paste its path; Tab completes it, ? helps.")
            return default

        return self.text(message, subject, parse, hint, "" if is_needed and shown is None else shown, completer, check)

    def choose(
        self,
        message: str,
        subject: str,
        choices: Mapping[str, str],
        hint: str,
        default: str | None = None,
        complaint: str = "is no answer to this",
        remedy: str = "",
        check: Callable[[str], object] = lambda name: None,
    ) -> str:
        """What the choice means whose name the answer is, or begins; default: the name that Enter alone takes."""

        def parse(text: str) -> str:
            wanted = " ".join(text.lower().split()) or default or ""
            meant = {choices[name] for name in choices if name == wanted}
            meant = meant or {choices[name] for name in choices if wanted and name.startswith(wanted)}
            if len(meant) != 1:
                what = "could be more than one of them" if meant else complaint
                raise SlerpMergeError(f"{text.strip()!r} {what}.", remedy or GUIDES[subject].help)
            return meant.pop()

        return self.text(message, subject, parse, lambda: hint, default, None, check, str, stays=False)

    def confirm(self, message: str, subject: str, default: bool) -> bool:
        """Yes or no."""
        capitals, word = ("Y/n", "yes") if default else ("y/N", "no")
        answers = {"yes": "yes", "no": "no"}
        return self.choose(message, subject, answers, capitals, word, "is neither yes nor no", "Say y or n.") == "yes"
