"""Multi-token prediction: what an original stores beside its layers is kept with it, and moves nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers

from slerpkit.parents.checkpoint import open_parents
from slerpkit.parity.check import check_parity
from slerpkit.parity.configs import stated_depth
from slerpkit.parity.report import Mismatch
from slerpkit.recipe import LayerSlice, MergeRecipe
from slerpkit.schedule import Schedule, ScheduleRule
from tests.builders import (
    HIDDEN,
    LAYERS,
    LLAMA_CONFIG,
    assert_same_bits,
    copy_model,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    merge,
    plan_of,
    replace_tensors,
)
from tests.test_families import make_family_parent
from tests.test_vocabulary import REVERSED, WORDS, make_parent

COUNTED = {**LLAMA_CONFIG, "num_nextn_predict_layers": 1}
SLOPE = Schedule((ScheduleRule((0.0, 1.0)),))
BEHIND = f"model.layers.{LAYERS}."


def prediction_layer(prefix: str, seed: int) -> dict[str, torch.Tensor]:
    """A layer like a Llama's others, and what joins it to them, under a prefix."""
    layer = {
        prefix + name.removeprefix("model.layers.0."): tensor
        for name, tensor in llama_tensors(seed).items()
        if name.startswith("model.layers.0.")
    }
    generator = torch.Generator().manual_seed(seed)
    return layer | {f"{prefix}eh_proj.weight": torch.randn(HIDDEN, 2 * HIDDEN, generator=generator).bfloat16()}


def make_original(folder: Path, seed: int, prefix: str = BEHIND) -> Path:
    return make_checkpoint(folder, llama_tensors(seed) | prediction_layer(prefix, seed + 50), COUNTED)


def make_tuned(folder: Path, seed: int) -> Path:
    return make_checkpoint(folder, llama_tensors(seed), COUNTED)


def without(tensors: Mapping[str, torch.Tensor], prefix: str = BEHIND) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def only_finding(primary: Path, secondary: Path, base: Path | None = None) -> Mismatch:
    recipe = MergeRecipe(primary, secondary, base=base, method="slerp" if base is None else "nuslerp")
    (found,) = check_parity(open_parents(recipe), recipe).mismatches
    return found


@pytest.mark.parametrize(
    "prefix", [BEHIND, "mtp.layers.0.", "model.mtp_block.0.", "model.mtp.layers.0.", "model.language_model.mtp."]
)
def test_layers_that_only_the_original_has_are_kept_or_left_out(tmp_path, parents, prefix):
    original, tuned = make_original(tmp_path / "original", 1, prefix), make_tuned(tmp_path / "tuned", 2)
    bare = make_tuned(tmp_path / "bare", 1)
    parents.watch(original, tuned)
    for primary, secondary, plain in ((original, tuned, (bare, tuned)), (tuned, original, (tuned, bare))):
        found = only_finding(primary, secondary)
        shown = ("10 tensors", "none") if primary == original else ("none", "10 tensors")
        assert (found.severity, found.subject) == ("resolved", "multi-token prediction")
        assert (found.primary, found.secondary) == shown
        child = load_tensors(merge(primary, secondary, tmp_path / f"of {primary.name}", schedule=SLOPE).child)
        expected = load_tensors(merge(*plain, tmp_path / f"like {primary.name}", schedule=SLOPE).child)
        kept = {name: t for name, t in load_tensors(primary).items() if name.startswith(prefix)}
        assert_same_bits(child, expected | kept)


def test_a_child_of_an_original_loads_as_the_original_does(tmp_path):
    """Its class does not know the layer, in the parent or in the child."""
    if not hasattr(transformers, "DeepseekV3ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} does not have it yet")
    original, tuned = (make_family_parent(tmp_path / str(n), "DeepseekV3ForCausalLM", n) for n in (1, 2))
    for folder in (original, tuned):
        edit_json(folder / "config.json", num_nextn_predict_layers=1)
    tensors = load_tensors(original)
    layer = {
        name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if "model.layers.1." in name
    }
    replace_tensors(original, {name: t.clone() for name, t in tensors.items()} | layer)
    for primary, secondary, is_there in ((original, tuned, True), (tuned, original, False)):
        child = merge(primary, secondary, tmp_path / f"of {primary.name}", 0.3).child
        load = transformers.DeepseekV3ForCausalLM.from_pretrained
        model, report = load(child, output_loading_info=True, torch_dtype=torch.float32)
        assert not report["missing_keys"] and not report["mismatched_keys"]
        # What is apart in the file may be fused in the class.
        assert all("model.layers.2." in name for name in report["unexpected_keys"])
        assert bool(report["unexpected_keys"]) == is_there
        with torch.no_grad():
            assert torch.isfinite(model.eval()(torch.tensor([[3, 4, 5, 6]])).logits).all()


def test_where_both_have_the_layer_it_is_blended(tmp_path):
    folders = [make_original(tmp_path / str(n), n) for n in (1, 2)]
    like = [make_original(tmp_path / f"mtp {n}", n, "mtp.") for n in (1, 2)]
    child, expected = (
        load_tensors(merge(*pair, tmp_path / f"child {n}", 0.3).child) for n, pair in enumerate((folders, like))
    )
    assert_same_bits(child, {name.replace("mtp.", BEHIND): tensor for name, tensor in expected.items()})
    assert not any(torch.equal(t, load_tensors(folders[0])[name]) for name, t in child.items() if BEHIND in name)


