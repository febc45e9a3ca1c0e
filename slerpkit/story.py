"""Read this first: a merge is prepared, and executed."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from slerpkit.child.companions import copy_companions
from slerpkit.child.report import amend_report
from slerpkit.child.verify import verify_child
from slerpkit.merge.events import MergeReport, ParentOpened, ParityChecked, PlanReady
from slerpkit.merge.journal import leftover_remarks
from slerpkit.merge.plan import plan_merge
from slerpkit.merge.staging import StagedChild, check_parents_unchanged
from slerpkit.merge.stream import measure_differences, stream_merge
from slerpkit.parents.checkpoint import open_checkpoint
from slerpkit.parity.check import check_parity
from slerpkit.recipe import check_recipe

if TYPE_CHECKING:
    from slerpkit.merge.difference_map import DifferenceMap
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity.report import ParityReport
    from slerpkit.recipe import MergeRecipe


def open_parents(
    recipe: MergeRecipe, observe: Observer
) -> tuple[Checkpoint, Checkpoint, Checkpoint | None, ParityReport]:
    """(primary, secondary, base, parity). Raises SlerpMergeError where they cannot make a right child."""
    primary = open_checkpoint(recipe.primary)
    observe(ParentOpened("primary", primary))
    secondary = open_checkpoint(recipe.secondary)
    observe(ParentOpened("secondary", secondary))
    base = None if recipe.base is None else open_checkpoint(recipe.base)
    if base is not None:
        observe(ParentOpened("base", base))
    parity = check_parity(primary, secondary, recipe.dtype, recipe.slices, base, recipe.tokenizer, recipe.chat_template)
    observe(ParityChecked(parity))
    parity.raise_if_blocking()
    return primary, secondary, base, parity


def inspect_parents(recipe: MergeRecipe, observe: Observer) -> DifferenceMap:
    """How the parents of a recipe differ. Reads each of them once and writes nothing.

    Raises SlerpMergeError where a parent, or their parity, forbids it.
    """
    *_, parity = open_parents(recipe, observe)
    return measure_differences(parity.pairs, recipe, observe)


def prepare_merge(recipe: MergeRecipe, observe: Observer) -> MergePlan:
    """Looks at both parents and decides everything. Reads headers and a few MB to time it; writes nothing.

    Raises SlerpMergeError where the recipe, a parent, their parity, the save directory or the disk forbids it.
    """
    check_recipe(recipe)
    primary, secondary, base, parity = open_parents(recipe, observe)
    plan = plan_merge(recipe, primary, secondary, parity, base)
    plan = dataclasses.replace(plan, remarks=(*plan.remarks, *leftover_remarks(plan)))
    observe(PlanReady(plan))
    return plan


def execute_merge(plan: MergePlan, observe: Observer) -> MergeReport:
    """Makes the planned child. It appears under its name whole and checked, or not at all.

    Raises SlerpMergeError where the world does not let it; parents and save directory are then as before.
    """
    started = time.perf_counter()
    with StagedChild(plan, observe) as child:
        result = stream_merge(plan, child, observe)
        copy_companions(plan, child, result, observe)
        verified = verify_child(plan, child, result, observe)
        warnings = (plan.kinship.warning,) if plan.kinship.warning else ()
        warnings += verified.warnings
        amend_report(child.folder, {"checks": list(verified.checks), "warnings": list(warnings)})
        sync_seconds = child.sync()
        check_parents_unchanged(plan, child)
    total_seconds = time.perf_counter() - started
    return MergeReport(child.target, plan, result, verified.checks, warnings, sync_seconds, total_seconds)
