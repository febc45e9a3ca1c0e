"""Scores: the harness's own figures digit for digit, on a local multiple-choice task, and what they are worth."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slerpmerge
from slerpkit.demo import make_demo_tokenizer
from slerpkit.evaluation.harness import judged_metrics, score, score_finding, sign_test, verdict_on
from slerpkit.evaluation.models import ComparedModels
from slerpkit.merge.events import ignore
from slerpkit.messages import SlerpMergeError
from slerpkit.screen.figures import render_finding
from tests.builders import merge
from tests.pictures import RecordingConsole
from tests.test_command_line import run, run_program  # noqa: F401  (run is a fixture)

TASKS = Path(__file__).parent / "harness"
TASK = "slerpmerge_blocks"
needs_harness = pytest.mark.skipif(
    not (importlib.util.find_spec("lm_eval") and importlib.util.find_spec("accelerate")),
    reason='the harness is not installed: pip install "lm-eval[hf]"',
)


def make_reader(folder: Path, seed: int) -> Path:
    """A tiny Llama that reads English bytes, of a family whose members differ by their seed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_demo_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, **sizes))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> Path:
    """A folder with primary, secondary and child."""
    folder = tmp_path_factory.mktemp("family")
    primary, secondary = (make_reader(folder / name, seed) for seed, name in ((1, "primary"), (2, "secondary")))
    merge(primary, secondary, folder / "child", device="cpu")
    return folder


@pytest.fixture
def folder(family, tmp_path) -> Path:
    """The family in the test's own folder."""
    for name in ("primary", "secondary", "child"):
        shutil.copytree(family / name, tmp_path / name)
    return tmp_path


