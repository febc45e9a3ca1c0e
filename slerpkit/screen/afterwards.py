"""What is asked of a finished child, by flags or at the prompt: a full verification, tastes, perplexities, scores.

How a figure is found is evaluation's business, how it is drawn figures.py's. What is asked for is checked before the
merge begins, so that nobody waits for a child and then learns that its text was not there.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from slerpkit.child.report import amend_report
from slerpkit.child.upload import check_card, logged_in_user, parse_repository, repository_name, upload
from slerpkit.child.verify import Verification, nothing_further
from slerpkit.evaluation.harness import check_harness_loads, find_tasks, score
from slerpkit.evaluation.loading import find_architecture
from slerpkit.evaluation.models import ComparedModels, check_generates_text, generates_text, verify_with_transformers
from slerpkit.evaluation.perplexity import compare_perplexity, read_judged_text
from slerpkit.evaluation.taste import taste
from slerpkit.files import is_inside
from slerpkit.merge.difference_map import map_of_merge, save_map
from slerpkit.merge.events import Noted, WorkBegan
from slerpkit.merge.save_directory import interruptions_held
from slerpkit.messages import SlerpMergeError
from slerpkit.screen.blend_prompt import ask_text_file
from slerpkit.screen.console import displayable, mark_of, render_error
from slerpkit.screen.figures import render_finding
from slerpkit.screen.prompts import GoBack

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.child.report import MergeReport
    from slerpkit.evaluation.objectives import Objective
    from slerpkit.merge.difference_map import DifferenceMap
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.recipe import MergeRecipe
    from slerpkit.screen.session import Session


def models_to_compare(recipe: MergeRecipe, child: Path, device: str) -> ComparedModels:
    """A child and the parents that it was made of."""
    folders = ("primary", recipe.primary), ("secondary", recipe.secondary), ("child", child)
    return ComparedModels(folders, device, recipe.adapter_bases)


def check_evaluation(session: Session, parents: Sequence[Checkpoint], objective: Objective | None) -> None:
    """Raises SlerpMergeError, before anything is made, where what flags or a sweep ask for cannot be done."""
    arguments = session.arguments
    texts = [*arguments.texts, *(objective.texts if objective is not None else ())]
    for path in texts:
        read_judged_text(path)
    if texts or arguments.prompts or arguments.tasks:
        for parent in parents:
            check_generates_text(parent, reads_on=bool(texts))
        numbered = tuple((str(number), parent.folder) for number, parent in enumerate(parents))
        bases = {parent.folder: parent.base.folder for parent in parents if parent.base is not None}
        ComparedModels(numbered, adapter_bases=bases).tokenizer_folder("0")
    if arguments.tasks:
        for parent in parents:
            check_harness_loads(parent)
        find_tasks(arguments.tasks, arguments.include_path)


def check_maps(session: Session, recipe: MergeRecipe, save_directory: Path | None = None) -> None:
    """Raises SlerpMergeError where --map would write among a model's files."""
    models = (recipe.primary, recipe.secondary, recipe.base, save_directory, *recipe.adapter_bases.values())
    for path in session.arguments.maps:
        if any(is_inside(path.resolve(), folder.resolve()) for folder in models if folder is not None):
            raise SlerpMergeError(f"{path} lies in a model's folder.", "Save the map somewhere else.")


def save_maps(session: Session, differences: DifferenceMap) -> None:
    """Writes the map into each file of --map."""
    for path in session.arguments.maps:
        save_map(differences, path, "How the parents differ")
        session.leave(f"The map stands in {path}.")
        session.show(session.closing_note)


def save_maps_of_merge(session: Session, report: MergeReport) -> None:
    """Writes what a merge measured on its way into each file of --map."""
    if session.arguments.maps:
        save_maps(session, map_of_merge(report.merged, report.plan.recipe.compared_vectors))


def further_check(session: Session) -> Callable[[Path], Verification]:
    """What --verify has checked of a child before it is put in place."""
    if session.arguments.verify != "full":
        return nothing_further

    def load(folder: Path) -> Verification:
        session.observe(Noted("Loading the child with transformers ..."))
        return verify_with_transformers(folder, with_logits=True)

    return load


def evaluate_as_flags_ask(session: Session, models: ComparedModels, objective: Objective | None = None) -> None:
    """--taste, --perplexity and --score. What a sweep has just measured children by is not measured once more."""
    arguments = session.arguments
    if arguments.prompts:
        evaluate(session, models, functools.partial(taste, models, arguments.prompts))
    if arguments.texts and objective is None:
        measured = functools.partial(compare_perplexity, models, arguments.texts)
        evaluate(session, models, measured)
    if arguments.tasks and (objective is None or objective.texts):
        scored = functools.partial(score, models, arguments.tasks, arguments.include_path)
        evaluate(session, models, scored)


