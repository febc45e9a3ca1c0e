#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "rich>=13.8",
#   "questionary>=2.0.1",
#   "prompt_toolkit>=3.0.36",
#   "colorama>=0.4.6",
#   "torch>=2.4",
#   "transformers>=4.45",
#   "tokenizers>=0.20",
#   "huggingface-hub>=0.23.2",
#   "filelock>=3.29.7",
#   "safetensors>=0.4.5",
#   "numpy>=1.24",
#   "pyyaml>=6.0",
#   "pytest>=8.0",
# ]
# ///
"""slerpmerge: two language models of one architecture become one, by spherical linear interpolation (SLERP).

    python slerpmerge.py            asks for two models, a folder and a blend, and makes the child
    python slerpmerge.py --demo     makes two tiny models, merges them and lets all three speak
    python slerpmerge.py --help     every question as a flag, for scripts

This file is the wizard's story: what is asked, shown, decided and done, in order. What a merge is stands in
slerpkit/story.py; read that next. slerpkit/__init__.py draws the house.
"""

from __future__ import annotations  # is this a SyntaxError? Then this Python is older than 3.10, which is needed.

import os
import signal
import sys

NOTHING_WRITTEN = "Nothing was written."
EXIT_DONE, EXIT_REFUSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130


def stop_at_once(number: int, frame: object) -> None:
    """Ctrl-C while the program loads: there is nothing to tidy, and an import that is torn could say anything."""
    try:
        os.write(2, f"\nStopped. {NOTHING_WRITTEN}\n".encode())
    finally:
        os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop_at_once)

import contextlib
import dataclasses
import gc
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if sys.version_info < (3, 10):  # noqa: UP036  before modules are loaded that it cannot read
    sys.exit(f"slerpmerge needs Python 3.10 or newer; this is {sys.version.split()[0]}.")

from slerpkit.lazy import lazy_modules
from slerpkit.messages import SlerpMergeError, explain_import_error, explain_refusal, format_names
from slerpkit.recipe import check_options, check_recipe
from slerpkit.screen import flags
from slerpkit.screen.answers import Answers, Blend, words_of_blend

if TYPE_CHECKING:
    from slerpkit import demo, recipe_file, recipe_writer, story
    from slerpkit.child.report import MergeReport
    from slerpkit.merge import save_directory
    from slerpkit.merge.plan import MergePlan
    from slerpkit.screen import afterwards, console, errands, fetching, figures, panels, prompts, searching, terminal
    from slerpkit.screen import session as sessions
    from slerpkit.screen.session import Session
else:  # each is loaded when the story comes to it: --help needs none, the first prompt next to none
    demo, recipe_file, recipe_writer, story = lazy_modules("slerpkit", "demo", "recipe_file", "recipe_writer", "story")
    (save_directory,) = lazy_modules("slerpkit.merge", "save_directory")
    afterwards, console, fetching = lazy_modules("slerpkit.screen", "afterwards", "console", "fetching")
    errands, figures, panels = lazy_modules("slerpkit.screen", "errands", "figures", "panels")
    prompts, searching = lazy_modules("slerpkit.screen", "prompts", "searching")
    sessions, terminal = lazy_modules("slerpkit.screen", "session", "terminal")

