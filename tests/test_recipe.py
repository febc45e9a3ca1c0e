"""mergekit's recipes: the golden children, recipes replayed, slices and schedules, task vectors, and every refusal."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from slerpkit.child.report import MergeReport
from slerpkit.evaluation.models import verify_with_transformers
from slerpkit.merge.plan import MergePlan
from slerpkit.messages import SlerpMergeError
from slerpkit.recipe import LayerSlice, RunOptions, TokenSource
from slerpkit.recipe_file import read_recipe
from slerpkit.recipe_writer import recipe_text
from slerpkit.schedule import Schedule, ScheduleRule
from slerpkit.story import execute_merge, prepare_merge
from tests.builders import (
    DEVICE,
    LLAMA_CONFIG,
    add_tokenizer,
    assert_same_bits,
    bits,
    distance,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    make_real_model,
    merge,
    plan_of,
    reference_slerp,
    set_block_elements,
)
from tests.conftest import fingerprint

GOLDEN = Path(__file__).with_name("golden") / "llama"
GOLDEN_NAMES = sorted(path.stem for path in GOLDEN.glob("*.yaml"))
WITHOUT_BASE, WITH_BASE = 2.5, 6.0  # units of float32's last place that a value may be off
ATTENTION, MLP = (0.0, 0.5, 0.3, 0.7, 1.0), (1.0, 0.5, 0.7, 0.3, 0.0)
WELL_KNOWN = Schedule((ScheduleRule(ATTENTION, "self_attn"), ScheduleRule(MLP, "mlp"), ScheduleRule((0.5,))))


def plan_of_file(recipe: Path, child: Path) -> MergePlan:
    return prepare_merge(read_recipe(recipe), RunOptions(child, DEVICE))


def merge_recipe(recipe: Path, child: Path) -> MergeReport:
    return execute_merge(plan_of_file(recipe, child))


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# ── A reference of its own: recipes read with PyYAML, values in float64, nothing shared with the program ──


def listed_value(gradient: Any, position: float) -> float:
    """A number, or a list read at a position between its ends."""
    if not isinstance(gradient, list):
        return gradient
    scaled = position * (len(gradient) - 1)
    low = int(scaled)
    high = min(low + 1, len(gradient) - 1)
    return gradient[low] + (scaled - low) * (gradient[high] - gradient[low])


def scoped_value(scopes: Sequence[Any], name: str, position: float) -> float:
    """The first value that speaks of a tensor; scopes run from the narrowest to the widest."""
    for scope in scopes:
        entries = scope if isinstance(scope, list) and isinstance(scope[0], dict) else [{"value": scope}]
        for entry in entries:
            if entry.get("filter", "*") == "*" or entry["filter"] in name:
                return listed_value(entry["value"], position)
    raise LookupError(name)


def settings_for(recipe: Mapping[str, Any], parameter: str, cut: Mapping[str, Any], source: Mapping[str, Any]) -> list:
    given = [scope.get("parameters", {}) for scope in (source, cut, recipe)]
    return [parameters[parameter] for parameters in given if parameter in parameters]


def layer_of(name: str) -> int | None:
    found = re.match(r"model\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def exact_nuslerp(v0: torch.Tensor, v1: torch.Tensor, t: float, axis: int | None) -> torch.Tensor:
    """NuSLERP in float64 of vectors along an axis, or of the whole."""
    if axis is None or v0.ndim < 2:
        shape, v0, v1, axis = v0.shape, v0.reshape(1, -1), v1.reshape(1, -1), 1
    else:
        shape = v0.shape
    lengths = (v0 * v0).sum(axis, keepdim=True).sqrt() * (v1 * v1).sum(axis, keepdim=True).sqrt()
    theta = torch.acos(((v0 * v1).sum(axis, keepdim=True) / lengths).clamp(-1, 1))
    curved = (torch.sin((1 - t) * theta) * v0 + torch.sin(t * theta) * v1) / torch.sin(theta)
    straight = (1 - t) * v0 + t * v1
    return torch.where((torch.sin(theta).abs() < 1e-8) | (lengths == 0), straight, curved).reshape(shape)


def exact_slerp(v0: torch.Tensor, v1: torch.Tensor, t: float) -> torch.Tensor:
    """SLERP in float64 of two whole tensors."""
    lengths = float(v0.norm()), float(v1.norm())
    cosine = float((v0 * v1).sum()) / (lengths[0] * lengths[1]) if min(lengths) > 1e-8 else 1.0
    if abs(cosine) > 0.9995:
        return (1 - t) * v0 + t * v1
    theta = math.acos(cosine)
    return (math.sin((1 - t) * theta) * v0 + math.sin(t * theta) * v1) / math.sin(theta)


@functools.cache
def golden_tensors(model: str) -> dict[str, torch.Tensor]:
    return load_tensors(GOLDEN / model)


def exact_golden(recipe: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor, list[torch.Tensor]]]:
    """(name, float64 value, operands) of every tensor of the child that a golden recipe describes."""
    method, base_model = recipe["merge_method"], recipe.get("base_model")
    entries = recipe["slices"][0]["sources"] if "slices" in recipe else recipe["models"]
    sides = [entry["model"] for entry in entries]
    if method == "slerp" and base_model != sides[0]:
        sides.reverse()
    flags = recipe.get("parameters", {})
    axis = None if flags.get("nuslerp_flatten", True) else (0 if flags.get("nuslerp_row_wise") else -1)
    whole = [{"sources": [{**entry, "layer_range": [0, 6]} for entry in entries]}]
    cuts = recipe.get("slices", whole)
    dtype = getattr(torch, recipe["dtype"])
    v0s, v1s = (golden_tensors(side.removeprefix("./")) for side in sides)
    bases = golden_tensors("base") if method == "nuslerp" and base_model else None

    def value(name: str, names: Sequence[str], position: float, cut: Mapping[str, Any]) -> Any:
        operands = [tensors[there].to(dtype) for tensors, there in zip((v0s, v1s), names)]
        if bases is not None:
            operands.append(bases[names[0]].to(dtype))
        v0, v1, *base = (operand.double() for operand in operands)
        by_model = {source["model"]: source for source in cut["sources"]}
        if method == "slerp":
            t = scoped_value(settings_for(recipe, "t", cut, {}), name, position)
            return name, exact_slerp(v0, v1, t), operands
        first, second = (
            scoped_value(settings_for(recipe, "weight", cut, by_model[side]), name, position) for side in sides
        )
        if method == "linear":
            share = 1 if flags.get("normalize", True) is False else first + second
            return name, (first * v0 + second * v1) / share, operands
        t = second / (first + second)
        if base:
            return name, base[0] + exact_nuslerp(v0 - base[0], v1 - base[0], t, axis), operands
        return name, exact_nuslerp(v0, v1, t, axis), operands

    number = 0
    for cut in cuts:
        ranges = {source["model"]: source["layer_range"] for source in cut["sources"]}
        count = ranges[sides[0]][1] - ranges[sides[0]][0]
        for step in range(count):
            for name in v0s:
                if layer_of(name) == ranges[sides[0]][0] + step:
                    here, there = (
                        re.sub(r"layers\.\d+", f"layers.{ranges[side][0] + step}", name, count=1) for side in sides
                    )
                    child = re.sub(r"layers\.\d+", f"layers.{number}", name, count=1)
                    yield value(child, (here, there), step / (count - 1), cut)
            number += 1
    for name in v0s:
        if layer_of(name) is None:
            yield value(name, (name, name), 0.0, cuts[0] if "embed" in name else cuts[-1])


def units(found: torch.Tensor, exact: torch.Tensor, operands: Sequence[torch.Tensor]) -> float:
    """The largest error of a tensor, in units of the last place at the size of each element's largest operand."""
    size = functools.reduce(torch.maximum, (part.double().abs() for part in (*operands, exact)))
    limits = torch.finfo(found.dtype)
    unit = torch.exp2(torch.floor(torch.log2(size.clamp_min(limits.smallest_normal)))) * limits.eps
    return float(((found.double() - exact).abs() / unit).max())


# ── Golden children ──


