"""The command line: flags, exit statuses, the report, and what it says when something is wrong."""

from __future__ import annotations

import ast
import errno
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import slerpmerge
from slerpkit import __version__
from slerpkit.lazy import load_modules
from slerpkit.merge.plan import MergePlan, plan_merge
from slerpkit.messages import SlerpMergeError
from slerpkit.schedule import BLENDS, parse_blend
from slerpkit.screen.flag_values import format_size, parse_size
from slerpkit.screen.flags import FLAG_GROUPS, answers_given, build_parser, equivalent_command
from tests.builders import (
    LLAMA_CONFIG,
    add_tokenizer,
    copy_model,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    make_real_pair,
    reference_slerp,
    replace_tensors,
    units_of_last_place,
)
from tests.conftest import fingerprint

REPORT_KEYS = {
    "child", "tensors", "slerped", "lerped", "copied", "bytes", "seconds", "sync_seconds", "total_seconds",
    "bytes_per_second", "tokenizer_from", "resolved", "notices", "warnings",
}  # fmt: skip

# Runs a script and tells on stderr which of the slow libraries it has loaded.
SPY = """
import os, runpy, sys
del sys.argv[0]
sys.path.insert(0, os.path.dirname(sys.argv[0]))  # as Python does for a script
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    slow = {"torch", "transformers", "numpy", "rich", "questionary"}
    print("loaded:", *sorted(slow & set(sys.modules)), file=sys.stderr)
"""


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str

    @property
    def report(self) -> dict:
        """The one JSON object that is alone on stdout."""
        return json.loads(self.out)


