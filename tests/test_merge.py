"""A whole merge on tiny checkpoints: every value against float64, every bit against other ways to the same child."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from slerpkit.child.report import MergeReport
from slerpkit.maths import TensorWeights
from slerpkit.merge.arithmetic import Arithmetic, DeviceArithmetic, vector_weights
from slerpkit.merge.blocks import BLOCK_ELEMENTS, TASK_BLOCKS
from slerpkit.merge.events import ChildPublished, Noted, WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.dtypes import EPSILON, stored_dtype, widen
from slerpkit.parents.tensors import TORCH_NAMES
from slerpkit.schedule import Schedule, ScheduleRule
from tests.builders import (
    DEVICE,
    LAYERS,
    LLAMA_CONFIG,
    PLAIN_CHILD,
    assert_same_bits,
    bits,
    distance,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    make_real_model,
    merge,
    reference_slerp,
    set_block_elements,
)

GOLDEN = Path(__file__).with_name("golden") / "llama"
SMALL_BLOCK = 64  # elements; a layer's matrix then has several spans, the last of them uneven
BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
# Units of the last place that a value may be off: one rounding, and what the float64 reference itself may lose.
LIMITS = {BF16: 0.51, F16: 0.51, F32: 1.0, F64: 4.0}


def merge_tensors(
    folder: Path, primary: Mapping[str, torch.Tensor], secondary: Mapping[str, torch.Tensor], **settings: Any
) -> tuple[dict[str, torch.Tensor], MergeReport]:
    """The child's tensors, and its report, of two parents that hold these tensors beside a Llama's."""
    folder.mkdir(exist_ok=True)
    left = make_checkpoint(folder / "primary", {**llama_tensors(1), **primary})
    right = make_checkpoint(folder / "secondary", {**llama_tensors(2), **secondary})
    report = merge(left, right, folder / "child", **settings)
    return load_tensors(report.child), report


def blend_of(report: MergeReport, name: str) -> TensorWeights:
    return next(merged.weights for merged in report.merged.tensors if merged.tensor.name == name)


def assert_right(
    child: Mapping[str, torch.Tensor],
    primary: Mapping[str, torch.Tensor],
    secondary: Mapping[str, torch.Tensor],
    t: float,
    method: str = "slerp",
) -> None:
    """Every tensor is the float64 reference, rounded once to its own dtype."""
    assert child.keys() == primary.keys()
    for name, found in child.items():
        v0, v1 = primary[name], secondary[name]
        assert found.shape == v0.shape
        assert distance(found, v0, v1, reference_slerp(v0, v1, t, method)) <= LIMITS[found.dtype], name


# ── Values ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("t", [0.1, 0.6])
@pytest.mark.parametrize("method", ["slerp", "slerp-norm", "lerp"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32, F64], ids=str)
def test_every_tensor_is_the_reference_rounded_once(tmp_path, parents, dtype, method, t):
    primary, secondary = make_pair(tmp_path, dtype)
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", t, method=method)
    child = load_tensors(report.child)
    assert {tensor.dtype for tensor in child.values()} == {dtype}
    assert_right(child, load_tensors(primary), load_tensors(secondary), t, method)
    assert report.verified.warnings == ()


@pytest.mark.parametrize("dtypes", [(BF16, F32), (F32, BF16), (F16, BF16), (BF16, F64), (F64, F32)], ids=str)
def test_parents_of_different_dtype_give_a_child_of_the_primarys(tmp_path, parents, dtypes):
    primary = make_checkpoint(tmp_path / "primary", llama_tensors(1, dtypes[0]))
    secondary = make_checkpoint(tmp_path / "secondary", llama_tensors(2, dtypes[1]))
    parents.watch(primary, secondary)
    child = load_tensors(merge(primary, secondary, tmp_path / "child", 0.3).child)
    assert {tensor.dtype for tensor in child.values()} == {dtypes[0]}
    assert_right(child, load_tensors(primary), load_tensors(secondary), 0.3)


def test_dtypes_mixed_within_each_parent(tmp_path):
    cycle = [BF16, F32, F16, F64]
    left = {name: t.to(cycle[i % 4]) for i, (name, t) in enumerate(llama_tensors(1, F64).items())}
    right = {name: t.to(cycle[i // 2 % 4]) for i, (name, t) in enumerate(llama_tensors(2, F64).items())}
    child, report = merge_tensors(tmp_path, left, right, t=0.4)
    assert {name: t.dtype for name, t in child.items()} == {name: t.dtype for name, t in left.items()}
    assert_right(child, left, right, 0.4)


@pytest.mark.parametrize("block", [1, 7, SMALL_BLOCK, 1000])
def test_values_are_right_however_a_tensor_is_cut(tmp_path, monkeypatch, block):
    set_block_elements(monkeypatch, block)
    left, right = ({"odd": torch.randn(13, 11, generator=torch.Generator().manual_seed(seed))} for seed in (3, 4))
    child, _ = merge_tensors(tmp_path, left, right, t=0.3)
    assert_right(child, {**llama_tensors(1), **left}, {**llama_tensors(2), **right}, 0.3)


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_tensors_of_more_than_one_block_are_right(tmp_path, dtype):
    """337,856 elements each: sums that lose a hundred-thousandth show here, above all where angles are wide."""
    generator = torch.Generator().manual_seed(5)
    base, noise = torch.randn(2, BLOCK_ELEMENTS + 75_712, generator=generator)
    left, right = {}, {}
    for degrees in (20, 71, 135):
        angle = math.radians(degrees)
        left[f"at {degrees}"] = base.to(dtype, copy=True)
        right[f"at {degrees}"] = (base * math.cos(angle) + noise * math.sin(angle)).to(dtype)
    child, report = merge_tensors(tmp_path, left, right, t=0.3)
    assert [round(blend_of(report, name).angle_degrees) for name in left] == [20, 71, 135]
    assert_right({name: child[name] for name in left}, left, right, 0.3)


def test_a_numpy_without_vecdot_adds_as_well(tmp_path, monkeypatch):
    expected, _ = merge_tensors(tmp_path / "a", llama_tensors(1), llama_tensors(2), t=0.3)
    monkeypatch.setattr("slerpkit.merge.arithmetic.numpy.vecdot", None, raising=False)
    child, _ = merge_tensors(tmp_path / "b", llama_tensors(1), llama_tensors(2), t=0.3)
    assert_same_bits(child, expected)


def test_roles_swapped_and_t_mirrored_give_the_same_child(tmp_path):
    primary, secondary = make_pair(tmp_path, F32)
    here = load_tensors(merge(primary, secondary, tmp_path / "here", 0.3).child)
    there = load_tensors(merge(secondary, primary, tmp_path / "there", 0.7).child)
    left, right = load_tensors(primary), load_tensors(secondary)
    for name, tensor in here.items():
        assert distance(tensor, left[name], right[name], there[name].double()) <= 1, name


@pytest.mark.parametrize(
    ("expected", "roles", "gradient"),
    [
        ("constant-float32", ("primary", "secondary"), (0.3,)),
        ("base-listed-second", ("secondary", "primary"), (0.2,)),
        ("gradient-whole", ("primary", "secondary"), (0.0, 0.5, 1.0)),
    ],
)
def test_a_peers_results_within_one_unit_of_the_last_place(tmp_path, parents, expected, roles, gradient):
    primary, secondary = (GOLDEN / role for role in roles)
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", schedule=Schedule((ScheduleRule(gradient),)))
    child, wanted = load_tensors(report.child), load_file(GOLDEN / "expected" / f"{expected}.safetensors")
    left, right = load_tensors(primary), load_tensors(secondary)
    assert child.keys() == wanted.keys()
    for name, tensor in child.items():
        assert tensor.dtype == wanted[name].dtype
        assert distance(tensor, left[name], right[name], wanted[name].double()) <= 1, name


# ── Bits ────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", [BF16, F16, F32], ids=str)
@pytest.mark.parametrize(("t", "source"), [(0.0, "primary"), (1.0, "secondary")])
def test_the_ends_of_t_are_the_parents_bit_for_bit(tmp_path, parents, dtype, t, source):
    rare = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, -3.0]).to(dtype)
    for seed, role in ((1, "primary"), (2, "secondary")):
        make_checkpoint(tmp_path / role, {**llama_tensors(seed, dtype), "rare": rare * seed})
    parents.watch(tmp_path / "primary", tmp_path / "secondary")
    report = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child", t)
    assert_same_bits(load_tensors(report.child), load_tensors(tmp_path / source))
    assert {merged.weights.operation for merged in report.merged.tensors} == {"copy"}


def test_t_of_one_casts_the_secondary_to_the_primarys_dtype(tmp_path):
    left, right = llama_tensors(1, BF16), llama_tensors(2, F32)
    child, _ = merge_tensors(tmp_path, left, right, t=1.0)
    assert_same_bits(child, {name: tensor.to(BF16) for name, tensor in right.items()})


@pytest.mark.parametrize("value", [0.25, float("nan"), float("inf"), -0.0], ids=str)
def test_identical_tensors_are_copied_and_not_computed(tmp_path, value):
    """Also where a value has no square: 0.9 x + 0.1 x is not always x."""
    shared = torch.randn(997, generator=torch.Generator().manual_seed(6))
    shared[500] = value
    child, report = merge_tensors(tmp_path, {"shared": shared}, {"shared": shared.clone()}, t=0.1)
    assert bits(child["shared"]) == bits(shared)
    blend = blend_of(report, "shared")
    assert (blend.operation, blend.reason) == ("copy", "identical")


def test_a_model_merged_with_its_own_copy_is_that_model(tmp_path):
    tensors = llama_tensors(1)
    for role in ("primary", "secondary"):
        make_checkpoint(tmp_path / role, tensors)
    report = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child", 0.3)
    assert_same_bits(load_tensors(report.child), tensors)
    assert report.as_dict()["copied"] == len(tensors)


def test_one_folder_given_as_both_parents_is_copied(tmp_path, parents):
    model = make_checkpoint(tmp_path / "model", llama_tensors(1))
    parents.watch(model)
    report = merge(model, model, tmp_path / "child")
    assert_same_bits(load_tensors(report.child), llama_tensors(1))


@pytest.mark.parametrize("dtype", [BF16, F64], ids=str)
def test_every_storage_gives_the_same_bits(tmp_path, parents, dtype):
    plain = merge(*make_pair(tmp_path, dtype), tmp_path / "child", 0.3)
    for storage in ("safetensors", "bin", "legacy-bin"):
        for shards in (1, 3):
            folder = tmp_path / f"{storage}-{shards}"
            primary, secondary = make_pair(folder, dtype, storage=storage, shards=shards)
            parents.watch(primary, secondary)
            other = merge(primary, secondary, folder / "child", 0.3)
            assert_same_bits(load_tensors(other.child), load_tensors(plain.child))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
def test_the_bits_do_not_depend_on_threads_shard_cuts_or_the_parents_files(tmp_path, monkeypatch, dtype):
    set_block_elements(monkeypatch, SMALL_BLOCK)
    parents = make_pair(tmp_path, dtype)
    plain = load_tensors(merge(*parents, tmp_path / "plain", 0.3, threads=1).child)
    for threads in (2, 5):
        child = merge(*parents, tmp_path / f"threads-{threads}", 0.3, threads=threads).child
        assert (child / "model.safetensors").read_bytes() == (tmp_path / "plain/model.safetensors").read_bytes()
    for size in (1, 3000, 10_000):
        child = merge(*parents, tmp_path / f"cut-{size}", 0.3, threads=2, max_shard_bytes=size).child
        assert len(list(child.glob("model-*.safetensors"))) > 1
        assert_same_bits(load_tensors(child), plain)
    for shards in (2, 7):
        sharded = make_pair(tmp_path / f"shards-{shards}", dtype, shards=shards)
        assert_same_bits(load_tensors(merge(sharded[0], parents[1], tmp_path / f"a{shards}", 0.3).child), plain)
        assert_same_bits(load_tensors(merge(*sharded, tmp_path / f"b{shards}", 0.3).child), plain)


def test_a_tensor_of_several_tasks_has_the_same_bits_however_it_is_made(tmp_path):
    """Real blocks: three tasks for two and five workers to share, and an end that fills no block."""
    count = 2 * TASK_BLOCKS * BLOCK_ELEMENTS + 12_345
    for seed, role in ((1, "primary"), (2, "secondary")):
        large = torch.randn(count, generator=torch.Generator().manual_seed(seed)).to(BF16)
        tensors = {**llama_tensors(seed), "large": large}
        make_checkpoint(tmp_path / role, tensors)
        make_checkpoint(tmp_path / f"{role}-sharded", tensors, shards=4)
    primary, secondary = tmp_path / "primary", tmp_path / "secondary"
    plain = load_tensors(merge(primary, secondary, tmp_path / "plain", 0.3, threads=1).child)
    for threads in (2, 5):
        child = merge(
            tmp_path / "primary-sharded", secondary, tmp_path / f"child-{threads}", 0.3,
            threads=threads, max_shard_bytes=5000,
        ).child  # fmt: skip
        assert_same_bits(load_tensors(child), plain)


# ── Tensors out of the ordinary ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("left", "right", "reason", "angle"),
    [
        ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], "parallel", 0.0),
        ([1.0, 2.0, 3.0], [-2.0, -4.0, -6.0], "antiparallel", 180.0),
        ([0.0, 0.0, 0.0], [2.0, 4.0, 6.0], "zero", None),
        ([2.0, 4.0, 6.0], [0.0, 0.0, 0.0], "zero", None),
        ([0.0, 0.0, 0.0], [-0.0, 0.0, 0.0], "zero", None),
    ],
)
@pytest.mark.parametrize("method", ["slerp", "slerp-norm"])
def test_where_no_arc_is_defined_tensors_are_lerped(tmp_path, left, right, reason, angle, method):
    left, right = torch.tensor(left), torch.tensor(right)
    child, report = merge_tensors(tmp_path, {"x": left}, {"x": right}, t=0.25, method=method)
    assert torch.equal(child["x"], 0.75 * left + 0.25 * right)
    blend = blend_of(report, "x")
    assert (blend.operation, blend.reason) == ("lerp", reason)
    assert blend.angle_degrees == (None if angle is None else pytest.approx(angle, abs=0.05))


@pytest.mark.parametrize("seed", range(6))
def test_opposite_parents_of_any_size_are_lerped(tmp_path, seed):
    """Their three sums are rounded each in its own way, so their cosine is not exactly -1."""
    weight = torch.randn(300, 300, generator=torch.Generator().manual_seed(seed))
    child, report = merge_tensors(tmp_path, {"wide": weight}, {"wide": -weight}, t=0.3, method="nuslerp")
    assert blend_of(report, "wide").reason == "antiparallel"
    assert torch.allclose(child["wide"], 0.4 * weight)


@pytest.mark.parametrize("vectors", ["first_dim", "last_dim"])
@pytest.mark.parametrize(
    ("shape", "scale"), [((5000, 1), 1), ((2000, 1, 4), 1), ((3, 70000), 1), ((40, 40), 1e20), ((40, 40), 1e-25)]
)
def test_vectors_of_any_length_and_size_pass_their_own_check(tmp_path, vectors, shape, scale):
    left, right = (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    settings = {"method": "nuslerp", "vectors": vectors}
    child, _ = merge_tensors(tmp_path, {"weight": left}, {"weight": right}, t=0.3, **settings)
    assert torch.isfinite(child["weight"]).all()


def test_two_zero_tensors_are_copied(tmp_path):
    child, report = merge_tensors(tmp_path, {"x": torch.zeros(9)}, {"x": torch.zeros(9)})
    assert torch.equal(child["x"], torch.zeros(9))
    assert blend_of(report, "x").angle_degrees is None


def test_a_threshold_moves_the_line_between_slerp_and_lerp(tmp_path):
    left, right = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])  # 45 degrees, a cosine of 0.7071
    for threshold, rule in ((0.70, "lerp"), (0.71, "slerp")):
        _, report = merge_tensors(tmp_path / rule, {"x": left}, {"x": right}, dot_threshold=threshold)
        assert blend_of(report, "x").operation == rule


def test_a_number_without_dimensions_is_lerped(tmp_path):
    child, report = merge_tensors(tmp_path, {"x": torch.tensor(2.0)}, {"x": torch.tensor(-4.0)}, t=0.25)
    assert child["x"].shape == ()
    assert child["x"] == 0.5
    assert blend_of(report, "x").operation == "lerp"


@pytest.mark.parametrize("dtypes", [(BF16, F32, F64), (torch.int64, torch.bool)], ids=["real", "whole"])
def test_tensors_without_elements_stay_so(tmp_path, dtypes):
    empty = {f"{shape} {dtype}": torch.zeros(shape, dtype=dtype) for shape in ((0,), (3, 0)) for dtype in dtypes}
    child, _ = merge_tensors(tmp_path, empty, {name: tensor.clone() for name, tensor in empty.items()}, t=0.3)
    assert_same_bits({name: child[name] for name in empty}, empty)


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_equal_integers_are_copied_in_silence(tmp_path, t):
    dtypes = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    numbers = {str(dtype): torch.tensor([0, 1, 7, 100, 2**62 + 1]).to(dtype) for dtype in dtypes}
    copies = {name: tensor.clone() for name, tensor in numbers.items()}
    child, report = merge_tensors(tmp_path, numbers, copies, t=t, dtype="float16")
    assert_same_bits({name: child[name] for name in numbers}, numbers)
    assert report.verified.warnings == ()


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_integers_that_differ_are_the_primarys_and_named(tmp_path, t):
    left, right = torch.arange(300), torch.arange(300)
    right[299] = 7
    child, report = merge_tensors(tmp_path, {"x": left, "y": left + 1}, {"x": right, "y": left + 1}, t=t)
    assert torch.equal(child["x"], left)
    (warning,) = report.verified.warnings
    assert warning.startswith("x: ")
    assert "int64" in warning


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("t", [0.0, 0.5])
def test_a_value_that_is_not_finite_is_counted_and_named(tmp_path, value, t):
    left, right = (torch.randn(2, 50, generator=torch.Generator().manual_seed(7))).unbind()
    left[3] = left[40] = value
    child, report = merge_tensors(tmp_path, {"x": left}, {"x": right}, t=t)
    (warning,) = report.verified.warnings
    assert warning.startswith("x: 2 values")
    others = torch.isfinite(left)
    assert not torch.isfinite(child["x"][~others]).any()
    assert distance(child["x"][others], left[others], right[others], ((1 - t) * left + t * right)[others].double()) <= 1


def test_values_too_large_for_float16_are_named(tmp_path):
    left, right = torch.tensor([1e5, 1.0, 2.0]), torch.tensor([1.0, 1e5, 2.0])
    for t, count in ((0.5, 2), (0.0, 1)):
        child, report = merge_tensors(tmp_path / str(t), {"x": left}, {"x": right}, t=t, dtype="float16")
        assert int(torch.isinf(child["x"]).sum()) == count
        assert [warning[:12] for warning in report.verified.warnings] == [f"x: {count} values "]


@pytest.mark.parametrize("method", ["slerp", "slerp-norm"])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_values_whose_squares_overflow_still_merge_right(tmp_path, dtype, method):
    left, right = (1e30 * torch.randn(2, 500, generator=torch.Generator().manual_seed(8))).to(dtype).unbind()
    child, report = merge_tensors(tmp_path, {"x": left}, {"x": right}, t=0.3, method=method)
    assert blend_of(report, "x").operation == "slerp"
    assert report.verified.warnings == ()
    assert_right({"x": child["x"]}, {"x": left}, {"x": right}, 0.3, method)


# ── Pairs that parity resolved ────────────────────────────────────────────────────────────────────


def test_a_stored_head_meets_the_embedding_that_is_tied_to_one(tmp_path):
    left, right = llama_tensors(1), llama_tensors(2)
    del right["lm_head.weight"]
    primary = make_checkpoint(tmp_path / "primary", left)
    secondary = make_checkpoint(tmp_path / "secondary", right, {**LLAMA_CONFIG, "tie_word_embeddings": True})
    child = load_tensors(merge(primary, secondary, tmp_path / "child", 0.3).child)
    assert_right(child, left, {**right, "lm_head.weight": right["model.embed_tokens.weight"]}, 0.3)
    assert json.loads((tmp_path / "child/config.json").read_text())["tie_word_embeddings"] is False


def test_a_primary_with_a_tied_head_has_a_child_with_one(tmp_path):
    left, right = llama_tensors(1), llama_tensors(2)
    del left["lm_head.weight"]
    primary = make_checkpoint(tmp_path / "primary", left, {**LLAMA_CONFIG, "tie_word_embeddings": True})
    secondary = make_checkpoint(tmp_path / "secondary", right)
    child = load_tensors(merge(primary, secondary, tmp_path / "child", 0.3).child)
    assert_right(child, left, right, 0.3)
    assert json.loads((tmp_path / "child/config.json").read_text())["tie_word_embeddings"] is True


@pytest.mark.parametrize("t", [0.3, 1.0])
def test_a_buffer_of_one_parent_is_in_the_child_if_the_primary_has_it(tmp_path, t):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    left, right = llama_tensors(1), llama_tensors(2)
    frequencies = torch.tensor([1.0, 0.1])
    has = make_checkpoint(tmp_path / "has", {**left, name: frequencies})
    lacks = make_checkpoint(tmp_path / "lacks", right)
    assert torch.equal(load_tensors(merge(has, lacks, tmp_path / "kept", t).child)[name], frequencies)
    assert name not in load_tensors(merge(lacks, has, tmp_path / "dropped", t).child)


def test_a_buffer_of_both_parents_is_never_blended(tmp_path):
    """Rotary frequencies that one parent saved in bfloat16 must not spoil the other's."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    exact = 10000.0 ** -(torch.arange(32) / 32)
    child, _ = merge_tensors(tmp_path, {name: exact}, {name: exact.to(BF16)}, t=0.5)
    assert torch.equal(child[name], exact)