@pytest.fixture(scope="module")
def golden_child(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("golden")

    @functools.cache
    def make(name: str) -> Path:
        return merge_recipe(GOLDEN / f"{name}.yaml", folder / name).child

    return make


def test_there_are_seventeen_golden_recipes() -> None:
    assert len(GOLDEN_NAMES) == 17


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_child_is_mergekits(name: str, golden_child: Callable[[str], Path]) -> None:
    child, peer = load_tensors(golden_child(name)), load_file(GOLDEN / "expected" / f"{name}.safetensors")
    assert child.keys() == peer.keys()
    for tensor_name, found in child.items():
        expected = peer[tensor_name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), tensor_name
        largest = expected.double().abs().max()
        unit = torch.exp2(torch.floor(torch.log2(largest))) * torch.finfo(found.dtype).eps
        # The peer's own float32 values lie up to 2.6 units from the exact ones: no right child meets them within one.
        most = 2 if found.dtype == torch.float32 else 1
        assert (found.double() - expected.double()).abs().max() <= most * unit, tensor_name
    config = json.loads((golden_child(name) / "config.json").read_text(encoding="utf-8"))
    expected_config = json.loads((GOLDEN / "expected" / f"{name}.config.json").read_text(encoding="utf-8"))
    assert config == expected_config


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_child_is_nearer_to_float64(name: str, golden_child: Callable[[str], Path]) -> None:
    recipe = yaml.safe_load((GOLDEN / f"{name}.yaml").read_text(encoding="utf-8"))
    child, peer = load_tensors(golden_child(name)), load_file(GOLDEN / "expected" / f"{name}.safetensors")
    seen = set()
    for tensor_name, exact, operands in exact_golden(recipe):
        found = child[tensor_name]
        seen.add(tensor_name)
        error = units(found, exact, operands)
        assert error <= units(peer[tensor_name], exact, operands) + 1, tensor_name
        if found.dtype == torch.float32:
            assert error <= (WITHOUT_BASE if len(operands) == 2 else WITH_BASE), tensor_name
        else:
            assert distance(found, operands[0], operands[1], exact) <= 0.51, tensor_name
    assert seen == child.keys()


# ── Recipes replayed ──


def assert_replays(child: Path, again: Path) -> None:
    merge_recipe(child / "merge_recipe.yaml", again)
    first, second = fingerprint(child), fingerprint(again)
    assert any("safetensors" in name for name in first)
    same = [name for name in first if "safetensors" in name or "token" in name]
    assert {name: first[name] for name in same} == {name: second.get(name) for name in same}
    assert first["config.json"] == second["config.json"]


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_child_is_replayed_bit_by_bit(name: str, golden_child: Callable[[str], Path], tmp_path: Path) -> None:
    assert_replays(golden_child(name), tmp_path / "again")


GRADIENTS = Schedule((ScheduleRule((0.1, 0.9, 0.3), "self_attn"), ScheduleRule((0.7,), "mlp"), ScheduleRule((0.33,))))
AWKWARD = Schedule((ScheduleRule((0.1, 0.7, 0.3), "mlp"), ScheduleRule((0.9, 0.05))))
SETTINGS: dict[str, dict[str, Any]] = {
    "slerp": {},
    "slerp-norm": {"method": "slerp-norm"},
    "lerp": {"method": "lerp", "schedule": Schedule.constant(0.1)},
    "nuslerp": {"method": "nuslerp", "schedule": Schedule.constant(0.7)},
    "nuslerp-row": {"method": "nuslerp", "vectors": "first_dim", "schedule": GRADIENTS},
    "nuslerp-column": {"method": "nuslerp", "vectors": "last_dim", "schedule": GRADIENTS},
    "gradients": {"schedule": GRADIENTS},
    "slerp-norm-gradients": {"schedule": GRADIENTS, "method": "slerp-norm"},
    "dtype": {"dtype": "float32"},
    "float16": {"dtype": "float16", "schedule": AWKWARD},
    "extrapolate": {"schedule": Schedule.constant(1.3), "extrapolate": True},
    "extrapolate-lerp": {"schedule": Schedule.constant(-0.2), "extrapolate": True, "method": "lerp"},
    "thresholds": {"dot_threshold": 0.01, "epsilon": 1e-5},
    "base-slerp": {"base": "base", "schedule": AWKWARD},
    "base-slerp-norm": {"base": "base", "method": "slerp-norm"},
    "base-lerp": {"base": "base", "method": "lerp", "schedule": AWKWARD},
    "base-nuslerp-row": {"base": "base", "method": "nuslerp", "vectors": "first_dim"},
    "slices-slerp": {"slices": (LayerSlice(1, 0, 1, AWKWARD), LayerSlice(0, 1, 1, GRADIENTS))},
    "slices-slerp-norm": {"slices": (LayerSlice(0, 0, 2, AWKWARD),), "method": "slerp-norm"},
    "slices-lerp": {"slices": (LayerSlice(0, 0, 2, AWKWARD), LayerSlice(0, 0, 2, GRADIENTS)), "method": "lerp"},
    "slices-base": {"slices": (LayerSlice(0, 1, 1, AWKWARD, None, 1),), "base": "base"},
    "tokenizer": {"tokenizer": "secondary", "schedule": Schedule.constant(0.2)},
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_child_of_flags_is_replayed_bit_by_bit(name: str, tmp_path: Path) -> None:
    settings = dict(SETTINGS[name])
    primary, secondary = make_pair(tmp_path, torch.float32)
    if "base" in settings:
        settings["base"] = make_checkpoint(tmp_path / "base", llama_tensors(3, torch.float32))
    if name == "tokenizer":
        for parent, seed in ((tmp_path / "real-1", 1), (tmp_path / "real-2", 2)):
            make_real_model(parent, seed)
        primary, secondary = tmp_path / "real-1", tmp_path / "real-2"
    child = merge(primary, secondary, tmp_path / "child", **settings).child
    text = (child / "merge_recipe.yaml").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    recipe = yaml.safe_load(text)
    assert recipe["merge_method"] in ("slerp", "nuslerp", "linear")
    assert ("models" in recipe) != ("slices" in recipe)
    for role, folder in (("primary", primary), ("secondary", secondary)):
        assert recipe["slerpmerge"][role]["name"] == folder.name
        assert re.fullmatch(r"sha256:[0-9a-f]{64}", recipe["slerpmerge"][role]["headers"])
    assert ("base" in recipe["slerpmerge"]) == ("base" in settings)
    assert_replays(child, tmp_path / "again")


# ── Whose tokenizer ──


def pair_of_tokenizers(folder: Path) -> tuple[Path, Path]:
    """Parents of which the secondary's tokenizer is taken where nobody says whose."""
    primary, secondary = make_pair(folder)
    add_tokenizer(primary)
    add_tokenizer(secondary, special_tokens_map=True)
    return primary, secondary


SILENT = {
    "slerp": ({"merge_method": "slerp", "base_model": "{}", "parameters": {"t": 0.5}}, None),
    "linear": ({"merge_method": "linear", "base_model": "{}"}, {"weight": 1}),
    "no base": ({"merge_method": "linear"}, {"weight": 1}),
}


@pytest.mark.parametrize("base_model", ["primary", "secondary"])
@pytest.mark.parametrize("recipe", SILENT)
def test_a_recipe_that_is_silent_takes_the_tokenizer_of_its_base_model(tmp_path, recipe, base_model):
    pair_of_tokenizers(tmp_path)
    content, parameters = SILENT[recipe]
    models = [
        {"model": f"./{name}"} | ({"parameters": parameters} if parameters else {}) for name in ("primary", "secondary")
    ]
    content = {**content, "models": models} | ({"base_model": f"./{base_model}"} if "base_model" in content else {})
    file = write(tmp_path / "silent.yaml", yaml.safe_dump(content))
    plan = plan_of_file(file, tmp_path / "child")
    expected = base_model if "base_model" in content else "secondary"
    assert plan.parents.by_role[plan.tokenizer_role].folder.name == expected
    said = write(tmp_path / "said.yaml", yaml.safe_dump({**content, "tokenizer_source": "./secondary"}))
    plan = plan_of_file(said, tmp_path / "child")
    assert plan.parents.by_role[plan.tokenizer_role].folder.name == "secondary"


def test_a_recipe_of_this_tool_that_is_silent_leaves_it_to_the_rule(tmp_path):
    """As version 0.2.0 wrote them."""
    pair_of_tokenizers(tmp_path)
    content = yaml.safe_load(GOOD) | {"slerpmerge": {"version": "0.2.0", "method": "slerp"}}
    plan = plan_of_file(write(tmp_path / "recipe.yaml", yaml.safe_dump(content)), tmp_path / "child")
    assert plan.tokenizer_role == "secondary"


def test_a_base_model_without_a_tokenizer_leaves_it_to_the_rule(tmp_path):
    _, secondary = make_pair(tmp_path)
    add_tokenizer(secondary)
    content = {"merge_method": "slerp", "base_model": "./primary", "parameters": {"t": 0.5},
               "models": [{"model": "./primary"}, {"model": "./secondary"}]}  # fmt: skip
    plan = plan_of_file(write(tmp_path / "recipe.yaml", yaml.safe_dump(content)), tmp_path / "child")
    assert plan.tokenizer_role == "secondary"


WHOLE_TOKENIZER = """tokenizer:
  source: model:./secondary/
  tokens:
    <a>: {source: ./secondary, force: yes}
    <b>: {source: zero}
    <c>: {source: {kind: zero}}
    "</s>":
      source: {kind: model_token, model: ./primary, token: "<s>"}
    7:
      source:
        kind: model_token
        model: {model: {path: primary}}
        token_id: '12'
      force: true
  pad_to_multiple_of: "64"
  truncate: true
"""


def test_a_recipe_says_which_rows_stand_for_tokens(tmp_path):
    make_pair(tmp_path)
    recipe = read_recipe(write(tmp_path / "recipe.yaml", GOOD + WHOLE_TOKENIZER))
    assert (recipe.tokenizer, recipe.pad_to_multiple_of) == ("secondary", 64)
    assert recipe.token_sources == (
        TokenSource("<a>", "secondary", force=True),
        TokenSource("<b>", None),
        TokenSource("<c>", None),
        TokenSource("</s>", "primary", "<s>"),
        TokenSource("7", "primary", 12, force=True),
    )
    assert recipe.origin.remarks == ("recipe.yaml, line 24: 'truncate' in tokenizer is passed over, as mergekit does.",)


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("tokenizer: {}", "union"),
        ("tokenizer: {pad_to_multiple_of: 8}", "union"),
        ("tokenizer_source: base", "primary"),
    ],
)
def test_a_tokenizer_without_a_source_is_the_union(tmp_path, text, tokenizer):
    make_pair(tmp_path)
    assert read_recipe(write(tmp_path / "recipe.yaml", f"{GOOD}{text}\n")).tokenizer == tokenizer


def test_a_template_and_a_padding_that_say_nothing_are_passed_over(tmp_path):
    make_pair(tmp_path)
    text = f"{GOOD}chat_template: ''\ntokenizer: {{source: base, pad_to_multiple_of: 0}}\n"
    recipe = read_recipe(write(tmp_path / "recipe.yaml", text))
    assert (recipe.chat_template, recipe.pad_to_multiple_of) == ("auto", 1)
    assert recipe.origin.remarks == ("recipe.yaml, line 9: 'chat_template' is empty and says nothing.",)


