"""A good t is found: which are tried, that the best is made, that a stopped sweep goes on, that nothing is left."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from rich.cells import cell_len

from slerpkit.child.findings import Finding, make_finding
from slerpkit.evaluation.models import ComparedModels
from slerpkit.evaluation.objectives import Measurement, Objective, TextLosses
from slerpkit.evaluation.perplexity import compare_perplexity
from slerpkit.evaluation.sweep import (
    MAX_TRIALS,
    TRIAL_PREFIX,
    Trial,
    describe_best,
    find_t,
    forget_sweep,
    lost_by,
    remove_trial,
)
from slerpkit.files import is_inside
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, ignore
from slerpkit.merge.plan import MergePlan
from slerpkit.messages import SlerpMergeError
from slerpkit.recipe import LayerSlice
from slerpkit.recipe_file import read_recipe
from slerpkit.schedule import Schedule
from slerpkit.screen.figures import draw_plot, render_finding
from slerpkit.screen.flags import build_parser, evaluation_words
from slerpkit.story import prepare_merge
from tests.builders import edit_json, load_tensors, make_pair, make_real_model, merge, plan_of
from tests.pictures import RecordingConsole
from tests.test_command_line import run  # noqa: F401  (a fixture)
from tests.test_judgement import write_text

FLAGS = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "child", "--yes", "--sweep")


@pytest.fixture
def plan(tmp_path, parents, monkeypatch) -> MergePlan:
    """A merge of two real tiny models in tmp_path, with two texts beside them."""
    monkeypatch.chdir(tmp_path)
    primary, secondary = (make_real_model(tmp_path / name, seed) for seed, name in ((1, "primary"), (2, "secondary")))
    parents.watch(primary, secondary)
    for number in (1, 2):
        write_text(tmp_path / f"text-{number}.txt", 200, number)
    return plan_of(primary, secondary, tmp_path / "child", device="cpu")


def weighed(*losses: float) -> tuple[tuple[float, float], ...]:
    """Items that count alike."""
    return tuple((loss, 1.0) for loss in losses)


def bowl(best: float, tried: list[float] | None = None):
    """A stand-in for measuring: the loss is least at `best`, over three items that differ from each other."""

    def measure(losses: TextLosses, role: str, folder: Path) -> Measurement:
        recipe = folder / "merge_recipe.yaml"
        t = {"primary": 0.0, "secondary": 1.0}.get(role)
        t = read_recipe(recipe).schedule.rules[0].gradient[0] if t is None else t
        if tried is not None:
            tried.append(t)
        loss = 1 + (t - best) ** 2
        return Measurement(("text",), (loss,), (weighed(loss - 0.1, loss, loss + 0.1),))

    return measure


def left_over(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".") or "trial" in path.name)


# ── The search ──


@pytest.mark.parametrize("best", [0.03, 0.1, 0.27, 0.5, 0.64, 0.88, 0.99])
def test_the_best_t_is_found_to_a_fortieth(plan, monkeypatch, best):
    tried: list[float] = []
    monkeypatch.setattr(TextLosses, "measure", bowl(best, tried))
    sweep = find_t(plan, Objective((Path("text-1.txt"),)), ignore)["figures"]
    assert abs(sweep["best_t"] - best) <= 0.0251
    assert len(tried) == len(set(tried)) <= MAX_TRIALS
    assert tried[:2] == [0.0, 1.0]


def test_figures_are_those_of_children_made_one_by_one(plan, tmp_path):
    texts = (tmp_path / "text-1.txt", tmp_path / "text-2.txt")
    sweep = find_t(plan, Objective(texts), ignore)["figures"]
    for trial in sweep["trials"]:
        folder = tmp_path / trial["role"]
        if trial["role"] == "child":
            parents = tmp_path / "primary", tmp_path / "secondary"
            folder = merge(*parents, tmp_path / f"at-{trial['t']}", trial["t"], device="cpu").child
        findings = compare_perplexity(ComparedModels((("child", folder),), "cpu"), texts, ignore)
        measured = [finding["figures"]["models"][0]["bits_per_byte"] for finding in findings]
        assert trial["values"] == pytest.approx(measured, rel=1e-6)
        assert trial["loss"] == pytest.approx(sum(measured) / 2, rel=1e-6)
    children = {trial["t"]: trial["loss"] for trial in sweep["trials"] if trial["role"] == "child"}
    assert children[sweep["best_t"]] == min(children.values())
    assert [trial["t"] for trial in sweep["trials"]] == sorted(trial["t"] for trial in sweep["trials"])


def test_progress_and_every_trial_are_told(plan, tmp_path):
    events: list[object] = []
    sweep = find_t(plan, Objective((tmp_path / "text-1.txt",)), events.append)["figures"]
    (began,) = (event for event in events if isinstance(event, WorkBegan))
    assert sum(event.amount for event in events if isinstance(event, WorkAdvanced)) <= began.total
    told = [event.text for event in events if isinstance(event, Noted)]
    assert len(told) == len(sweep["trials"])
    assert "text-1.txt" in told[0]


def test_noise_is_of_the_difference_on_the_same_items():
    best = Trial("child", 0.5, (2.0,), (weighed(1.0, 2.0, 3.0),))
    other = Trial("child", 0.7, (2.1,), (weighed(1.1, 2.1, 3.1),))
    assert other.stderr_against(best) == pytest.approx(0.0, abs=1e-12)
    two = Trial("child", 0.7, (2.1, 5.0), (weighed(1.0, 2.4, 3.0), weighed(5.0, 5.0, 5.3)))
    base = Trial("child", 0.5, (2.0, 5.0), (weighed(1.0, 2.0, 3.0), weighed(5.0, 5.0, 5.0)))
    expected = math.hypot(0.4 / 3, 0.3 / 3) / 2  # the deviation of one among three is its size over root three
    assert two.stderr_against(base) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("primary", "words"),
    [
        ((3.0, 3.1, 3.2), "1.0000 less than the primary and"),
        ((1.0, 1.1, 1.3), "0.9667 more than the primary and"),
        ((2.0, 2.4, 2.0), "less than the primary, which is noise"),
    ],
)
def test_the_verdict_says_what_is_noise_and_when_a_parent_is_better(primary, words):
    best = Trial("child", 0.5, (2.1,), (weighed(2.0, 2.1, 2.2),))
    trials = [Trial("primary", 0.0, (0.0,), (weighed(*primary),)), best]
    trials += [Trial("secondary", 1.0, (0.0,), (weighed(4.0, 4.1, 4.2),))]
    assert words in describe_best(best, trials)


# ── What it leaves ──


def test_the_best_child_is_made_and_nothing_else_is_left(run, plan, tmp_path):  # noqa: F811
    outcome = run(*FLAGS, "--perplexity", "text-1.txt", "--perplexity", "text-2.txt", "--json")
    assert outcome.status == 0, outcome.err
    assert left_over(tmp_path) == []
    (finding,) = outcome.report["findings"]
    sweep = finding["figures"]
    other = run(*FLAGS[:5], "other", "--yes", "--t", str(sweep["best_t"]))
    assert other.status == 0
    child, same = load_tensors(tmp_path / "child"), load_tensors(tmp_path / "other")
    assert all(child[name].equal(same[name]) for name in same)
    assert json.loads((tmp_path / "child" / "merge_report.json").read_text("utf-8"))["findings"] == [finding]
    card = (tmp_path / "child" / "README.md").read_text("utf-8")
    assert f"| **{sweep['best_t']:g}** |" in card
    assert "## How t was found" in card


@pytest.mark.parametrize("stop_after", [1, 4, 9])
def test_a_stopped_sweep_goes_on_where_it_was(plan, tmp_path, monkeypatch, stop_after):
    tried: list[float] = []
    measure = TextLosses.measure

    def counted(losses, role, folder):
        tried.append(role)
        return measure(losses, role, folder)

    monkeypatch.setattr(TextLosses, "measure", counted)
    objective = Objective((tmp_path / "text-1.txt",))

    def stop(event: object) -> None:
        if isinstance(event, Noted) and len(tried) == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find_t(plan, objective, stop)
    assert len(tried) == stop_after
    assert left_over(tmp_path) == [".child.slerpmerge-sweep"]
    assert [path.name for path in (tmp_path / ".child.slerpmerge-sweep").iterdir()] == ["journal.json"]
    sweep = find_t(plan, objective, ignore)
    assert len(tried) == len(sweep["figures"]["trials"]), "none twice"
    forget_sweep(plan.options.save_directory)
    assert find_t(plan, objective, ignore) == sweep
    forget_sweep(plan.options.save_directory)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("text", "the texts were different"),
        ("method", "the method was different"),
        ("restart", "as asked"),
        ("odd", "cannot be read"),
        ("torn", None),
        ("empty", None),
    ],
)
def test_what_was_found_for_another_sweep_is_not_used_and_that_is_told(plan, tmp_path, monkeypatch, change, reason):
    tried: list[float] = []
    monkeypatch.setattr(TextLosses, "measure", bowl(0.3, tried))
    objective = Objective((tmp_path / "text-1.txt",))
    whole = len(find_t(plan, objective, ignore)["figures"]["trials"])
    assert len(tried) == whole
    recipe, options = plan.recipe, plan.options
    if change == "text":
        write_text(tmp_path / "text-1.txt", 201)
    elif change == "method":
        recipe = dataclasses.replace(recipe, method="lerp")
    elif change == "restart":
        options = dataclasses.replace(options, restart=True)
    elif change == "odd":
        edit_json(tmp_path / ".child.slerpmerge-sweep" / "journal.json", columns=None)
    else:
        torn = "{}" if change == "torn" else ""
        (tmp_path / ".child.slerpmerge-sweep" / "journal.json").write_text(torn, encoding="utf-8")
    told: list[object] = []
    again = prepare_merge(recipe, options)
    lost = lost_by(again, objective)
    find_t(again, objective, told.append)
    assert len(tried) == 2 * whole
    noted = [event.text for event in told if isinstance(event, Noted) and "discarded" in event.text]
    assert len(noted) == (reason is not None)
    assert all(reason in text for text in noted)
    assert lost in (None, *noted)
    assert (lost is None) == (change in ("odd", "torn", "empty"))


def test_texts_given_in_another_order_are_the_same_search(plan, tmp_path, monkeypatch):
    first, second = tmp_path / "text-1.txt", tmp_path / "text-2.txt"
    before = find_t(plan, Objective((first, second)), ignore)["figures"]
    told: list[object] = []
    monkeypatch.setattr(TextLosses, "measure", None)  # nothing is measured again
    assert lost_by(plan, Objective((second, first))) is None
    after = find_t(plan, Objective((second, first)), told.append)["figures"]
    assert told[0] == Noted(f"Carrying on: {len(before['trials'])} models are measured already.")
    assert after["names"] == ["text-2.txt", "text-1.txt"]
    assert after["best_t"] == before["best_t"]
    for was, now in zip(before["trials"], after["trials"]):
        assert now["values"] == was["values"][::-1]
        assert now["loss"] == pytest.approx(was["loss"])


def test_the_shown_command_has_the_texts_in_the_order_given():
    arguments = build_parser().parse_args(["--perplexity", "z.txt"])
    words = list(evaluation_words(arguments, Objective((Path("y.txt"), Path("z.txt"), Path("a.txt")))))
    assert words[1:] == ["--perplexity", "z.txt", "--perplexity", "y.txt", "--perplexity", "a.txt"]


@pytest.mark.parametrize("in_memory", [True, False])
def test_there_is_one_trial_child_at_a_time_in_memory_where_it_fits(plan, tmp_path, monkeypatch, in_memory):
    memory = tmp_path / "memory"
    if in_memory:
        memory.mkdir()
    monkeypatch.setattr("slerpkit.evaluation.sweep.MEMORY_FOLDER", memory)
    measure = bowl(0.3)
    seen = []

    def watched(losses, role, folder):
        children = [path.parent for path in tmp_path.rglob("merge_report.json")]
        seen.append(len(children))
        if role == "child":
            assert children == [folder]
            assert is_inside(folder, memory) == in_memory
        return measure(losses, role, folder)

    monkeypatch.setattr(TextLosses, "measure", watched)
    find_t(plan, Objective((tmp_path / "text-1.txt",)), ignore)
    assert max(seen) == 1
    assert list(tmp_path.rglob("merge_report.json")) == []


def test_a_trial_that_a_killed_sweep_left_is_removed_by_the_next(plan, tmp_path, monkeypatch):
    monkeypatch.setattr(TextLosses, "measure", bowl(0.3))
    monkeypatch.setattr("slerpkit.evaluation.sweep.remove_trial", lambda storage: None)  # as if it had never come to it
    objective = Objective((tmp_path / "text-1.txt",))
    find_t(plan, objective, ignore)
    storage = Path(json.loads((tmp_path / ".child.slerpmerge-sweep" / "journal.json").read_text("utf-8"))["storage"])
    assert (storage / "trial" / "model.safetensors").is_file()
    monkeypatch.undo()
    monkeypatch.setattr(TextLosses, "measure", bowl(0.3))
    find_t(plan, objective, ignore)
    assert not storage.exists()


def test_a_journal_cannot_have_a_folder_of_the_persons_removed(tmp_path):
    for name in ("precious", TRIAL_PREFIX + "link"):
        (tmp_path / "precious").mkdir(exist_ok=True)
        if name != "precious":
            (tmp_path / name).symlink_to(tmp_path / "precious")
        remove_trial(str(tmp_path / name))
    assert (tmp_path / "precious").is_dir()


def test_two_sweeps_into_one_place_are_refused(plan, tmp_path, monkeypatch):
    measure = bowl(0.3)
    objective = Objective((tmp_path / "text-1.txt",))

    def again(losses, role, folder):
        with pytest.raises(SlerpMergeError, match="Another run"):
            find_t(plan, objective, ignore)
        return measure(losses, role, folder)

    monkeypatch.setattr(TextLosses, "measure", again)
    find_t(plan, objective, ignore)


# ── What it refuses ──


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((), "--perplexity FILE, or --score TASK"),
        (("--perplexity", "text-1.txt", "--t", "0.5"), "A sweep finds t itself"),
        (("--perplexity", "nowhere.txt"), "nowhere.txt is not there"),
        (("--include-path", "."), "--perplexity FILE"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused_before_it_begins(run, plan, tmp_path, flags, words):  # noqa: F811
    outcome = run(*FLAGS, *flags)
    assert outcome.status == (1 if "nowhere" in words else 2)
    assert words in " ".join(outcome.err.split())
    assert left_over(tmp_path) == []
    assert not (tmp_path / "child").exists()


def test_slices_have_no_single_t(tmp_path):
    cut = LayerSlice(0, 0, 1, Schedule.constant(0.5))
    plan = plan_of(*make_pair(tmp_path), tmp_path / "child", slices=(cut,))
    with pytest.raises(SlerpMergeError, match="one t of whole models"):
        find_t(plan, Objective((write_text(tmp_path / "text.txt", 9),)), ignore)


# ── The curve ──


def curve(texts: int = 1) -> Finding:
    """What a sweep finds that has its least loss at 0.45."""
    ts = [0, 0.1, 0.3, 0.4, 0.45, 0.5, 0.7, 0.9, 1]
    trials = [
        {
            "role": {0: "primary", 1: "secondary"}.get(t, "child"),
            "t": t,
            "values": [1 + (t - 0.45) ** 2 + number for number in range(texts)],
            "loss": 1 + (t - 0.45) ** 2,
            "loss_above_best": (t - 0.45) ** 2,
            "stderr": None if t == 0.45 else 0.01,
        }
        for t in ts
    ]
    names = [f"[red]text-{number}" for number in range(texts)]
    sweep = {"names": names, "unit": "bits per byte", "less_is_better": True, "best_t": 0.45, "trials": trials}
    title = "A good t: 0.45"
    return make_finding("sweep", "How t was found", title, ("t",), [], "So and so.", sweep, ["The best child ..."])


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@pytest.mark.parametrize("texts", [1, 2])
def test_the_curve_is_drawn_within_the_width_with_both_parents_at_its_ends(width, encoding, texts, monkeypatch):
    monkeypatch.setattr(RecordingConsole, "encoding", encoding)
    console = RecordingConsole(width)
    console.print(render_finding(console, curve(texts)))
    text = console.export_text()
    assert max(map(cell_len, text.splitlines())) <= width
    assert "[red]text-0" in text
    assert "The best child ..." in text
    parent, best = ("■", "◆") if encoding == "utf-8" else ("@", "#")
    plots = 1 if texts == 1 else texts + 1
    assert text.count(best) == plots + 1, "once in each plot, once in the legend"
    assert text.count(parent) == 2 * plots + 1
    assert encoding != "ascii" or text.isascii()


def test_points_stand_where_their_values_are():
    console = RecordingConsole(100)
    trials = [{"role": "child", "t": t} for t in (0, 0.5, 1)]
    lines = draw_plot(console, trials, [3.0, 1.0, 2.0], [None] * 3, best_t=0.5)
    rows = {mark: row for row, line in enumerate(lines) for mark in "●◆" if mark in line}
    assert lines[0].split() == ["3.0000", "●"]
    assert lines[8].split() == ["1.0000", "◆"]
    assert rows["●"] == 4
    assert lines[9].split() == ["0", "0.25", "0.5", "0.75", "1"]
    assert lines[8].index("◆") == pytest.approx(lines[9].index("0.5"), abs=1)