def harness_alone(model: Path, folder: Path) -> dict:
    """What the harness's own command makes of a model, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={model}",
        "--device",
        "cpu",
    ]
    command += ["--tasks", TASK, "--include_path", str(TASKS), "--output_path", str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (folder / "out").rglob("results_*.json")
    return json.loads(path.read_text("utf-8"))["results"][TASK]


# ── With the harness ──


@needs_harness
def test_figures_are_the_harnesss_own_digit_for_digit(run, folder):  # noqa: F811
    outcome = run("--child", "child", "--score", TASK, "--include-path", TASKS, "--device", "cpu", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.err == ""
    (finding,) = outcome.report["findings"]
    scores = finding["figures"]["scores"]
    assert [(each["task"], each["metric"], each["items"]) for each in scores] == [
        (TASK, "acc", 60),
        (TASK, "acc_norm", 60),
    ]
    for role in ("primary", "secondary", "child"):
        theirs = harness_alone(folder / role, folder / f"alone-{role}")
        for each in scores:
            metric = each["metric"]
            assert each["values"][role] == [theirs[f"{metric},none"], theirs[f"{metric}_stderr,none"]]


@needs_harness
def test_scores_join_the_table_the_report_and_the_card(run, folder):  # noqa: F811
    outcome = run("--child", "child", "--score", TASK, "--include-path", TASKS)
    assert outcome.status == 0, outcome.err
    assert "acc_norm" in outcome.out
    assert "child against primary: " in outcome.out
    report = json.loads((folder / "child" / "merge_report.json").read_text("utf-8"))
    value, error = report["findings"][0]["figures"]["scores"][0]["values"]["child"]
    assert f"{value:.4f} ± {error:.4f}" in outcome.out
    assert f"{value:.4f} ± {error:.4f}" in (folder / "child" / "README.md").read_text("utf-8")


@needs_harness
def test_a_task_of_plain_yaml_on_plain_json_needs_no_code(run, folder):  # noqa: F811
    text = (
        (TASKS / "blocks.yaml")
        .read_text("utf-8")
        .replace("!function place.BLOCKS", json.dumps(str(folder / "b.jsonl")))
    )
    (folder / "own").mkdir()
    (folder / "own" / "own.yaml").write_text(text.replace(TASK, "my_own_task"), encoding="utf-8")
    lines = (TASKS / "blocks.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "b.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    outcome = run("--child", "child", "--score", "my_own_task", "--include-path", "own", "--json")
    assert outcome.report["findings"][0]["figures"]["scores"][0]["items"] == 8


@needs_harness
def test_a_task_that_does_not_exist_is_refused_before_anything_is_made(run, folder, monkeypatch):  # noqa: F811
    arguments = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "other", "--yes")
    outcome = run(*arguments, "--score", f"{TASK},slerpmerge_blokcs", "--include-path", TASKS)
    assert outcome.status == 1
    assert "The harness has no task slerpmerge_blokcs" in outcome.err
    assert "Did you mean slerpmerge_blocks" in outcome.err
    assert not (folder / "other").exists()
    outcome = run(*arguments, "--score", TASK, "--include-path", "nowhere")
    assert "The folder of tasks nowhere is not there" in outcome.err


@needs_harness
def test_a_task_whose_data_is_missing_is_one_message_and_the_child_stands(run, folder):  # noqa: F811
    text = (TASKS / "blocks.yaml").read_text("utf-8").replace("!function place.BLOCKS", '"/nowhere/blocks.jsonl"')
    (folder / "own").mkdir()
    (folder / "own" / "own.yaml").write_text(text, encoding="utf-8")
    arguments = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "other", "--yes")
    outcome = run(*arguments, "--score", TASK, "--include-path", "own")
    assert outcome.status == 1
    assert "The harness could not evaluate primary: FileNotFoundError" in outcome.err
    assert "The child stands in" in outcome.err
    assert "Traceback" not in outcome.err
    assert (folder / "other" / "model.safetensors").is_file()


@needs_harness
def test_a_sweep_goes_by_a_task(run, folder):  # noqa: F811
    text = (
        (TASKS / "blocks.yaml")
        .read_text("utf-8")
        .replace("!function place.BLOCKS", json.dumps(str(folder / "b.jsonl")))
    )
    (folder / "own").mkdir()
    (folder / "own" / "own.yaml").write_text(text, encoding="utf-8")
    lines = (TASKS / "blocks.jsonl").read_text("utf-8").splitlines(keepends=True)
    (folder / "b.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    arguments = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "other", "--yes", "--json")
    outcome = run(*arguments, "--sweep", "--score", TASK, "--include-path", "own")
    assert outcome.status == 0, outcome.err
    (finding,) = outcome.report["findings"]
    assert finding["kind"] == "sweep", "and no scores beside it"
    sweep = finding["figures"]
    assert sweep["names"] == [f"{TASK}: acc"]
    best = max(trial["values"][0] for trial in sweep["trials"] if trial["role"] == "child")
    (chosen,) = (trial for trial in sweep["trials"] if trial["role"] == "child" and trial["t"] == sweep["best_t"])
    assert chosen["values"] == [best], "more is better here"


# ── Without it ──


def test_without_the_harness_it_says_what_to_install(run, folder, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    outcome = run("--child", "child", "--score", TASK)
    assert outcome.status == 1
    assert 'pip install "lm-eval[hf]"' in outcome.err


def test_it_is_never_loaded_unasked(folder):
    spy = "import sys, slerpmerge; status = slerpmerge.main(sys.argv[1:]); print('lm_eval' in sys.modules, status)"
    arguments = ["--primary", "primary", "--secondary", "secondary", "--save-dir", "other", "--yes", "--quiet"]
    done = subprocess.run(
        [sys.executable, "-c", spy, *arguments, "--taste", "The"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(slerpmerge.__file__).parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.split() == ["False", "0"], done.stderr


# ── What differences are worth ──


@pytest.mark.parametrize(
    ("better", "worse", "p"),
    [
        (0, 0, 1.0),
        (5, 0, 0.0625),
        (6, 0, 0.03125),
        (0, 6, 0.03125),
        (9, 1, 0.021484375),
        (10, 10, 1.0),
        (15, 5, 0.0414),
    ],
)
def test_the_sign_test_has_the_binomials_values(better, worse, p):
    """From tables of the binomial distribution with p = 1/2, two-sided."""
    assert sign_test(better, worse) == pytest.approx(p, abs=5e-5)


def test_a_difference_within_chance_is_called_noise():
    parent = [0.0] * 20
    assert verdict_on([1.0] * 5 + [0.0] * 15, parent, True)[0].startswith("noise")
    assert verdict_on([1.0] * 6 + [0.0] * 14, parent, True)[0].startswith("better (better on 6, worse on 0 of 20")
    assert verdict_on([1.0] * 6 + [0.0] * 14, parent, False)[0].startswith("worse")


def test_equal_accuracy_can_hide_unequal_items():
    child, parent = [1.0, 0.0] * 10, [0.0, 1.0] * 10
    assert verdict_on(child, parent, True)[0] == "noise (better on 10, worse on 10 of 20; p = 1)"


@pytest.mark.parametrize("width", [60, 100, 160])
def test_the_table_stays_within_its_width(width):
    scored = {
        "task": "a_task_with_a_rather_long_name",
        "metric": "acc_norm",
        "items": 20,
        "values": {"primary": [0.5, 0.1], "secondary": [0.25, None], "child": [0.75, 0.05]},
        "verdicts": {
            "primary": "better (better on 9, worse on 1 of 20; p = 0.021)",
            "secondary": "noise (better on 1, worse on 0 of 20; p = 1)",
        },
    }
    console = RecordingConsole(width)
    console.print(render_finding(console, score_finding(["a_task"], [scored], "So and so.")))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    joined = "".join(text.split())
    for part in ("0.7500±0.0500", "0.2500", "noise(betteron1"):
        assert part.replace("±", "±") in joined or width == 60


def test_a_figure_that_is_no_mean_of_its_items_is_not_judged():
    """A perplexity over words is known for the whole alone; the items hold something else under its name."""
    samples = [{"doc_id": n, "filter": "none", "perplexity": -float(n), "acc": float(n % 2)} for n in range(4)]
    result = {"results": {"x": {"perplexity,none": 4.48, "acc,none": 0.5}}, "samples": {"x": samples}}
    assert list(judged_metrics(result)) == [("x", "acc", "none")]


def test_a_harness_without_figures_for_items_is_refused(monkeypatch, folder):
    monkeypatch.setattr("slerpkit.evaluation.harness.find_tasks", lambda *_: (["x"], None))
    monkeypatch.setattr("slerpkit.evaluation.harness.load_harness", lambda: None)
    monkeypatch.setattr(
        "slerpkit.evaluation.harness.harness_results", lambda *_: {"results": {"x": {"alias": "x"}}, "samples": {}}
    )
    roles = ("primary", "secondary", "child")
    models = ComparedModels(tuple((role, folder / role) for role in roles), "cpu")
    with pytest.raises(SlerpMergeError, match="no figure that is a mean over their items"):
        score(models, ["x"], None, ignore)