# ── The child's dtype and files ─────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_an_asked_dtype_is_what_every_real_tensor_and_the_config_have(tmp_path, dtype, t):
    left = {**llama_tensors(1, F32), "model.norm.weight": llama_tensors(1, BF16)["model.norm.weight"]}
    right = llama_tensors(2, F16)
    primary = make_checkpoint(tmp_path / "primary", left, {**LLAMA_CONFIG, "torch_dtype": "float64"})
    secondary = make_checkpoint(tmp_path / "secondary", right)
    child = load_tensors(merge(primary, secondary, tmp_path / "child", t, dtype=dtype).child)
    assert {str(tensor.dtype) for tensor in child.values()} == {f"torch.{dtype}"}
    assert json.loads((tmp_path / "child/config.json").read_text())["torch_dtype"] == dtype
    if t in (0.0, 1.0):
        source = right if t else left
        assert_same_bits(child, {name: tensor.to(getattr(torch, dtype)) for name, tensor in source.items()})
    else:
        assert_right(child, left, right, t)


def test_a_child_is_one_file_with_its_header_as_transformers_writes_it(tmp_path):
    child = merge(*make_pair(tmp_path), tmp_path / "child").child
    assert sorted(path.name for path in child.iterdir()) == PLAIN_CHILD
    data = (child / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_a_child_in_shards_has_an_index_and_loads(tmp_path, parents):
    from transformers import AutoModelForCausalLM

    primary, secondary = make_real_model(tmp_path / "primary", 1), make_real_model(tmp_path / "secondary", 2)
    parents.watch(primary, secondary)
    child = merge(primary, secondary, tmp_path / "child", 0.3, max_shard_bytes=4000).child
    tensors = load_tensors(child)
    index = json.loads((child / "model.safetensors.index.json").read_text())
    count = len(list(child.glob("*.safetensors")))
    assert count > 2
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert index["weight_map"].keys() == tensors.keys()
    for number in range(1, count + 1):
        file = f"model-{number:05d}-of-{count:05d}.safetensors"
        held = load_file(child / file)
        assert {name for name, place in index["weight_map"].items() if place == file} == held.keys()
        assert sum(tensor.nbytes for tensor in held.values()) <= 4000
    loaded = AutoModelForCausalLM.from_pretrained(child, torch_dtype=BF16).state_dict()
    assert_same_bits({name: loaded[name] for name in tensors}, tensors)


def test_files_hold_the_layers_in_their_order(tmp_path):
    layers = 12
    config = {**LLAMA_CONFIG, "num_hidden_layers": layers}
    primary, secondary = (
        make_checkpoint(tmp_path / str(seed), llama_tensors(seed, layers=layers), config, shards=2) for seed in (1, 2)
    )
    report = merge(primary, secondary, tmp_path / "child", max_shard_bytes=4000)
    numbers = [
        int(merged.tensor.name.split(".")[2]) for merged in report.merged.tensors if ".layers." in merged.tensor.name
    ]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) == layers