def ask_what_now(session: Session, plan: MergePlan, models: ComparedModels) -> None:
    """Does with a child what the person asks for, until that is enough. What goes wrong is told; the child stands."""
    deeds = {"verify": verify_as_asked, "upload": upload_as_asked}
    if may_generate_text(plan) and not plan.options.stream_parents:
        deeds = {"taste": taste_as_asked, "perplexity": measure_as_asked, **deeds}
    choices = {name: name for name in deeds}
    while (wanted := session.wizard.ask_next(choices)) != "leave":
        try:
            with contextlib.suppress(GoBack):
                deeds[wanted](session, models)
        except SlerpMergeError as error:
            session.show(render_error(session.console, error))


def taste_as_asked(session: Session, models: ComparedModels) -> None:
    """Lets parents and child answer prompts. Raises GoBack where there is none."""
    prompts = session.wizard.ask_prompts()
    evaluate(session, models, functools.partial(taste, models, prompts))


def measure_as_asked(session: Session, models: ComparedModels) -> None:
    """Compares how well parents and child predict a text. Raises GoBack where there is none."""
    path = ask_text_file(session.wizard.prompt, "Text file", "measured_text")
    evaluate(session, models, functools.partial(compare_perplexity, models, [path]))


def upload_as_asked(session: Session, models: ComparedModels) -> None:
    """Uploads a child to the Hub, under a name that the person agrees to. Raises GoBack where there is none."""
    child = dict(models.folders)["child"]
    user = logged_in_user()
    check_card(child)
    proposed = f"{user}/{repository_name(child.name)}"
    name, is_private = session.wizard.ask_upload(proposed, functools.partial(parse_repository, user=user))
    session.show(f"Uploading to {name}, {'private' if is_private else 'public'} ...")
    with session.stoppable():
        session.leave(f"The child stands in {child}; what is uploaded of it is not uploaded again.")
        session.show(f"It stands at {upload(child, name, is_private)}")
        session.leave(f"The child stands in {child}.")


def check_upload(name: str) -> None:
    """Raises SlerpMergeError, before anything is made, where a child could not be uploaded under a name."""
    parse_repository(name, logged_in_user())


def upload_as_flags_ask(session: Session, child: Path) -> None:
    """--upload: a child that stands. Raises SlerpMergeError as upload does."""
    arguments = session.arguments
    if arguments.upload is not None:
        name = parse_repository(arguments.upload, logged_in_user())
        check_card(child)
        session.show(f"Uploading to {name} ...")
        session.show(f"It stands at {upload(child, name, is_private=not arguments.public)}")


def load_libraries(session: Session, models: ComparedModels) -> None:
    """Loads what models are asked with, where Ctrl-C ends less than the run: what is loaded by half is no use any more.

    Raises SlerpMergeError where transformers does not know a model's class.
    """
    if session.asks:
        session.observe(WorkBegan("Loading transformers", 0))
        with interruptions_held():
            for checkpoint in models.checkpoints.values():
                with contextlib.suppress(SlerpMergeError):  # who asks a model that is not known here says so
                    find_architecture(checkpoint)
        session.view.stop()


def verify_as_asked(session: Session, models: ComparedModels) -> None:
    """Loads a child that stands, without memory for its weights.

    Raises SlerpMergeError where transformers does not load it as it should.
    """
    with session.stoppable():
        load_libraries(session, models)
        found = verify_with_transformers(dict(models.folders)["child"])
        for severity, lines in (("resolved", found.checks), ("notice", found.warnings)):
            for line in lines:
                session.show(Text.assemble(mark_of(session.console, severity), " ", displayable(session.console, line)))


def evaluate(session: Session, models: ComparedModels, work: Callable[[Observer], list[Finding]]) -> None:
    """One kind of evaluation: done, shown, and added to the child's report."""
    with session.stoppable():
        load_libraries(session, models)
        findings = work(session.observe)
        for finding in findings:
            session.show(render_finding(session.console, finding))
        add_to_report(session, dict(models.folders)["child"], findings)


def add_to_report(session: Session, child: Path, findings: Sequence[Finding]) -> None:
    """Adds what was found to a child's report and to what --json prints. What goes wrong there is told at the end."""
    session.findings += findings
    try:
        amend_report(child, findings)
    except SlerpMergeError as error:
        session.deferred_error = error


def may_generate_text(plan: MergePlan) -> bool:
    """Whether a taste is worth offering, by what the config calls itself; transformers need not load for it."""
    return plan.tokenizer_role is not None and generates_text(plan.parents.primary)
