"""A merge from Python in one call: the child of the script's command, its refusals, and nothing shown."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slerpmerge
from slerpkit import merge_models
from slerpkit.messages import SlerpMergeError
from slerpkit.schedule import Schedule
from tests.builders import (
    DEVICE,
    LLAMA_CONFIG,
    add_tokenizer,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
)
from tests.conftest import fingerprint

README = Path(__file__).resolve().parents[1] / "README.md"
FROM_PYTHON = README.read_text(encoding="utf-8").partition("\n## From Python\n")[2].partition("\n## ")[0]


@pytest.fixture
def pair(tmp_path, parents, monkeypatch) -> tuple[Path, Path]:
    """Two tiny parents in the working directory, which no test may change."""
    monkeypatch.chdir(tmp_path)
    folders = make_pair(tmp_path)
    for folder in folders:
        add_tokenizer(folder)
    parents.watch(*folders)
    return folders


def make_by_command(*arguments: str) -> Path:
    """A child that the script makes of ./primary and ./secondary."""
    folders = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "by-command/child")
    assert slerpmerge.main([*folders, "--device", DEVICE, "--yes", "--quiet", *arguments]) == 0
    return Path("by-command/child")


def make_by_call(**settings: Any) -> Path:
    """A child that one call makes of them."""
    return merge_models("primary", "secondary", "by-call/child", **{"device": DEVICE, **settings}).child


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, ()),
        ({"t": 0.3}, ("--t", "0.3")),
        ({"t": 1}, ("--t", "1")),
        ({"t": "0.3"}, ("--t", "0.3")),
        ({"t": Schedule.constant(0.3)}, ("--t", "0.3")),
        ({"t": "ramp"}, ("--t", "0,0.1,0.5,0.9,1")),
        ({"t": "self_attn=0,1 0.5"}, ("--t", "self_attn=0,1", "--t", "0.5")),
        ({"t": 1.5, "extrapolate": True}, ("--t", "1.5", "--extrapolate")),
        ({"method": "slerp-norm"}, ("--method", "slerp-norm")),
        ({"dtype": "float16", "max_shard_bytes": 9_000}, ("--dtype", "float16", "--max-shard-size", "9KB")),
        ({"tokenizer": "secondary"}, ("--tokenizer", "secondary")),
    ],
    ids=str,
)
def test_the_child_is_that_of_the_command_file_by_file(pair, settings, flags):
    assert fingerprint(make_by_call(**settings)) == fingerprint(make_by_command(*flags))


@pytest.mark.parametrize("kind", [str, Path])
def test_a_base_is_a_path_or_text(pair, tmp_path, kind):
    make_checkpoint(tmp_path / "base", llama_tensors(3))
    child = make_by_call(base=kind("base"))
    assert fingerprint(child) == fingerprint(make_by_command("--base", "base"))
    assert fingerprint(child) != fingerprint(merge_models(*pair, tmp_path / "without" / "child", device=DEVICE).child)


def test_what_is_returned_tells_of_the_child(pair, tmp_path):
    report = merge_models(*pair, tmp_path / "child", device=DEVICE)
    assert report.child == tmp_path / "child"
    assert report.verified.warnings == ()
    assert len(report.merged.tensors) == len(load_tensors(report.child))


@pytest.mark.parametrize("kind", [str, Path])
def test_folders_are_understood_as_the_flags_understand_them(pair, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MODELS", str(tmp_path))
    report = merge_models(kind("$MODELS/primary"), kind("$MODELS/secondary"), kind("$MODELS/child"), device=DEVICE)
    assert report.child == tmp_path / "child"


def test_progress_is_told_to_who_asks_for_it(pair, tmp_path):
    events: list[Any] = []
    merge_models(*pair, tmp_path / "child", observe=events.append, device=DEVICE)
    assert events


def test_nothing_is_shown(pair, tmp_path, capfd):
    merge_models(*pair, tmp_path / "child", device=DEVICE)
    with pytest.raises(SlerpMergeError):
        merge_models(*pair, tmp_path / "child", device=DEVICE)
    assert capfd.readouterr() == ("", "")


def test_no_library_of_the_screen_is_loaded(pair):
    code = (
        "import sys\nfrom slerpkit import merge_models\n"
        f"merge_models('primary', 'secondary', 'child', device={DEVICE!r})\n"
        "assert not {'rich', 'questionary', 'prompt_toolkit', 'transformers', 'slerpkit.screen'} & set(sys.modules)"
    )
    program = f"import sys; sys.path.insert(0, {str(README.parent)!r})\n{code}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def make_other_shapes(folder: Path) -> None:
    edit_json(folder / "config.json", num_attention_heads=8)


def make_other_architecture(folder: Path) -> None:
    edit_json(folder / "config.json", architectures=["MistralForCausalLM"], model_type="mistral")


def take_weights_away(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("spoil", [make_other_shapes, make_other_architecture, take_weights_away])
def test_parents_that_the_script_refuses_are_refused(tmp_path, monkeypatch, capsys, spoil):
    monkeypatch.chdir(tmp_path)
    _, secondary = make_pair(tmp_path)
    spoil(secondary)
    refused_alike(tmp_path, capsys, {}, ())


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({"t": 1.5}, ("--t", "1.5")),
        ({"vectors": "first_dim"}, ("--granularity", "row")),
        ({"base": "nowhere"}, ("--base", "nowhere")),
    ],
    ids=str,
)
def test_settings_that_the_script_refuses_are_refused(pair, tmp_path, capsys, settings, flags):
    refused_alike(tmp_path, capsys, settings, flags)


def refused_alike(folder: Path, capsys: pytest.CaptureFixture[str], settings: dict[str, Any], flags: tuple) -> None:
    """The call raises what the script shows of the same merge, and nothing is written by either."""
    before = sorted(folder.rglob("*"))
    with pytest.raises(SlerpMergeError) as refusal:
        merge_models("primary", "secondary", "child", **{"device": DEVICE, **settings})
    folders = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "child")
    assert slerpmerge.main([*folders, "--device", DEVICE, "--yes", *flags]) in (1, 2)  # 2 where flags cannot be
    shown = words_of(capsys.readouterr().err)
    assert words_of(refusal.value.message) in shown
    assert refusal.value.hint
    assert words_of(refusal.value.hint) in shown
    assert sorted(folder.rglob("*")) == before


def words_of(text: str) -> str:
    """A message without the breaks and the frame that a terminal's width gives it."""
    return "".join(re.findall(r"[^\s│╭╮╰╯─]", text))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "sleep"},
        {"dtype": "int8"},
        {"device": "abacus"},
        {"threads": -1},
        {"dot_threshold": 2.0},
        {"t": "0.5 0.6"},
        {"t": "1.5"},
    ],
    ids=str,
)
def test_values_that_no_flag_can_have_are_refused(pair, tmp_path, settings):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SlerpMergeError) as refusal:
        merge_models(*pair, tmp_path / "child", **settings)
    assert refusal.value.message
    assert refusal.value.hint
    assert sorted(tmp_path.rglob("*")) == before