# ── Events and the report ───────────────────────────────────────────────────────────────────────


def test_events_tell_the_whole_story_in_order_on_the_main_thread(tmp_path, monkeypatch):
    set_block_elements(monkeypatch, SMALL_BLOCK)
    events, threads = [], set()

    def observe(event: object) -> None:
        events.append(event)
        threads.add(threading.current_thread())

    primary, secondary = make_pair(tmp_path)
    report = merge(primary, secondary, tmp_path / "child", 0.3, observe, threads=3, max_shard_bytes=5000)
    assert threads == {threading.main_thread()}
    kinds = [type(event) for event in events if not isinstance(event, WorkAdvanced | MergedTensor)]
    assert kinds == [*[Noted] * (DEVICE != "cpu"), WorkBegan, WorkEnded, ChildPublished]
    (began,) = (event for event in events if isinstance(event, WorkBegan))
    published = events[-1]
    assert [event.text for event in events if isinstance(event, Noted)] == [f"Merging on {DEVICE}."][DEVICE == "cpu" :]
    assert (began.total, began.unit) == (report.plan.child_bytes, "bytes")
    assert began.tensors == tuple(tensor.name for tensor in report.plan.tensors)
    assert published.child == report.child

    merged = [event for event in events if isinstance(event, MergedTensor)]
    assert tuple(merged) == report.merged.tensors
    planned = [tensor for shard in report.plan.shards for tensor in shard.tensors]
    assert [event.tensor for event in merged] == planned
    assert len(planned) == len(llama_tensors(1)) == 3 + 9 * LAYERS
    left, right = load_tensors(primary), load_tensors(secondary)
    for event in merged:
        flat = (side[event.tensor.name].double().flatten() for side in (left, right))
        cosine = torch.cosine_similarity(*flat, dim=0)
        assert event.weights.operation == "slerp"
        assert event.weights.angle_degrees == pytest.approx(math.degrees(math.acos(cosine)), abs=1e-3)
        assert 0 < event.seconds < 60
        assert event.non_finite == 0

    total = sum(tensor.nbytes for tensor in load_tensors(report.child).values())
    assert sum(event.amount for event in events if isinstance(event, WorkAdvanced)) == total
    assert report.plan.child_bytes == total
    planned_files = {shard.file_name: shard.byte_count for shard in report.plan.shards}
    assert planned_files == {file.name: file.stat().st_size for file in report.child.glob("*.safetensors")}
    assert len(planned_files) > 2


