"""A good t, found over trial children.

A grid first, then both sides of the best at half the distance, and again. Every trial child is made by the same
two functions as any other, measured, and removed; what was measured is in a journal, so that a stopped sweep goes on.
By what children are measured is not known here. Read story.py and objectives.py before this.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.child.findings import make_finding, with_stderr
from slerpkit.devices import free_memory
from slerpkit.evaluation.models import WORKING_BYTES, ComparedModels, with_fallback_to_cpu
from slerpkit.evaluation.perplexity import error_of_difference, ratio_of
from slerpkit.files import is_plain_file, is_plain_folder, read_json, replace_files
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.journal import JOURNAL_NAME, fingerprint_difference
from slerpkit.merge.save_directory import WorkFolder, interruptions_held
from slerpkit.messages import SlerpMergeError, explain_os_error
from slerpkit.schedule import Schedule
from slerpkit.story import execute_merge, prepare_merge

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.evaluation.objectives import Objective, TaskScores, TextLosses
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.team import WorkerTeam

SWEEP_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)
SWEEP_STEPS = (0.1, 0.05, 0.025)  # around the best so far
MAX_TRIALS = 2 + len(SWEEP_GRID) + 2 * len(SWEEP_STEPS)  # both parents among them
MEMORY_FOLDER = Path("/dev/shm")  # files in memory, where the system has it
TRIAL_PREFIX = "slerpmerge-trial-"


@dataclass(frozen=True)
class Trial:
    """What the objective says of one model."""

    role: str  # "primary", "secondary" or "child"
    t: float
    values: tuple[float, ...]  # as they are shown, one for each text or task
    items: tuple[tuple[tuple[float, float], ...], ...]  # of each (loss, weight), whose ratio counts; less is better

    @property
    def loss(self) -> float:
        """The mean over texts or tasks, each counting the same."""
        return math.fsum(map(ratio_of, self.items)) / len(self.items)

    def stderr_against(self, other: Trial) -> float | None:
        """Standard error of the difference of two losses; None where there are too few items to tell."""
        errors = [error_of_difference(a, b) for a, b in zip(self.items, other.items)]
        return None if None in errors else math.hypot(*errors) / len(errors)

    def as_dict(self, best: Trial) -> dict[str, Any]:
        """What a finding holds of it."""
        return {
            "role": self.role,
            "t": self.t,
            "values": list(self.values),
            "loss": self.loss,
            "loss_above_best": self.loss - best.loss,
            "stderr": None if self is best else self.stderr_against(best),
        }


def sweep_area(save_directory: Path) -> Path:
    """The hidden folder beside the save directory that a sweep keeps its journal in."""
    target = save_directory.resolve()
    return target.with_name(f".{target.name}.slerpmerge-sweep")


def sweep_fingerprint(plan: MergePlan, objective: Objective | TextLosses | TaskScores) -> dict[str, Any]:
    """What the figures of a sweep depend on, as far as the objective knows it yet, as JSON can hold it."""
    fingerprint = plan.fingerprint
    del fingerprint["recipe"]["schedule"]
    return json.loads(json.dumps({**fingerprint, "objective": objective.fingerprint()}))


def read_sweep(area: Path) -> dict[str, Any]:
    """What the journal of a sweep holds; nothing where there is none, or a torn one."""
    if is_plain_file(area / JOURNAL_NAME):
        with contextlib.suppress(SlerpMergeError):
            return read_json(area / JOURNAL_NAME)
    return {}


def describe_loss(content: Mapping[str, Any], fingerprint: Mapping[str, Any], restart: bool) -> str | None:
    """What goes of a journal's content, and why, where a sweep of this fingerprint begins; None where nothing does."""
    trials = content.get("trials")
    if not isinstance(trials, list) or not trials:
        return None
    reason = "as asked" if restart else None
    try:
        reason = reason or fingerprint_difference(content["fingerprint"], fingerprint)
        before = content["fingerprint"]["objective"]
        for name, value in fingerprint["objective"].items() if reason is None else ():
            if before[name] != value:
                reason = "the texts were different" if name == "texts" else "they were measured in another way"
                break
    except (TypeError, KeyError, AttributeError, ValueError):  # a journal of another making
        reason = "its journal cannot be read"
    models = f"{len(trials)} model{'s' * (len(trials) > 1)}"
    return reason and f"What an earlier search measured there, {models}, will be discarded: {reason}."


def lost_by(plan: MergePlan, objective: Objective) -> str | None:
    """What a sweep that was stopped has kept and this one would discard, and why; None for nothing.

    Told before any model is loaded, so that what only a device or the harness decides is not known yet.
    """
    content = read_sweep(sweep_area(plan.options.save_directory))
    return describe_loss(content, sweep_fingerprint(plan, objective), plan.options.restart)


