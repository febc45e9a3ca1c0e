"""What is asked and shown where parents are still on the Hub: whether to fetch them, and how on a small disk.

How a file comes here is merge/supply.py's business; whether two models fit is known before any of this.
"""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit import story
from slerpkit.files import existing_folder
from slerpkit.lazy import huggingface_hub, lazy_modules
from slerpkit.merge.save_directory import free_bytes
from slerpkit.merge.supply import DiskTooSmall, download_bytes, fetch_parents
from slerpkit.messages import SlerpMergeError, format_bytes
from slerpkit.screen.flags import wants_evaluation

if TYPE_CHECKING:
    from slerpkit.evaluation.objectives import Objective
    from slerpkit.merge.plan import MergePlan
    from slerpkit.parents.checkpoint import Parents
    from slerpkit.parity.report import ParityReport
    from slerpkit.recipe import MergeRecipe, RunOptions
    from slerpkit.screen import prompts
    from slerpkit.screen.session import Session
else:  # a run without questions loads no prompt
    (prompts,) = lazy_modules("slerpkit.screen", "prompts")

FETCHED_KEPT = "No child was made. What was fetched of the parents is kept; the same command carries on."


def plan_within_disk(
    session: Session,
    recipe: MergeRecipe,
    options: RunOptions,
    parents: Parents,
    parity: ParityReport,
    objective: Objective | None = None,
) -> MergePlan:
    """The plan. Where the parents' files do not fit on the disk, and would one by one, that is offered.

    Not where they are needed whole: by a search, objective, or for what flags ask of them afterwards.
    """
    try:
        return story.plan_merge(recipe, options, parents, parity)
    except DiskTooSmall as error:
        is_needed_whole = objective is not None or wants_evaluation(session.arguments)
        if is_needed_whole or not (error.can_stream and session.asks):
            raise
        question = f"{error.message} Fetch and drop them file by file?"
        if not session.wizard.prompt.confirm(question, "stream", default=True):
            raise
    return story.plan_merge(recipe, dataclasses.replace(options, stream_parents=True), parents, parity)


def may_fetch(session: Session, plan: MergePlan) -> bool:
    """Whether what a plan needs of the Hub may be fetched. Raises as consent does."""
    return plan.options.stream_parents or consent(session, plan.download_bytes)


def consent(session: Session, byte_count: int) -> bool:
    """Whether so many bytes may be fetched from the Hub: by --download, or by the person's word.

    Raises SlerpMergeError where neither can be had.
    """
    if not byte_count or session.arguments.download:
        return True
    cache = existing_folder(Path(huggingface_hub.constants.HF_HUB_CACHE))
    free = free_bytes(cache)
    size, known = format_bytes(byte_count), "" if free is None else f"{format_bytes(free)} are free"
    if not session.asks:
        what = f"{size} of the parents' weights are still on the Hub."
        raise SlerpMergeError(what, f"Add --download to fetch them{known and f'; {known} at {cache}'}.")
    with contextlib.suppress(prompts.GoBack):
        question = f"Fetch {size} from the Hub?{known and f' {known}.'}"
        return session.wizard.prompt.confirm(question, "fetch", default=True)
    return False


def with_weights(session: Session, plan: MergePlan) -> MergePlan:
    """The plan once the parents' weights are here, which knows more of them then; it is as it was where they are."""
    if not plan.download_bytes or plan.options.stream_parents:
        return plan
    session.leave(FETCHED_KEPT)
    with session.view:
        fetch_parents(plan.parents, session.observe)
    plan = story.prepare_merge(plan.recipe, plan.options)
    session.show(f"kinship: {plan.kinship.describe()}", style="dim", markup=False)
    return plan


def with_parents_here(session: Session, recipe: MergeRecipe) -> MergeRecipe:
    """The recipe once its models are on this machine. Raises SlerpMergeError where they may not be fetched."""
    recipe = story.locate_parents(recipe, session.observe)
    parents = story.open_parents(recipe)
    if not consent(session, download_bytes(parents.by_role.values())):
        raise SlerpMergeError("That needs the parents' weights.", "Fetch them, or give folders that hold them.")
    with session.view:
        fetch_parents(parents, session.observe)
    return recipe
