"""Whether the parents come from one base: told from a sample of their weights before anything is written."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from slerpkit.parity.kinship import KINSHIP_ELEMENTS, Kinship, measure_kinship
from slerpkit.recipe import MergeRecipe, RunOptions
from slerpkit.story import prepare_merge
from slerpmerge import EXIT_DONE, main
from tests.builders import llama_tensors, load_tensors, make_checkpoint, make_pair, merge


def kinship_of(folder: Path, left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> Kinship:
    parents = make_checkpoint(folder / "primary", left), make_checkpoint(folder / "secondary", right)
    return prepare_merge(MergeRecipe(*parents), RunOptions(folder / "child")).kinship


def make_strangers(folder: Path) -> tuple[Path, Path]:
    left, right = (llama_tensors(seed, likeness=0) for seed in (1, 2))
    return make_checkpoint(folder / "primary", left), make_checkpoint(folder / "secondary", right)


@pytest.mark.parametrize("seed", range(100))
def test_strangers_are_told_from_siblings(tmp_path, seed):
    base = llama_tensors(seed, torch.float32, likeness=0)
    drift = llama_tensors(seed + 1000, torch.float32, likeness=0)
    sibling = {name: (weight + 0.1 * drift[name]).bfloat16() for name, weight in base.items()}
    stranger = llama_tensors(seed + 2000, likeness=0)
    base = {name: weight.bfloat16() for name, weight in base.items()}
    assert kinship_of(tmp_path / "near", base, sibling).verdict == "siblings"
    assert kinship_of(tmp_path / "far", base, stranger).verdict == "strangers"


@pytest.mark.parametrize("dtypes", [("bfloat16", "bfloat16"), ("float16", "float32"), ("float64", "bfloat16")])
def test_the_angles_are_those_of_the_weights(tmp_path, dtypes):
    left, right = (llama_tensors(seed, getattr(torch, dtype)) for seed, dtype in zip((1, 2), dtypes))
    found = kinship_of(tmp_path, left, right)

    def angle(mark: str) -> float:
        chosen = [name for name in left if "layers" in name and mark in name and left[name].ndim > 1]
        v0, v1 = (torch.cat([part[name].double().flatten() for name in chosen]) for part in (left, right))
        return math.degrees(math.acos(float(v0 @ v1 / v0.norm() / v1.norm())))

    assert dict(found.by_component) == pytest.approx({"attention": angle("attn"), "mlp": angle("mlp")}, abs=1e-6)
    assert found.degrees == pytest.approx(angle(""), abs=1e-6)


def test_whether_most_matrices_lie_near_each_other_is_told_from_them_one_by_one(tmp_path):
    """Identical ones are not near: they are copied, and a base would not help them."""
    names = [f"model.layers.{layer}.mlp.{part}_proj.weight" for layer in (0, 1) for part in ("gate", "up", "down")]
    left = {name: torch.eye(8) for name in names}
    right = {name: weight + 0.01 * torch.ones(8, 8) for name, weight in left.items()}
    near = kinship_of(tmp_path / "near", left, right)
    assert len(near.angles) == 6
    assert near.are_mostly_within(5)
    assert not near.are_mostly_within(0.5)
    half = kinship_of(tmp_path / "half", left, {**right, **{name: left[name].clone() for name in names[:3]}})
    assert not half.are_mostly_within(5)


def test_large_matrices_are_sampled_in_their_middle(tmp_path):
    """What lies outside the middle is not read: it would cost the time of a merge."""
    size = KINSHIP_ELEMENTS
    left = {"model.layers.0.mlp.up_proj.weight": torch.ones(4, size)}
    right = {name: weight.clone() for name, weight in left.items()}
    right["model.layers.0.mlp.up_proj.weight"][0] = -1
    assert kinship_of(tmp_path, left, right).degrees == 0


def test_parents_without_matrices_are_unknown_to_each_other(tmp_path):
    left = {
        "model.norm.weight": torch.ones(8),
        "empty": torch.ones(0, 3),
        "numbers": torch.ones(2, 2, dtype=torch.int8),
    }
    found = kinship_of(tmp_path, left, {name: weight.clone() for name, weight in left.items()})
    assert (found.verdict, found.degrees, found.warning) == ("unknown", None, None)


def test_values_that_are_no_numbers_do_not_hide_the_rest(tmp_path):
    left, right = llama_tensors(1), llama_tensors(2)
    right["model.layers.0.mlp.up_proj.weight"][:] = math.nan
    assert kinship_of(tmp_path, left, right).verdict == "siblings"
    assert measure_kinship(()).verdict == "unknown"


def test_strangers_merge_with_a_warning_where_nobody_is_asked(tmp_path, parents, capsys):
    primary, secondary = make_strangers(tmp_path)
    parents.watch(primary, secondary)
    flags = ["--primary", primary, "--secondary", secondary, "--save-dir", tmp_path / "child", "--yes", "--json"]
    assert main([str(flag) for flag in flags]) == EXIT_DONE
    report = json.loads(capsys.readouterr().out)
    assert report["kinship"]["verdict"] == "strangers"
    assert 80 < report["kinship"]["degrees"] < 100
    assert any("strangers" in warning for warning in report["warnings"])
    assert load_tensors(tmp_path / "child").keys() == load_tensors(primary).keys()


def test_siblings_are_called_so_and_not_warned_of(tmp_path, capsys):
    primary, secondary = make_pair(tmp_path)
    flags = ["--primary", primary, "--secondary", secondary, "--save-dir", tmp_path / "child", "--dry-run"]
    assert main([str(flag) for flag in flags]) == EXIT_DONE
    assert re.search(r"kinship +siblings: \d\d\.\d degrees apart", capsys.readouterr().out)
    assert not any(
        "strangers" in warning for warning in merge(primary, secondary, tmp_path / "child").verified.warnings
    )