@pytest.fixture
def run(capsys, monkeypatch, tmp_path) -> Callable[..., Outcome]:
    """`run("--primary", ...)`: the tool in this process, in tmp_path, on a wide screen that is no terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str | Path) -> Outcome:
        try:
            status = slerpmerge.main([str(argument) for argument in arguments])
        except SystemExit as end:  # argparse's way to refuse
            status = end.code
        return Outcome(status, *capsys.readouterr())

    return call


@pytest.fixture
def pair(tmp_path, parents) -> tuple[Path, Path]:
    """Two tiny parents at tmp_path/primary and tmp_path/secondary, which no test may change."""
    folders = make_pair(tmp_path)
    parents.watch(*folders)
    return folders


def run_program(*arguments: str | Path, folder: Path, spy: bool = False, **environment: str) -> Outcome:
    """The tool as a program of its own."""
    program = ["-c", SPY] if spy else []
    done = subprocess.run(
        [sys.executable, *program, slerpmerge.__file__, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
    )
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    return Outcome(done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding))


MERGE = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "child", "--yes")


class TestMerge:
    def test_a_child_is_made(self, run, pair, tmp_path):
        outcome = run(*MERGE)
        assert outcome.status == 0
        assert outcome.err == ""
        assert load_tensors(tmp_path / "child").keys() == load_tensors(pair[0]).keys()
        assert "21 slerped" in outcome.out
        assert str(tmp_path / "child") in outcome.out
        assert "%" not in outcome.out, "no progress is told of so short a merge"

    def test_a_flag_may_hold_quotes_tilde_and_variables(self, run, pair, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        monkeypatch.setenv("MODELS", str(tmp_path))
        folders = ("--primary", "'~/primary/'", "--secondary", "$MODELS/secondary", "--save-dir", "~/below/child")
        assert run(*folders, "--yes").status == 0
        assert (tmp_path / "below" / "child" / "model.safetensors").is_file()

    @pytest.mark.parametrize("flag", ["--primary", "--save-dir", "--recipe", "--perplexity"])
    def test_the_home_of_nobody_is_refused_and_not_made(self, run, pair, tmp_path, flag):
        outcome = run(*MERGE, flag, "~nobody-of-that-name/there")
        assert_refused(outcome, "~nobody-of-that-name is nobody's home here", "", status=2)
        assert {path.name for path in tmp_path.iterdir()} == {"primary", "secondary"}

    @pytest.mark.skipif(os.name == "nt", reason="names end otherwise there")
    @pytest.mark.parametrize("name", ["my$HOME", "trailing ", r"back\ slash", "~"])
    def test_a_folder_that_is_there_is_meant_as_it_is_written(self, run, pair, tmp_path, name):
        copy_model(pair[1], tmp_path / name)
        assert run("--primary", "primary", "--secondary", name, "--save-dir", "child", "--yes").status == 0

    def test_a_comma_list_is_a_gradient_over_the_layers(self, run, pair, tmp_path):
        assert run(*MERGE, "--t", "0, 1").status == 0
        child, primary, secondary = (load_tensors(folder) for folder in (tmp_path / "child", *pair))
        first, last = (f"model.layers.{layer}.self_attn.q_proj.weight" for layer in (0, 1))
        assert torch.equal(child[first], primary[first])
        assert torch.equal(child[last], secondary[last])
        assert torch.equal(child["lm_head.weight"], primary["lm_head.weight"])

    @pytest.mark.parametrize("text", [*(name for name, _, _ in BLENDS), "att", "R", " Primary  at", "lean to s"])
    def test_t_takes_every_blend_that_the_prompt_names(self, text):
        given = answers_given(build_parser().parse_args([*MERGE, "--t", text]))
        assert given.blend.schedule == parse_blend(text)
        shown = shlex.split(equivalent_command(given.recipe, given.options))
        (name,) = (name for name, _, _ in BLENDS if name.startswith(" ".join(text.lower().split())))
        assert shown[shown.index("--t") + 1] == name
        assert answers_given(build_parser().parse_args(shown[2:])).blend == given.blend

    def test_t_takes_filters_as_the_prompt_does(self):
        arguments = build_parser().parse_args([*MERGE, "--t", "self_attn=0,1 mlp = 1, 0 0.5"])
        assert answers_given(arguments).blend.schedule == parse_blend("self_attn=0,1 mlp=1,0 0.5")

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("lean", "could be lean to primary or lean to secondary"),
            ("task vectors", "--base MODEL"),
            ("find", "--sweep --perplexity FILE"),
            ("mine.yaml", "--recipe FILE"),
            ("even so", "attention and mlp"),
        ],
    )
    def test_a_t_that_is_none_says_what_would_be(self, run, pair, text, words):
        assert_refused(run(*MERGE, "--t", text), words, "--help", status=2)

    @pytest.mark.parametrize("t", [(), ("--t", "0.25"), ("--t", "ramp")], ids=str)
    def test_yes_takes_the_proposed_save_directory_and_says_which(self, run, pair, tmp_path, t):
        name = {"0.25": "primary-secondary-slerp-0.25", "ramp": "primary-secondary-slerp"}.get(
            t[-1] if t else "", "primary-secondary-slerp-0.5"
        )
        for expected in (name, f"{name}-2"):
            outcome = run(*MERGE[:4], "--yes", *t)
            assert outcome.status == 0, outcome.err
            assert outcome.out.startswith(f"The child goes to {expected}.\n")
            assert (tmp_path / expected / "model.safetensors").is_file()

    def test_a_dry_run_takes_the_proposed_save_directory(self, run, pair, tmp_path):
        assert run(*MERGE[:4], "--dry-run", "--json").report["child"] == "primary-secondary-slerp-0.5"
        assert {path.name for path in tmp_path.iterdir()} == {"primary", "secondary"}

    def test_max_shard_size_cuts_the_child(self, run, pair, tmp_path):
        assert run(*MERGE, "--max-shard-size", "4KB").status == 0
        shards = sorted(path.name for path in (tmp_path / "child").glob("*.safetensors"))
        count = len(shards)
        assert count >= 3
        assert shards == [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    def test_dtype_and_method_are_followed(self, run, pair, tmp_path):
        outcome = run(*MERGE, "--json", "--dtype", "float32", "--method", "lerp")
        assert (outcome.report["slerped"], outcome.report["lerped"]) == (0, 21)
        assert {tensor.dtype for tensor in load_tensors(tmp_path / "child").values()} == {torch.float32}

    @pytest.mark.parametrize("place", ["[red]primary", "a[/red]", "[bold]b[/bold", "[link=x]", "a:warning:b"])
    def test_markup_in_a_folder_name_is_shown_as_it_is(self, run, pair, tmp_path, place):
        copy_model(pair[0], tmp_path / place)
        outcome = run("--primary", place, "--secondary", "secondary", "--save-dir", f"{place}-child", "--yes")
        assert outcome.status == 0
        assert f"{Path(place).name}: LlamaForCausalLM" in outcome.out
        assert f"{place}-child" in outcome.out

    def test_overwrite_replaces_a_model_and_nothing_else_does(self, run, pair, tmp_path):
        assert run(*MERGE).status == 0
        before = fingerprint(tmp_path / "child")
        refused = run(*MERGE, "--t", "0.3")
        assert refused.status == 1
        assert "--overwrite" in refused.err
        assert fingerprint(tmp_path / "child") == before
        assert run(*MERGE, "--t", "0.3", "--overwrite").status == 0
        after = fingerprint(tmp_path / "child")
        assert after.keys() == before.keys()
        assert after["model.safetensors"] != before["model.safetensors"]
        assert {path.name for path in tmp_path.iterdir()} == {"primary", "secondary", "child"}

    def test_overwrite_does_not_replace_a_folder_that_is_no_model(self, run, pair, tmp_path):
        (tmp_path / "child").mkdir()
        (tmp_path / "child" / "thesis.txt").write_text("years of work")
        outcome = run(*MERGE, "--overwrite")
        assert outcome.status == 1
        assert "not a model's" in outcome.err
        assert (tmp_path / "child" / "thesis.txt").read_text() == "years of work"


class TestExtrapolate:
    @pytest.mark.parametrize(("t", "told"), [("1.5", "1.5"), ("-0.1", "-0.1"), ("0.2,2", "2"), ("mlp=1.25", "1.25")])
    def test_t_outside_0_to_1_needs_the_flag(self, run, pair, tmp_path, t, told):
        rest = ["--t=0.5"] if "=" in t else []
        assert_refused(run(*MERGE, f"--t={t}", *rest), f"t = {told} lies outside 0 to 1", "--extrapolate", status=2)
        assert not (tmp_path / "child").exists()

    @pytest.mark.parametrize("t", [1.5, -0.25])
    def test_with_it_the_child_lies_beyond_a_parent(self, run, pair, tmp_path, t):
        assert run(*MERGE, f"--t={t}", "--extrapolate").status == 0
        child, primary, secondary = (load_tensors(folder) for folder in (tmp_path / "child", *pair))
        for name, tensor in child.items():
            exact = reference_slerp(primary[name], secondary[name], t)
            assert units_of_last_place(tensor.flatten(), exact.flatten()) <= 0.51, name


class TestBlend:
    FILTERS = ("--t", "q_proj=0", "--t", "0", "--t", "self_attn=1", "--t", "mlp=0,1")

    def test_the_first_filter_that_matches_wins_and_the_bare_value_is_for_the_rest(self, run, pair, tmp_path):
        assert run(*MERGE, *self.FILTERS).status == 0
        child, primary, secondary = (load_tensors(folder) for folder in (tmp_path / "child", *pair))
        for name, tensor in child.items():
            of_secondary = ("self_attn" in name and "q_proj" not in name) or "layers.1.mlp" in name
            assert torch.equal(tensor, (secondary if of_secondary else primary)[name]), name

    def test_filters_alone_are_refused_with_a_tensor_that_none_matches(self, run, pair, tmp_path):
        outcome = run(*MERGE, "--t", "self_attn=1", "--t", "mlp=0")
        assert_refused(outcome, "no value for the tensor", "without a filter")
        named = outcome.err.partition("for the tensor ")[2].partition(". ")[0].split()[0].rstrip(".")
        assert named in load_tensors(pair[0])
        assert not {"self_attn", "mlp"} & set(named.split("."))
        assert not (tmp_path / "child").exists()

    def test_a_second_bare_value_is_refused(self, run, pair, tmp_path):
        """Only the first would be used."""
        assert run(*MERGE, "--t", "0.3", "--t", "0.6").status == 2
        assert not (tmp_path / "child").exists()

    def test_a_dry_run_prints_t_over_the_layers(self, run, pair, tmp_path):
        outcome = run(*MERGE, *self.FILTERS, "--dry-run")
        assert outcome.status == 0
        rows = [line.strip("│ ").split() for line in outcome.out.partition("t of every tensor")[2].splitlines()]
        assert ["model.layers", "mlp", "▁█", "0", "to", "1"] in rows
        assert ["model.layers", "other", "▁▁", "0"] in rows
        assert not (tmp_path / "child").exists()

    def test_a_dry_run_gives_t_of_each_tensor_as_json(self, run, pair, tmp_path):
        report = run(*MERGE, *self.FILTERS, "--dry-run", "--json").report
        assert report["t"].keys() == load_tensors(pair[0]).keys()
        assert report["t"]["model.layers.0.self_attn.q_proj.weight"] == 0
        assert report["t"]["model.layers.0.self_attn.k_proj.weight"] == 1
        assert [report["t"][f"model.layers.{layer}.mlp.up_proj.weight"] for layer in (0, 1)] == [0, 1]
        assert report["t"]["lm_head.weight"] == 0

    @pytest.mark.parametrize("method", [(), ("--method", "slerp-norm"), ("--method", "lerp")], ids=str)
    def test_granularity_goes_with_nuslerp_alone(self, run, pair, tmp_path, method):
        outcome = run(*MERGE, "--granularity", "row", *method)
        assert_refused(outcome, "'row' goes with the method nuslerp alone", "--method nuslerp", status=2)
        assert not (tmp_path / "child").exists()

    def test_nuslerp_takes_each_row_as_a_vector(self, run, pair, tmp_path):
        outcomes = [run(*MERGE, "--method", "nuslerp", "--granularity", g, "--overwrite") for g in ("tensor", "row")]
        assert [outcome.status for outcome in outcomes] == [0, 0]
        assert "nuslerp by row" in outcomes[1].out


class TestBase:
    @pytest.fixture
    def base(self, tmp_path, parents) -> Path:
        folder = make_checkpoint(tmp_path / "origin", llama_tensors(3))
        parents.watch(folder)
        return folder

    def test_what_was_learned_since_the_base_is_blended_and_added_to_it(self, run, pair, base, tmp_path):
        outcome = run(*MERGE, "--base", "origin", "--t", "0.25")
        assert outcome.status == 0
        assert "slerp of task vectors, t = 0.25" in outcome.out
        child, *others = (load_tensors(folder) for folder in (tmp_path / "child", *pair, base))
        for name, tensor in child.items():
            left, right, base_tensor = (tensors[name].double() for tensors in others)
            exact = base_tensor + reference_slerp(left - base_tensor, right - base_tensor, 0.25)
            assert torch.allclose(tensor.double(), exact, rtol=2**-8, atol=1e-6), name

    def test_as_json(self, run, pair, base):
        report = run(*MERGE, "--base", "origin", "--json").report
        assert report.keys() >= REPORT_KEYS
        assert (report["tensors"], report["slerped"]) == (21, 21)

    def test_a_base_that_is_not_there(self, run, pair, tmp_path):
        assert_refused(run(*MERGE, "--base", "nowhere"), "nowhere does not exist", "config.json")
        assert not (tmp_path / "child").exists()

    @pytest.mark.parametrize("flags", [(), ("--base", "origin")], ids=["without", "with"])
    def test_near_parallel_parents_get_the_advice_to_name_it(self, run, tmp_path, flags):
        base_tensor = llama_tensors(3, torch.float32)
        make_checkpoint(tmp_path / "origin", base_tensor)
        for seed, name in enumerate(("primary", "secondary")):
            drift = llama_tensors(seed, torch.float32)
            make_checkpoint(tmp_path / name, {key: base_tensor[key] + 0.001 * drift[key] for key in base_tensor})
        outcome = run(*MERGE, *flags)
        assert outcome.status == 0
        text = " ".join(outcome.out.replace("│", " ").split())
        assert ("note Most tensors lie less than 1.8 degrees apart" in text) == (not flags)
        assert ("name the base (`task vectors` at Blend, or --base)" in text) == (not flags)

    def test_parents_far_apart_get_no_such_advice(self, run, pair):
        assert "--base" not in run(*MERGE).out


class TestRecipe:
    TEXT = (
        "merge_method: slerp\nbase_model: ../primary\nmodels:\n- model: ../primary\n- model: ../secondary\n"
        "parameters:\n  t:\n  - filter: mlp\n    value: 1\n  - value: 0\n"
    )
    ARGUMENTS = ("--recipe", "recipes/mine.yaml", "--save-dir", "child", "--yes")

    @pytest.fixture
    def recipe(self, tmp_path) -> Path:
        (tmp_path / "recipes").mkdir()
        (tmp_path / "recipes" / "mine.yaml").write_text(self.TEXT)
        return tmp_path / "recipes" / "mine.yaml"

    def test_its_models_stand_relative_to_it_and_its_t_is_followed(self, run, pair, recipe, tmp_path):
        outcome = run(*self.ARGUMENTS)
        assert (outcome.status, outcome.err) == (0, "")
        child, primary, secondary = (load_tensors(folder) for folder in (tmp_path / "child", *pair))
        for name, tensor in child.items():
            assert torch.equal(tensor, (secondary if "mlp" in name else primary)[name]), name

    def test_the_childs_own_recipe_makes_the_same_bits_again(self, run, pair, tmp_path):
        assert run(*MERGE, "--t", "mlp=0.2,0.9", "--t", "0.4", "--method", "slerp-norm").status == 0
        assert run("--recipe", "child/merge_recipe.yaml", "--save-dir", "again", "--yes").status == 0
        weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("child", "again")]
        assert weights[0] == weights[1]

    @pytest.mark.parametrize(
        ("flag", "value"),
        [("--t", "0.5"), ("--primary", "primary"), ("--base", "primary"), ("--method", "lerp")],
    )
    def test_a_flag_that_says_what_it_says_is_refused(self, run, pair, recipe, tmp_path, flag, value):
        outcome = run(*self.ARGUMENTS, flag, value)
        assert_refused(outcome, f"already says what {flag} would", "Leave out", status=2)
        assert not (tmp_path / "child").exists()

    def test_other_flags_go_before_it(self, run, pair, recipe, tmp_path):
        recipe.write_text(self.TEXT + "dtype: bfloat16\n")
        assert run(*self.ARGUMENTS, "--dtype", "float32").status == 0
        assert {tensor.dtype for tensor in load_tensors(tmp_path / "child").values()} == {torch.float32}

    def test_a_fault_is_told_with_its_line(self, run, pair, recipe, tmp_path):
        recipe.write_text(self.TEXT.replace("slerp", "slurp"))
        assert_refused(run(*self.ARGUMENTS), "mine.yaml, line 1: the method 'slurp'", "Did you mean slerp?")
        assert not (tmp_path / "child").exists()


class TestJson:
    def test_the_report_is_alone_on_stdout_and_true(self, run, pair, tmp_path):
        outcome = run(*MERGE, "--json")
        assert outcome.status == 0
        report = outcome.report
        assert report.keys() >= REPORT_KEYS
        assert report["child"] == str(tmp_path / "child")
        assert (report["tensors"], report["slerped"], report["lerped"], report["copied"]) == (21, 21, 0, 0)
        tensors = load_tensors(tmp_path / "child").values()
        assert report["bytes"] == sum(tensor.nbytes for tensor in tensors)
        assert 0 < report["seconds"] <= report["total_seconds"]
        assert report["bytes_per_second"] == pytest.approx(report["bytes"] / report["seconds"])
        assert report["sync_seconds"] >= 0
        assert report["tokenizer_from"] is None
        assert report["resolved"] == report["notices"] == report["warnings"] == []

    def test_differences_and_warnings_are_in_it(self, run, tmp_path):
        primary = llama_tensors(1)
        primary["model.norm.weight"][0] = torch.inf
        make_checkpoint(tmp_path / "primary", primary, {**LLAMA_CONFIG, "max_position_embeddings": 128})
        add_tokenizer(make_checkpoint(tmp_path / "secondary", llama_tensors(2, torch.float16)))
        report = run(*MERGE, "--json").report
        assert [resolved["subject"] for resolved in report["resolved"]] == ["dtype of 21 tensors"]
        assert "max_position_embeddings" in [notice["subject"] for notice in report["notices"]]
        assert report["tokenizer_from"] == "secondary"
        assert len(report["warnings"]) == 1
        assert report["warnings"][0].startswith("model.norm.weight")

    def test_a_dry_run_reports_its_plan(self, run, pair, tmp_path):
        outcome = run(*MERGE, "--json", "--dry-run")
        assert outcome.status == 0
        assert outcome.report["tensors"] == 21
        assert outcome.report["files"] == ["model.safetensors"]
        assert outcome.report["disk_needed_bytes"] > outcome.report["bytes"] > 0
        assert not (tmp_path / "child").exists()

    def test_a_refusal_leaves_stdout_empty(self, run, pair):
        outcome = run(*MERGE, "--json", "--primary", "nowhere")
        assert (outcome.status, outcome.out) == (1, "")
        assert "nowhere does not exist" in outcome.err


class TestQuiet:
    def test_nothing_is_printed(self, run, pair, tmp_path):
        assert run(*MERGE, "--quiet") == Outcome(0, "", "")
        assert (tmp_path / "child" / "model.safetensors").is_file()

    def test_but_errors_are(self, run, pair):
        outcome = run(*MERGE, "--quiet", "--secondary", "nowhere")
        assert (outcome.status, outcome.out) == (1, "")
        assert "nowhere does not exist" in outcome.err


@pytest.mark.skipif(os.name == "nt", reason="a pipe has no such error there")
@pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}], ids=["lines", "live"])
@pytest.mark.parametrize("flag", [(), ("--json",)], ids=["words", "json"])
def test_a_merge_whose_output_nobody_reads_goes_on_to_its_child(pair, tmp_path, flag, variables):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, slerpmerge.__file__, *MERGE, *flag],
        cwd=tmp_path,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    os.close(writing)
    assert done.returncode == 0
    assert (tmp_path / "child" / "model.safetensors").exists()
    unread = "Nobody reads the output any more; the run goes on without it."
    assert unread in done.stderr.splitlines()
    assert flag or done.stderr.splitlines() == [unread, f"The child stands in {tmp_path / 'child'}."]
    assert "roken pipe" not in done.stderr


CLOSED_AND_FULL = [
    pytest.param("<&-", 0, id="no-stdin"),
    pytest.param(">&-", 0, id="no-stdout"),
    pytest.param("2>&-", 0, id="no-stderr"),
    pytest.param("<&- >&- 2>&-", 0, id="none"),
    pytest.param(">&- --json", 0, id="no-stdout-json"),
    pytest.param(">/dev/full", 0, id="full"),
    pytest.param("2>/dev/full", 0, id="full-stderr"),
    pytest.param(">/dev/full --json", 1, id="full-json"),
]


def run_in_shell(arguments: str, folder: Path, **environment: str) -> Outcome:
    """The tool as a shell starts it, with redirections."""
    done = subprocess.run(
        f"'{sys.executable}' '{slerpmerge.__file__}' {arguments}",
        shell=True,
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
class TestStreamsThatAreClosedOrFull:
    @pytest.mark.parametrize(("redirection", "status"), CLOSED_AND_FULL)
    @pytest.mark.parametrize("variables", [{}, {"FORCE_COLOR": "1"}], ids=["lines", "live"])
    def test_the_merge_goes_on_to_its_child(self, pair, tmp_path, redirection, status, variables):
        outcome = run_in_shell(f"{' '.join(MERGE)} {redirection}", tmp_path, **variables)
        assert outcome.status == status
        assert (tmp_path / "child" / "model.safetensors").exists()
        assert "Traceback" not in outcome.err

    def test_a_report_that_found_no_room_is_said_to_be_lost_and_the_child_to_stand(self, pair, tmp_path):
        outcome = run_in_shell(f"{' '.join(MERGE)} --json >/dev/full", tmp_path)
        words = " ".join(outcome.err.split())
        assert "The JSON object could not be written to stdout: No space left" in words
        assert f"The child stands in {tmp_path / 'child'}" in words

    @pytest.mark.parametrize("redirection", ["2>/dev/full", "<&- >&- 2>&-"])
    @pytest.mark.parametrize(("arguments", "status"), [("--frobnicate", 2), ("--primary no --yes --inspect", 2)])
    def test_a_refusal_that_nobody_can_read_keeps_its_status(self, tmp_path, arguments, status, redirection):
        outcome = run_in_shell(f"{arguments} {redirection}", tmp_path)
        assert (outcome.status, outcome.err) == (status, "")

    def test_without_stdin_each_missing_flag_is_named(self, tmp_path):
        outcome = run_in_shell("<&-", tmp_path)
        assert outcome.status == 2
        assert "There is no terminal to ask at; give --primary" in outcome.err


# Runs a script, and sends it Ctrl-C while it imports a module.
INTERRUPTED_IMPORT = """
import os, runpy, signal, sys
del sys.argv[0]
name = sys.argv.pop(0)
class Interruption:
    def find_spec(self, module, path, target=None):
        if module == name:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interruption())
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.skipif(os.name == "nt", reason="there a process cannot send itself Ctrl-C")
@pytest.mark.parametrize("module", ["slerpkit.lazy", "argparse", "slerpkit.screen.terminal", "rich.console"])
def test_ctrl_c_while_the_program_loads_is_one_line(pair, tmp_path, module):
    command = [sys.executable, "-c", INTERRUPTED_IMPORT, module, slerpmerge.__file__, *MERGE]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nStopped. Nothing was written.\n")


