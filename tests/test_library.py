"""A merge from Python in one call: the script's own bits and checks, and no screen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from slerpkit import merge_models
from slerpkit.messages import SlerpMergeError
from slerpkit.schedule import parse_blend
from tests.builders import LLAMA_CONFIG, llama_tensors, load_tensors, make_checkpoint, make_pair
from tests.conftest import fingerprint

ROOT = Path(__file__).resolve().parents[1]


def files_of(child: Path) -> dict[str, str]:
    return {name: hashed for name, hashed in fingerprint(child).items() if name != "merge_recipe.yaml"}


@pytest.mark.parametrize(
    ("settings", "flags"),
    [
        ({}, []),
        ({"t": 0.3, "method": "slerp-norm"}, ["--t", "0.3", "--method", "slerp-norm"]),
        ({"t": "self_attn=0,1 0.5"}, ["--t", "self_attn=0,1", "--t", "0.5"]),
        ({"t": parse_blend("ramp"), "dtype": "float32"}, ["--t", "0,0.1,0.5,0.9,1", "--dtype", "float32"]),
    ],
    ids=["plain", "number", "text", "schedule"],
)
def test_the_child_is_the_scripts(tmp_path, parents, capfd, settings, flags):
    pair = make_pair(tmp_path)
    parents.watch(*pair)
    report = merge_models(*pair, tmp_path / "here" / "child", **settings)
    assert capfd.readouterr() == ("", "")
    names = ("--primary", pair[0], "--secondary", pair[1], "--save-dir", tmp_path / "there" / "child")
    command = [sys.executable, ROOT / "slerpmerge.py", *names, *flags, "--yes", "--quiet"]
    subprocess.run(list(map(str, command)), check=True, timeout=60)
    assert report.child == tmp_path / "here" / "child"
    assert files_of(report.child) == files_of(tmp_path / "there" / "child")
    assert report.as_dict()["checks"] == list(report.verified.checks)


def test_paths_may_be_text_and_task_vectors_are_blended(tmp_path):
    pair = make_pair(tmp_path)
    base = make_checkpoint(tmp_path / "base", llama_tensors(3))
    child = merge_models(str(pair[0]), str(pair[1]), str(tmp_path / "child"), base=str(base)).child
    assert load_tensors(child).keys() == load_tensors(pair[0]).keys()
    plain = merge_models(*pair, tmp_path / "plain").child
    assert files_of(child) != files_of(plain)


def test_what_stands_there_is_replaced_only_if_it_is_asked_for(tmp_path):
    pair = make_pair(tmp_path)
    before = files_of(merge_models(*pair, tmp_path / "child", t=0.2).child)
    with pytest.raises(SlerpMergeError, match="is not empty") as caught:
        merge_models(*pair, tmp_path / "child", t=0.8)
    assert caught.value.hint
    assert files_of(tmp_path / "child") == before
    assert files_of(merge_models(*pair, tmp_path / "child", t=0.8, overwrite=True).child) != before


@pytest.mark.parametrize(
    ("settings", "words"), [({"t": 1.5}, "outside 0 to 1"), ({"t": "purple"}, "purple"), ({"method": "ties"}, "ties")]
)
def test_what_cannot_be_is_refused_and_nothing_is_written(tmp_path, settings, words):
    pair = make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match=words) as caught:
        merge_models(*pair, tmp_path / "child", **settings)
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["primary", "secondary"]


def test_parents_that_do_not_fit_are_refused(tmp_path):
    primary = make_checkpoint(tmp_path / "primary", llama_tensors(1))
    secondary = make_checkpoint(tmp_path / "secondary", llama_tensors(2), {**LLAMA_CONFIG, "rms_norm_eps": 1e-3})
    with pytest.raises(SlerpMergeError, match="rms_norm_eps"):
        merge_models(primary, secondary, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_a_setting_that_there_is_not_is_a_type_error(tmp_path):
    with pytest.raises(TypeError, match="purple"):
        merge_models(*make_pair(tmp_path), tmp_path / "child", purple=1)


def test_the_readmes_example_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    make_pair(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert "child" in capsys.readouterr().out
    assert load_tensors(tmp_path / "child")
