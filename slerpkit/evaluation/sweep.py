"""A good t, found over trial children.

A grid first, then both sides of the best at half the distance, and again. Every trial child is made by the same
two functions as any other, read, and removed; what was found is in a journal, so that a stopped sweep goes on.
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
from slerpkit.evaluation.harness import (
    NO_FIGURES,
    find_tasks,
    harness_results,
    is_higher_better,
    items_of,
    judged_metrics,
)
from slerpkit.evaluation.models import (
    WORKING_BYTES,
    ComparedModels,
    check_generates_text,
    with_fallback_to_cpu,
)
from slerpkit.evaluation.perplexity import (
    describe_window,
    error_of_difference,
    lose_on_texts,
    ratio_of,
    read_judged_text,
    window_of,
)
from slerpkit.files import is_plain_file, is_plain_folder, read_json, replace_files
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.journal import JOURNAL_NAME
from slerpkit.merge.save_directory import WorkFolder, interruptions_held
from slerpkit.messages import SlerpMergeError, explain_os_error
from slerpkit.parents.checkpoint import file_stats_of
from slerpkit.schedule import Schedule
from slerpkit.story import execute_merge, prepare_merge

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan

SWEEP_GRID = (0.1, 0.3, 0.5, 0.7, 0.9)
SWEEP_STEPS = (0.1, 0.05, 0.025)  # around the best so far
MAX_TRIALS = 2 + len(SWEEP_GRID) + 2 * len(SWEEP_STEPS)  # both parents among them
MEMORY_FOLDER = Path("/dev/shm")  # files in memory, where the system has it
TRIAL_PREFIX = "slerpmerge-trial-"


@dataclass(frozen=True)
class Objective:
    """What trial children are measured by: texts that they should predict, or else tasks of the harness."""

    texts: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None


@dataclass(frozen=True)
class Trial:
    """What the yardstick says of one model."""

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


class SweepJournal:
    """What a sweep has found so far, and the one trial child that is there at a time.

    Leaving the `with` block removes the trial child. What was found stays until `forget`.
    """

    def __init__(self, plan: MergePlan, identity: Mapping[str, Any]) -> None:
        self.plan = plan
        self.identity = json.loads(json.dumps(identity))
        self.area = WorkFolder(sweep_area(plan.options.save_directory))
        self.path = self.area.path / JOURNAL_NAME
        self.trials: list[Trial] = []
        self.names: list[str] = []  # of the figures
        self.storage: Path | None = None

    def __enter__(self) -> SweepJournal:
        self.area.enter()
        content: dict[str, Any] = {}
        if is_plain_file(self.path):
            with contextlib.suppress(SlerpMergeError):  # a torn one is as good as none
                content = read_json(self.path)
        remove_trial(content.get("storage"))
        if content.get("identity") == self.identity and not self.plan.options.restart:
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a journal of another making begins anew
                self.trials = [
                    Trial(entry["role"], entry["t"], tuple(entry["values"]), entry["items"])
                    for entry in content["trials"]
                ]
                self.names = [str(name) for name in content["names"]]
        try:
            self.storage = trial_storage(self.plan, self.area.path)
            self._write()
        except BaseException as error:
            self.__exit__()
            if isinstance(error, OSError):
                raise explain_os_error(error, self.area.path, "write in") from error
            raise
        return self

    def _write(self) -> None:
        trials = [dataclasses.asdict(trial) for trial in self.trials]
        content = {"identity": self.identity, "storage": str(self.storage), "names": self.names, "trials": trials}
        replace_files({self.path: json.dumps(content).encode()})

    def add(self, trial: Trial) -> None:
        self.trials.append(trial)
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
    needed = 1.05 * plan.disk_needed_bytes
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
    """One search for t. `run` returns what was found."""

    def __init__(self, plan: MergePlan, yardstick: Objective, observe: Observer) -> None:
        self.plan = plan
        self.yardstick = yardstick
        self.observe = observe
        self.texts = [read_judged_text(path) for path in yardstick.texts]
        self.parents = (("primary", plan.parents.primary.folder), ("secondary", plan.parents.secondary.folder))
        self.lineup = ComparedModels(self.parents, plan.options.device)
        self.window = window_of(self.lineup)
        self.tasks: tuple[list[str], Any] = ([], None)
        for checkpoint in self.lineup.checkpoints.values():
            check_generates_text(checkpoint, reads_on=bool(self.texts))
        if not self.texts:
            self.tasks = find_tasks(yardstick.tasks, yardstick.include_path)

    def run(self) -> Finding:
        return with_fallback_to_cpu(self.lineup, self.observe, self.run_on)

    def run_on(self, device: str, dtype: str) -> Finding:
        self.place = device, dtype
        per_model = sum(len(text.encode()) for text in self.texts) or 1
        with SweepJournal(self.plan, self.identity()) as self.journal:
            known = len(self.journal.trials)
            if known:
                self.observe(Noted(f"Carrying on: {known} models are measured already."))
            self.observe(WorkBegan("Finding a good t", MAX_TRIALS * per_model))
            self.observe(WorkAdvanced(known * per_model))
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
            return self.finding(self.journal.trials)

    def identity(self) -> dict[str, Any]:
        """All that the figures depend on."""
        import hashlib

        identity = self.plan.fingerprint
        identity["recipe"].pop("schedule")
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in self.texts]
        folder = self.yardstick.include_path
        file_stats = (
            {} if folder is None else file_stats_of(folder, [path.name for path in folder.iterdir() if path.is_file()])
        )
        tasks = self.tasks[0], str(folder), file_stats
        return {**identity, "texts": hashes, "tasks": tasks, "place": self.place, "window": self.window}

    def best(self) -> Trial:
        """The child that loses least; of equal ones the one nearest the middle."""
        children = [trial for trial in self.journal.trials if trial.role == "child"]
        return min(children, key=lambda trial: (trial.loss, abs(trial.t - 0.5)))

    def try_model(self, role: str, t: float) -> None:
        """Measures a parent, or a child made for it, unless the journal has it."""
        if any((trial.role, trial.t) == (role, t) for trial in self.journal.trials):
            return
        folder = dict(self.parents).get(role) or self.make_trial(t)
        values, items = self.measure(role, folder)
        trial = Trial(role, t, values, items)
        self.journal.add(trial)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in zip(self.journal.names, values))
        self.observe(Noted(f"t = {t:<6g} {role:<10} {shown}"))

    def make_trial(self, t: float) -> Path:
        """A child at t, in place of the one before it."""
        folder = self.journal.storage / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        recipe = dataclasses.replace(self.plan.recipe, schedule=Schedule.constant(t))
        options = dataclasses.replace(self.plan.options, save_directory=folder, overwrite=False, restart=True)
        return execute_merge(prepare_merge(recipe, options)).child

    def measure(self, role: str, folder: Path) -> tuple[tuple[float, ...], tuple[Any, ...]]:
        """(figures to show, items whose losses count) of one model, as a trial has them."""
        lineup = ComparedModels(
            (*self.parents, (role, folder)) if role == "child" else self.parents, self.lineup.device
        )
        if self.texts:
            losses = lose_on_texts(
                lineup, role, self.texts, self.place, self.window, lambda count: self.observe(WorkAdvanced(count))
            )
            self.journal.names = [path.name for path in self.yardstick.texts]
            return tuple(loss.bits_per_byte for loss in losses), tuple(loss.items for loss in losses)
        names, manager = self.tasks
        result = harness_results(lineup, role, names, manager, self.place[0])
        self.observe(WorkAdvanced(1))
        chosen: dict[str, tuple[str, str]] = {}
        for task, metric, filtered in judged_metrics(result):
            chosen.setdefault(task, (metric, filtered))
        if not chosen:
            raise SlerpMergeError(NO_FIGURES, "Sweep by others, such as tasks of multiple choice.")
        self.journal.names = [f"{task}: {metric}" for task, (metric, _) in chosen.items()]
        values, items = [], []
        for task, (metric, filtered) in chosen.items():
            found = items_of(result, task, metric, filtered)
            higher = is_higher_better(result, task, metric)
            values.append(math.fsum(found) / len(found))
            items.append(tuple((-value if higher else value, 1.0) for value in found))
        return tuple(values), tuple(items)

    def finding(self, trials: Sequence[Trial]) -> Finding:
        """The curve of a sweep, its trials in the order of t."""
        best, trials = self.best(), sorted(trials, key=lambda trial: trial.t)
        device, dtype = self.place
        how = describe_window(self.window, dtype, device) if self.texts else f"The harness's tasks, on {device}."
        steps = f"A grid of t from {SWEEP_GRID[0]} to {SWEEP_GRID[-1]}, then narrowed to steps of {SWEEP_STEPS[-1]}."
        names, unit = self.journal.names, "bits per byte" if self.texts else "the harness's figure"
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
            f"{steps} {how} Noise is the standard error of the difference from the best child, "
            "which was picked on these very items, so that its gain is a little flattered.",
            {
                "names": names,
                "unit": unit,
                "less_is_better": bool(self.texts),
                "best_t": best.t,
                "trials": told,
            },
            [self.verdict(trials, best)],
            highlighted_row=trials.index(best),
        )

    @staticmethod
    def verdict(trials: Sequence[Trial], best: Trial) -> str:
        """What was found, in words; a difference within twice its standard error is called noise."""
        words = []
        for trial in trials:
            if trial.role != "child":
                gain, stderr = trial.loss - best.loss, trial.stderr_against(best)
                doubt = ", which is noise" if stderr is not None and abs(gain) <= 2 * stderr else ""
                doubt = ", on too short a text to tell that from noise" if stderr is None else doubt
                words.append(f"{abs(gain):.4f} {'less' if gain > 0 else 'more'} than the {trial.role}{doubt}")
        near = [
            f"{trial.t:g}"
            for trial in sorted(trials, key=lambda trial: trial.t)
            if trial.role == "child"
            and trial is not best
            and (stderr := trial.stderr_against(best)) is not None
            and trial.loss - best.loss <= 2 * stderr
        ]
        alike = f" Not to be told from it: t = {', '.join(near)}." if near else ""
        return f"The best child, at t = {best.t:g}, loses {' and '.join(words)}.{alike}"


def find_t(plan: MergePlan, yardstick: Objective, observe: Observer) -> Finding:
    """The t at which a child of the plan's parents loses least on texts or tasks, and the curve that shows it.

    Follows the plan's recipe in all but its schedule. Raises SlerpMergeError where the texts, tasks or models do not
    allow it. What was found stays in a journal beside the save directory until `forget_sweep`.
    """
    if plan.recipe.slices or plan.recipe.weights is not None:
        what = "A sweep looks for one t of whole models; this recipe has slices or weights of its own."
        raise SlerpMergeError(what, "Sweep without the recipe, or merge it as it is.")
    return Sweep(plan, yardstick, observe).run()
