"""Read this first: a merge is prepared, and executed.

Every step of a merge stands here, in order. `observe` is told of progress; nothing here knows who watches.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.child.companions import copy_companions
from slerpkit.child.report import MergeReport, write_report
from slerpkit.child.verify import nothing_further, verify_child, verify_values
from slerpkit.files import clean_path
from slerpkit.merge.events import Noted, ignore
from slerpkit.merge.plan import choose_threads, plan_merge
from slerpkit.merge.staging import StagedChild, check_parents_unchanged
from slerpkit.merge.stream import measure_differences, stream_merge
from slerpkit.merge.supply import StreamedSupply, awaited_models, fetch_parents
from slerpkit.merge.team import WorkerDied, team_for
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_parents
from slerpkit.parents.hub import locate, look_closer, must_be_looked_up
from slerpkit.parents.hub_cache import REMOTE_MODELS
from slerpkit.parents.resolver import find_model, short_name
from slerpkit.parity.check import check_parity, parity_of_headers
from slerpkit.parity.report import ParityReport
from slerpkit.recipe import MergeRecipe, check_options, check_recipe, recipe_and_options
from slerpkit.schedule import Schedule, parse_blend

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from slerpkit.child.verify import Verification
    from slerpkit.merge.difference_map import DifferenceMap
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.team import WorkerTeam
    from slerpkit.merge.tensor_plan import MergedTensor
    from slerpkit.recipe import RunOptions


def locate_parents(
    recipe: MergeRecipe,
    observe: Observer = ignore,
    refuse: Callable[[ParityReport], None] = ParityReport.raise_if_blocking,
) -> MergeRecipe:
    """The recipe with a folder for every model: those that are named and not here are looked up on the Hub.

    Configs and headers come first, so that a pair that cannot fit is refused before anything larger is fetched; then
    all but the weights. refuse: raises SlerpMergeError where a parity forbids the merge. Raises as look_up does, too.
    """
    found = {}
    for role in ("primary", "secondary", "base"):
        folder = getattr(recipe, role)
        if folder is not None:
            if must_be_looked_up(folder):
                observe(Noted(f"Looking at {short_name(folder)} on the Hub ..."))
            found[role] = locate(folder)
    recipe = dataclasses.replace(recipe, **found)
    remotes = [REMOTE_MODELS[folder] for folder in dict.fromkeys(found.values()) if folder in REMOTE_MODELS]
    if remotes and recipe.tokenizer == "auto" and not recipe.token_sources:
        refuse(parity_of_headers(open_parents(recipe), recipe))
    for remote in remotes:
        look_closer(remote)
    return recipe


def check_fit(primary_folder: Path, secondary_folder: Path) -> None:
    """Raises SlerpMergeError, short enough for a prompt, where a second parent cannot be merged with the first.

    What the person may accept is asked later.
    """

    def refuse(parity: ParityReport) -> None:
        blocking = parity.of_severity("blocking")
        if blocking and not parity.acceptable:
            worst = blocking[0]
            more = f" And {len(blocking) - 1} more." if len(blocking) > 1 else ""
            what = f"It does not fit the primary: {worst.subject} is {worst.secondary}, not {worst.primary}.{more}"
            raise SlerpMergeError(what, worst.consequence)

    recipe = locate_parents(MergeRecipe(primary_folder, secondary_folder), refuse=refuse)
    refuse(check_parity(open_parents(recipe), recipe))


def prepare_merge(recipe: MergeRecipe, options: RunOptions, observe: Observer = ignore) -> MergePlan:
    """Looks at the parents and decides everything. Reads headers and a few MB to time it; writes nothing.

    Raises SlerpMergeError where the recipe, a parent, their parity, the save directory or the disk forbids it.
    """
    check_recipe(recipe)
    check_options(options)
    recipe = locate_parents(recipe, observe)
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
    if not plan.options.stream_parents:
        fetch_parents(plan.parents, observe)
    with StagedChild(plan, observe) as child, own_team as team:
        supply = supply_for(plan, child, team, observe)
        merged = stream_merge(plan, child, team, observe, supply)
        copy_companions(plan, child)
        verified = verify_child(plan, child, merged, team, further, None if supply is None else supply.checked)
        report = write_report(plan, child, merged, verified)
        sync_seconds = child.sync()
        check_parents_unchanged(plan, child)
    if supply is not None:
        supply.drop()
    return MergeReport(child.target, plan, merged, verified, report, sync_seconds, time.perf_counter() - started)


def supply_for(plan: MergePlan, child: StagedChild, team: WorkerTeam, observe: Observer) -> StreamedSupply | None:
    """What brings the parents' files as the merge comes to them; None where all are here."""
    if not awaited_models(plan.parents):
        return None

    def check(tensors: Sequence[MergedTensor]) -> tuple[int, int]:
        try:
            return verify_values(plan, child.folder, tensors, team)
        except WorkerDied:  # that says nothing of the child
            raise
        except SlerpMergeError:
            child.distrust()
            raise

    return StreamedSupply(plan.parents, list(plan.tensors), check, team.release_files, observe)


def inspect_parents(
    recipe: MergeRecipe, options: RunOptions, observe: Observer = ignore, team: WorkerTeam | None = None
) -> DifferenceMap:
    """How the parents of a recipe differ. Reads each of them once and writes nothing.

    team: as in execute_merge. Raises SlerpMergeError where a parent, or their parity, forbids it.
    """
    recipe = locate_parents(recipe, observe)
    parents = open_parents(recipe)
    parity = check_parity(parents, recipe)
    parity.raise_if_blocking()
    fetch_parents(parents, observe)
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
