"""What a run has at hand: its console, live view, wizard and history, and what stands where if something goes wrong.

Decides nothing: the story does (slerpmerge.py), and afterwards.py for a child that stands.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from slerpkit import __version__
from slerpkit.files import json_text
from slerpkit.lazy import lazy_modules
from slerpkit.messages import SlerpMergeError
from slerpkit.screen import flags
from slerpkit.screen.answers import QUESTIONS, Answers
from slerpkit.screen.console import UNREAD, OutputConsole, displayable, tell_errors
from slerpkit.screen.history import History
from slerpkit.screen.terminal import Terminated, drop_output, stdout_alone

if TYPE_CHECKING:
    from rich.console import RenderableType

    from slerpkit.child.findings import Finding
    from slerpkit.evaluation.objectives import Objective
    from slerpkit.merge import events
    from slerpkit.merge import plan as plans
    from slerpkit.merge import team as teams
    from slerpkit.merge.events import Event
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.team import WorkerTeam
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity.report import ParityReport
    from slerpkit.recipe import MergeRecipe, RunOptions
    from slerpkit.screen import finder, progress, prompts, wizard
    from slerpkit.screen import lookahead as lookaheads
    from slerpkit.screen.lookahead import Lookahead
    from slerpkit.screen.progress import MergeView
    from slerpkit.screen.wizard import Wizard
else:  # a run without questions loads no wizard, and a refused one no view
    events, plans, teams = lazy_modules("slerpkit.merge", "events", "plan", "team")
    finder, progress, prompts, wizard = lazy_modules("slerpkit.screen", "finder", "progress", "prompts", "wizard")
    (lookaheads,) = lazy_modules("slerpkit.screen", "lookahead")


CARRIES_ON = "the same command carries on"


class Session:
    """One run of the tool, from its flags to its closing note."""

    def __init__(self, arguments: argparse.Namespace, closing_note: str) -> None:
        self.arguments = arguments
        self.closing_note = closing_note  # what stands where, if the run ends here
        self.leaves_something = False  # whether the note tells of something that stands, which an error must tell too
        if arguments.no_color:
            os.environ["NO_COLOR"] = "1"
            os.environ["PROMPT_TOOLKIT_COLOR_DEPTH"] = "DEPTH_1_BIT"
        # With --json the report alone goes to stdout; what people read goes beside it.
        # Bound to its stream, so that a bar goes on where a library's own prints are held back.
        self.console = OutputConsole(sys.stderr if arguments.json else sys.stdout)
        self.output = sys.stdout  # for that report
        self._at_the_end = contextlib.ExitStack()
        self.interactive = sys.stdin.isatty() and self.console.is_terminal and not arguments.json
        self.history = History()
        self.workers: WorkerTeam | None = None
        self.lookahead: Lookahead | None = None  # at the primary, while the person reads
        self.settled: dict[tuple[Any, ...], bool] = {}  # what was asked once and for all, and the answer
        self.findings: list[Finding] = []  # of the child; --json prints them
        self.deferred_error: SlerpMergeError | None = None  # of something that did not keep the run from its end

    def __enter__(self) -> Session:
        if self.arguments.json:
            self.output = self._at_the_end.enter_context(stdout_alone())
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def asks(self) -> bool:
        """Whether there is somebody who wants to be asked before and after a merge."""
        return self.interactive and not self.arguments.yes

    @functools.cached_property
    def view(self) -> MergeView:
        """The live picture of work; `with session.view:` takes it away in any case."""
        return progress.MergeView(self.console, quiet=self.arguments.quiet or self.arguments.json)

    @functools.cached_property
    def wizard(self) -> Wizard:
        """The questions; models are looked for once the first prompt stands."""
        models = finder.ModelFinder(self.history.recent)
        prompter = prompts.Prompter(self.console, models.start)
        models.on_change = prompter.refresh
        return wizard.Wizard(prompter, models, lambda primary, answers: self.prepare_for(primary, answers.options))

    def ask(self, given: Answers, questions: tuple[str, ...] = tuple(QUESTIONS)) -> Answers:
        """What was given, and the person's answers for the rest; the last run's are offered again."""
        unanswered = set(given.unanswered()) & set(questions)
        if not unanswered:
            return given
        if unanswered != {"blend"}:
            name = (f"slerpmerge {__version__}", "bold")
            self.show(Text.assemble(name, "  Tab completes, ? helps, Esc goes back, Ctrl-C leaves."))
        return self.wizard.complete(given, self.history.answers(), questions)

    def prepare_for(self, primary: Checkpoint, options: RunOptions) -> None:
        """Starts what a primary needs beside the questions: workers, and a look at it where somebody reads of it."""
        is_new = self.lookahead is None or self.lookahead.folder != primary.folder
        if is_new and not primary.awaited and self.asks and not self.arguments.inspect:
            self.end_lookahead()
            self.lookahead = lookaheads.Lookahead(primary.folder, primary.base and primary.base.folder)
        self.start_workers(primary, options)

    def start_workers(self, primary: Checkpoint, options: RunOptions) -> None:
        """Starts the workers for such a primary, where none are there, so that they are ready when they are needed."""
        if self.workers is None and options.device in ("auto", "cpu"):
            threads = plans.choose_threads(options.threads)
            kind = plans.choose_workers("cpu", 2 * primary.byte_count, primary.dtypes)
            self.workers = teams.WorkerTeam(threads, "cpu", *kind)

    def workers_for(self, plan: MergePlan) -> WorkerTeam | None:
        """The workers that were started, where they can make the plan's child; else the merge has its own."""
        if self.workers is not None and not self.workers.serves(
            plan.threads, plan.device, plan.source_bytes, plan.dtypes
        ):
            self.end_workers()
        return self.workers

    def what_primary_lacks(self, seconds: float = 0) -> str | None:
        """A warning of what the primary's class misses of it, where that is known by then."""
        return self.lookahead.look(seconds) if self.lookahead is not None else None

    def end_workers(self) -> None:
        """Ends the workers, where they were started."""
        if self.workers is not None:
            self.workers.close()
            self.workers = None

    def end_lookahead(self) -> None:
        """Gives up the look at the primary: nobody reads of it any more."""
        if self.lookahead is not None:
            self.lookahead.end()
            self.lookahead = None

    def close(self) -> None:
        """Ends what runs beside the session."""
        self.end_lookahead()
        self.end_workers()
        self._at_the_end.close()

    def offers_template(self, role: str, recipe: MergeRecipe) -> bool:
        """Whether the person takes a parent's chat template, as Enter alone does; asked once for a pair of parents."""
        about = "template", recipe.primary, recipe.secondary, role
        if about not in self.settled and self.asks:
            question = f"The child has no chat template; take the {role}'s?"
            self.settled[about] = self.wizard.prompt.confirm(question, "template_offer", default=True)
        return self.settled.get(about, False)

    def accepts(self, parity: ParityReport, recipe: MergeRecipe) -> bool:
        """Whether the person lets pass the settings that alone forbid the merge; Enter alone does not.

        Once they may pass, they may for this pair of parents.
        """
        if not self.asks or self.arguments.dry_run:
            return False
        about = "accept", recipe.primary, recipe.secondary, parity.acceptable
        if not self.settled.get(about):
            for mismatch in parity.of_severity("blocking"):
                self.show(f"  {mismatch}")
            question = "The parents use their weights in different ways. Merge all the same?"
            self.settled[about] = self.wizard.prompt.confirm(question, "differences", default=False)
        return self.settled[about]

    @contextlib.contextmanager
    def stoppable(self) -> Iterator[None]:
        """Work that is watched and that Ctrl-C ends alone, where somebody is asked again after it."""
        try:
            with self.view:
                yield
        except KeyboardInterrupt as stop:
            if isinstance(stop, Terminated) or not self.asks:
                raise
            self.show("Stopped.")

    def show(self, picture: RenderableType, **how: Any) -> None:
        """Prints for people; nothing with --quiet or --json."""
        if not (self.arguments.quiet or self.arguments.json):
            self.console.print(displayable(self.console, picture) if isinstance(picture, str) else picture, **how)

    def show_command(self, plan: MergePlan, objective: Objective | None, recipe: Path | None = None) -> None:
        """Shows the command for scripts that does what was answered; recipe: the file that says it, where one does."""
        more = list(flags.evaluation_words(self.arguments, objective))
        if any(model.hub_name is not None for model in plan.parents.by_role.values()):
            more.append("--download")
        self.show("The same without questions:", style="dim")
        command = flags.equivalent_command(plan.recipe, plan.options, more, recipe)
        self.show(command, soft_wrap=True)

    def print_json(self, content: Mapping[str, Any]) -> None:
        """With --json, the one object that is alone on stdout."""
        if self.arguments.json:
            try:
                print(json_text(content), file=self.output, flush=True)
            except BrokenPipeError:  # what was to be made is there all the same
                drop_output(self.output)
                tell_errors(UNREAD)
            except OSError as error:
                drop_output(self.output)
                what = f"The JSON object could not be written to stdout: {error.strerror or error}."
                raise SlerpMergeError(what, "Send it to a place with room.") from error

    def leave(self, note: str) -> None:
        """Something stands now; the note tells of it however the run ends."""
        self.closing_note, self.leaves_something = note, True

    def with_closing_note(self, error: SlerpMergeError) -> SlerpMergeError:
        """An error that also tells what stands now, where something does; what its hint says is not said again."""
        if not self.leaves_something:
            return error
        said = CARRIES_ON in error.hint.lower()
        note = self.closing_note.replace(f"; {CARRIES_ON}", "") if said else self.closing_note
        return SlerpMergeError(error.message, f"{error.hint} {note}")

    def observe(self, event: Event) -> None:
        """Takes an event: the view shows it, and the closing note follows what was written."""
        if isinstance(event, events.MergeStopped):
            are = "is" if event.kept == 1 else "are"
            files = f"{event.kept} of {event.total} weight files {are} finished and kept"
            self.leave(f"{files}; {CARRIES_ON}.")
        elif isinstance(event, events.ChildPublished):
            self.leave(f"The child stands in {event.child}.")
        self.view.observe(event)

    def raise_deferred_error(self) -> None:
        """Raises what went wrong beside a run that came to its end."""
        if self.deferred_error is not None:
            raise self.deferred_error
