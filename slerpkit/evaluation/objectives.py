"""What trial children are measured by: the choice of it (Objective), and the two ways to measure.

TextLosses and TaskScores look alike to whoever searches: each measures one model, says what its figures depend on and
in which order they stand (columns), and describes itself. Neither knows t, nor makes a child. Read perplexity.py and
harness.py before this.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.evaluation.harness import (
    NO_FIGURES,
    check_harness_loads,
    find_tasks,
    harness_results,
    is_higher_better,
    items_of,
    judged_metrics,
)
from slerpkit.evaluation.models import ComparedModels, check_generates_text
from slerpkit.evaluation.perplexity import describe_window, lose_on_texts, read_judged_text, window_of
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import file_stats_of

if TYPE_CHECKING:
    Items = tuple[tuple[float, float], ...]  # (loss, weight) of each; less is better


@dataclass(frozen=True)
class Measurement:
    """What an objective says of one model; a name, a value and items for each text or task."""

    names: tuple[str, ...]
    values: tuple[float, ...]  # as they are shown
    items: tuple[Items, ...]  # whose ratio, the sum of losses over the sum of weights, counts


@dataclass(frozen=True)
class Objective:
    """What the person chose: texts that children should predict, or else tasks of the harness."""

    texts: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    include_path: Path | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What is known without a model of what the figures depend on, as JSON can hold it.

        Raises SlerpMergeError where a text cannot be read.
        """
        return {"texts": sorted(map(text_hash, map(read_judged_text, self.texts)))}

    def on(
        self, parents: ComparedModels, device: str, dtype: str, advance: Callable[[int], object]
    ) -> TextLosses | TaskScores:
        """The objective ready to measure models on a device; `advance` is told the work done, of `work` for each model.

        Raises SlerpMergeError where a text, a task or a parent does not allow it.
        """
        if self.texts:
            return TextLosses(self.texts, parents, (device, dtype), advance)
        return TaskScores(self.tasks, self.include_path, parents, device, advance)


def text_hash(text: str) -> str:
    """What tells one text from another, wherever it stands."""
    return hashlib.sha256(text.encode()).hexdigest()


class TextLosses:
    """Bits per byte of texts: less is better."""

    unit = "bits per byte"
    less_is_better = True

    def __init__(
        self,
        paths: Sequence[Path],
        parents: ComparedModels,
        device_and_dtype: tuple[str, str],
        advance: Callable[[int], object],
    ) -> None:
        self.names = tuple(path.name for path in paths)
        self.texts = [read_judged_text(path) for path in paths]
        self.columns = [text_hash(text) for text in self.texts]
        self.parents = parents
        self.device_and_dtype = device_and_dtype
        self.advance = advance
        for checkpoint in parents.checkpoints.values():
            check_generates_text(checkpoint, reads_on=True)
        self.window = window_of(parents)
        self.work = sum(len(text.encode()) for text in self.texts)  # bytes to be read by each model

    def fingerprint(self) -> dict[str, Any]:
        """All that the figures of a model depend on beside the model, as JSON can hold it."""
        conditions = {"window": self.window, "device_and_dtype": list(self.device_and_dtype)}
        return {"texts": sorted(self.columns), **conditions}

    def describe(self) -> str:
        """How models are measured, in a sentence."""
        device, dtype = self.device_and_dtype
        return describe_window(self.window, dtype, device)

    def measure(self, role: str, folder: Path) -> Measurement:
        """One model, a parent or a child of theirs. Raises SlerpMergeError where it cannot be loaded or asked."""
        models = with_model(self.parents, role, folder)
        advance = self.advance
        losses = lose_on_texts(
            models, role, self.texts, self.device_and_dtype, self.window, lambda _, size: advance(size)
        )
        return Measurement(
            self.names, tuple(loss.bits_per_byte for loss in losses), tuple(loss.items for loss in losses)
        )


class TaskScores:
    """The first figure that the harness gives each task, whose items are losses where more is better."""

    unit = "the harness's figure"
    less_is_better = False
    work = 1  # model
    columns: Sequence[str] = ()  # the harness gives figures in an order of its own

    def __init__(
        self,
        tasks: Sequence[str],
        include_path: Path | None,
        parents: ComparedModels,
        device: str,
        advance: Callable[[int], object],
    ) -> None:
        self.parents = parents
        self.device = device
        self.advance = advance
        for checkpoint in parents.checkpoints.values():
            check_harness_loads(checkpoint)
        self.tasks, self.manager = find_tasks(tasks, include_path)
        self.include_path = include_path

    def fingerprint(self) -> dict[str, Any]:
        """All that the figures of a model depend on beside the model, as JSON can hold it."""
        folder = self.include_path
        files = [] if folder is None else [path.name for path in folder.iterdir() if path.is_file()]
        file_stats = {} if folder is None else file_stats_of(folder, files)
        return {
            "texts": [],
            "tasks": self.tasks,
            "include_path": str(folder),
            "files": {name: list(stat) for name, stat in file_stats.items()},
            "device": self.device,
        }

    def describe(self) -> str:
        """How models are measured, in a sentence."""
        return f"The harness's tasks, on {self.device}."

    def measure(self, role: str, folder: Path) -> Measurement:
        """One model, a parent or a child of theirs. Raises SlerpMergeError for whatever goes wrong in the harness."""
        result = harness_results(with_model(self.parents, role, folder), role, self.tasks, self.manager, self.device)
        self.advance(1)
        metrics: dict[str, tuple[str, str]] = {}
        for task, metric, filtered in judged_metrics(result):
            metrics.setdefault(task, (metric, filtered))
        if not metrics:
            raise SlerpMergeError(NO_FIGURES, "Sweep by others, such as tasks of multiple choice.")
        values, items = [], []
        for task, (metric, filtered) in metrics.items():
            amounts = items_of(result, task, metric, filtered)
            sign = -1 if is_higher_better(result, task, metric) else 1
            values.append(math.fsum(amounts) / len(amounts))
            items.append(tuple((sign * amount, 1.0) for amount in amounts))
        names = tuple(f"{task}: {metric}" for task, (metric, _) in metrics.items())
        return Measurement(names, tuple(values), tuple(items))


def with_model(parents: ComparedModels, role: str, folder: Path) -> ComparedModels:
    """The parents, and the model of a folder beside them where it is none of them."""
    if role in dict(parents.folders):
        return parents
    return dataclasses.replace(parents, folders=(*parents.folders, (role, folder)))
