"""lm-eval's tasks and figures, and what their differences are worth.

All figures of models are the harness's own; differences are judged here, item by item. The harness is no requirement:
it is loaded when it is asked for. How figures are shown is not known here. Read models.py before this.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import io
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.child.findings import make_finding, with_stderr
from slerpkit.evaluation.models import NO_NUMBERS, check_generates_text, choose_device_and_dtype, out_of_memory_named
from slerpkit.merge.events import WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.messages import SlerpMergeError, format_names, shorten
from slerpkit.parents.checkpoint import has_tokenizer

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.evaluation.models import ComparedModels
    from slerpkit.merge.events import Observer
    from slerpkit.parents.checkpoint import Checkpoint

NO_FIGURES = "The harness gives these tasks no figure that is a mean over their items."
NOISE_LEVEL = 0.05  # a difference that chance makes more often than this is noise


def load_harness() -> Any:
    """The package lm_eval. Raises SlerpMergeError where it is not installed, or not whole."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        harness = importlib.import_module("lm_eval")
        importlib.import_module("accelerate")  # its models of transformers need it
    except ImportError as error:
        what = f"Scores need the evaluation harness, which is not installed ({error})."
        raise SlerpMergeError(what, 'pip install "lm-eval[hf]"') from error
    for name in ("lm_eval", "datasets", "evaluate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return harness


@functools.cache  # the index of all its tasks takes some ten seconds, and is asked for before a merge and after it
def task_manager(include_path: Path | None, with_defaults: bool) -> Any:
    """The harness's index of tasks. Raises SlerpMergeError where a task's file cannot be read."""
    try:
        return importlib.import_module("lm_eval.tasks").TaskManager(
            include_path=str(include_path) if include_path else None, include_defaults=with_defaults
        )
    except Exception as error:  # a task file can be wrong in as many ways as YAML can
        what = f"The harness cannot read the tasks in {include_path}: {shorten(str(error), 300)}"
        raise SlerpMergeError(what, "Correct that file, or try it with lm_eval itself.") from error


def find_tasks(tasks: Sequence[str], include_path: Path | None) -> tuple[list[str], Any]:
    """(names of the harness's tasks that are meant, its task manager). Raises SlerpMergeError for one it does not have.

    The harness's own thousands of tasks are only looked through where a name is not one of `include_path`.
    """
    load_harness()
    if include_path is not None and not include_path.is_dir():
        raise SlerpMergeError(
            f"The folder of tasks {include_path} is not there.", "Give the folder of their YAML files."
        )
    folder = None if include_path is None else include_path.resolve()
    for with_defaults in (True,) if folder is None else (False, True):
        manager = task_manager(folder, with_defaults)
        missing = [task for task in tasks if not manager.match_tasks([task])]
        if not missing:
            return list(dict.fromkeys(name for task in tasks for name in manager.match_tasks([task]))), manager
    near = difflib.get_close_matches(missing[0], manager.all_tasks, 3)
    hint = f"Did you mean {' or '.join(near)}?" if near else "lm_eval ls tasks lists what there is."
    raise SlerpMergeError(f"The harness has no task {format_names(missing)}.", hint)


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Keeps the harness's own prints and bars off the screen, and what git says where it looks for a commit."""
    evaluator = importlib.import_module("lm_eval.evaluator")
    before = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        evaluator.get_git_commit_hash = before


def check_harness_loads(checkpoint: Checkpoint) -> None:
    """Raises SlerpMergeError where a model cannot generate text, or is none that the harness could load itself."""
    check_generates_text(checkpoint, reads_on=False)
    if checkpoint.base is not None:
        what = f"{checkpoint.name} is an adapter, and the harness loads whole models alone."
        raise SlerpMergeError(what, "Taste it or measure its perplexity, or merge it into its base with peft first.")


def harness_results(
    models: ComparedModels, role: str, tasks: Sequence[str], manager: Any, device: str
) -> dict[str, Any]:
    """The harness's own result for one model, with its samples; all settings are its defaults.

    Raises SlerpMergeError for whatever goes wrong in it.
    """
    harness = load_harness()
    folder, name = dict(models.folders)[role], models.checkpoints[role].name
    model_arguments = {"pretrained": str(folder), "trust_remote_code": False}
    if not has_tokenizer(folder):
        model_arguments["tokenizer"] = str(models.tokenizer_folder(role))
    try:
        with silenced(), out_of_memory_named(name, device):
            result = harness.simple_evaluate(
                model="hf",
                model_args=model_arguments,
                tasks=list(tasks),
                task_manager=manager,
                device=device,
                log_samples=True,
            )
    except SlerpMergeError:
        raise
    except Exception as error:  # tasks are programs and data of others; each fails in its own way
        what = f"The harness could not evaluate {name}: {shorten(f'{type(error).__name__}: {error}', 300)}"
        hint = "Try it with lm_eval itself: if it shows the same, the fault is the task's."
        raise SlerpMergeError(what, hint) from error
    answers = (sample.get("filtered_resps") for samples in result["samples"].values() for sample in samples)
    if "nan" in re.findall(r"\bnan\b", str(list(answers))):
        raise SlerpMergeError(f"{name} gives a probability that is no number.", NO_NUMBERS)
    return result


def judged_metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(task, metric, filter) of every figure of a result that is the mean of a value known for each item.

    Others, such as a perplexity over words, have no value of an item that more or less of would mean anything.
    """
    for task, figures in result["results"].items():
        samples = result["samples"].get(task, ())
        for key in figures:
            metric, comma, filtered = key.partition(",")
            judged = [sample for sample in samples if sample.get("filter", "none") == filtered]
            if comma and not metric.endswith("_stderr") and judged and is_number(judged[0].get(metric)):
                items = items_of(result, task, metric, filtered)
                if math.isclose(math.fsum(items) / len(items), figures[key], rel_tol=1e-6, abs_tol=1e-9):
                    yield task, metric, filtered


def is_number(value: Any) -> bool:
    """Whether a harness's value is a single number, numpy's own among them."""
    return isinstance(value, (bool, int, float)) or type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0


def items_of(result: Mapping[str, Any], task: str, metric: str, filtered: str) -> list[float]:
    """A metric's value for each item of a task, in the order of the items."""
    samples = [sample for sample in result["samples"][task] if sample.get("filter", "none") == filtered]
    return [float(sample[metric]) for sample in sorted(samples, key=lambda sample: sample["doc_id"])]


def is_higher_better(result: Mapping[str, Any], task: str, metric: str) -> bool:
    """What a task says of its metric; where it says nothing, more is better."""
    return result.get("higher_is_better", {}).get(task, {}).get(metric, True) is not False


def sign_test(better: int, worse: int) -> float:
    """How often chance alone makes a difference as uneven as this, two-sided. Exact.

    Over items of right and wrong it is McNemar's test: Q. McNemar, Psychometrika 12 (1947), 153-157, in its exact form.
    """
    count = better + worse
    tail = sum(math.comb(count, k) for k in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**count)


def verdict_on(child: Sequence[float], parent: Sequence[float], higher_is_better: bool) -> tuple[str, float]:
    """(in words, p) what a difference between child and parent on the same items is worth."""
    gains = [(a - b) * (1 if higher_is_better else -1) for a, b in zip(child, parent)]
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    p = sign_test(better, worse)
    word = "noise" if p > NOISE_LEVEL else "better" if better > worse else "worse"
    return f"{word} (better on {better}, worse on {worse} of {len(gains)}; p = {p:.2g})", p


def score(models: ComparedModels, tasks: Sequence[str], include_path: Path | None, observe: Observer) -> list[Finding]:
    """Parents and child on the harness's tasks, with its own figures: one finding.

    include_path: a folder of tasks beside the harness's own. Raises SlerpMergeError where the harness, a task or a
    model does not let them be had.
    """
    names, manager = find_tasks(tasks, include_path)
    for checkpoint in models.checkpoints.values():
        check_harness_loads(checkpoint)
    device = choose_device_and_dtype(models)[0]
    results = {}
    observe(WorkBegan("Scoring with the harness", len(models.folders)))
    for role, _ in models.folders:
        results[role] = harness_results(models, role, names, manager, device)
        observe(WorkAdvanced(1))
    observe(WorkEnded())
    scores = [score_of(results, task, metric, filtered) for task, metric, filtered in judged_metrics(results["child"])]
    if not scores:
        raise SlerpMergeError(NO_FIGURES, "Choose others, such as tasks of multiple choice.")
    version = getattr(load_harness(), "__version__", results["child"].get("lm_eval_version", ""))
    measured = f"lm-eval {version}, its defaults, on {device}; child against parent: exact sign test on the same items."
    return [score_finding(names, scores, measured)]


def score_of(results: Mapping[str, Mapping[str, Any]], task: str, metric: str, filtered: str) -> dict[str, Any]:
    """One figure of all the models, the harness's own, and the child's differences from each parent."""
    key, error_key = f"{metric},{filtered}", f"{metric}_stderr,{filtered}"
    values, items = {}, {}
    for role, result in results.items():
        error = result["results"][task].get(error_key)
        values[role] = [float(result["results"][task][key]), float(error) if is_number(error) else None]
        items[role] = items_of(result, task, metric, filtered)
    higher = is_higher_better(results["child"], task, metric)
    parents = [role for role in results if role != "child"]
    judged = {parent: verdict_on(items["child"], items[parent], higher) for parent in parents}
    return {
        "task": task,
        "metric": metric if filtered == "none" else f"{metric} ({filtered})",
        "items": len(items["child"]),
        "values": values,  # (the figure, its standard error) of each role
        "verdicts": {parent: words for parent, (words, _) in judged.items()},
        "p": {parent: p for parent, (_, p) in judged.items()},
    }


def score_finding(tasks: Sequence[str], scores: Sequence[Mapping[str, Any]], measured: str) -> Finding:
    """The scores of one run, each as score_of has it, with what the child's differences are worth."""
    roles = list(scores[0]["values"])
    return make_finding(
        "score",
        "Scores",
        f"Scores on {format_names(tasks)}",
        ("task", "metric", *roles),
        [(each["task"], each["metric"], *(with_stderr(*each["values"][role]) for role in roles)) for each in scores],
        measured,
        {"tasks": list(tasks), "scores": list(scores)},
        [
            f"child against {parent}: {each['metric']} of {each['task']}: {verdict}"
            for each in scores
            for parent, verdict in each["verdicts"].items()
        ],
    )