CLEANED_UP = "The unfinished child was removed; both parents are as they were."
PATIENCE_SECONDS = 0.5  # that a plan waits for a look at the primary to end


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool and returns its exit status. All that goes wrong ends here, in one message."""
    session: Session | None = None
    try:
        arguments = flags.parse_arguments(argv)
        terminal.prepare_terminal()
        with terminal.signals_end_it(), sessions.Session(arguments, NOTHING_WRITTEN) as session:
            if signal.getsignal(signal.SIGINT) is stop_at_once:  # from here on there may be something to tidy
                signal.signal(signal.SIGINT, signal.default_int_handler)
            run(session)
            session.raise_deferred_error()
            if session.console.is_unread:
                console.tell_errors(session.closing_note)
        return EXIT_DONE
    except ImportError as error:
        fault = explain_import_error(error)
    except SlerpMergeError as error:
        fault = error
    except (KeyboardInterrupt, EOFError) as error:
        number = getattr(error, "number", None)  # of a signal that is not Ctrl-C
        by = f" by {signal.Signals(number).name}" if number is not None else ""
        with contextlib.suppress(OSError):  # the terminal may be what was lost
            print(f"\nStopped{by}. {session.closing_note if session else NOTHING_WRITTEN}", file=sys.stderr)
        return EXIT_INTERRUPTED if number is None else 128 + number
    except (OSError, MemoryError) as error:
        fault = explain_refusal(error)
    status = EXIT_USAGE if isinstance(fault, flags.WrongUsage) else EXIT_REFUSED
    fault = session.with_closing_note(fault) if session is not None else fault
    try:
        terminal.open_closed_streams()  # perhaps the flags already were wrong
        console.show_error(fault)
    except ImportError:  # of what messages are drawn with
        with contextlib.suppress(OSError):  # nobody may be there to read it
            print(f"{fault.message} {fault.hint}", file=sys.stderr)
    return status


def run(session: Session) -> None:
    """The story that the flags ask for."""
    arguments = session.arguments
    if arguments.forget:
        session.show("Forgotten." if session.history.forget() else "There was nothing to forget.")
    elif arguments.inspect:
        errands.inspect_parents(session)
    elif arguments.child is not None:
        errands.evaluate_standing_child(session)
    elif arguments.demo:
        merge(session, make_demo_parents(session))
    else:
        merge(session, flags.settle(arguments, session.interactive))


def merge(session: Session, given: Answers) -> None:
    """Three questions, one plan, one yes, one child; then what it knows."""
    answers, plan, decision = agree_on_plan(session, given)
    if decision == "print":
        session.print_json(plan.as_dict())
    elif decision == "leave":
        session.show(NOTHING_WRITTEN)
    if decision != "start":
        return
    objective = answers.blend.objective
    if session.asks:
        session.show_command(plan, objective, answers.blend.recipe_file)
    if session.interactive and not session.arguments.demo:
        session.history.remember(plan.recipe, plan.options, answers.blend.text)
    if objective is not None:
        plan, curve = searching.find_good_t(session, plan, objective)
    report = make_child(session, plan)
    if objective is not None:
        searching.keep_sweep(session, report, curve)
    afterwards.save_maps_of_merge(session, report)
    compared = afterwards.models_to_compare(plan.recipe, report.child, plan.options.device)
    afterwards.evaluate_as_flags_ask(session, compared, objective)
    afterwards.upload_as_flags_ask(session, report.child)
    if session.asks:
        afterwards.ask_what_now(session, plan, compared)
    session.print_json({**report.as_dict(), "findings": session.findings})
    session.show("Try it, convert it, share it:", style="bold")
    for command in panels.next_commands(report):
        session.show(command, soft_wrap=True)


def agree_on_plan(session: Session, given: Answers) -> tuple[Answers, MergePlan, str]:
    """(answers, the plan that they make, what to do with it), once the person has no second thoughts."""
    questions = questions_to_ask(session, given)
    answers, plan = complete(session, given, questions), None
    while True:
        decision = "change"
        try:
            if plan is None:
                plan = prepare_plan(session, answers)
            decision, plan = decide(session, plan, answers)
        except SlerpMergeError as error:
            if not questions or session.arguments.dry_run:
                raise
            session.show(console.render_error(session.console, error))
            plan = None
        except prompts.GoBack:  # from a question about the parents
            pass
        if decision != "change":
            return answers, plan, decision
        changed = session.wizard.change(answers, is_planned=plan is not None)
        if changed is not None:
            answers, plan = changed, None


def questions_to_ask(session: Session, given: Answers) -> list[str]:
    """What the person is asked: not where the child goes, if nobody wants to be asked that."""
    proposes = flags.proposes_save_directory(session.arguments)
    return [question for question in given.unanswered() if not (proposes and question == "save_directory")]


def complete(session: Session, given: Answers, questions: Sequence[str]) -> Answers:
    """The person's answers to these questions; and the proposed save directory, where that is still open."""
    answers = session.ask(given, tuple(questions))
    if answers.save_directory is not None:
        return answers
    blend = words_of_blend(answers)
    proposed = save_directory.proposed_save_directory(answers.primary, answers.secondary, blend)
    session.show(f"The child goes to {proposed}.")
    return dataclasses.replace(answers, save_directory=proposed)


def prepare_plan(session: Session, answers: Answers) -> MergePlan:
    """Parents, parity, plan: each is shown once it is known, before the next is begun. Writes nothing.

    Raises SlerpMergeError where the merge, or what was asked for after it, cannot be.
    """
    recipe, options, arguments = answers.recipe, answers.options, session.arguments
    check_recipe(recipe)
    check_options(options)
    recipe = story.locate_parents(recipe, session.observe)
    parents = story.open_parents(recipe)
    if not arguments.dry_run:
        session.prepare_for(parents.primary, options)  # it loads what it needs meanwhile
    parity = story.check_parity(parents, recipe)
    if parity.acceptable and session.accepts(parity, recipe):
        recipe = dataclasses.replace(recipe, accept=(*recipe.accept, *parity.acceptable))
        parity = story.check_parity(parents, recipe)
    parity.raise_if_blocking()
    session.show(panels.render_parity(session.console, parity))
    role = None if arguments.dry_run else parity.template.offered
    if role is not None and session.offers_template(role, recipe):
        recipe = dataclasses.replace(recipe, chat_template=role)
        parity = story.check_parity(parents, recipe)
    plan = fetching.plan_within_disk(session, recipe, options, parents, parity, answers.blend.objective)
    objective, lacks = answers.blend.objective, session.what_primary_lacks(PATIENCE_SECONDS)
    session.show(panels.render_plan(session.console, plan, objective is not None, lacks))
    if objective is None and (arguments.dry_run or len({tensor.t for tensor in plan.tensors}) > 1):
        session.show(panels.render_curves(session.console, plan))
    if arguments.upload is not None:
        afterwards.check_upload(arguments.upload)
    if flags.wants_evaluation(arguments) or objective is not None:
        afterwards.check_maps(session, recipe, options.save_directory)
        afterwards.check_evaluation(session, (parents.primary, parents.secondary), objective)
    return plan