def test_what_a_recipe_says_of_tokens_is_replayed(tmp_path):
    primary, secondary = pair_of_tokenizers(tmp_path)
    token = next(iter(json.loads((primary / "tokenizer.json").read_text())["model"]["vocab"]))
    wanted = (
        TokenSource(token, "secondary", force=True),
        TokenSource("fresh", "primary", 3),
        TokenSource("none", None, force=True),
    )
    given = {"tokenizer": "secondary", "token_sources": wanted, "pad_to_multiple_of": 16}
    child = merge(primary, secondary, tmp_path / "child", **given).child
    again = read_recipe(child / "merge_recipe.yaml")
    assert {key: getattr(again, key) for key in given} == given
    assert_replays(child, tmp_path / "again")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        ("tokenizer_source: union\ntokenizer: {source: union}", 10, "stands beside tokenizer_source"),
        ("tokenizer: {tokens: {a: {force: true}}}", 9, "says nothing of where its row is from"),
        ("tokenizer: {tokens: {a: {source: ./third}}}", 9, "is not one of the two models"),
        ("tokenizer: {tokens: {a: {source: {kind: mean}}}}", 9, "is no row"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: ./primary}}}}", 9, "is no row"),
        ("tokenizer: {tokens: {a: {source: {kind: model_token, model: ./primary, token_id: -1}}}}", 9, "from 0 on"),
        ("tokenizer: {pad_to_multiple_of: -8}", 9, "from 0 on"),
        ("tokenizer: {pad_to_multiple_of: 1.5}", 9, "from 0 on"),
        ("tokenizer: {tokns: {}}", 9, "not known in tokenizer"),
    ],
)
def test_a_tokenizer_that_is_wrong_is_refused_with_its_line(tmp_path, text, line, said):
    make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match=said) as refused:
        read_recipe(write(tmp_path / "recipe.yaml", f"{GOOD}{text}\n"))
    assert f"line {line}: " in refused.value.message