class TestWithoutTorch:
    """What needs no arithmetic answers before torch could be loaded."""

    @pytest.mark.parametrize(
        ("arguments", "status", "loaded"),
        [
            (("--version",), 0, set()),
            (("--help",), 0, set()),
            ((*MERGE, "--dry-run"), 0, {"numpy", "rich"}),
            ((*MERGE, "--primary", "nowhere"), 1, {"numpy", "rich"}),
        ],
        ids=["version", "help", "dry-run", "refusal"],
    )
    def test_torch_is_not_loaded(self, pair, tmp_path, arguments, status, loaded):
        """Neither torch nor transformers; questionary only where something is asked."""
        before = fingerprint(tmp_path)
        outcome = run_program(*arguments, folder=tmp_path, spy=True)
        assert outcome.status == status
        told = outcome.err.splitlines()[-1].split()
        assert told[0] == "loaded:"
        assert set(told[1:]) <= loaded
        assert fingerprint(tmp_path) == before
        assert {path.name for path in tmp_path.iterdir()} == {"primary", "secondary"}

    def test_help_is_in_groups_with_three_examples(self, run):
        outcome = run("--help")
        places = [outcome.out.index(f"\n{title}:\n") for title in FLAG_GROUPS]
        assert places == sorted(places)
        assert outcome.out.count("  python slerpmerge.py --") == 3
        for line in re.findall(r"^  python slerpmerge.py (.*)$", outcome.out, re.MULTILINE):
            build_parser().parse_args(shlex.split(line))

    def test_the_version_is_printed(self, run):
        assert run("--version") == Outcome(0, f"slerpmerge {__version__}\n", "")

    def test_a_dry_run_prints_the_plan(self, run, pair):
        outcome = run("--primary", "primary", "--secondary", "secondary", "--save-dir", "child", "--dry-run")
        assert outcome.status == 0
        for part in ("Plan", "LlamaForCausalLM", "child", "t = 0.5", "21 to slerp", "of disk", "tokenizer"):
            assert part in outcome.out