@pytest.mark.parametrize("both", [True, False])
def test_slices_count_layers_without_it_and_it_follows_the_last(tmp_path, both):
    original = make_original(tmp_path / "original", 1)
    other = (make_original if both else make_tuned)(tmp_path / "other", 2)
    bare = make_tuned(tmp_path / "bare", 1), make_tuned(tmp_path / "bare other", 2)
    cut = LayerSlice(0, 0, LAYERS, Schedule.constant(0.4))
    child = merge(original, other, tmp_path / "child", slices=(cut, cut)).child
    expected = load_tensors(merge(*bare, tmp_path / "expected", slices=(cut, cut)).child)
    behind = f"model.layers.{2 * LAYERS}."
    found = load_tensors(child)
    assert_same_bits(without(found, behind), expected)
    assert json.loads((child / "config.json").read_text())["num_hidden_layers"] == 2 * LAYERS
    own = {name: t for name, t in load_tensors(original).items() if name.startswith(BEHIND)}
    assert {name.replace(behind, BEHIND) for name in found.keys() - expected.keys()} == own.keys()
    if not both:
        assert_same_bits({n.replace(behind, BEHIND): found[n] for n in found.keys() - expected.keys()}, own)
    recipe = MergeRecipe(original, other, slices=(LayerSlice(1, 1, LAYERS, Schedule.constant(0.4)),))
    subjects = [m.subject for m in check_parity(open_parents(recipe), recipe).of_severity("blocking")]
    assert subjects == ["layer_range"]


def test_a_base_without_the_layer_leaves_the_primarys(tmp_path):
    primary, secondary = (make_original(tmp_path / str(n), n) for n in (1, 2))
    base = make_tuned(tmp_path / "base", 3)
    assert only_finding(primary, secondary, base).severity == "resolved"
    child = load_tensors(merge(primary, secondary, tmp_path / "child", 0.3, method="nuslerp", base=base).child)
    own = load_tensors(primary)
    assert_same_bits(
        {name: t for name, t in child.items() if BEHIND in name}, {name: t for name, t in own.items() if BEHIND in name}
    )


@pytest.mark.parametrize("tokenizer", ["primary", "secondary"])
@pytest.mark.parametrize("table", [f"{BEHIND}embed_tokens.weight", None])
def test_a_table_of_other_tokens_is_left_out_with_its_layer(tmp_path, tokenizer, table):
    primary, secondary = make_parent(tmp_path / "primary", 1, WORDS), make_parent(tmp_path / "secondary", 2, REVERSED)
    for folder in (primary, secondary):
        edit_json(folder / "config.json", num_nextn_predict_layers=1)
    layer = prediction_layer(BEHIND, 9) | ({} if table is None else {table: torch.randn(len(WORDS), HIDDEN)})
    replace_tensors(primary, {name: t.clone() for name, t in load_tensors(primary).items()} | layer)
    child = load_tensors(merge(primary, secondary, tmp_path / "child", 0.3, tokenizer=tokenizer).child)
    is_kept = tokenizer == "primary" or table is None
    assert {name for name in child if BEHIND in name} == (layer.keys() if is_kept else set())


def test_what_configs_state_of_it_follows_the_primary_and_is_no_depth(tmp_path):
    original, tuned = make_original(tmp_path / "original", 1, "mtp."), make_tuned(tmp_path / "tuned", 2)
    edit_json(original / "config.json", mtp_num_hidden_layers=1, mtp_use_dedicated_embeddings=False)
    recipe = MergeRecipe(original, tuned)
    findings = check_parity(open_parents(recipe), recipe).mismatches
    assert [found.severity for found in findings] == ["resolved", "notice", "notice"]
    config = {"mtp_num_hidden_layers": 1, "mtp_num_layers": 3, "num_nextn_predict_layers": 2, "num_hidden_layers": 9}
    assert stated_depth(config) == 9


def test_another_tower_as_deep_by_chance_is_none(tmp_path):
    towers = [
        {f"vision.blocks.{layer}.fc.weight": torch.full((2, 2), 1.0 + seed) for layer in range(LAYERS + 1)}
        for seed in (1, 2)
    ]
    original = make_checkpoint(tmp_path / "o", llama_tensors(1) | prediction_layer(BEHIND, 5) | towers[0], COUNTED)
    tuned = make_checkpoint(tmp_path / "t", llama_tensors(2) | towers[1], COUNTED)
    assert only_finding(original, tuned).primary == "10 tensors"
    assert only_finding(tuned, original).secondary == "10 tensors"
    plan = plan_of(tuned, original, tmp_path / "child", schedule=SLOPE)
    assert [t.t for t in plan.tensors if t.name.startswith("vision")] == [0.0, 0.5, 1.0]


def test_further_layers_that_no_config_speaks_of_block(tmp_path):
    original, tuned = make_original(tmp_path / "original", 1), make_tuned(tmp_path / "tuned", 2)
    copy = copy_model(original, tmp_path / "copy")
    edit_json(copy / "config.json", num_nextn_predict_layers=0)
    recipe = MergeRecipe(copy, tuned)
    assert "without a counterpart" in check_parity(open_parents(recipe), recipe).of_severity("blocking")[0].consequence