def test_the_report_counts_what_was_done(tmp_path):
    shared, number = torch.ones(5), torch.tensor(1.0)
    left = {"same": shared, "number": number, "ids": torch.arange(3)}
    right = {"same": shared.clone(), "number": number * 2, "ids": torch.arange(3)}
    child, report = merge_tensors(tmp_path, left, right, t=0.3)
    told = report.as_dict()
    assert told["tensors"] == len(child)
    assert (told["slerped"], told["lerped"], told["copied"]) == (len(child) - 3, 1, 2)
    assert told["bytes"] == sum(tensor.nbytes for tensor in child.values())
    assert told["child"] == str(tmp_path / "child")
    assert 0 < told["seconds"] <= told["total_seconds"]
    assert told["bytes_per_second"] == pytest.approx(told["bytes"] / told["seconds"])
    assert json.loads(json.dumps(told)) == told


def test_a_gradient_and_a_filter_give_each_layer_its_t(tmp_path):
    schedule = Schedule((ScheduleRule((1.0,), "mlp"), ScheduleRule((0.25, 0.75))))
    report = merge(*make_pair(tmp_path), tmp_path / "child", schedule=schedule)
    left, right, child = (load_tensors(tmp_path / name) for name in ("primary", "secondary", "child"))
    assert {m.tensor.name for m in report.merged.tensors if m.tensor.t == 1.0} == {
        name for name in left if "mlp" in name
    }
    for name in child:
        t = 1.0 if "mlp" in name else 0.75 if ".layers.1." in name else 0.25
        assert distance(child[name], left[name], right[name], reference_slerp(left[name], right[name], t)) <= 0.51, name