class TestStarting:
    """The script finds the house behind it wherever it is started from."""

    def test_through_a_link_to_the_script(self, pair, tmp_path):
        if os.name == "nt":
            pytest.skip("making a link needs a privilege on Windows")
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin" / "merge").symlink_to(slerpmerge.__file__)
        done = subprocess.run([sys.executable, "bin/merge", *MERGE], cwd=tmp_path, capture_output=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, b"")
        assert (tmp_path / "child" / "model.safetensors").is_file()

    def test_from_a_folder_that_cannot_be_written_to(self, pair, tmp_path):
        folder = tmp_path / "locked"
        folder.mkdir(mode=0o555)
        names = ("--primary", "../primary", "--secondary", "../secondary", "--save-dir", "../child", "--yes")
        assert run_program(*names, folder=folder).status == 0
        assert (tmp_path / "child" / "model.safetensors").is_file()
        assert list(folder.iterdir()) == []

    def test_from_a_copy_that_cannot_be_written_to(self, pair, tmp_path):
        """Python then keeps no compiled modules."""
        source = Path(slerpmerge.__file__).parent
        copy = tmp_path / "copy"
        shutil.copytree(source / "slerpkit", copy / "slerpkit", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(slerpmerge.__file__, copy)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o555 if path.is_dir() else 0o444)
        command = [sys.executable, copy / "slerpmerge.py", *MERGE]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
        for path in (copy, *copy.rglob("*")):
            path.chmod(0o755)  # so that the test's own folder can be removed
        assert (done.returncode, done.stderr) == (0, b"")

    @pytest.mark.parametrize("fault", ["raise ImportError('it is not there')", "1 / 0", "def broken("])
    @pytest.mark.parametrize("package", ["rich", "colorama", "numpy", "yaml", "tokenizers", "filelock"])
    def test_without_a_package_it_says_what_to_install_before_anything_is_made(self, pair, tmp_path, package, fault):
        (tmp_path / "broken" / package).mkdir(parents=True)
        (tmp_path / "broken" / package / "__init__.py").write_text(fault)
        outcome = run_program(*MERGE, folder=tmp_path, PYTHONPATH=str(tmp_path / "broken"))
        assert outcome.status == 1
        assert "A package cannot be loaded: " in outcome.err
        assert "Run: pip install -r requirements.txt" in outcome.err
        assert len(outcome.err.splitlines()) <= 2
        assert not outcome.out.count("Merging")
        assert not (tmp_path / "child").exists()
        assert run_program("--version", folder=tmp_path, PYTHONPATH=str(tmp_path / "broken")).status == 0

    def test_half_a_package_is_none(self, tmp_path, monkeypatch):
        """As an uninstallation leaves it that could not remove a file."""
        (tmp_path / "left_over" / "data").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        with pytest.raises(ImportError, match="left_over: its folder holds no package"):
            load_modules("left_over")

    def test_an_older_python_is_told_which_it_should_be(self, tmp_path):
        source = Path(slerpmerge.__file__)
        compile(source.read_text("utf-8"), source, "exec", ast.PyCF_ONLY_AST, _feature_version=7)  # it gets that far
        code = f"import runpy, sys; sys.version_info = (3, 9, 6); runpy.run_path({str(source)!r}, run_name='__main__')"
        command = [sys.executable, "-c", code, "--version"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert done.stderr.startswith("slerpmerge needs Python 3.10 or newer; this is ")
        assert len(done.stderr.splitlines()) == 1


class TestWrongUsage:
    @pytest.mark.parametrize(
        ("given", "missing"),
        [
            ((), ["--primary", "--secondary", "--save-dir", "--t", "--yes"]),
            (("--yes",), ["--primary", "--secondary"]),
            (("--dry-run", "--primary", "primary"), ["--secondary"]),
            ((*MERGE[:4], "--sweep", "--perplexity", "x"), ["--yes"]),
            (MERGE[:-1], ["--t", "--yes"]),
            ((*MERGE[:-1], "--t", "0.5"), ["--yes"]),
            ((*MERGE[:2], "--json", "--yes"), ["--secondary"]),
        ],
        ids=["nothing", "yes", "dry-run", "sweep", "folders", "all-but-yes", "json"],
    )
    def test_without_a_terminal_each_missing_flag_is_named(self, run, pair, given, missing):
        outcome = run(*given)
        assert (outcome.status, outcome.out) == (2, "")
        flags = ("--primary", "--secondary", "--save-dir", "--t", "--yes")
        named = outcome.err.partition("give ")[2].partition("(")[0].replace(",", " ").replace(".", " ").split()
        assert [flag for flag in flags if flag in named] == missing

    @pytest.mark.parametrize("t", ["half", "nan", "inf", "", "0.2,,0.4", "0.5;0.6", "mlp=", "mlp=half"])
    def test_t_that_is_no_number(self, run, pair, t):
        outcome = run(*MERGE, f"--t={t}")
        assert outcome.status == 2
        assert "is not a number" in outcome.err
        assert "--t" in outcome.err

    @pytest.mark.parametrize(
        "arguments",
        [
            ("--method", "magic"),
            ("--dtype", "int8"),
            ("--device", "abacus"),
            ("--threads", "two"),
            ("--threads", "-1"),
            ("--dot-threshold", "1.5"),
            ("--dot-threshold", "nan"),
            ("--epsilon", "-1"),
            ("--max-shard-size", "many"),
            ("--frobnicate",),
        ],
        ids=" ".join,
    )
    def test_a_flag_that_cannot_be_meant(self, run, pair, tmp_path, arguments):
        outcome = run(*MERGE, *arguments)
        assert_refused(outcome, arguments[0], "--help lists every flag", status=2)
        assert len(outcome.err.splitlines()) == 2
        assert not (tmp_path / "child").exists()

    def test_without_the_package_that_draws_messages_it_is_told_all_the_same(self, tmp_path):
        code = (
            "import sys; sys.modules['rich'] = None; import slerpmerge; sys.exit(slerpmerge.main(['--threads', '0']))"
        )
        environment = {**os.environ, "PYTHONPATH": str(Path(slerpmerge.__file__).parent)}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=120)
        assert done.returncode == 2
        assert done.stderr.startswith(b"Argument --threads: '0' is not a number of threads")

    @pytest.mark.parametrize("address", ["https://example.org/ada/finch", "https://huggingface.co/datasets/ada/finch"])
    def test_an_address_of_no_model_says_what_to_give(self, run, address):
        outcome = run("--primary", address)
        assert outcome.status == 2
        assert f"{address} is an address, and no model" in outcome.err
        assert "Give a folder, or the org/name of a model" in outcome.err

    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("5GB", 5_000_000_000),
            ("500MB", 500_000_000),
            ("2GiB", 2 * 1024**3),
            ("1.5 kb", 1500),
            ("1T", 10**12),
            ("300k", 300_000),
            (" 12345678 ", 12_345_678),
            ("1000000", 1_000_000),
            ("64B", 64),
        ],
    )
    def test_sizes(self, text, size):
        assert parse_size(text) == size

    @pytest.mark.parametrize("text", ["", "GB", "-1GB", "5XB", "5GBs", "0", "0MB", "0.0001KB", "1e3", "five", "5,5GB"])
    def test_what_is_no_size(self, text):
        with pytest.raises(SlerpMergeError, match="is not a size"):
            parse_size(text)

    @pytest.mark.parametrize("number", ["3", "1.5", "999999", " 5000 "])
    def test_a_bare_number_that_can_hardly_mean_bytes_is_refused_with_what_may_be_meant(self, run, pair, number):
        outcome = run(*MERGE, "--max-shard-size", number)
        assert_refused(outcome, f"Did you mean {number.strip()}GB?", "--help", status=2)

    @pytest.mark.parametrize("size", [1, 64, 999, 5000, 12_345, 1_500_000, 2_000_000, 5_000_000_000, 2 * 1024**3])
    def test_a_size_in_the_shown_command_is_read_as_it_was(self, size):
        assert parse_size(format_size(size)) == size


