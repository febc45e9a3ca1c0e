"""A search for t, as the person sees it: what it would discard, what it found, and what is kept of it.

How it searches is evaluation/sweep.py's business.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from slerpkit import story
from slerpkit.evaluation import sweep
from slerpkit.schedule import Schedule
from slerpkit.screen import afterwards, figures

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.child.report import MergeReport
    from slerpkit.evaluation.objectives import Objective
    from slerpkit.merge.plan import MergePlan
    from slerpkit.screen.session import Session

SWEEP_KEPT = "The child was not made. What the sweep measured is kept; the same command carries on."
MAX_TRIALS = sweep.MAX_TRIALS


def what_would_go(plan: MergePlan, objective: Objective | None) -> list[str]:
    """What a start would discard of earlier runs into the same place."""
    files = "The finished files of the merge that stands there are of another; they would go."
    loss = sweep.lost_by(plan, objective) if objective is not None else None
    return [files] * (plan.leftover is not None and plan.leftover.reason != "") + [loss] * (loss is not None)


def find_good_t(session: Session, plan: MergePlan, objective: Objective) -> tuple[MergePlan, Finding]:
    """(the plan for the t that a sweep finds best, its curve). What was measured stays until the child stands."""
    try:
        with session.view:
            curve = sweep.find_t(plan, objective, session.observe, session.workers_for(plan))
    finally:
        if sweep.sweep_area(plan.options.save_directory).is_dir():
            session.leave(SWEEP_KEPT)
    session.show(figures.render_finding(session.console, curve))
    recipe = dataclasses.replace(plan.recipe, schedule=Schedule.constant(curve["figures"]["best_t"]))
    return story.prepare_merge(recipe, plan.options), curve


def keep_sweep(session: Session, report: MergeReport, curve: Finding) -> None:
    """A sweep's curve joins the report of the child that it found; its own notes are then of no more use."""
    afterwards.add_to_report(session, report.child, [curve])
    if session.deferred_error is None:
        sweep.forget_sweep(report.plan.options.save_directory)
