"""What is asked of a finished child, by flags or at the prompt: a full verification, tastes, perplexities, scores.

How a figure is found is evaluation's business, how it is drawn figures.py's. What is asked for is checked before the
merge begins, so that nobody waits for a child and then learns that its text was not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from slerpkit.child.report import amend_report
from slerpkit.child.verify import Verification, nothing_further
from slerpkit.evaluation.harness import check_harness_loads, find_tasks, score
from slerpkit.evaluation.models import ComparedModels, check_generates_text, generates_text, verify_with_transformers
from slerpkit.evaluation.perplexity import compare_perplexity, read_judged_text
from slerpkit.evaluation.taste import taste
from slerpkit.files import is_inside
from slerpkit.merge.difference_map import map_of_merge, save_map
from slerpkit.merge.events import Noted
from slerpkit.messages import SlerpMergeError
from slerpkit.screen.console import displayable, mark_of, render_error
from slerpkit.screen.figures import render_finding

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


def verify_as_asked(session: Session, report: MergeReport) -> None:
    """Loads a child that stands, without memory for its weights, where the person takes the offer of it.

    Raises SlerpMergeError where transformers does not load it as it should.
    """
    if session.arguments.verify is not None or not session.offers("Load the child with transformers, to be sure?"):
        return
    found = verify_with_transformers(report.child)
    for severity, lines in (("resolved", found.checks), ("notice", found.warnings)):
        for line in lines:
            session.show(Text.assemble(mark_of(session.console, severity), " ", displayable(session.console, line)))


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


def evaluate_as_asked(session: Session, models: ComparedModels) -> None:
    """Tastes and perplexities until the person has had enough. What goes wrong is told, and the child stands."""
    while (wanted := session.wizard.ask_next()) != "leave":
        try:
            if wanted == "perplexity":
                path = session.wizard.ask_text_file("Text file")
                evaluate(session, models, functools.partial(compare_perplexity, models, [path]))
            elif prompts := session.wizard.ask_prompts():
                evaluate(session, models, functools.partial(taste, models, prompts))
        except SlerpMergeError as error:
            session.show(render_error(session.console, error))


def evaluate(session: Session, models: ComparedModels, work: Callable[[Observer], list[Finding]]) -> None:
    """One kind of evaluation: done, shown, and added to the child's report."""
    with session.view:
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