# ── Bad input: each function spoils what make_pair has made below a folder, and returns flags that differ ──


def missing_folder(folder: Path) -> list[str]:
    return ["--secondary", "nowhere"]


def file_as_parent(folder: Path) -> list[str]:
    (folder / "notes.txt").touch()
    return ["--secondary", "notes.txt"]


def link_in_a_ring(folder: Path) -> str:
    if os.name == "nt":
        pytest.skip("the system has other words for it there")
    (folder / "ring").symlink_to("ring")
    return "ring"


def parent_named_at_length(folder: Path) -> list[str]:
    if os.name == "nt":
        pytest.skip("the system has other words for it there")
    return ["--secondary", "x" * 300]


def parent_links_in_a_ring(folder: Path) -> list[str]:
    return ["--secondary", link_in_a_ring(folder)]


def no_weights(folder: Path) -> list[str]:
    (folder / "secondary" / "model.safetensors").unlink()
    return []


def no_config(folder: Path) -> list[str]:
    (folder / "secondary" / "config.json").unlink()
    return []


def broken_config(folder: Path) -> list[str]:
    (folder / "secondary" / "config.json").write_text('{"model_type": "llama",')
    return []


def truncated_weights(folder: Path) -> list[str]:
    path = folder / "secondary" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return []


def empty_weights(folder: Path) -> list[str]:
    (folder / "secondary" / "model.safetensors").write_bytes(b"")
    return []