# ── An accelerator's arithmetic, where the processor stands for it ──────────────────────────────


def stored(values: torch.Tensor, name: str) -> numpy.ndarray:
    """Values as a worker reads them."""
    raw = values.to(getattr(torch, TORCH_NAMES[name])).view(torch.uint8).numpy().copy()
    return raw.view(stored_dtype(name))


@pytest.mark.parametrize("cast", [None, "float16"])
@pytest.mark.parametrize("name", ["BF16", "F16", "F32", "F64"])
@pytest.mark.parametrize("sources", [2, 3])
def test_an_accelerator_computes_what_the_processor_does(name, cast, sources):
    width, rows = 48, 40
    random = torch.Generator().manual_seed(7)
    block = [stored(torch.randn(rows * width, generator=random).double(), name) for _ in range(sources)]
    dtype = numpy.dtype("f8" if name == "F64" else "f4")
    made = []
    for arithmetic in (Arithmetic(cast), DeviceArithmetic("cpu", cast)):
        outs = [numpy.zeros(rows * width, stored_dtype(name)) for _ in range(3)]
        arithmetic.blend(block, dtype, (0.6, 0.5), outs[0])
        sums = [numpy.array(arithmetic.measure(block, dtype))]
        for axis, out in ((0, outs[1]), (1, outs[2])):
            sums.append(arithmetic.measure_vectors(block, dtype, width, axis))
            weights = [weight[None, :] if axis == 0 else weight[:, None] for weight in vector_weights(sums[-1], 0.3)]
            arithmetic.blend_vectors(block, dtype, weights, width, out)
        made.append((outs, sums))
    (outs, sums), (device_outs, device_sums) = made
    for mine, other in zip(sums, device_sums):
        numpy.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-5)
    unit = max(EPSILON[name], EPSILON["F16"] if cast else 0)
    for mine, other in zip(outs, device_outs):
        wide = [numpy.zeros(rows * width) for _ in range(2)]
        widen(mine, wide[0])
        widen(other, wide[1])
        assert numpy.abs(wide[0]).max() > 1
        numpy.testing.assert_allclose(*wide, rtol=2 * unit, atol=16 * unit)