class SweepJournal:
    """What a sweep has measured so far, and the one trial child that is there at a time.

    plan: of the merge whose t is looked for. What was measured for another objective or merge is discarded, and
    `observe` is told before. Leaving the `with` block removes the trial child; what was measured stays until
    forget_sweep.
    """

    def __init__(self, plan: MergePlan, objective: TextLosses | TaskScores, observe: Observer) -> None:
        self.plan = plan
        self.columns = list(objective.columns)
        self.observe = observe
        self.fingerprint = sweep_fingerprint(plan, objective)
        self.area = WorkFolder(sweep_area(plan.options.save_directory))
        self.path = self.area.path / JOURNAL_NAME
        self.trials: list[Trial] = []
        self.names: list[str] = []  # of the figures
        self.storage: Path | None = None

    def __enter__(self) -> SweepJournal:
        self.area.enter()
        content = read_sweep(self.area.path)
        remove_trial(content.get("storage"))
        loss = describe_loss(content, self.fingerprint, self.plan.options.restart)
        if loss is None and content.get("trials"):
            try:
                self._take_over(content)
            except (ValueError, TypeError, KeyError, IndexError, AttributeError):  # a journal of another making
                self.trials, loss = [], "What an earlier search measured there cannot be read, and is discarded."
        if loss is not None:
            self.observe(Noted(loss))
        try:
            self.storage = trial_storage(self.plan, self.area.path)
            self._write()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise explain_os_error(error, self.area.path, "write in") from error
            raise
        return self

    def _take_over(self, content: Mapping[str, Any]) -> None:
        """Takes what was measured, its figures in this sweep's order: texts may have been given in another."""
        places = [content["columns"].index(column) for column in self.columns] or range(len(content["names"]))
        self.names = [str(content["names"][place]) for place in places]
        self.trials = [
            Trial(
                entry["role"],
                entry["t"],
                tuple(entry["values"][place] for place in places),
                tuple(entry["items"][place] for place in places),
            )
            for entry in content["trials"]
        ]

    def _write(self) -> None:
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        content = {
            "fingerprint": self.fingerprint,
            "storage": str(self.storage),
            "columns": self.columns,
            "names": self.names,
            "trials": trials,
        }
        replace_files({self.path: json.dumps(content).encode()})

    def add(self, trial: Trial, names: Sequence[str]) -> None:
        """Keeps a trial. names: of its values, the same for every trial."""
        self.trials.append(trial)
        self.names = list(names)
        self._write()

    def __exit__(self, *_: object) -> None:
        with interruptions_held():
            remove_trial(str(self.storage))
            if not self.trials:
                with contextlib.suppress(OSError):  # what cannot be removed now, the next sweep removes
                    self.path.unlink(missing_ok=True)
            self.area.leave()


def forget_sweep(save_directory: Path) -> None:
    """Removes a sweep's journal, once its child stands."""
    area = sweep_area(save_directory)
    if is_plain_folder(area):
        shutil.rmtree(area, ignore_errors=True)


def trial_storage(plan: MergePlan, area: Path) -> Path:
    """A new folder for trial children: in memory where one fits there beside itself once more, loaded; else on disk."""
    needed = 1.05 * (plan.disk_needed_bytes + plan.kept_bytes)
    loaded = 2 * plan.child_bytes + WORKING_BYTES
    try:
        fits = shutil.disk_usage(MEMORY_FOLDER).free > needed and free_memory() > needed + loaded
        if fits and os.access(MEMORY_FOLDER, os.W_OK):
            return Path(tempfile.mkdtemp(prefix=TRIAL_PREFIX, dir=MEMORY_FOLDER))
    except OSError:  # no such folder here, or none to write to: the disk then
        fits = False
    return Path(tempfile.mkdtemp(prefix=TRIAL_PREFIX, dir=area))


def remove_trial(storage: Any) -> None:
    """Removes a folder of trial children, if it is one."""
    path = Path(storage) if isinstance(storage, str) else Path()
    if path.name.startswith(TRIAL_PREFIX) and is_plain_folder(path):
        shutil.rmtree(path, ignore_errors=True)