def lying_header(folder: Path) -> list[str]:
    """A header that claims a tensor of more bytes than its shape needs."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4096]}}).encode()
    data = struct.pack("<Q", len(header)) + header + bytes(4096)
    (folder / "secondary" / "model.safetensors").write_bytes(data)
    return []


def endless_header(folder: Path) -> list[str]:
    (folder / "secondary" / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    return []


def write_index(folder: Path, file_name: str) -> list[str]:
    (folder / "secondary" / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": file_name}}
    (folder / "secondary" / "model.safetensors.index.json").write_text(json.dumps(index))
    return []


def index_names_missing_file(folder: Path) -> list[str]:
    return write_index(folder, "model-00001-of-00002.safetensors")


def index_names_outside_file(folder: Path) -> list[str]:
    return write_index(folder, "../primary/model.safetensors")


class Burglar:
    """Unpickled the usual way, it leaves a file named burgled in the current folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("burgled",)


def pickle_with_code(folder: Path) -> list[str]:
    (folder / "secondary" / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "secondary" / "pytorch_model.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"lm_head.weight": Burglar()}, protocol=2))
        archive.writestr("archive/version", "3\n")
    return []


def save_directory_is_a_parent(folder: Path) -> list[str]:
    return ["--save-dir", "primary/", "--overwrite"]


def save_directory_in_a_parent(folder: Path) -> list[str]:
    return ["--save-dir", "secondary/child"]


def save_directory_around_a_parent(folder: Path) -> list[str]:
    return ["--save-dir", ".", "--overwrite"]


def save_directory_links_to_a_parent(folder: Path) -> list[str]:
    if os.name == "nt":
        pytest.skip("making a link needs a privilege on Windows")
    (folder / "child").symlink_to(folder / "primary", target_is_directory=True)
    return ["--overwrite"]


def save_directory_not_empty(folder: Path) -> list[str]:
    (folder / "child").mkdir()
    (folder / "child" / "notes.txt").write_text("keep me")
    return []


def save_directory_is_a_file(folder: Path) -> list[str]:
    (folder / "child").write_text("keep me")
    return []


def save_directory_below_a_file(folder: Path) -> list[str]:
    (folder / "notes.txt").write_text("keep me")
    return ["--save-dir", "notes.txt/child"]


def save_directory_links_in_a_ring(folder: Path) -> list[str]:
    return ["--save-dir", link_in_a_ring(folder)]


def another_architecture(folder: Path) -> list[str]:
    edit_json(folder / "secondary" / "config.json", model_type="mistral", architectures=["MistralForCausalLM"])
    return []


def another_depth(folder: Path) -> list[str]:
    shutil.rmtree(folder / "secondary")
    config = {**LLAMA_CONFIG, "num_hidden_layers": 3}
    make_checkpoint(folder / "secondary", llama_tensors(2, layers=3), config)
    return []


def quantised_parent(folder: Path) -> list[str]:
    edit_json(folder / "secondary" / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    return []


def gguf_parent(folder: Path) -> list[str]:
    (folder / "secondary" / "model.safetensors").rename(folder / "secondary" / "model-q4.gguf")
    return []


def adapter_parent(folder: Path) -> list[str]:
    (folder / "secondary" / "model.safetensors").rename(folder / "secondary" / "adapter_model.safetensors")
    (folder / "secondary" / "config.json").rename(folder / "secondary" / "adapter_config.json")
    return []


def absent_tokenizer(folder: Path) -> list[str]:
    return ["--tokenizer", "secondary"]


BAD_INPUTS = [
    (missing_folder, "nowhere does not exist", "config.json"),
    (file_as_parent, "is a file, not a folder", "config.json"),
    (parent_named_at_length, "File name too long", "Check the path"),
    (parent_links_in_a_ring, "Too many levels of symbolic links", "Check the path"),
    (no_weights, "holds no weights", "Choose the folder"),
    (no_config, "has no config.json", "Download it from"),
    (broken_config, "config.json does not hold valid JSON", "Correct this file, or download it again"),
    (truncated_weights, "model.safetensors is damaged or incomplete", "download it again"),
    (empty_weights, "model.safetensors is damaged or incomplete", "download it again"),
    (lying_header, "model.safetensors is damaged or incomplete: 'a' has 4096 bytes", "download it again"),
    (endless_header, "its header should be 1152921504606846976 bytes", "download it again"),
    (index_names_missing_file, "names model-00001-of-00002.safetensors, which is not there", "Download the missing"),
    (index_names_outside_file, "outside its own folder", "Do not trust"),
    (pickle_with_code, "wants to run code", "safetensors copy"),
    (save_directory_is_a_parent, "is a parent's folder", "folder of its own"),
    (save_directory_in_a_parent, "overlaps a parent's folder", "folder of its own"),
    (save_directory_around_a_parent, "overlaps a parent's folder", "folder of its own"),
    (save_directory_links_to_a_parent, "is a parent's folder", "folder of its own"),
    (save_directory_not_empty, "is not empty", "--overwrite"),
    (save_directory_is_a_file, "is a file", "another name"),
    (save_directory_below_a_file, "cannot be made", "Choose a place"),
    (save_directory_links_in_a_ring, "Too many levels of symbolic links", "Check the path"),
    (another_architecture, "Different architectures", "same architecture"),
    (another_depth, "num_hidden_layers: primary 2, secondary 3", "same architecture"),
    (quantised_parent, "GPTQ", "unquantised"),
    (gguf_parent, "GGUF", "original safetensors"),
    (adapter_parent, "of no stated kind, where LoRA alone is merged", "merge_and_unload"),
    (absent_tokenizer, "has no tokenizer", "auto"),
]


def everything_below(folder: Path) -> dict[str, str]:
    """Every file with its hash, and every folder."""
    return {**fingerprint(folder), **{str(path): "folder" for path in folder.rglob("*") if path.is_dir()}}


def assert_refused(outcome: Outcome, cause: str, hint: str, status: int = 1) -> None:
    """An exit status and one message: what happened, then what to do about it."""
    assert outcome.status == status
    assert "Traceback" not in outcome.out + outcome.err
    message, arrow, remedy = outcome.err.partition("→")
    assert message.startswith("✗ ")
    assert arrow
    assert outcome.err.count("✗") == outcome.err.count("→") == 1
    assert cause in message
    assert hint in remedy


class TestAccept:
    def test_the_refusal_names_the_flag_and_the_flag_lets_it_pass_with_a_warning(self, run, tmp_path):
        make_pair(tmp_path)
        edit_json(tmp_path / "secondary" / "config.json", rope_theta=5e5, rms_norm_eps=1e-5)
        refused = run(*MERGE)
        assert_refused(refused, "rms_norm_eps: primary 1e-06, secondary 1e-05", "--accept rms_norm_eps")
        flags = refused.err[refused.err.index("--accept") :].split()
        assert flags[::2] == ["--accept", "--accept"]
        assert_refused(run(*MERGE, *flags[:2]), flags[3], f"--accept {flags[3]}")
        report = json.loads(run(*MERGE, *flags, "--json").out)
        assert [entry["subject"] for entry in report["accepted"]] == flags[1::2]
        warned = [warning for warning in report["warnings"] if "accepted" in warning]
        assert [warning.partition(":")[0] for warning in warned] == flags[1::2]
        card = (tmp_path / "child" / "README.md").read_text(encoding="utf-8")
        assert "## Warning" in card
        assert "`rms_norm_eps`: 1e-06 in the primary, 1e-05 in the secondary. Accepted. " in card
        assert "in the primary's way" in card
        again = run("--recipe", tmp_path / "child" / "merge_recipe.yaml", "--save-dir", "again", "--yes")
        assert again.status == 0

    def test_a_base_that_differs_is_accepted_by_the_same_name(self, run, pair, tmp_path):
        base = make_checkpoint(tmp_path / "base", llama_tensors(3), {**LLAMA_CONFIG, "hidden_act": "gelu"})
        assert_refused(run(*MERGE, "--base", base), "hidden_act of the base", "--accept hidden_act")
        assert run(*MERGE, "--base", base, "--accept", "hidden_act").status == 0

    def test_what_is_another_architecture_cannot_be_accepted(self, run, tmp_path):
        make_pair(tmp_path)
        edit_json(tmp_path / "secondary" / "config.json", model_type="mistral")
        assert_refused(run(*MERGE, "--accept", "model_type"), "Different architectures", "same architecture")


class TestBadInput:
    @pytest.mark.parametrize(("spoil", "cause", "hint"), BAD_INPUTS, ids=[case[0].__name__ for case in BAD_INPUTS])
    def test_is_refused_with_cause_and_hint_and_nothing_changes(self, run, tmp_path, spoil, cause, hint):
        make_pair(tmp_path)
        changed = spoil(tmp_path)
        before = everything_below(tmp_path)
        assert_refused(run(*MERGE, *changed), cause, hint)
        assert everything_below(tmp_path) == before

    def test_a_place_that_cannot_be_written(self, run, pair, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # as for anyone but root
        assert_refused(run(*MERGE), f"{tmp_path} is not writable", "permissions")
        assert not (tmp_path / "child").exists()

    def test_a_place_beside_which_nothing_can_be_made(self, run, pair, tmp_path, monkeypatch):
        (tmp_path / "child").mkdir()
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
        assert_refused(
            run(*MERGE), f"{tmp_path} is not writable", f"Give a folder in it, such as {Path('child/child')}"
        )

    def test_a_disk_that_is_too_full(self, run, pair, tmp_path, monkeypatch):
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        assert_refused(run(*MERGE), "only 1.0 KB are free", "another disk")
        assert not (tmp_path / "child").exists()

    def test_a_place_that_cannot_be_looked_at(self, run, pair, tmp_path, monkeypatch):
        iterdir = Path.iterdir

        def refuse(path: Path) -> Iterator[Path]:
            if path.name == "child":
                raise PermissionError(13, "Permission denied", str(path))
            return iterdir(path)

        (tmp_path / "child").mkdir()
        monkeypatch.setattr(Path, "iterdir", refuse)  # as for anyone but root
        assert_refused(run(*MERGE), f"Could not use {tmp_path / 'child'}: Permission denied.", "permissions")

    @pytest.mark.parametrize(
        ("fault", "cause", "hint"),
        [
            (MemoryError(), "out of memory", "--threads 1"),
            (OSError(28, "No space left on device"), "No space left", "Free some space"),
        ],
        ids=["memory", "disk"],
    )
    def test_a_fault_in_the_middle_leaves_no_child(self, run, pair, tmp_path, monkeypatch, fault, cause, hint):
        def fail(*_: object) -> None:
            raise fault

        monkeypatch.setattr("slerpkit.story.copy_companions", fail)
        assert_refused(run(*MERGE), cause, "1 of 1 weight files is finished and kept; the same command carries on")
        assert not (tmp_path / "child").exists()
        monkeypatch.setattr("slerpkit.child.companions.write_index", fail)
        assert_refused(run(*MERGE, "--restart"), cause, "1 of 1")
        monkeypatch.setattr("slerpkit.merge.stream.create_file", fail)
        assert_refused(run(*MERGE, "--restart"), cause, hint)
        assert {path.name for path in tmp_path.iterdir()} == {"primary", "secondary"}

    def test_what_the_hint_says_of_kept_files_is_said_once(self, run, pair, monkeypatch):
        def fail(*_: object) -> None:
            raise SlerpMergeError("A worker ended.", "The same command carries on. Close other programs.")

        monkeypatch.setattr("slerpkit.story.copy_companions", fail)
        outcome = run(*MERGE)
        assert_refused(outcome, "A worker ended.", "1 of 1 weight files is finished and kept.")
        assert outcome.err.lower().count("the same command carries on") == 1

    @pytest.mark.parametrize(
        ("fault", "hint"),
        [
            (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
            (OSError("who knows"), "Put that right"),
            (MemoryError(), "--threads 1"),
            (ImportError("no such library"), "pip install"),
        ],
        ids=repr,
    )
    def test_a_refusal_that_nobody_expected_tells_of_kept_files_too(self, run, pair, monkeypatch, fault, hint):
        def fail(*_: object) -> None:
            raise fault

        monkeypatch.setattr("slerpkit.story.copy_companions", fail)
        outcome = run(*MERGE)
        assert_refused(outcome, "", hint)
        assert "1 of 1 weight files is finished and kept; the same command carries on." in outcome.err

    @pytest.mark.parametrize(
        ("place", "words"),
        [
            ("slerpkit.story.copy_companions", "1 of 1 weight files is finished"),
            ("slerpkit.merge.stream.create_file", "removed"),
        ],
    )
    def test_ctrl_c_in_the_middle_leaves_no_child(self, run, pair, tmp_path, monkeypatch, place, words):
        def interrupt(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(place, interrupt)
        outcome = run(*MERGE)
        assert outcome.status == 130
        assert words in outcome.err
        assert not (tmp_path / "child").exists()
        assert run(*MERGE, "--dry-run").status == 0


class TestOddNames:
    """Names come from strangers' files: what could drive a terminal is never printed as it is."""

    odd = "x\x1b[31m\x07\x9b\u202e"

    def assert_harmless(self, outcome: Outcome) -> None:
        assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(outcome.out + outcome.err)
        assert r"x\x1b[31m" in outcome.out + outcome.err

    @pytest.mark.skipif(os.name == "nt", reason="Windows allows no control characters in file names")
    def test_in_a_folder(self, run, pair, tmp_path):
        copy_model(pair[0], tmp_path / self.odd)
        outcome = run("--primary", self.odd, "--secondary", "secondary", "--save-dir", f"{self.odd}-child", "--yes")
        assert outcome.status == 0
        self.assert_harmless(outcome)

    def test_in_a_folder_that_is_not_there(self, run, pair):
        outcome = run(*MERGE, "--primary", self.odd)
        assert outcome.status == 1
        self.assert_harmless(outcome)

    def test_in_a_tensor(self, run, pair, tmp_path):
        tensors = {**llama_tensors(1), self.odd: torch.ones(2)}
        make_checkpoint(tmp_path / "other", tensors)
        outcome = run(*MERGE, "--primary", "other")
        assert outcome.status == 1
        self.assert_harmless(outcome)

    def test_in_a_config(self, run, pair, tmp_path):
        edit_json(copy_model(pair[0], tmp_path / "other") / "config.json", note=self.odd, architectures=[self.odd])
        edit_json(copy_model(pair[1], tmp_path / "another") / "config.json", architectures=[self.odd])
        outcome = run(*MERGE, "--primary", "other", "--secondary", "another")
        assert outcome.status == 0
        self.assert_harmless(outcome)

    def test_in_an_index(self, run, pair, tmp_path):
        copy_model(pair[1], tmp_path / "other" / "secondary")
        write_index(tmp_path / "other", self.odd)
        outcome = run(*MERGE, "--secondary", "other/secondary")
        assert outcome.status == 1
        self.assert_harmless(outcome)

    def test_a_line_break_in_a_name_makes_no_line_of_its_own(self, run, pair, tmp_path):
        tensors = {**llama_tensors(1), "weight\n→ Everything is fine.": torch.ones(2)}
        make_checkpoint(tmp_path / "other", tensors)
        outcome = run(*MERGE, "--primary", "other")
        assert outcome.status == 1
        assert "\n→ Everything is fine." not in outcome.err

    @pytest.mark.parametrize(("encoding", "flag"), [("cp1252", "--yes"), ("ascii", "--json"), ("ascii", "--dry-run")])
    def test_a_name_that_the_terminal_cannot_show_stops_nothing(self, pair, tmp_path, encoding, flag):
        copy_model(pair[0], tmp_path / "modèle-日本")
        names = ("--primary", "modèle-日本", "--secondary", "secondary", "--save-dir", "enfant-日本")
        outcome = run_program(*names, "--yes", flag, folder=tmp_path, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
        assert (outcome.status, outcome.err) == (0, "")
        assert (tmp_path / "enfant-日本").exists() == (flag != "--dry-run")
        if flag == "--json":
            assert outcome.report["child"] == str(tmp_path / "enfant-日本")


class TestFullVerification:
    @pytest.fixture
    def real_pair(self, tmp_path, capsys) -> None:
        make_real_pair(tmp_path)
        capsys.readouterr()  # the library's own bars

    def test_the_child_is_loaded_and_the_report_says_so(self, run, real_pair, tmp_path):
        outcome = run(*MERGE, "--json", "--verify", "full")
        assert outcome.status == 0
        checks = " / ".join(outcome.report["checks"])
        assert "LlamaForCausalLM loads it with no missing, unexpected or mismatched key" in checks
        assert "48 tokens" in checks

        assert "its logits for a short text are finite" in checks
        assert (
            json.loads((tmp_path / "child" / "merge_report.json").read_text("utf-8"))["checks"]
            == (outcome.report["checks"])
        )

    def spoil(self, folder: Path, name: str, value: torch.Tensor | None) -> None:
        tensors = {**load_tensors(folder), name: value}
        replace_tensors(folder, {name: tensor for name, tensor in tensors.items() if tensor is not None})

    @pytest.mark.parametrize(
        ("name", "value", "words"),
        [
            ("model.norm.weight", None, "missing keys: model.norm.weight"),
            ("model.layers.1.mlp.gate.weight", torch.ones(4, 16), "unexpected keys: model.layers.1.mlp.gate.weight"),
            ("model.norm.weight", torch.full((16,), torch.inf), "infinite or not a number"),
        ],
    )
    def test_a_child_that_fails_is_not_put_in_place(self, run, real_pair, tmp_path, parents, name, value, words):
        folders = [tmp_path / "primary", tmp_path / "secondary"]
        for folder in folders:
            self.spoil(folder, name, value)
        parents.watch(*folders)
        copy_model(folders[0], tmp_path / "child")
        before = fingerprint(tmp_path / "child")
        outcome = run(*MERGE, "--overwrite", "--verify", "full")
        assert_refused(outcome, words, "Nothing was saved. Load the primary the same way")
        assert fingerprint(tmp_path / "child") == before
        assert {path.name for path in tmp_path.iterdir()} == {"primary", "secondary", "child"}
        assert run(*MERGE, "--overwrite").status == 0  # without transformers it is made, and what is odd is told

    def test_what_transformers_does_not_know_is_a_warning(self, run, real_pair, tmp_path):
        for folder in ("primary", "secondary"):
            edit_json(tmp_path / folder / "config.json", architectures=["NoSuchModelForCausalLM"])
        outcome = run(*MERGE, "--json", "--verify", "full")
        assert outcome.status == 0
        assert any("no NoSuchModelForCausalLM" in warning for warning in outcome.report["warnings"])
        assert (tmp_path / "child" / "model.safetensors").is_file()


def test_a_parent_that_changes_underway_is_told_so(run, pair, tmp_path, monkeypatch, parents):
    """The weights are cut short between the plan and the merge."""
    parents.prints.clear()

    def plan_then_cut(*arguments: object) -> MergePlan:
        plan = plan_merge(*arguments)
        weights = pair[1] / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-600])
        return plan

    monkeypatch.setattr("slerpkit.story.plan_merge", plan_then_cut)
    assert_refused(run(*MERGE), "became shorter while it was read", "Let nothing write to it")
    assert {path.name for path in tmp_path.iterdir()} == {"primary", "secondary"}


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("slerpkit.demo.teach_demo_model", "Nothing was written."),
        ("slerpmerge.prepare_plan", "The two parents stand"),
    ],
)
def test_ctrl_c_in_the_demo_leaves_what_it_says(run, tmp_path, monkeypatch, place, words):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("slerpkit.demo.teach_demo_model", lambda *_, **__: None)
    monkeypatch.setattr(place, interrupt)
    outcome = run("--demo")
    assert outcome.status == 130
    assert words in outcome.err
    made = list(tmp_path.glob("slerpmerge-*"))
    assert [path for path in made if str(path) in outcome.err] == made


def test_the_demo_makes_three_models_that_speak(tmp_path):
    # Tiny models learn faster on one thread, above all while other tests run.
    outcome = run_program("--demo", "--save-dir", "demo", folder=tmp_path, OMP_NUM_THREADS="1")
    assert outcome.status == 0
    assert "Traceback" not in outcome.err
    report = json.loads((tmp_path / "demo" / "demo-child" / "merge_report.json").read_text("utf-8"))
    (answers,) = [finding["figures"]["answers"] for finding in report["findings"] if finding["kind"] == "taste"]
    assert answers.keys() == {"primary", "secondary", "child"}
    for sentence in answers.values():
        assert len(set(sentence.split())) >= 6, "it says something"
        assert sentence.split()[0] in outcome.out
    from transformers import AutoModelForCausalLM

    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "demo" / "demo-child", output_loading_info=True)
    assert not any(loading[fault] for fault in ("missing_keys", "unexpected_keys", "mismatched_keys"))
