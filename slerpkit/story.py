"""Read this first: a merge is prepared, and executed.

Every step of a merge stands here, in order. `observe` is told of progress; nothing here knows who watches.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.child.companions import copy_companions
from slerpkit.child.report import MergeReport, write_report
from slerpkit.child.verify import nothing_further, verify_child
from slerpkit.files import clean_path
from slerpkit.merge.events import ignore
from slerpkit.merge.plan import choose_threads, plan_merge
from slerpkit.merge.staging import StagedChild, check_parents_unchanged
from slerpkit.merge.stream import measure_differences, stream_merge
from slerpkit.merge.team import team_for
from slerpkit.parents.checkpoint import open_parents
from slerpkit.parents.resolver import find_model
from slerpkit.parity.check import check_parity
from slerpkit.recipe import check_options, check_recipe, recipe_and_options
from slerpkit.schedule import Schedule, parse_blend

if TYPE_CHECKING:
    from collections.abc import Callable

    from slerpkit.child.verify import Verification
    from slerpkit.merge.difference_map import DifferenceMap
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.team import WorkerTeam
    from slerpkit.recipe import MergeRecipe, RunOptions


def prepare_merge(recipe: MergeRecipe, options: RunOptions) -> MergePlan:
    """Looks at the parents and decides everything. Reads headers and a few MB to time it; writes nothing.

    Raises SlerpMergeError where the recipe, a parent, their parity, the save directory or the disk forbids it.
    """
    check_recipe(recipe)
    check_options(options)
    parents = open_parents(recipe)
    parity = check_parity(parents, recipe)  # every mismatch, with the rule that resolves it or why it cannot be
    parity.raise_if_blocking()
    return plan_merge(recipe, options, parents, parity)


def execute_merge(
    plan: MergePlan,
    observe: Observer = ignore,
    team: WorkerTeam | None = None,
    further: Callable[[Path], Verification] = nothing_further,
) -> MergeReport:
    """Makes the planned child. It appears under its name whole and checked, or not at all.

    team: workers that were started before; without it the merge has its own. further: a check of the whole child, in
    its folder, before it is put in place. Raises SlerpMergeError where the world, or a check, does not let it; parents
    and save directory are then as before.
    """
    started = time.perf_counter()
    own_team = team_for(plan.threads, plan.device, plan.source_bytes, plan.dtypes, team)
    with StagedChild(plan, observe) as child, own_team as team:
        merged = stream_merge(plan, child, team, observe)
        copy_companions(plan, child)
        verified = verify_child(plan, child, merged, team, further)
        report = write_report(plan, child, merged, verified)
        sync_seconds = child.sync()
        check_parents_unchanged(plan, child)
    return MergeReport(child.target, plan, merged, verified, report, sync_seconds, time.perf_counter() - started)


def inspect_parents(
    recipe: MergeRecipe, options: RunOptions, observe: Observer = ignore, team: WorkerTeam | None = None
) -> DifferenceMap:
    """How the parents of a recipe differ. Reads each of them once and writes nothing.

    team: as in execute_merge. Raises SlerpMergeError where a parent, or their parity, forbids it.
    """
    parents = open_parents(recipe)
    parity = check_parity(parents, recipe)
    parity.raise_if_blocking()
    device = "cpu" if options.device == "auto" else options.device
    models = parents.by_role.values()
    byte_count = sum(model.byte_count for model in models)
    dtypes = {dtype for model in models for dtype in model.dtypes} | {recipe.cast_dtype or "float32"}
    with team_for(choose_threads(options.threads), device, byte_count, dtypes, team) as team:
        return measure_differences(parity.pairs, recipe, team, observe)


def merge_models(
    primary: str | Path,
    secondary: str | Path,
    save_directory: str | Path,
    t: float | str | Schedule = 0.5,
    observe: Observer = ignore,
    **settings: Any,
) -> MergeReport:
    """Makes a child of two models in one call, with every check that the script makes.

    primary (t = 0), secondary (t = 1): folders, or the org/name of a model in the Hugging Face cache. t: a number, or
    what the prompt `Blend` takes, such as "ramp" or "self_attn=0,1 0.5". settings: any other field of MergeRecipe or
    RunOptions, such as method="slerp-norm", dtype="float16" or overwrite=True.

    Returns what was made and found; `report.child` is the child's folder. Raises SlerpMergeError, with a message and a
    hint, where the child cannot be right; nothing is then put in place. Raises TypeError for a setting that is none.
    """
    if not isinstance(t, Schedule):
        t = parse_blend(t) if isinstance(t, str) else Schedule.constant(float(t))
    if settings.get("base") is not None:
        settings["base"] = find_model(str(settings["base"]))
    recipe, options = recipe_and_options(
        {
            "primary": find_model(str(primary)),
            "secondary": find_model(str(secondary)),
            "save_directory": clean_path(str(save_directory)),
            "schedule": t,
            **settings,
        }
    )
    return execute_merge(prepare_merge(recipe, options), observe)