def decide(session: Session, plan: MergePlan, answers: Answers) -> tuple[str, MergePlan]:
    """What to do with a plan: "start", "leave", "change" an answer, "saved" as a recipe, or "print" it (dry run).

    The plan comes back with it: once the parents' weights are fetched, it is another.
    """
    objective = answers.blend.objective
    if session.arguments.dry_run:
        return "print", plan
    if objective is not None:
        names = [path.name for path in objective.texts] or list(objective.tasks)
        made = f"up to {searching.MAX_TRIALS - 2} children are made one after the other, and the best again"
        session.show(f"t will be found on {format_names(names)}: {made}.")
    if plan.kinship.warning:
        session.show(plan.kinship.warning, style="yellow")
    if session.arguments.yes:
        fetching.may_fetch(session, plan)
        return "start", fetching.with_weights(session, plan)
    lost = searching.what_would_go(plan, objective)
    for loss in lost:
        session.show(loss, style="yellow")
    lacks = session.what_primary_lacks()
    while True:
        decision = session.wizard.decide(plan.kinship.warning is None and not lost and lacks is None)
        if decision == "inspect" and plan.options.stream_parents and plan.download_bytes:
            session.show("Parents that are fetched file by file are never here whole, so they cannot be inspected.")
            continue
        if decision in ("start", "inspect"):
            if not fetching.may_fetch(session, plan):
                continue
            plan, was_strange = fetching.with_weights(session, plan), plan.kinship.warning
            if plan.kinship.warning != was_strange:
                session.show(plan.kinship.warning, style="yellow")
                continue
        if decision == "inspect":
            with session.stoppable():
                team = session.workers_for(plan)
                found = story.measure_differences(plan.parity.pairs, plan.recipe, team, session.observe)
                session.view.stop()
                session.show(figures.render_map(session.console, found))
        elif decision == "save":
            with contextlib.suppress(prompts.GoBack):
                save_recipe(session, plan, answers)
                return "saved", plan
        elif decision == "start" and session.what_primary_lacks() != lacks:  # known since the plan was drawn
            lacks = session.what_primary_lacks()
            session.show(lacks, style="yellow")
        else:
            return decision, plan


def save_recipe(session: Session, plan: MergePlan, answers: Answers) -> None:
    """The merge as a recipe instead, and the commands that follow it. Raises GoBack where the person wants none."""
    settled, roles = dataclasses.replace(plan, recipe=plan.settled_recipe), plan.parents.by_role
    path = session.wizard.save_recipe(lambda folder: recipe_writer.recipe_text(settled.recipe, roles, folder))
    session.leave(f"The recipe stands in {path}.")
    session.show(session.closing_note)
    session.show_command(settled, None, path)
    if answers.blend.objective is not None:
        session.show("It has t = 0.5, where a search begins. The command that searches:")
        session.show_command(plan, answers.blend.objective)


def make_child(session: Session, plan: MergePlan) -> MergeReport:
    """The merge itself, timed with all that the person waits for, and its report shown."""
    session.closing_note, session.leaves_something = CLEANED_UP, False
    session.end_lookahead()
    started = time.perf_counter()
    terminal.collect_garbage_again()
    with session.view:
        further = afterwards.further_check(session)
        report = story.execute_merge(plan, session.observe, session.workers_for(plan), further)
    report = dataclasses.replace(report, total_seconds=time.perf_counter() - started)
    session.show(panels.render_report(session.console, report))
    return report


def make_demo_parents(session: Session) -> Answers:
    """--demo: two tiny models, trained on the spot, answer for the person."""
    session.show("Teaching two tiny models, one to sail and one to garden (some seconds) ...")
    primary, secondary = demo.make_demo_parents(session.arguments.save_directory)
    session.leave(f"The two parents stand in {primary.parent}.")
    return Answers(primary, secondary, primary.with_name(demo.DEMO_CHILD), Blend(), overwrite=True)


if __name__ == "__main__":
    gc.disable()  # loading makes a million objects that stay; to look for garbage among them took 0.5 s
    terminal.leave(main())