class Sweep:
    """One search for t by an objective that knows how to measure. `run` returns the curve."""

    def __init__(
        self, plan: MergePlan, objective: TextLosses | TaskScores, observe: Observer, team: WorkerTeam | None
    ) -> None:
        self.plan = plan
        self.team = team
        self.objective = objective
        self.observe = observe
        self.journal = SweepJournal(plan, objective, observe)
        self.tried: list[Trial] = []  # on the way of a search that was never stopped, in its order

    def run(self) -> Finding:
        work = self.objective.work
        with self.journal:
            count = len(self.journal.trials)
            if count:
                self.observe(Noted(f"Carrying on: {count} model{'s are' if count > 1 else ' is'} measured already."))
            self.observe(WorkBegan("Finding a good t", MAX_TRIALS * work))
            self.observe(WorkAdvanced(count * work))
            for role, t in (("primary", 0.0), ("secondary", 1.0)):
                self.try_model(role, t)
            for t in SWEEP_GRID:
                self.try_model("child", t)
            for step in SWEEP_STEPS:
                best = self.best().t
                for t in (round(best - step, 4), round(best + step, 4)):
                    if 0 < t < 1:
                        self.try_model("child", t)
            self.observe(WorkEnded())
            return self.finding()

    def best(self) -> Trial:
        """The child that loses least; of equal ones the one nearest the middle."""
        children = [trial for trial in self.tried if trial.role == "child"]
        return min(children, key=lambda trial: (trial.loss, abs(trial.t - 0.5)))

    def try_model(self, role: str, t: float) -> None:
        """Measures a parent, or a child made for it, unless the journal has it."""
        kept = [trial for trial in self.journal.trials if (trial.role, trial.t) == (role, t)]
        self.tried += kept or [self.measure(role, t)]

    def measure(self, role: str, t: float) -> Trial:
        """What the objective says of a parent, or of a child made for it; the journal keeps it."""
        folder = self.make_trial(t) if role == "child" else self.plan.parents.by_role[role].folder
        measured = self.objective.measure(role, folder)
        trial = Trial(role, t, measured.values, measured.items)
        self.journal.add(trial, measured.names)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in zip(measured.names, measured.values))
        self.observe(Noted(f"t = {t:<6g} {role:<10} {figures}"))
        return trial

    def make_trial(self, t: float) -> Path:
        """A child at t, in place of the one before it."""
        folder = self.journal.storage / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = dataclasses.replace(self.plan.recipe, schedule=Schedule.constant(t))
        options = dataclasses.replace(self.plan.options, save_directory=folder, overwrite=False, restart=True)
        return execute_merge(prepare_merge(recipe, options), team=self.team).child

    def finding(self) -> Finding:
        """The curve of a sweep, its trials in the order of t."""
        best, trials = self.best(), sorted(self.tried, key=lambda trial: trial.t)
        steps = f"A grid of t from {SWEEP_GRID[0]} to {SWEEP_GRID[-1]}, then narrowed to steps of {SWEEP_STEPS[-1]}."
        names, unit = self.journal.names, self.objective.unit
        told = [trial.as_dict(best) for trial in trials]
        return make_finding(
            "sweep",
            "How t was found",
            f"A good t: {best.t:g}",
            ("t", *(f"{name} ({unit})" for name in names), "mean loss over the best's"),
            [
                (
                    f"{trial.t:g}" + (f" ({trial.role})" if trial.role != "child" else ""),
                    *(f"{value:.4f}" for value in trial.values),
                    with_stderr(figures["loss_above_best"], figures["stderr"], "+.4f"),
                )
                for trial, figures in zip(trials, told)
            ],
            f"{steps} {self.objective.describe()} Noise is the standard error of the difference from the best child, "
            "which was picked on these very items, so that its gain is a little flattered.",
            {
                "names": names,
                "unit": unit,
                "less_is_better": self.objective.less_is_better,
                "best_t": best.t,
                "trials": told,
            },
            [describe_best(best, trials)],
            highlighted_row=trials.index(best),
        )


def describe_best(best: Trial, trials: Sequence[Trial]) -> str:
    """What was found, in words; a difference within twice its standard error is called noise. trials: by t."""
    words = []
    for trial in trials:
        if trial.role != "child":
            gain, stderr = trial.loss - best.loss, trial.stderr_against(best)
            doubt = ", which is noise" if stderr is not None and abs(gain) <= 2 * stderr else ""
            doubt = ", on too short a text to tell that from noise" if stderr is None else doubt
            words.append(f"{abs(gain):.4f} {'less' if gain > 0 else 'more'} than the {trial.role}{doubt}")
    near = [
        f"{trial.t:g}"
        for trial in trials
        if trial.role == "child"
        and trial is not best
        and (stderr := trial.stderr_against(best)) is not None
        and trial.loss - best.loss <= 2 * stderr
    ]
    alike = f" Tied with it: t = {', '.join(near)}." if near else ""
    return f"The best child, at t = {best.t:g}, loses {' and '.join(words)}.{alike}"


def find_t(plan: MergePlan, objective: Objective, observe: Observer, team: WorkerTeam | None = None) -> Finding:
    """The t at which a child of the plan's parents loses least by an objective, and the curve that shows it.

    Follows the plan's recipe in all but its schedule; the t is figures["best_t"] of what is returned. team: workers
    that make the trial children; without it each merge has its own. Raises SlerpMergeError where the texts, tasks or
    models do not allow it. What was measured stays in a journal beside the save directory until `forget_sweep`.
    """
    if plan.recipe.slices or plan.recipe.weights is not None:
        what = "A sweep looks for one t of whole models; this recipe has slices or weights of its own."
        raise SlerpMergeError(what, "Sweep without the recipe, or merge it as it is.")
    folders = tuple((role, plan.parents.by_role[role].folder) for role in ("primary", "secondary"))
    parents = ComparedModels(folders, plan.options.device, plan.recipe.adapter_bases)

    def search(device: str, dtype: str) -> Finding:
        ready = objective.on(parents, device, dtype, lambda amount: observe(WorkAdvanced(amount)))
        return Sweep(plan, ready, observe, team).run()

    return with_fallback_to_cpu(parents, observe, search)