def test_a_child_that_stands_is_replaced_only_if_that_is_said(pair, tmp_path):
    first = fingerprint(merge_models(*pair, tmp_path / "child", 0.3, device=DEVICE).child)
    with pytest.raises(SlerpMergeError) as refusal:
        merge_models(*pair, tmp_path / "child", 0.7, device=DEVICE)
    assert refusal.value.hint
    assert fingerprint(tmp_path / "child") == first
    second = merge_models(*pair, tmp_path / "child", 0.7, device=DEVICE, overwrite=True).child
    assert fingerprint(second) != first


@pytest.mark.parametrize("name", ["colour", "over_write", "save_dir"])
def test_a_setting_that_is_none_is_a_type_error(pair, tmp_path, name):
    with pytest.raises(TypeError, match=name):
        merge_models(*pair, tmp_path / "child", **{name: 1})
    assert not (tmp_path / "child").exists()


def test_the_readmes_example_runs_as_it_stands(tmp_path, monkeypatch, capfd):
    (example,) = re.findall(r"```python\n(.*?)```", FROM_PYTHON, re.DOTALL)
    folders = re.findall(r'"(models/[a-z-]+)"', example)
    monkeypatch.chdir(tmp_path)
    for seed, folder in enumerate(folders[:2], 1):
        make_checkpoint(tmp_path / folder, llama_tensors(seed), LLAMA_CONFIG)
    program = f"import sys; sys.path.insert(0, {str(README.parent)!r})\n{example}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert folders[2] in done.stdout.replace("\\", "/")
    assert load_tensors(tmp_path / folders[2]).keys() == llama_tensors(1).keys()