# ── An accelerator that is short of memory ──────────────────────────────────────────────────────


def scarce(enough_for: int, tried: list[str]) -> type[DeviceArithmetic]:
    """Arithmetic that plays an accelerator on the processor, whose memory is full after so many blocks."""

    class Scarce(Arithmetic):
        def __init__(self, device: str, cast_dtype: str | None) -> None:
            super().__init__(cast_dtype)
            self.device = device

        def load(self, *arguments: Any, **more: Any) -> Any:
            tried.append(self.device)
            if tried.count("cuda") > enough_for:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().load(*arguments, **more)

    return Scarce


@pytest.mark.parametrize(
    ("enough_for", "settings"),
    [
        (10**9, {}),
        (40, {}),
        (0, {}),
        (0, {"method": "nuslerp", "vectors": "first_dim"}),
        (0, {"method": "nuslerp", "vectors": "last_dim"}),
    ],
)
def test_where_an_accelerator_is_short_of_memory_the_processor_takes_over_to_the_same_bits(
    tmp_path, monkeypatch, enough_for, settings
):
    set_block_elements(monkeypatch, SMALL_BLOCK)
    expected = load_tensors(merge(*make_pair(tmp_path), tmp_path / "expected", 0.3, **settings).child)
    tried: list[str] = []
    monkeypatch.setattr("slerpkit.merge.worker.DeviceArithmetic", scarce(enough_for, tried))
    monkeypatch.setattr("slerpkit.devices.check_device", lambda device: None)
    parents = tmp_path / "primary", tmp_path / "secondary"
    child = load_tensors(merge(*parents, tmp_path / "child", 0.3, threads=2, device="cuda", **settings).child)
    assert_same_bits(child, expected)
    assert tried
    assert tried.count("cuda") <= enough_for + 2  # each of two workers tries it once more, and then no longer


def test_an_accelerator_that_fails_is_named(tmp_path, monkeypatch):
    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered\nCompile with ...")

    monkeypatch.setattr(DeviceArithmetic, "load_block", fail)
    monkeypatch.setattr("slerpkit.devices.check_device", lambda device: None)
    with pytest.raises(SlerpMergeError, match="The device cuda failed: CUDA error: an illegal") as caught:
        merge(*make_pair(tmp_path), tmp_path / "child", device="cuda")
    assert "--device cpu" in caught.value.hint