@pytest.mark.parametrize("method", ["slerp", "lerp", "nuslerp"])
@pytest.mark.parametrize("asked", ["auto", "primary", "union"])
def test_the_recipe_of_a_child_states_whose_tokenizer_it_has(tmp_path, asked, method):
    primary, secondary = pair_of_tokenizers(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", method=method, tokenizer=asked).child
    stated = yaml.safe_load((child / "merge_recipe.yaml").read_text())["tokenizer_source"]
    assert stated == {"auto": "../secondary", "primary": "../primary", "union": "union"}[asked]
    assert_replays(child, tmp_path / "again")


@pytest.mark.parametrize("extrapolate", [False, True])
@pytest.mark.parametrize("method", ["slerp", "lerp", "nuslerp"])
def test_slices_keep_every_t_when_replayed(method: str, extrapolate: bool, tmp_path: Path) -> None:
    """Written as the weights 1 - t and t, some t between anchors would come back a rounding off."""
    primary, secondary = hollow_pair(tmp_path, vectors({"model.layers": 7}, ("mlp.weight",), ("lm_head.weight",)), 7)
    chance = random.Random(1)
    ends = (-2.0, 3.0) if extrapolate else (0.0, 1.0)
    gradients = [tuple(chance.uniform(*ends) for _ in range(3)) for _ in range(100)]
    slices = tuple(LayerSlice(0, 0, 7, Schedule((ScheduleRule(gradient),))) for gradient in gradients)
    child = tmp_path / "child"
    plan = plan_of(primary, secondary, child, slices=slices, method=method, extrapolate=extrapolate, threads=1)
    child.mkdir()
    text = recipe_text(plan.recipe, plan.parents.by_role, child)
    again = plan_of_file(write(child / "merge_recipe.yaml", text), tmp_path / "again")
    replayed = {tensor.name: tensor.t for tensor in again.tensors}
    assert [tensor.name for tensor in plan.tensors if replayed[tensor.name] != tensor.t] == []


# ── Schedules ──


def vectors(stacks: Mapping[str, int], parts: Sequence[str], outside: Sequence[str] = ()) -> dict[str, torch.Tensor]:
    """The smallest tensors that have the names of these stacks of layers."""
    names = [f"{stack}.{layer}.{part}" for stack, depth in stacks.items() for layer in range(depth) for part in parts]
    return {name: torch.ones(2) for name in (*names, *outside)}


def hollow_pair(folder: Path, tensors: Mapping[str, torch.Tensor], depth: int) -> tuple[Path, Path]:
    config = {**LLAMA_CONFIG, "num_hidden_layers": depth}
    others = {name: tensor + 1 for name, tensor in tensors.items()}
    return make_checkpoint(folder / "primary", tensors, config), make_checkpoint(folder / "secondary", others, config)


def planned_t(primary: Path, secondary: Path, **settings: Any) -> dict[str, float]:
    return {
        tensor.name: tensor.t for tensor in plan_of(primary, secondary, primary.parent / "child", **settings).tensors
    }


def test_well_known_recipe_on_thirty_two_layers(tmp_path: Path) -> None:
    tensors = vectors(
        {"model.layers": 32},
        ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"),
        ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    )
    t = planned_t(*hollow_pair(tmp_path, tensors, 32), schedule=WELL_KNOWN)
    worked = {0: 0.0, 7: 0.4516, 8: 0.4935, 15: 0.3129, 16: 0.3258, 24: 0.7290, 31: 1.0}
    for layer, value in worked.items():
        assert t[f"model.layers.{layer}.self_attn.q_proj.weight"] == pytest.approx(value, abs=5.1e-5)
        assert t[f"model.layers.{layer}.mlp.up_proj.weight"] == pytest.approx(1 - value, abs=5.1e-5)
    for layer in range(32):
        attention = t[f"model.layers.{layer}.self_attn.q_proj.weight"]
        assert attention == pytest.approx(listed_value(list(ATTENTION), layer / 31), abs=1e-12)
        assert t[f"model.layers.{layer}.input_layernorm.weight"] == 0.5
    assert {t["model.embed_tokens.weight"], t["model.norm.weight"], t["lm_head.weight"]} == {0.5}


def random_value(chance: random.Random) -> Any:
    values = [round(chance.random(), 3) for _ in range(chance.randint(1, 5))]
    return values[0] if len(values) == 1 else values


def random_t(chance: random.Random, complete: bool) -> Any:
    """A number, a list or filters; one that is not complete may leave tensors to the next wider scope."""
    if complete and chance.random() < 0.3:
        return random_value(chance)
    known = ["self_attn", "q_proj", "mlp", "norm", "layers.1.", "weight", "lm_head"]
    filters = chance.sample(known, chance.randint(1, 3))
    entries: list[dict[str, Any]] = [{"filter": part, "value": random_value(chance)} for part in filters]
    if complete:
        entries.append(chance.choice([{"value": random_value(chance)}, {"filter": "*", "value": 0.4}]))
    return entries


@pytest.mark.parametrize("seed", range(20))
def test_every_t_is_the_formulas(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    depth, tower = chance.randint(4, 7), chance.randint(1, 3)
    parts = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.up_proj.weight", "norm.weight")
    outside = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
    hollow_pair(tmp_path, vectors({"model.layers": depth, "vision.blocks": tower}, parts, outside), depth)
    sliced, with_module = chance.random() < 0.7, chance.random() < 0.5
    top = {"merge_method": "slerp", "base_model": "primary", "parameters": {"t": random_t(chance, True)}}
    scopes = [top["parameters"]["t"]]
    body: dict[str, Any] = {}
    if with_module:
        body["parameters"] = {"t": random_t(chance, False)}
        scopes.insert(0, body["parameters"]["t"])
    wanted: dict[str, float] = {}
    cut_scopes = [scopes]
    if sliced:
        body["slices"], cut_scopes, number = [], [], 0
        for _ in range(chance.randint(1, 3)):
            length = chance.randint(1, depth)
            starts = [chance.randint(0, depth - length) for _ in range(2)]
            cut: dict[str, Any] = {
                "sources": [
                    {"model": model, "layer_range": [start, start + length]}
                    for model, start in zip(("primary", "secondary"), starts)
                ]
            }
            own = []
            if chance.random() < 0.6:
                own = [random_t(chance, False)]
                cut["parameters"] = {"t": own[0]}
            cut_scopes.append([*own, *scopes])
            body["slices"].append(cut)
            for step in range(length):
                for part in parts:
                    name = f"model.layers.{number}.{part}"
                    wanted[name] = scoped_value(cut_scopes[-1], name, step / (length - 1) if length > 1 else 1.0)
                number += 1
    else:
        body["models"] = [{"model": "primary"}, {"model": "secondary"}]
        for layer in range(depth):
            for part in parts:
                name = f"model.layers.{layer}.{part}"
                wanted[name] = scoped_value(scopes, name, layer / (depth - 1))
    for layer in range(tower):
        for part in parts:
            name = f"vision.blocks.{layer}.{part}"
            wanted[name] = scoped_value(cut_scopes[-1], name, layer / (tower - 1) if tower > 1 else 1.0)
    for name in outside:
        wanted[name] = scoped_value(cut_scopes[0 if "embed" in name else -1], name, 0.0)
    content = {**top, "modules": {"default": body}} if with_module else {**top, **body}
    plan = plan_of_file(write(tmp_path / "recipe.yaml", yaml.safe_dump(content, sort_keys=False)), tmp_path / "child")
    assert {tensor.name: tensor.t for tensor in plan.tensors} == pytest.approx(wanted, abs=1e-12)


def test_each_stack_of_an_encoder_decoder_has_its_own_gradient(tmp_path: Path) -> None:
    parts = ("layer.0.SelfAttention.q.weight", "layer.1.wi.weight")
    tensors = vectors({"encoder.block": 3, "decoder.block": 5}, parts, ("shared.weight",))
    t = planned_t(*hollow_pair(tmp_path, tensors, 5), schedule=Schedule((ScheduleRule((0.0, 1.0)),)))
    for part in parts:
        assert [t[f"encoder.block.{layer}.{part}"] for layer in range(3)] == [0, 0.5, 1]
        assert [t[f"decoder.block.{layer}.{part}"] for layer in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert t["shared.weight"] == 0


def test_slices_cut_the_language_model_and_leave_its_vision_tower_whole(tmp_path: Path) -> None:
    tensors = vectors(
        {"vision_tower.encoder.layers": 3, "language_model.model.layers": 5}, ("mlp.fc1.weight",), ("projector.weight",)
    )
    left, right = hollow_pair(tmp_path, tensors, 5)
    for folder in (left, right):
        edit_json(folder / "config.json", num_hidden_layers=..., text_config={"num_hidden_layers": 5})
    cut = LayerSlice(2, 2, 3, Schedule((ScheduleRule((0.2, 0.8)),)))
    t = planned_t(left, right, slices=(cut,))
    for stack in ("language_model.model.layers", "vision_tower.encoder.layers"):
        assert [t[f"{stack}.{layer}.mlp.fc1.weight"] for layer in range(3)] == pytest.approx([0.2, 0.5, 0.8])
    assert "language_model.model.layers.3.mlp.fc1.weight" not in t
    assert t["projector.weight"] == 0.2


def test_an_experts_number_is_not_a_layer(tmp_path: Path) -> None:
    experts = [f"block_sparse_moe.experts.{expert}.w1.weight" for expert in range(4)]
    left, right = hollow_pair(tmp_path, vectors({"model.layers": 3}, experts), 3)
    t = planned_t(left, right, schedule=Schedule((ScheduleRule((0.0, 1.0)),)))
    for layer in range(3):
        assert {t[f"model.layers.{layer}.{expert}"] for expert in experts} == {layer / 2}
    t = planned_t(left, right, slices=(LayerSlice(1, 0, 2, Schedule.constant(0.4)),))
    assert set(t) == {f"model.layers.{layer}.{expert}" for layer in range(2) for expert in experts}


# ── Slices ──


def test_child_of_another_depth_has_its_layers_from_both_parents(tmp_path: Path) -> None:
    """The primary has four layers, the secondary six; the child five, of which two stand twice."""
    kinds = ["sliding", "full", "sliding", "chunked"]
    config = {**LLAMA_CONFIG, "num_hidden_layers": 4, "layer_types": kinds}
    other = {**LLAMA_CONFIG, "num_hidden_layers": 6, "layer_types": [*kinds, "full", "full"]}
    v0, v1 = llama_tensors(1, torch.float32, layers=4), llama_tensors(2, torch.float32, layers=6)
    primary = make_checkpoint(tmp_path / "primary", v0, config)
    secondary = make_checkpoint(tmp_path / "secondary", v1, other)
    cuts = LayerSlice(1, 3, 3, Schedule.constant(0.3)), LayerSlice(2, 0, 2, Schedule.constant(0.6))
    child = merge(primary, secondary, tmp_path / "child", slices=cuts).child
    tensors = load_tensors(child)
    sources = [(1, 3, 0.3), (2, 4, 0.3), (3, 5, 0.3), (2, 0, 0.6), (3, 1, 0.6)]
    assert {layer_of(name) for name in tensors} == {None, 0, 1, 2, 3, 4}
    for layer, (left, right, t) in enumerate(sources):
        for part in ("self_attn.q_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight"):
            a, b = v0[f"model.layers.{left}.{part}"], v1[f"model.layers.{right}.{part}"]
            found = tensors[f"model.layers.{layer}.{part}"]
            assert distance(found, a, b, reference_slerp(a, b, t)) <= 1.0, (layer, part)
    made = json.loads((child / "config.json").read_text(encoding="utf-8"))
    assert made["num_hidden_layers"] == 5
    assert made["layer_types"] == ["full", "sliding", "chunked", "sliding", "chunked"]


@pytest.mark.parametrize("cuts", [((0, 1, 3),), ((0, 0, 4), (1, 1, 3))], ids=["shorter", "longer"])
def test_sliced_child_loads_in_transformers(cuts: tuple[tuple[int, int, int], ...], tmp_path: Path) -> None:
    primary = make_real_model(tmp_path / "primary", 1, num_hidden_layers=4)
    secondary = make_real_model(tmp_path / "secondary", 2, num_hidden_layers=4)
    slices = tuple(LayerSlice(*cut, Schedule.constant(0.5)) for cut in cuts)
    child = merge(primary, secondary, tmp_path / "child", slices=slices).child
    verify_with_transformers(child)
    made = json.loads((child / "config.json").read_text(encoding="utf-8"))
    assert made["num_hidden_layers"] == sum(cut[2] for cut in cuts)


def test_layers_beyond_the_depth_are_refused_with_both_depths(tmp_path: Path) -> None:
    primary, secondary = make_pair(tmp_path)
    cut = LayerSlice(0, 1, 2, Schedule.constant(0.5))
    with pytest.raises(SlerpMergeError) as refused:
        merge(primary, secondary, tmp_path / "child", slices=(cut,))
    assert "2 layers, asked up to 2" in refused.value.message
    assert "2 layers, asked up to 3" in refused.value.message
    assert not (tmp_path / "child").exists()


# ── Recipes that are wrong ──

GOOD = """merge_method: slerp
base_model: ./primary
models:
- model: ./primary
- model: ./secondary
parameters:
  t: 0.5
dtype: float32
"""
SLICED = """merge_method: slerp
base_model: ./primary
slices:
- sources:
  - model: ./primary
    layer_range: [0, 2]
  - model: ./secondary
    layer_range: [0, 2]
parameters:
  t: 0.5
"""
TASK = """merge_method: nuslerp
base_model: ./third
models:
- model: ./primary
  parameters:
    weight: 1
- model: ./secondary
  parameters:
    weight: 1
dtype: float32
"""
FLAGGED = """merge_method: linear
slices:
- sources:
  - {model: ./primary, layer_range: [0, 2]}
  - {model: ./secondary, layer_range: [0, 2]}
  parameters:
    normalize: off
- sources:
  - {model: ./primary, layer_range: [0, 2]}
  - {model: ./secondary, layer_range: [0, 2]}
parameters:
  weight: 1
"""
LEFT, RIGHT = "./primary\n    layer_range: ", "./secondary\n    layer_range: "
# (the recipe, what is changed, into what, the line at fault, a word of the message, a word of the hint)
WRONG: dict[str, tuple[str, str, str, int, str, str]] = {
    "key": (GOOD, "base_model", "base_modle", 2, "base_modle", "base_model"),
    "own-key-nobody-knows": (GOOD, "dtype: float32", "slerpmerge: {xyzzy: 1}", 8, "xyzzy", "dot_threshold"),
    "key-in-a-model": (GOOD, "- model: ./secondary", "- model: ./secondary\n  paramters: {}", 6, "paramters",
                       "parameters"),
    "parameter": (GOOD, "  t: 0.5", "  tt: 0.5", 7, "tt", "t"),
    "method": (GOOD, "slerp", "slrep", 1, "slrep", "slerp"),
    "capitals": (GOOD, "slerp", "SLERP", 1, "SLERP", "Did you mean slerp"),
    "ties": (GOOD, "slerp", "ties", 1, "ties", "mergekit"),
    "three-models": (GOOD, "- model: ./secondary", "- model: ./secondary\n- model: ./third", 4, "2 models", "one"),
    "no-base-model": (GOOD, "base_model: ./primary\n", "", 1, "base_model is missing", "t = 0"),
    "no-t": (GOOD, "parameters:\n  t: 0.5\n", "", 4, "parameter t", "parameters"),
    "no-method": (GOOD, "merge_method: slerp\n", "", 1, "merge_method", "slerp"),
    "text": (GOOD, "0.5", "half", 7, "half", "0.5"),
    "text-in-list": (GOOD, "0.5", "[0.1, half]", 7, "half", "0.5"),
    "quoted-words": (GOOD, "0.5", "'0,5'", 7, "number", "0.5"),
    "typed-as-number": (GOOD, "0.5", "!!int ''", 7, "number", "0.5"),
    "nothing-typed": (GOOD, "./secondary", "''", 5, "no model", "org/name"),
    "null-byte": (GOOD, "./secondary", '"a\\0b"', 5, "no usable path", "path"),
    "address": (GOOD, "./secondary", "https://example.org/org/name", 5, "an address", "org/name"),
    "architecture": (GOOD, "./secondary", "{model: ./b, override_architecture: X}", 5, "architecture", "config.json"),
    "listed-twice": (GOOD, "- model: ./secondary", "- model: ./secondary\n- model: secondary/", 6, "twice", "once"),
    "third-base": (GOOD, "base_model: ./primary", "base_model: ./third", 4, "./third", "January 2024"),
    "merge-key": (GOOD, "dtype: float32", "<<: [3]", 8, "mapping", "Known"),
    "documents": (GOOD, "dtype: float32", "---\nmerge_method: slerp", 9, "mergekit-multi", "file of its own"),
    "linear-base": (TASK.replace("nuslerp", "linear"), "dtype", "name", 4, "./third", "blended in"),
    "scale": (TASK.replace("nuslerp", "passthrough"), "weight", "scale", 6, "scale", "as they are"),
    "normalize-of-a-slice": (FLAGGED, "layer_range", "layer_range", 7, "normalize differs", "under the recipe's own"),
    "normalize-of-a-tensor": (FLAGGED, "off", "[{filter: mlp, value: off}]", 7, "differs", "true or false"),
    "flatten-of-a-slice": (FLAGGED.replace("linear", "nuslerp"), "normalize", "nuslerp_flatten", 7, "differs", "own"),
    "base-of-a-slice": (FLAGGED.replace("linear", "nuslerp"), "parameters:\n    normalize: off", "base_model: ./third",
                        7, "another here", "one base"),
    "base-of-no-slice": (SLICED.replace("t: 0.5", "t: 0.5\n"), "base_model: ./primary\n", "", 1, "base_model", "t = 0"),
    "scaled-slice": (FLAGGED, "  - {model: ./secondary, layer_range: [0, 2]}\n  parameters:\n    normalize: off",
                     "  parameters: {normalize: off, weight: 0.5}", 4, "scale", "normalize: true"),
    "passthrough": (GOOD.replace("t: 0.5", ""), "slerp", "passthrough", 4, "one model", "slerp"),
    "not-a-number": (GOOD, "0.5", ".nan", 7, ".nan", "0.5"),
    "empty-list": (GOOD, "0.5", "[]", 7, "list", "dash"),
    "no-value": (GOOD, "t: 0.5", "t:\n  - filter: mlp", 8, "value", "value"),
    "twice": (GOOD, "dtype: float32", "dtype: float32\ndtype: float16", 9, "twice", "one"),
    "yaml": (GOOD, "dtype: float32", "dtype: [float32\nname: x: y", 9, "YAML", "line"),
    "dtype": (GOOD, "float32", "float7", 8, "float7", "bfloat16"),
    "out-dtype": (GOOD, "dtype: float32", "out_dtype: int8", 8, "int8", "bfloat16"),
    "stranger": (GOOD, "dtype: float32", "tokenizer_source: ./third", 8, "third", "one of them"),
    "third base": (TASK, "dtype: float32", "tokenizer_source: base", 10, "'./third' is not one of", "one of them"),
    "chat-template": (GOOD, "dtype: float32", "chat_template: chat-ml", 8, "chat-ml", "chatml"),
    "models-and-slices": (GOOD, "dtype: float32", "slices: []", 1, "either models or slices", "one"),
    "neither": (GOOD, "models:\n- model: ./primary\n- model: ./secondary\n", "", 1, "either models or slices", "one"),
    "no-model": (GOOD, "- model: ./secondary", "- parameters: {t: 1}", 5, "model", "folder"),
    "list": (GOOD, GOOD, "- slerp\n- nuslerp\n", 1, "mapping", "merge_method"),
    "word": (GOOD, GOOD, "slerp\n", 1, "mapping", "merge_method"),
    "range-falls": (SLICED, RIGHT + "[0, 2]", RIGHT + "[2, 0]", 8, "layer_range", "["),
    "range-of-one": (SLICED, LEFT + "[0, 2]", LEFT + "[2]", 6, "layer_range", "["),
    "range-in-parts": (SLICED, LEFT + "[0, 2]", LEFT + "[0, 1.5]", 6, "whole", "["),
    "range-of-words": (SLICED, LEFT + "[0, 2]", LEFT + "[0, two]", 6, "two", "0.5"),
    "range-missing": (SLICED, RIGHT + "[0, 2]", "./secondary", 7, "layer_range", "["),
    "ranges-unequal": (SLICED, RIGHT + "[0, 2]", RIGHT + "[0, 1]", 7, "2 and 1", "counterpart"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipe_is_refused_with_its_line(name: str, tmp_path: Path) -> None:
    text, old, new, line, said, advised = WRONG[name]
    assert old in text
    path = write(tmp_path / "wrong.yaml", text.replace(old, new, 1))
    with pytest.raises(SlerpMergeError) as refused:
        read_recipe(path)
    assert f"{path}, line {line}: " in refused.value.message
    assert said in refused.value.message
    assert advised in refused.value.hint


@pytest.mark.parametrize("content", [b"", b"# nothing but words\n"], ids=["empty", "comment"])
def test_empty_recipe_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_bytes(content)
    with pytest.raises(SlerpMergeError, match=r"empty\.yaml is empty") as refused:
        read_recipe(path)
    assert "merge_method" in refused.value.hint


def test_recipe_of_other_bytes_than_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bytes.yaml"
    path.write_bytes(b"merge_method: \xff\xfe\n")
    with pytest.raises(SlerpMergeError, match=r"bytes\.yaml.*not valid YAML"):
        read_recipe(path)


def test_t_outside_its_range_needs_extrapolation(tmp_path: Path) -> None:
    make_pair(tmp_path)
    path = write(tmp_path / "recipe.yaml", GOOD.replace("0.5", "1.5"))
    with pytest.raises(SlerpMergeError, match=r"t = 1\.5") as refused:
        plan_of_file(path, tmp_path / "child")
    assert "--extrapolate" in refused.value.hint
    plan = prepare_merge(dataclasses.replace(read_recipe(path), extrapolate=True), RunOptions(tmp_path / "child"))
    assert {tensor.t for tensor in plan.tensors} == {1.5}


def test_a_filter_that_matches_nothing_is_remarked_on(tmp_path: Path) -> None:
    make_pair(tmp_path)
    entries = "[{filter: self_atn, value: 0.1}, {filter: mlp, value: 0.2}, {value: 0.5}]"
    plan = plan_of_file(write(tmp_path / "recipe.yaml", GOOD.replace("0.5", entries)), tmp_path / "child")
    assert plan.remarks == ("The filter 'self_atn' matches no tensor.",)


def test_an_entry_that_is_never_reached_is_remarked_on(tmp_path: Path) -> None:
    entries = "[{filter: mlp, value: 0.2}, {value: 0.5}, {filter: lm_head, value: 1.5}]"
    recipe = read_recipe(write(tmp_path / "recipe.yaml", GOOD.replace("0.5", entries)))
    assert recipe.schedule == Schedule((ScheduleRule((0.2,), "mlp"), ScheduleRule((0.5,))))
    (remark,) = recipe.origin.remarks
    assert "an entry of t stands behind one that matches every tensor" in remark


@pytest.mark.parametrize("normalize", ["on", "off"])
def test_a_wider_weight_says_nothing_of_a_single_model_that_has_its_own(normalize: str, tmp_path: Path) -> None:
    lone = "  - {model: ./secondary, layer_range: [0, 2], parameters: {weight: 1}}\n"
    text = f"""merge_method: linear
slices:
- sources:
  - {{model: ./primary, layer_range: [0, 2]}}
  - {{model: ./secondary, layer_range: [0, 2]}}
- sources:
{lone}parameters: {{weight: 0.0, normalize: {normalize}}}
"""
    path = tmp_path / "recipe.yaml"
    assert read_recipe(write(path, text)).slices[1].alone == "secondary"
    with pytest.raises(SlerpMergeError, match=r"line 7: a weight .* a single model"):
        read_recipe(write(path, text.replace(", parameters: {weight: 1}", "")))


def test_a_null_filter_matches_every_tensor(tmp_path: Path) -> None:
    make_pair(tmp_path)
    entries = "[{filter: mlp, value: 0.2}, {filter: null, value: 0.7}]"
    plan = plan_of_file(write(tmp_path / "recipe.yaml", GOOD.replace("0.5", entries)), tmp_path / "child")
    assert {tensor.t for tensor in plan.tensors if "mlp" not in tensor.name} == {0.7}


def test_a_tensor_that_no_filter_matches_is_named(tmp_path: Path) -> None:
    make_pair(tmp_path)
    entries = "[{filter: layers, value: 0.2}, {filter: norm, value: 0}]"
    path = write(tmp_path / "recipe.yaml", GOOD.replace("0.5", entries))
    with pytest.raises(SlerpMergeError, match=r"lm_head\.weight|model\.embed_tokens\.weight"):
        plan_of_file(path, tmp_path / "child")


# ── Recipes as people publish them ──

NEOX = ("attention.query_key_value.weight", "mlp.dense_h_to_4h.weight", "input_layernorm.weight")
NEOX_OUTSIDE = ("gpt_neox.embed_in.weight", "gpt_neox.final_layer_norm.weight", "embed_out.weight")


def neox_pair(folder: Path, depth: int = 4) -> tuple[Path, Path]:
    return hollow_pair(folder, vectors({"gpt_neox.layers": depth}, NEOX, NEOX_OUTSIDE), depth)


def t_of_text(folder: Path, text: str) -> dict[str, float]:
    plan = plan_of_file(write(folder / "recipe.yaml", text), folder / "child")
    return {tensor.name: tensor.t for tensor in plan.tensors}


def remarks_of(folder: Path, text: str) -> tuple[str, ...]:
    return read_recipe(write(folder / "recipe.yaml", text)).origin.remarks


SPELLINGS = ["./secondary", "secondary", "./secondary/", "'./secondary'", "primary/../secondary", "secondary@main",
             "{model: ./secondary}", "{model: {path: secondary, revision: null}, lora: null, override_architecture: ~}",
             "{model: {path: secondary, revision: main}}"]  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_model_is_one_model_however_it_is_spelt(spelling: str, tmp_path: Path) -> None:
    primary, secondary = neox_pair(tmp_path)
    text = GOOD.replace("base_model: ./primary", f"base_model: {spelling}") + "tokenizer_source: ./secondary/\n"
    recipe = read_recipe(write(tmp_path / "recipe.yaml", text))
    assert (recipe.primary.resolve(), recipe.secondary.resolve()) == (secondary, primary)
    assert (recipe.tokenizer, recipe.origin.remarks) == ("primary", ())


def test_a_model_is_looked_for_beside_the_recipe_then_here_then_in_the_cache(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    home = cache / "models--org--name"
    tensors = vectors({"transformer.h": 2}, ("attn.c_attn.weight",), ("transformer.wte.weight",))
    older, newer = (make_checkpoint(home / "snapshots" / commit, tensors) for commit in ("a" * 40, "b" * 40))
    (home / "refs").mkdir()
    write(home / "refs" / "v1", "a" * 40)
    write(home / "refs" / "main", "b" * 40)
    os.utime(newer, (1, 1))
    hidden = make_checkpoint(tmp_path / "recipes" / "primary", tensors)
    make_checkpoint(tmp_path / "primary", tensors)
    seen = make_checkpoint(tmp_path / "secondary", tensors)

    def found(base_model: str) -> tuple[Path, Path]:
        text = GOOD.replace("./primary", base_model)
        recipe = read_recipe(write(tmp_path / "recipes" / "recipe.yaml", text))
        return recipe.primary.resolve(), recipe.secondary.resolve()

    assert found("./primary") == (hidden, seen)
    assert found("org/name") == (newer, seen)
    assert found("org/name@v1") == (older, seen)
    assert found("{model: {path: org/name, revision: %s}}" % ("a" * 40)) == (older, seen)


def test_base_model_beside_one_listed_model_is_t_zero(tmp_path: Path) -> None:
    primary, secondary = neox_pair(tmp_path)
    alone = GOOD.replace("- model: ./primary\n", "").replace("0.5", "[0.2, 0.8]")
    recipe = read_recipe(write(tmp_path / "recipe.yaml", alone))
    assert (recipe.primary.resolve(), recipe.secondary.resolve()) == (primary, secondary)
    assert t_of_text(tmp_path, alone)["gpt_neox.layers.3.mlp.dense_h_to_4h.weight"] == 0.8
    linear = alone.replace("slerp", "linear").replace("t: [0.2, 0.8]", "weight: 1").replace("secondary", "secondary\n"
        "  parameters: {weight: 3}")  # fmt: skip
    assert set(t_of_text(tmp_path, linear).values()) == {0.75}


def test_base_model_that_no_slice_lists_has_the_same_layers(tmp_path: Path) -> None:
    neox_pair(tmp_path)
    alone = SLICED.replace("  - model: ./primary\n    layer_range: [0, 2]\n", "").replace("[0, 2]", "[1, 3]")
    recipe = read_recipe(write(tmp_path / "recipe.yaml", alone))
    assert recipe.slices == (LayerSlice(1, 1, 2, Schedule.constant(0.5)),)


def test_base_model_of_a_slice_decides_that_slice(tmp_path: Path) -> None:
    primary, secondary = neox_pair(tmp_path)
    cut = SLICED.partition("slices:\n")[2].partition("parameters")[0]
    text = SLICED.replace(cut, cut + cut + "  base_model: ./secondary\n").replace("0.5", "[0.25, 0.5]")
    t = t_of_text(tmp_path, text)
    assert [t[f"gpt_neox.layers.{layer}.input_layernorm.weight"] for layer in range(4)] == [0.25, 0.5, 0.75, 0.5]
    assert (t["gpt_neox.embed_in.weight"], t["gpt_neox.final_layer_norm.weight"]) == (0.25, 0.75)
    only_there = text.replace("base_model: ./primary\n", "").replace(cut + cut, cut + "  base_model: secondary\n" + cut)
    recipe = read_recipe(write(tmp_path / "recipe.yaml", only_there))
    assert (recipe.primary.resolve(), recipe.secondary.resolve()) == (secondary, primary)
    assert {part.schedule.rules[0].gradient for part in recipe.slices} == {(0.25, 0.5)}


def test_a_filter_of_a_weight_names_each_sources_own_layer(tmp_path: Path) -> None:
    neox_pair(tmp_path)
    weight = "[{filter: layers.3., value: 3}, {filter: embed_out, value: 4}, {value: 1}]"
    text = f"""merge_method: linear
slices:
- sources:
  - {{model: ./primary, layer_range: [0, 2]}}
  - {{model: ./secondary, layer_range: [2, 4], parameters: {{weight: {weight}}}}}
parameters: {{weight: 1}}
"""
    plan = plan_of_file(write(tmp_path / "recipe.yaml", text), tmp_path / "child")
    t = {tensor.name: tensor.t for tensor in plan.tensors}
    assert [t[f"gpt_neox.layers.{layer}.input_layernorm.weight"] for layer in range(2)] == [0.5, 0.75]
    assert (t["embed_out.weight"], t["gpt_neox.embed_in.weight"], plan.remarks) == (0.8, 0.5, ())


BEFORE = ("model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "gpt_neox.embed_in.weight",
          "transformer.word_embeddings.weight", "backbone.embeddings.weight", "bert.embeddings.LayerNorm.bias",
          "model.tok_embeddings.weight", "transformer.relative_pe.slopes", "shared.weight")  # fmt: skip
BEHIND = ("model.norm.weight", "lm_head.weight", "embed_out.weight", "transformer.ln_f.bias", "output.weight",
          "gpt_neox.final_layer_norm.weight", "transformer.output_layer.weight", "backbone.norm_f.weight",
          "cls.predictions.decoder.weight", "score.weight")  # fmt: skip


def test_what_stands_outside_the_layers_follows_the_first_slice_or_the_last(tmp_path: Path) -> None:
    tensors = vectors({"model.layers": 2}, ("mlp.weight",), (*BEFORE, *BEHIND))
    slices = tuple(LayerSlice(layer, layer, 1, Schedule.constant(t)) for layer, t in ((0, 0.2), (1, 0.7)))
    t = planned_t(*hollow_pair(tmp_path, tensors, 2), slices=slices)
    assert {name: t[name] for name in BEFORE} == dict.fromkeys(BEFORE, 0.2)
    assert {name: t[name] for name in BEHIND} == dict.fromkeys(BEHIND, 0.7)


@pytest.mark.parametrize("method", ["linear", "nuslerp"])
def test_a_setting_that_every_slice_states_holds_for_the_whole(method: str, tmp_path: Path) -> None:
    neox_pair(tmp_path)
    name = "normalize" if method == "linear" else "nuslerp_flatten"
    text = FLAGGED.replace("linear", method).replace("  parameters:\n    normalize: off\n", "")
    text = text.replace("[0, 2]}\n- sources", f"[0, 2]}}\n  parameters: {{{name}: off}}\n- sources")
    recipe = read_recipe(
        write(tmp_path / "recipe.yaml", text.replace("parameters:\n  w", f"parameters:\n  {name}: 0\n  w"))
    )
    assert (recipe.normalize, recipe.vectors) == ((False, "tensor") if method == "linear" else (True, "last_dim"))


PASSED_OVER = {
    "metadata": (GOOD, "dtype: float32", "metadata:\n  author: me\n  t: 3", 8),
    "output_dir": (GOOD, "dtype: float32", "output_dir: out", 8),
    "model_name": (GOOD, "dtype: float32", "model_name: mine", 8),
    "copy_tokenizer": (GOOD, "dtype: float32", "copy_tokenizer: true", 8),
    "int8_mask": (GOOD, "  t: 0.5", "  t: 0.5\n  int8_mask: true", 8),
    "embed_slerp": (GOOD, "  t: 0.5", "  embed_slerp: true\n  t: 0.5", 7),
    "density": (GOOD, "- model: ./secondary", "- model: ./secondary\n  parameters: {density: 0.5}", 6),
    "t": (GOOD, "- model: ./secondary", "- model: ./secondary\n  parameters: {t: 0.9}", 6),
    "random_seed": (GOOD, "dtype: float32", "random_seed: 0", 8),
    "normalize": (GOOD, "  t: 0.5", "  t: 0.5\n  normalize: true", 8),
    "merge_method": (SLICED, "[0, 2]\nparameters", "[0, 2]\n  merge_method: ties\nparameters", 9),
    "residual_weight": (SLICED, "- sources:", "- residual_weight: 0.1\n  sources:", 4),
    "layer_range": (GOOD, "- model: ./secondary", "- model: ./secondary\n  layer_range: [0, 2]", 6),
    "tokenizer_source": (GOOD, "dtype: float32", "tokenizer_source: null", 8),
    "out_dtype": (GOOD, "dtype: float32", "out_dtype: ~", 8),
    "parameters": (GOOD, "- model: ./secondary", "- model: ./secondary\n  parameters:", 6),
}  # fmt: skip


@pytest.mark.parametrize("key", PASSED_OVER)
def test_what_mergekit_passes_over_is_passed_over_with_a_remark(key: str, tmp_path: Path) -> None:
    neox_pair(tmp_path)
    text, old, new, line = PASSED_OVER[key]
    assert text.count(old) == 1
    path = write(tmp_path / "recipe.yaml", text.replace(old, new))
    plan = plan_of_file(path, tmp_path / "child")
    assert [remark.partition(" in ")[0] for remark in plan.remarks] == [f"recipe.yaml, line {line}: {key!r}"]
    assert set(t_of_text(tmp_path, path.read_text()).values()) == {0.5}


def test_a_remark_on_a_recipe_reaches_the_report(tmp_path: Path) -> None:
    make_pair(tmp_path)
    child = merge_recipe(write(tmp_path / "recipe.yaml", GOOD + "output_dir: out\n"), tmp_path / "child").child
    remarks = json.loads((child / "merge_report.json").read_text(encoding="utf-8"))["remarks"]
    assert remarks == ["recipe.yaml, line 9: 'output_dir' in a recipe is passed over, as mergekit does."]


def test_a_base_model_of_a_slice_that_decides_nothing_is_remarked_on(tmp_path: Path) -> None:
    text = FLAGGED.replace("parameters:\n    normalize: off", "base_model: ./primary")
    assert remarks_of(tmp_path, text) == ("recipe.yaml, line 6: base_model in a slice decides nothing in linear.",)


SPELT = {
    "quoted": "'0.25'", "exponent": "25e-2", "exponent-of-a-float": "2.5e-1", "no-zero": ".25",
    "hexadecimal": "[0x0, 0.5]", "quoted-list": "['0', \"5e-1\"]", "bool": "[no, 0.5]", "one-mapping": "{value: 0.25}",
    "mapping-filter": "{filter: null, value: 0.25}", "merged": "{<<: {value: 0.25}}", "typed": "!!float '0.25'",
    "merged-list": "[{<<: [{value: 0.25}, {value: 1, filter: '*'}]}]",
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELT)
def test_a_number_is_read_however_it_is_spelt(spelling: str, tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path / "recipe.yaml", GOOD.replace("0.5", SPELT[spelling])))
    assert recipe.schedule.rules[0].value_at(0.5) == 0.25


@pytest.mark.parametrize(
    ("word", "meant"), [("yes", True), ("off", False), ("0", False), ("1.0", True), ("'False'", False)]
)
def test_a_truth_is_read_however_it_is_spelt(word: str, meant: bool, tmp_path: Path) -> None:
    text = (
        TASK.replace("nuslerp", "linear").replace("base_model: ./third\n", "") + f"parameters: {{normalize: {word}}}\n"
    )
    assert read_recipe(write(tmp_path / "recipe.yaml", text)).normalize is meant


WHOLE = {
    "byte-order-mark": lambda text: "\ufeff" + text,
    "windows": lambda text: text.replace("\n", "\r\n"),
    "json": lambda text: json.dumps(yaml.safe_load(text), indent=1),
    "fenced": lambda text: f"---\n{text}---\n",
    "torch": lambda text: text.replace("float32", "torch.float32"),
    "anchors": lambda text: text.replace(": ./primary\nm", ": &first ./primary\nm").replace(": ./primary", ": *first"),
    "merge-key": lambda text: "x-common: &common\n  dtype: float32\n" + text.replace("dtype: float32", "<<: *common"),
    "own-before-merged": lambda text: text + "<<: {dtype: float16, merge_method: linear}\n",
}  # fmt: skip


@pytest.mark.parametrize("form", WHOLE)
def test_a_recipe_is_read_however_its_file_is_written(form: str, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(WHOLE[form](GOOD).encode("utf-8"))
    assert read_recipe(tmp_path / "recipe.yaml") == read_recipe(write(tmp_path / "plain.yaml", GOOD))


BOMBS = {
    "lists": "x0: &x0 [1, 1]\n" + "".join(f"x{n}: &x{n} [*x{n - 1}, *x{n - 1}]\n" for n in range(1, 60)) + "t: *x59\n",
    "merge-keys": "x0: &x0 {a: 1}\n"
    + "".join(f"x{n}: &x{n} {{<<: [*x{n - 1}, *x{n - 1}]}}\n" for n in range(1, 60))
    + "models: [*x59]\n",
    "ring": "<<: &x {<<: *x}\n",
    "models": "x: &x {model: *x}\nmodels: [*x]\n",
    "slices": "x: &x [{model: a}]\nslices: [" + "{sources: *x}, " * 60_000 + "]\n",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_aliases_that_unfold_without_end_are_refused(bomb: str, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", "merge_method: slerp\n" + BOMBS[bomb])
    with pytest.raises(SlerpMergeError, match=r"recipe\.yaml, line \d+: ") as refused:
        read_recipe(path)
    assert "aliases" in refused.value.hint or bomb in ("lists", "slices")


# ── Slices of one model ──

STACK = """merge_method: {method}
base_model: ./primary
slices:
- sources: [{{model: ./primary, layer_range: [0, 2]}}]
- sources: [{{model: ./primary, layer_range: [1, 3]}}, {{model: ./secondary, layer_range: [3, 5]}}]
- sources: [{{model: ./secondary, layer_range: [3, 6]}}]
parameters: {{{parameter}: {value}}}
"""


@pytest.mark.parametrize("method", ["slerp", "linear"])
def test_layers_of_one_model_are_copied_between_those_of_two(method: str, tmp_path: Path) -> None:
    """The primary has three layers, so that it could not give the counterparts of the secondary's last ones."""
    v0, v1 = llama_tensors(1, torch.float32, layers=3), llama_tensors(2, torch.float32, layers=6)
    kinds = ["full", "full", "sliding", "sliding", "chunked", "full"]
    for side, tensors, depth in (("primary", v0, 3), ("secondary", v1, 6)):
        config = {**LLAMA_CONFIG, "num_hidden_layers": depth, "layer_types": kinds[:depth]}
        make_checkpoint(tmp_path / side, tensors, config)
    parameters = {"slerp": ("t", 0.25), "linear": ("weight", 1)}[method]
    text = STACK.format(method=method, parameter=parameters[0], value=parameters[1])
    child = merge_recipe(write(tmp_path / "recipe.yaml", text), tmp_path / "child").child
    made = load_tensors(child)
    for layer, (source, number) in {0: (v0, 0), 1: (v0, 1), 4: (v1, 3), 5: (v1, 4), 6: (v1, 5)}.items():
        for part in ("self_attn.k_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight"):
            assert torch.equal(made[f"model.layers.{layer}.{part}"], source[f"model.layers.{number}.{part}"])
    blended = [v0["model.layers.2.mlp.up_proj.weight"], v1["model.layers.4.mlp.up_proj.weight"]]
    assert not any(torch.equal(made["model.layers.3.mlp.up_proj.weight"], source) for source in blended)
    assert torch.equal(made["model.embed_tokens.weight"], v0["model.embed_tokens.weight"])
    assert torch.equal(made["lm_head.weight"], v1["lm_head.weight"])
    config = json.loads((child / "config.json").read_text(encoding="utf-8"))
    assert config["num_hidden_layers"] == 7
    assert config["layer_types"] == ["full", "full", "full", "sliding", "sliding", "chunked", "full"]
    assert_replays(child, tmp_path / "again")


@pytest.mark.parametrize("models", [("primary", "secondary"), ("primary", "primary")], ids=["two", "one"])
def test_passthrough_stacks_layers(models: tuple[str, str], tmp_path: Path) -> None:
    neox_pair(tmp_path)
    first, second = models
    text = f"""merge_method: passthrough
slices:
- sources: [{{model: ./{first}, layer_range: [0, 3]}}]
- sources: [{{model: ./{second}, layer_range: [1, 4]}}]
"""
    plan = plan_of_file(write(tmp_path / "recipe.yaml", text), tmp_path / "child")
    sources = {tensor.name: tensor.sources for tensor in plan.tensors}
    assert {tensor.operation for tensor in plan.tensors} == {"copy"}
    for layer, (model, number) in enumerate(
        [(first, 0), (first, 1), (first, 2), (second, 1), (second, 2), (second, 3)]
    ):
        (info,) = sources[f"gpt_neox.layers.{layer}.mlp.dense_h_to_4h.weight"]
        assert (info.file.parent.name, info.name) == (model, f"gpt_neox.layers.{number}.mlp.dense_h_to_4h.weight")
    assert sources["embed_out.weight"][0].file.parent.name == second
    child = tmp_path / "child"
    child.mkdir()
    written = recipe_text(plan.recipe, plan.parents.by_role, child)
    assert yaml.safe_load(written)["merge_method"] == "passthrough"
    assert read_recipe(write(child / "merge_recipe.yaml", written)).slices == plan.recipe.slices


def test_the_whole_of_one_model_is_written_as_one(tmp_path: Path) -> None:
    """mergekit takes no model twice."""
    neox_pair(tmp_path)
    text = "merge_method: passthrough\nmodels: [{model: ./secondary}]\ndtype: float16\n"
    plan = plan_of_file(write(tmp_path / "recipe.yaml", text), tmp_path / "child")
    written = recipe_text(plan.recipe, plan.parents.by_role, tmp_path / "child")
    content = yaml.safe_load(written)
    assert (content["merge_method"], content["models"]) == ("passthrough", [{"model": "../secondary"}])
    (tmp_path / "child").mkdir()
    again = plan_of_file(write(tmp_path / "child" / "merge_recipe.yaml", written), tmp_path / "again")
    made = [
        [(tensor.name, tensor.operation, tensor.dtype, tensor.t) for tensor in one.tensors] for one in (plan, again)
    ]
    assert made[0] and made[0] == made[1]


def test_a_stacked_child_loads_in_transformers(tmp_path: Path) -> None:
    primary, secondary = (
        make_real_model(tmp_path / name, seed, num_hidden_layers=3) for name, seed in (("a", 1), ("b", 2))
    )
    half = Schedule.constant(0.5)
    slices = LayerSlice(0, None, 2, half), LayerSlice(1, 1, 1, half), LayerSlice(None, 0, 3, half)
    verify_with_transformers(merge(primary, secondary, tmp_path / "child", slices=slices).child)


def test_layers_that_are_copied_must_be_like_the_primarys(tmp_path: Path) -> None:
    primary, _ = neox_pair(tmp_path)
    other = vectors({"gpt_neox.layers": 4}, NEOX, NEOX_OUTSIDE) | {"gpt_neox.layers.2.attention.bias": torch.ones(2)}
    secondary = make_checkpoint(tmp_path / "other", other, {**LLAMA_CONFIG, "num_hidden_layers": 4})
    half = Schedule.constant(0.5)
    kept = plan_of(
        primary, secondary, tmp_path / "child", slices=(LayerSlice(0, 0, 1, half), LayerSlice(None, 3, 1, half))
    )
    assert {tensor.t for tensor in kept.tensors if ".1." in tensor.name} == {1.0}
    with pytest.raises(SlerpMergeError, match=r"layers of a slice: primary other tensors, secondary 2\. .*copied"):
        plan_of(
            primary, secondary, tmp_path / "child", slices=(LayerSlice(0, 0, 1, half), LayerSlice(None, 1, 3, half))
        )
    with pytest.raises(SlerpMergeError, match="layers of neither model"):
        plan_of(primary, secondary, tmp_path / "child", slices=(LayerSlice(None, None, 1, half),))


# ── The models that a recipe was saved with ──


def test_a_replay_with_other_weights_says_so(tmp_path: Path) -> None:
    primary, secondary = make_pair(tmp_path, torch.float32)
    recipe = merge(primary, secondary, tmp_path / "child").child / "merge_recipe.yaml"

    def remarks() -> tuple[str, ...]:
        return plan_of_file(recipe, tmp_path / "again").remarks

    assert remarks() == ()
    tensors = load_tensors(secondary)
    shutil.rmtree(secondary)
    make_checkpoint(secondary, tensors, shards=3)
    assert remarks() == ()
    shutil.rmtree(secondary)
    make_checkpoint(secondary, llama_tensors(5, torch.float32))
    (said,) = remarks()
    assert said.startswith("The secondary is not the secondary that this recipe was saved with: its weights are others")
    shutil.rmtree(secondary)
    make_checkpoint(secondary, llama_tensors(2, torch.bfloat16))
    (said,) = remarks()
    assert "other names, dtypes or shapes" in said


def test_a_recipe_that_records_headers_alone_is_held_against_them(tmp_path: Path) -> None:
    primary, secondary = make_pair(tmp_path)
    recipe = merge(primary, secondary, tmp_path / "child").child / "merge_recipe.yaml"
    content = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    for role in ("primary", "secondary"):
        del content["slerpmerge"][role]["sample"]
    recipe.write_text(yaml.safe_dump(content), encoding="utf-8")
    assert plan_of_file(recipe, tmp_path / "again").remarks == ()


@pytest.mark.parametrize("base", ["primary", "secondary"])
@pytest.mark.parametrize("cuts", [(), ((0, 1, 1), (1, 0, 1))], ids=["whole", "slices"])
def test_a_recipe_whose_base_is_a_parent_is_replayed(
    base: str, cuts: tuple[tuple[int, int, int], ...], tmp_path: Path
) -> None:
    primary, secondary = make_pair(tmp_path, torch.float32)
    slices = tuple(LayerSlice(*cut, AWKWARD, None, 1) for cut in cuts)
    settings = {"base": tmp_path / base, "method": "nuslerp", "schedule": AWKWARD, "slices": slices}
    child = merge(primary, secondary, tmp_path / "child", **settings).child
    assert read_recipe(child / "merge_recipe.yaml").base.resolve() == tmp_path / base
    assert_replays(child, tmp_path / "again")


@pytest.mark.parametrize("method", ["slerp", "lerp", "nuslerp"])
def test_a_recipe_of_one_model_with_itself_is_replayed(method: str, tmp_path: Path) -> None:
    primary, _ = make_pair(tmp_path)
    child = merge(primary, primary, tmp_path / "child", method=method).child
    assert_replays(child, tmp_path / "again")


# ── Weights ──


def weighted(method: str, first: Any, second: Any, **parameters: Any) -> str:
    models = [
        {"model": "./primary", "parameters": {"weight": first}},
        {"model": "./secondary", "parameters": {"weight": second}},
    ]
    content = {"merge_method": method, "models": models, "dtype": "float32"}
    return yaml.safe_dump({**content, "parameters": parameters} if parameters else content, sort_keys=False)


def test_weights_as_gradients_of_each_model(tmp_path: Path) -> None:
    hollow_pair(tmp_path, vectors({"model.layers": 5}, ("mlp.weight",), ("lm_head.weight",)), 5)
    second = [{"filter": "lm_head", "value": 0.9}, {"value": [1.0, 0.5, 0.8]}]
    text = weighted("linear", [0.2, 1.0], second, normalize=False)
    tensors = {
        tensor.name: tensor
        for tensor in plan_of_file(write(tmp_path / "recipe.yaml", text), tmp_path / "child").tensors
    }
    wanted = [(0.2, 1.0), (0.4, 0.75), (0.6, 0.5), (0.8, 0.65), (1.0, 0.8)]
    for layer, weights in enumerate(wanted):
        assert tensors[f"model.layers.{layer}.mlp.weight"].weights == pytest.approx(weights)
    assert tensors["lm_head.weight"].weights == pytest.approx((0.2, 0.9))
    text = text.replace("normalize: false", "normalize: true")
    tensors = {
        tensor.name: tensor
        for tensor in plan_of_file(write(tmp_path / "recipe.yaml", text), tmp_path / "child").tensors
    }
    for layer, (left, right) in enumerate(wanted):
        assert tensors[f"model.layers.{layer}.mlp.weight"].t == pytest.approx(right / (left + right))
        assert tensors[f"model.layers.{layer}.mlp.weight"].weights is None


def test_linear_without_normalising_adds_the_weighted_parents(tmp_path: Path) -> None:
    primary, secondary = make_pair(tmp_path, torch.float32)
    text = weighted("linear", 1.0, 1.0, normalize=False)
    child = load_tensors(merge_recipe(write(tmp_path / "recipe.yaml", text), tmp_path / "child").child)
    v0, v1 = load_tensors(primary), load_tensors(secondary)
    for name, found in child.items():
        assert torch.equal(found, v0[name] + v1[name]), name


@pytest.mark.parametrize("weights", [(0.0, 0.0), (0.3, -0.3), (1e-7, 2e-7)])
def test_nuslerp_weights_that_vanish_meet_in_the_middle(weights: tuple[float, float], tmp_path: Path) -> None:
    make_pair(tmp_path)
    plan = plan_of_file(write(tmp_path / "recipe.yaml", weighted("nuslerp", *weights)), tmp_path / "child")
    assert {tensor.t for tensor in plan.tensors} == {0.5}


def test_linear_weights_that_add_up_to_zero_are_refused(tmp_path: Path) -> None:
    make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match=r"weight.* add up to 0"):
        plan_of_file(write(tmp_path / "recipe.yaml", weighted("linear", 1.0, -1.0)), tmp_path / "child")


# ── Task vectors ──


def siblings(folder: Path) -> tuple[Path, Path, Path]:
    """Two children of one base, so near to it and to each other that only their task vectors stand apart."""
    base_tensor = llama_tensors(3, torch.float32)
    learned = [llama_tensors(seed, torch.float32, 0.002) for seed in (1, 2)]
    tuned = [{name: tensor + part[name] for name, tensor in base_tensor.items()} for part in learned]
    first, second, base = (
        make_checkpoint(folder / name, tensors)
        for name, tensors in zip(("primary", "secondary", "base"), (*tuned, base_tensor))
    )
    return first, second, base


@pytest.mark.parametrize(
    ("method", "taken_as_one"),
    [("slerp", "tensor"), ("slerp-norm", "tensor"), ("lerp", "tensor"), ("nuslerp", "tensor"), ("nuslerp", "first_dim"),
     ("nuslerp", "last_dim")],
)  # fmt: skip
def test_task_vectors_are_blended_and_added_to_the_base(method: str, taken_as_one: str, tmp_path: Path) -> None:
    primary, secondary, base = siblings(tmp_path)
    report = merge(primary, secondary, tmp_path / "child", 0.3, method=method, vectors=taken_as_one, base=base)
    operands = [load_tensors(folder) for folder in (primary, secondary, base)]
    for name, found in load_tensors(report.child).items():
        parts = [tensors[name] for tensors in operands]
        v0, v1, base_tensor = (part.double() for part in parts)
        if method == "nuslerp":
            axis = {"tensor": None, "first_dim": 0, "last_dim": -1}[taken_as_one]
            exact = base_tensor + exact_nuslerp(v0 - base_tensor, v1 - base_tensor, 0.3, axis)
        else:
            exact = base_tensor + reference_slerp(v0 - base_tensor, v1 - base_tensor, 0.3, method)
        assert units(found, exact, parts) <= WITH_BASE, name
    if method == "slerp":
        assert {merged.weights.operation for merged in report.merged.tensors} == {"slerp"}


@pytest.mark.parametrize(("t", "side"), [(0.0, "primary"), (1.0, "secondary")])
def test_an_end_of_the_arc_is_the_parent_whatever_the_base(t: float, side: str, tmp_path: Path) -> None:
    primary, secondary, base = siblings(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", t, base=base).child
    assert_same_bits(load_tensors(child), load_tensors(tmp_path / side))


def test_base_without_a_tensor_is_refused_by_name(tmp_path: Path) -> None:
    primary, secondary, _ = siblings(tmp_path)
    base_tensor = llama_tensors(3, torch.float32)
    del base_tensor["model.layers.1.mlp.up_proj.weight"]
    base = make_checkpoint(tmp_path / "short", base_tensor)
    with pytest.raises(SlerpMergeError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of the base"):
        merge(primary, secondary, tmp_path / "child", base=base)


@pytest.mark.parametrize("taken_as_one", ["tensor", "first_dim", "last_dim"])
@pytest.mark.parametrize("with_base", [False, True], ids=["whole", "task"])
def test_bits_do_not_depend_on_threads_or_chunks(
    taken_as_one: str, with_base: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    primary, secondary, base = siblings(tmp_path)
    settings = {"method": "nuslerp", "vectors": taken_as_one, "base": base if with_base else None}
    usual = load_tensors(merge(primary, secondary, tmp_path / "usual", 0.3, threads=1, **settings).child)
    set_block_elements(monkeypatch, 64)
    children = [
        load_tensors(merge(primary, secondary, tmp_path / f"by-{threads}", 0.3, threads=threads, **settings).child)
        for threads in (1, 2, 5)
    ]
    for child in children[1:]:
        assert_same_bits(child, children[0])
    if taken_as_one == "last_dim":  # its vectors are whole rows, which no chunk ever cuts
        matrices = [name for name, tensor in usual.items() if tensor.ndim == 2]
        assert matrices
        assert [bits(children[0][name]) for name in matrices] == [bits(usual[name]) for name in matrices]


def test_a_base_with_a_range_of_another_length_is_refused(tmp_path: Path) -> None:
    sources = [
        {"model": side, "layer_range": [0, end], "parameters": {"weight": 0.5}}
        for side, end in (("./primary", 2), ("./secondary", 2))
    ]
    sources.append({"model": "./base", "layer_range": [0, 1]})
    content = {"merge_method": "nuslerp", "base_model": "./base", "slices": [{"sources": sources}]}
    siblings(tmp_path)
    path = write(tmp_path / "recipe.yaml", yaml.safe_dump(content, sort_keys=False))
    with pytest.raises(SlerpMergeError, match=r"recipe\.yaml, line \d+: layer ranges of different length"):
        read_recipe(path)


def test_a_model_named_in_two_ways_is_one_model(tmp_path: Path) -> None:
    primary, secondary = make_pair(tmp_path)
    text = GOOD.replace("base_model: ./primary", f"base_model: {json.dumps(str(primary))}")
    recipe = read_recipe(write(tmp_path / "recipe.yaml", text))
    assert (recipe.primary.resolve(), recipe.secondary.resolve()) == (primary.resolve(), secondary.resolve())


def test_a_list_of_layer_numbers_is_no_list_of_one_entry_a_layer(tmp_path: Path) -> None:
    """mlp_only_layers says which layers have no experts; by chance it is as long as there are layers in all."""
    config = {**LLAMA_CONFIG, "num_hidden_layers": 2, "mlp_only_layers": [0, 1], "layer_types": ["full", "sliding"]}
    primary, secondary = make_pair(tmp_path, config=config)
    child = merge(primary, secondary, tmp_path / "child", slices=(LayerSlice(1, 1, 1, Schedule.constant(0.5)),)).child
    made = json.loads((child / "config.json").read_text(encoding="utf-8"))
    assert made["layer_types"] == ["sliding"]
    assert made["mlp_only_layers"] in ([0], [0, 1])
