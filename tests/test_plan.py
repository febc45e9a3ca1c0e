"""Everything that is decided before a byte is written: rules, files, costs, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from slerpkit.merge.plan import MergePlan
from slerpkit.merge.save_directory import check_save_directory
from slerpkit.merge.tensor_plan import TensorPlan, cut_shards, lay_out_shard, plan_shards
from slerpkit.messages import SlerpMergeError
from slerpkit.parity.tokenizer_source import chat_template, choose_tokenizer
from slerpkit.schedule import Schedule, ScheduleRule
from slerpkit.story import execute_merge
from tests.builders import LLAMA_CONFIG, add_tokenizer, llama_tensors, load_tensors, make_checkpoint, make_pair, plan_of

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {
    "F64": torch.float64, "I64": torch.int64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@pytest.fixture
def pair(tmp_path, parents) -> Path:
    """The folder that holds the tiny parents `primary` and `secondary`, which no plan may touch."""
    parents.watch(*make_pair(tmp_path))
    return tmp_path


def planned(folder: Path, **changes: Any) -> MergePlan:
    """A plan for `primary` and `secondary` below a folder, into `child` beside them."""
    folders = {"primary": folder / "primary", "secondary": folder / "secondary", "save_directory": folder / "child"}
    return plan_of(**{**folders, "threads": 1, **changes})


def tensors_by_name(plan: MergePlan) -> dict[str, TensorPlan]:
    return {tensor.name: tensor for tensor in plan.tensors}


def make_both(folder: Path, primary: dict[str, torch.Tensor], secondary: dict[str, torch.Tensor]) -> None:
    """Two parents of a tiny Llama's tensors with these in addition."""
    make_checkpoint(folder / "primary", {**llama_tensors(1), **primary})
    make_checkpoint(folder / "secondary", {**llama_tensors(2), **secondary})


def tensor_of(name: str, dtype: str, *shape: int) -> TensorPlan:
    return TensorPlan(name, shape, (), dtype=dtype, operation="copy")


def random_tensors(seed: int) -> list[TensorPlan]:
    """Tensors of random dtypes and sizes, some empty, some numbers."""
    chooser = random.Random(seed)
    shapes = [[chooser.randint(0, 9) for _ in range(chooser.randint(0, 3))] for _ in range(chooser.randint(1, 40))]
    return [tensor_of(f"层.{number}.w", chooser.choice(list(DTYPES)), *shape) for number, shape in enumerate(shapes)]


def refused(match: str):
    return pytest.raises(SlerpMergeError, match=match)


# ── A rule for each tensor ──


@pytest.mark.parametrize("method", ["slerp", "slerp-norm", "lerp"])
def test_weights_get_the_method_and_both_parents(pair, method):
    plan = planned(pair, method=method, schedule=Schedule.constant(0.3))
    assert {tensor.name for tensor in plan.tensors} == set(llama_tensors(1))
    for tensor in plan.tensors:
        assert (tensor.operation, tensor.t) == ("lerp" if method == "lerp" else "slerp", 0.3)
        assert tensor.sources == (
            plan.parents.primary.tensors[tensor.name],
            plan.parents.secondary.tensors[tensor.name],
        )
    assert plan.count("slerp") + plan.count("lerp") == len(llama_tensors(1))


@pytest.mark.parametrize(("t", "parent"), [(0.0, "primary"), (1.0, "secondary")])
def test_at_its_ends_a_blend_is_a_copy_of_one_parent(pair, t, parent):
    plan = planned(pair, schedule=Schedule.constant(t))
    for tensor in plan.tensors:
        assert (tensor.operation, tensor.t) == ("copy", t)
        assert tensor.sources == (plan.parents.by_role[parent].tensors[tensor.name],)


def test_a_gradient_reaches_its_layers(tmp_path):
    for name, seed in (("primary", 1), ("secondary", 2)):
        config = {**LLAMA_CONFIG, "num_hidden_layers": 12}
        make_checkpoint(tmp_path / name, llama_tensors(seed, layers=12), config)
    rules = ScheduleRule((0.25,), "lm_head"), ScheduleRule((0.0, 1.0), "mlp"), ScheduleRule((0.5, 0.6))
    tensors = tensors_by_name(planned(tmp_path, schedule=Schedule(rules)))
    for layer in range(12):
        assert tensors[f"model.layers.{layer}.mlp.up_proj.weight"].t == pytest.approx(layer / 11)
        assert tensors[f"model.layers.{layer}.self_attn.q_proj.weight"].t == pytest.approx(0.5 + 0.1 * layer / 11)
    assert tensors["model.layers.0.mlp.up_proj.weight"].operation == "copy"
    assert tensors["model.layers.11.mlp.up_proj.weight"].operation == "copy"
    assert tensors["model.layers.5.mlp.up_proj.weight"].operation == "slerp"
    assert (tensors["model.embed_tokens.weight"].t, tensors["lm_head.weight"].t) == (0.5, 0.25)


def test_numbers_are_lerped_and_whole_numbers_copied(tmp_path):
    numbers = {"scale": torch.tensor(2.0), "ids": torch.arange(3), "mask": torch.tensor([True])}
    make_both(tmp_path, numbers, {**numbers, "scale": torch.tensor(3.0)})
    plan = planned(tmp_path)
    tensors = tensors_by_name(plan)
    assert {name: tensors[name].operation for name in numbers} == {"scale": "lerp", "ids": "copy", "mask": "copy"}
    for name in ("ids", "mask"):
        assert tensors[name].sources[0] == plan.parents.primary.tensors[name]
        assert tensors[name].t == 0


def test_whole_numbers_come_from_the_primary_even_where_t_is_one(tmp_path):
    make_both(tmp_path, {"ids": torch.arange(3)}, {"ids": torch.arange(3)})
    plan = planned(tmp_path, schedule=Schedule.constant(1.0))
    assert tensors_by_name(plan)["ids"].sources[0] == plan.parents.primary.tensors["ids"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_tensor_without_elements_reaches_the_child(tmp_path, dtype):
    make_both(tmp_path, {"nothing": torch.zeros(0, 3, dtype=dtype)}, {"nothing": torch.zeros(0, 3, dtype=dtype)})
    report = execute_merge(planned(tmp_path))
    found = load_tensors(report.child)["nothing"]
    assert (found.shape, found.dtype) == ((0, 3), dtype)


def test_a_buffer_of_one_side_is_kept_from_the_primary_and_dropped_from_the_secondary(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    make_both(tmp_path, {name: torch.ones(4)}, {})
    plan = planned(tmp_path)
    tensor = tensors_by_name(plan)[name]
    assert (tensor.operation, tensor.sources) == ("copy", (plan.parents.primary.tensors[name],))
    swapped = planned(tmp_path, primary=tmp_path / "secondary", secondary=tmp_path / "primary")
    assert name not in tensors_by_name(swapped)


def test_a_tied_head_is_blended_with_the_embedding_that_serves_as_head(tmp_path):
    make_checkpoint(tmp_path / "primary", llama_tensors(1))
    tied = llama_tensors(2)
    del tied["lm_head.weight"]
    make_checkpoint(tmp_path / "secondary", tied, {**LLAMA_CONFIG, "tie_word_embeddings": True})
    plan = planned(tmp_path)
    embedding = plan.parents.secondary.tensors["model.embed_tokens.weight"]
    assert tensors_by_name(plan)["lm_head.weight"].sources == (
        plan.parents.primary.tensors["lm_head.weight"],
        embedding,
    )


def test_a_tensor_that_no_filter_matches_stops_the_plan(pair):
    with refused(r"no value for the tensor (lm_head|model\.)"):
        planned(pair, schedule=Schedule((ScheduleRule((0.5,), "mlp"),)))


# ── The child's dtype ──


def test_auto_keeps_the_primarys_dtypes_tensor_by_tensor(tmp_path):
    mixed = {name: t.float() if "norm" in name else t for name, t in llama_tensors(1).items()}
    make_checkpoint(tmp_path / "primary", mixed)
    make_checkpoint(tmp_path / "secondary", llama_tensors(2, torch.float16))
    for tensor in planned(tmp_path).tensors:
        assert tensor.dtype == ("F32" if "norm" in tensor.name else "BF16")


@pytest.mark.parametrize(("asked", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
@pytest.mark.parametrize("t", [0.0, 0.5])
def test_a_dtype_that_is_asked_for_is_that_of_every_real_tensor(tmp_path, asked, stored, t):
    make_both(tmp_path, {"ids": torch.arange(3)}, {"ids": torch.arange(3)})
    plan = planned(tmp_path, dtype=asked, schedule=Schedule.constant(t))
    assert {tensor.dtype for tensor in plan.tensors if tensor.name != "ids"} == {stored}
    assert tensors_by_name(plan)["ids"].dtype == "I64"
    width = 4 if stored == "F32" else 2
    assert plan.child_bytes == 24 + width * sum(tensor.numel() for tensor in llama_tensors(1).values())


# ── Order and files ──


def test_tensors_come_in_layer_order(tmp_path):
    for name, seed in (("primary", 1), ("secondary", 2)):
        tensors = llama_tensors(seed, layers=12)
        shuffled = random.Random(0).sample(list(tensors), len(tensors))
        config = {**LLAMA_CONFIG, "num_hidden_layers": 12}
        make_checkpoint(tmp_path / name, {key: tensors[key] for key in shuffled}, config, shards=3)
    names = [tensor.name for tensor in planned(tmp_path, max_shard_bytes=5000).tensors]
    layers = [int(name.split(".")[2]) for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert set(layers) == set(range(12))


@pytest.mark.parametrize("seed", range(8))
def test_shards_are_filled_in_order_and_to_their_limit(seed):
    tensors = random_tensors(seed)
    largest = max(tensor.byte_count for tensor in tensors)
    for limit in (1, largest - 1, largest, 3 * largest, sum(tensor.byte_count for tensor in tensors)):
        groups = cut_shards(tensors, limit)
        assert [tensor for group in groups for tensor in group] == tensors
        sizes = [sum(tensor.byte_count for tensor in group) for group in groups]
        for group, size in zip(groups, sizes):
            assert group
            assert size <= limit or sum(tensor.byte_count > 0 for tensor in group) == 1
        for size, following in zip(sizes, groups[1:]):
            assert size + following[0].byte_count > limit  # no shard is cut without need


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(pair):
    limit = 800
    plan = planned(pair, max_shard_bytes=limit)
    large = {tensor.name for tensor in plan.tensors if tensor.byte_count > limit}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= large
    for shard in plan.shards:
        assert len(shard.tensors) == 1 or sum(tensor.byte_count for tensor in shard.tensors) <= limit


@pytest.mark.parametrize("count", [1, 2, 3])
def test_files_are_named_as_loaders_expect(count):
    shards = plan_shards([tensor_of(f"t{number}", "U8", 10) for number in range(count)], 10)
    several = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    assert [shard.file_name for shard in shards] == (several if count > 1 else ["model.safetensors"])


def test_a_limit_of_exactly_the_childs_size_is_one_file(pair):
    size = planned(pair).child_bytes
    assert len(planned(pair, max_shard_bytes=size).shards) == 1
    assert len(planned(pair, max_shard_bytes=size - 1).shards) == 2


@pytest.mark.parametrize("seed", range(8))
def test_a_laid_out_shard_is_a_file_that_the_library_reads(tmp_path, seed):
    generator = torch.Generator().manual_seed(seed)
    shard = lay_out_shard("model.safetensors", random_tensors(seed))
    content = bytearray(shard.byte_count)
    content[: len(shard.header)] = shard.header
    expected = {}
    for tensor in shard.tensors:
        values = torch.randint(0, 2, tensor.shape, generator=generator).to(DTYPES[tensor.dtype])
        expected[tensor.name] = values
        data = values.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert len(data) == tensor.byte_count
        content[tensor.offset : tensor.offset + len(data)] = data
    file = tmp_path / shard.file_name
    file.write_bytes(content)
    found = load_file(file)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@pytest.mark.parametrize("seed", range(8))
def test_every_tensor_is_aligned_to_its_own_width(seed):
    for tensor in lay_out_shard("model.safetensors", random_tensors(seed)).tensors:
        assert tensor.offset % DTYPES[tensor.dtype].itemsize == 0


def test_one_width_keeps_its_order_in_a_shard():
    tensors = [tensor_of("a", "BF16", 3), tensor_of("b", "F32", 3), tensor_of("c", "F16", 3), tensor_of("d", "F32", 1)]
    assert [tensor.name for tensor in lay_out_shard("x", tensors).tensors] == ["b", "d", "a", "c"]


# ── What it costs ──


def sparse_model(folder: Path, rows: int) -> Path:
    """A model of one tensor of rows x 1024 bfloat16 zeros that take no room on the disk."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG), encoding="utf-8")
    shard = lay_out_shard("model.safetensors", [tensor_of("model.layers.0.mlp.weight", "BF16", rows, 1024)])
    with open(folder / shard.file_name, "wb") as stream:
        stream.write(shard.header)
        stream.truncate(shard.byte_count)
    return folder


@pytest.mark.skipif(os.name == "nt", reason="a truncated file takes its whole room there")
def test_peak_memory_does_not_grow_with_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**60, free=2**60))
    plans = []
    for rows in (16, 4_000_000):
        (tmp_path / str(rows)).mkdir()
        for name in ("primary", "secondary"):
            sparse_model(tmp_path / str(rows) / name, rows)
        tracemalloc.start()
        plans.append(planned(tmp_path / str(rows)))
        allocated = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert allocated < 100_000_000
    small, large = plans
    assert large.child_bytes > 8_000_000_000
    assert small.peak_memory_bytes == large.peak_memory_bytes < 1_000_000_000
    assert large.expected_seconds > 100 * small.expected_seconds
    assert large.disk_needed_bytes > large.child_bytes


MEASURED_MERGE = """
import re, sys
from pathlib import Path
from slerpkit.recipe import recipe_and_options
from slerpkit.schedule import Schedule
from slerpkit.story import execute_merge, prepare_merge

names = ("primary", "secondary", "save_directory", "schedule", "threads")
recipe, options = recipe_and_options(dict(zip(names, (*map(Path, sys.argv[1:]), Schedule.constant(0.5), 2))))
plan = prepare_merge(recipe, options)
execute_merge(plan)
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(plan.peak_memory_bytes, int(peak) * 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory otherwise")
def test_the_peak_memory_covers_tens_of_thousands_of_tensors(tmp_path):
    names = [f"model.layers.{n % 2}.mlp.experts.{n // 2}.down_proj.weight" for n in range(20_000)]
    for seed, role in enumerate(("primary", "secondary")):
        values = torch.randn(len(names), 4, 4, generator=torch.Generator().manual_seed(seed))
        make_checkpoint(tmp_path / role, {**llama_tensors(seed), **dict(zip(names, values))})
    folders = [str(tmp_path / name) for name in ("primary", "secondary", "child")]
    command = [sys.executable, "-c", MEASURED_MERGE, *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300)
    planned_peak, peak = map(int, done.stdout.split())
    assert peak < planned_peak < 2 * peak


def test_peak_memory_grows_with_the_threads(pair):
    peaks = [planned(pair, threads=threads).peak_memory_bytes for threads in (1, 2, 8)]
    assert peaks[0] < peaks[1] < peaks[2]


def test_the_thread_count_is_as_asked_or_sensible(pair):
    assert planned(pair, threads=3).threads == 3
    assert 1 <= planned(pair, threads=0).threads <= (os.cpu_count() or 1)


def test_the_disk_need_covers_all_that_the_child_takes(tmp_path):
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(secondary)
    (primary / "generation_config.json").write_text("{}")
    (primary / "modeling_own.py").write_text("#" * 100_000)
    plan = planned(tmp_path, max_shard_bytes=2000)
    child = execute_merge(plan).child
    taken = sum(file.stat().st_size for file in child.rglob("*") if file.is_file())
    assert taken <= plan.disk_needed_bytes <= taken + 500_000


@pytest.fixture
def disk(monkeypatch):
    """The disk as the program sees it: set `disk.free`; `disk.asked` are the folders it was asked for."""
    seen = SimpleNamespace(free=0, asked=[])

    def disk_usage(path):
        seen.asked.append(Path(path))
        return SimpleNamespace(total=10**12, used=10**12 - seen.free, free=seen.free)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return seen


def test_a_disk_without_room_is_refused_before_anything_is_written(pair, disk):
    disk.free = 10_000
    place = pair / "new" / "deeper" / "child"
    with refused(r"needs .* only 10\.0 KB are free at") as caught:
        planned(pair, save_directory=place)
    assert str(pair) in caught.value.message
    assert "--dtype" in caught.value.hint
    assert not (pair / "new").exists()
    assert set(disk.asked) == {pair.resolve()}  # where the child would come to lie


def test_a_disk_with_just_enough_room_is_accepted(pair, disk):
    disk.free = 10**9
    needed = planned(pair).disk_needed_bytes
    disk.free = needed
    assert planned(pair).disk_free_bytes == needed
    disk.free = needed - 1
    with refused("needs"):
        planned(pair)


# ── Recipes that cannot be ──


def t_of(*values: float) -> Schedule:
    return Schedule((ScheduleRule((0.5,), "mlp"), ScheduleRule(values)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"method": "average"}, "method cannot be 'average'"),
        ({"dtype": "int8"}, "dtype cannot be 'int8'"),
        ({"tokenizer": "both"}, "tokenizer cannot be 'both'"),
        ({"device": "tpu"}, "device cannot be 'tpu'"),
        ({"schedule": t_of(-0.1)}, "t = -0.1 lies outside 0 to 1"),
        ({"schedule": t_of(0, 0.5, 1.5)}, "t = 1.5 lies outside 0 to 1"),
        ({"schedule": t_of(math.nan)}, "t = nan"),
        ({"schedule": t_of(math.inf)}, "t = inf"),
        ({"dot_threshold": 0.0}, "dot threshold 0"),
        ({"dot_threshold": -0.5}, "dot threshold -0.5"),
        ({"dot_threshold": 1.01}, "dot threshold 1.01"),
        ({"dot_threshold": math.nan}, "dot threshold nan"),
        ({"epsilon": -1e-9}, "Epsilon cannot be -1e-09"),
        ({"epsilon": math.nan}, "Epsilon cannot be nan"),
        ({"epsilon": math.inf}, "Epsilon cannot be inf"),
        ({"max_shard_bytes": 0}, "Shard size"),
        ({"max_shard_bytes": -5}, "Shard size"),
        ({"threads": -1}, "threads"),
    ],
)
def test_a_recipe_that_asks_for_the_impossible(pair, changes, match):
    with refused(match) as caught:
        planned(pair, **changes)
    assert caught.value.hint


@pytest.mark.parametrize("rules", [(), (ScheduleRule(()),)], ids=["no-rule", "no-value"])
def test_a_schedule_without_a_value(pair, rules):
    with refused("schedule of t"):
        planned(pair, schedule=Schedule(rules))


@pytest.mark.parametrize(
    "changes", [{"dot_threshold": 1.0}, {"epsilon": 0.0}, {"max_shard_bytes": 1}, {"schedule": t_of(0, 1)}]
)
def test_a_recipe_at_the_edge_of_the_possible(pair, changes):
    assert planned(pair, **changes).child_bytes > 0


# ── Where the child may stand ──


def save_at(pair: Path, place: Path, overwrite: bool = False) -> None:
    check_save_directory(place, (pair / "primary", pair / "secondary"), overwrite)


@pytest.mark.parametrize("parent", ["primary", "secondary"])
@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("{parent}", "is a parent's folder"),
        ("{parent}/../{parent}", "is a parent's folder"),
        ("{parent}/child", "overlaps a parent's folder"),
        ("{parent}/deep/deeper/child", "overlaps a parent's folder"),
        (".", "overlaps a parent's folder"),
        ("..", "overlaps a parent's folder"),
    ],
)
def test_a_child_may_not_touch_a_parent(pair, parent, overwrite, place, why):
    with refused(why) as caught:
        save_at(pair, pair / place.format(parent=parent), overwrite)
    assert "never written to" in caught.value.hint


def test_a_link_to_a_parent_is_seen_through(pair):
    try:
        (pair / "link").symlink_to(pair / "primary", target_is_directory=True)
    except OSError:
        pytest.skip("this system lets nobody make links")
    with refused("is a parent's folder"):
        save_at(pair, pair / "link", overwrite=True)
    with refused("overlaps a parent's folder"):
        save_at(pair, pair / "link" / "child")


def test_a_name_that_begins_like_a_parents_is_no_parent(pair):
    save_at(pair, pair / "primary-slerp")
    save_at(pair, pair / "prim")


@pytest.mark.parametrize("place", ["child", "new/deeper/child", "empty"])
def test_a_new_or_empty_folder_is_welcome_and_not_made_yet(pair, place):
    (pair / "empty").mkdir()
    save_at(pair, pair / place)
    assert not (pair / "child").exists()
    assert not (pair / "new").exists()


def test_a_disk_that_does_not_tell_its_size_is_not_full(pair, monkeypatch):
    """Memory and many disks in networks say 0 of 0 bytes."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=0, used=0, free=0))
    plan = planned(pair, save_directory=pair / "new" / "child")
    assert plan.as_dict()["disk_free_bytes"] is None
    assert execute_merge(plan).child.is_dir()


def test_a_folder_that_is_not_empty_needs_permission(pair):
    model = make_checkpoint(pair / "older", llama_tensors(3))
    with refused(f"{model} is not empty") as caught:
        save_at(pair, model)
    assert "--overwrite" in caught.value.hint
    save_at(pair, model, overwrite=True)


def test_a_folder_that_is_no_model_is_not_overwritten_even_with_permission(pair):
    (pair / "thesis").mkdir()
    (pair / "thesis" / "chapter-1.txt").write_text("years of work")
    with refused("not a model's; nothing was overwritten"):
        save_at(pair, pair / "thesis", overwrite=True)


@pytest.mark.parametrize("place", ["file", "file/child", "file/deeper/child"])
@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_in_the_way(pair, place, overwrite):
    (pair / "file").write_text("mine")
    with refused("is a file|cannot be made"):
        save_at(pair, pair / place, overwrite)
    assert (pair / "file").read_text() == "mine"


def test_a_place_that_may_not_be_written(pair, monkeypatch):
    """Told by the system's answer, for a root user may write anywhere."""
    denied, answer = pair.resolve(), os.access

    def access(path, mode, **how):
        return answer(path, mode, **how) and not (Path(path) == denied and mode & os.W_OK)

    monkeypatch.setattr(os, "access", access)
    for place in ("child", "new/deeper/child"):
        with refused("is not writable") as caught:
            save_at(pair, pair / place)
        assert str(denied) in caught.value.message


@pytest.mark.parametrize("name", ["x" * 300, "nul\0byte"])
def test_a_name_that_no_system_can_have(pair, name):
    with refused("no usable path"):
        save_at(pair, pair / name)


def test_the_plan_checks_the_save_directory(pair):
    with refused("overlaps a parent's folder"):
        planned(pair, save_directory=pair / "primary" / "child")


# ── Whose tokenizer ──

NOTHING: tuple[str, ...] = ()
SLOW = ("tokenizer.model", "tokenizer_config.json")
FAST = ("tokenizer.json", "tokenizer_config.json")
MAPPED = (*FAST, "special_tokens_map.json")


def choose(folder: Path, primary: tuple[str, ...], secondary: tuple[str, ...], asked: str = "auto"):
    """(role, reason) where the parents' folders hold just these files."""
    for role, names in (("primary", primary), ("secondary", secondary)):
        (folder / role).mkdir()
        for name in names:
            (folder / role / name).write_text("{}")
    return choose_tokenizer(asked, folder / "primary", folder / "secondary")


@pytest.mark.parametrize(
    ("primary", "secondary", "role", "reason"),
    [
        (MAPPED, FAST, "primary", "it alone has special_tokens_map.json"),
        (FAST, MAPPED, "secondary", "it alone has special_tokens_map.json"),
        (SLOW, MAPPED, "secondary", "it alone has special_tokens_map.json"),
        (MAPPED, MAPPED, "primary", "both have special_tokens_map.json"),
        (FAST, FAST, "primary", "neither has special_tokens_map.json"),
        (SLOW, FAST, "primary", "neither has special_tokens_map.json"),
        (NOTHING, FAST, "secondary", "only it has a tokenizer"),
        (NOTHING, MAPPED, "secondary", "only it has a tokenizer"),
        (SLOW, NOTHING, "primary", "only it has a tokenizer"),
        (FAST, ("special_tokens_map.json",), "primary", "only it has a tokenizer"),
        (("qwen.tiktoken",), NOTHING, "primary", "only it has a tokenizer"),
        (NOTHING, NOTHING, None, "neither parent has a tokenizer"),
    ],
)
def test_the_tokenizer_is_that_of_the_parent_with_a_special_tokens_map(tmp_path, primary, secondary, role, reason):
    assert choose(tmp_path, primary, secondary) == (role, reason)


TALK = "{{ messages }}"
VOICES = {
    "file": ("chat_template.jinja", TALK),
    "settings": ("tokenizer_config.json", json.dumps({"chat_template": TALK})),
    "processor": ("chat_template.json", json.dumps({"chat_template": TALK})),
    "named": ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "rag", "template": TALK}]})),
    "folder": ("additional_chat_templates/rag.jinja", TALK),
}
NO_VOICES = {
    "empty": ("chat_template.jinja", ""),
    "nothing": ("tokenizer_config.json", json.dumps({"chat_template": None})),
    "no text": ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "rag"}, 5]})),
}


def give_voice(folder: Path, voice: str) -> None:
    name, text = {**VOICES, **NO_VOICES}[voice]
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(text)


@pytest.mark.parametrize("voice", [*VOICES, *NO_VOICES])
@pytest.mark.parametrize("talking", ["primary", "secondary"])
def test_a_chat_template_that_one_alone_has_wins_over_the_map_of_the_other(tmp_path, talking, voice):
    mapped = {"primary": "secondary", "secondary": "primary"}[talking]
    choose(tmp_path, **{talking: FAST, mapped: MAPPED})
    give_voice(tmp_path / talking, voice)
    found = choose_tokenizer("auto", tmp_path / "primary", tmp_path / "secondary")
    if voice in VOICES:
        assert found == (talking, "it alone has a chat template")
    else:
        assert found == (mapped, "it alone has special_tokens_map.json")


@pytest.mark.parametrize(("primary", "secondary"), [(MAPPED, FAST), (FAST, FAST), (MAPPED, MAPPED)])
def test_the_map_decides_where_both_talk_and_the_primary_where_it_does_not(tmp_path, primary, secondary):
    before = choose(tmp_path, primary, secondary)
    give_voice(tmp_path / "secondary", "file")
    if primary != secondary:
        give_voice(tmp_path / "primary", "settings")
    assert choose_tokenizer("auto", tmp_path / "primary", tmp_path / "secondary") == before


def test_a_chat_template_is_read_as_transformers_finds_it(tmp_path):
    """Files go before settings; one named default is no other than one without a name."""
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "a"}]})
    )
    assert chat_template(tmp_path) == "a"
    give_voice(tmp_path, "folder")
    assert json.loads(chat_template(tmp_path)) == {"rag": TALK}
    (tmp_path / "chat_template.jinja").write_text("b")
    assert json.loads(chat_template(tmp_path)) == {"default": "b", "rag": TALK}


@pytest.mark.parametrize("asked", ["primary", "secondary"])
def test_a_tokenizer_that_is_asked_for_wins_over_the_rule(tmp_path, asked):
    has_map = {"primary": "secondary", "secondary": "primary"}[asked]
    files = {asked: FAST, has_map: MAPPED}
    assert choose(tmp_path, files["primary"], files["secondary"], asked) == (asked, "as asked")


@pytest.mark.parametrize("asked", ["primary", "secondary"])
def test_a_tokenizer_that_is_asked_for_and_not_there(tmp_path, asked):
    files = {"primary": FAST, "secondary": FAST, asked: NOTHING}
    with refused(f"The {asked} model has no tokenizer") as caught:
        choose(tmp_path, files["primary"], files["secondary"], asked)
    assert caught.value.hint


def test_the_plan_names_the_donor(tmp_path):
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(secondary)
    plan = planned(tmp_path)
    assert plan.tokenizer_role == "secondary"
    assert plan.parents.by_role[plan.tokenizer_role] == plan.parents.secondary
    assert planned(tmp_path, primary=secondary, secondary=primary).tokenizer_role == "primary"


# ── A plan is only a plan ──


def test_planning_writes_nothing(pair):
    before = sorted(pair.rglob("*"))
    planned(pair, save_directory=pair / "new" / "child", max_shard_bytes=1000)
    assert sorted(pair.rglob("*")) == before


PLAN_AND_TELL = """
import sys
from pathlib import Path
from slerpkit.recipe import MergeRecipe, RunOptions
from slerpkit.story import prepare_merge

folder = Path(sys.argv[1])
plan = prepare_merge(MergeRecipe(folder / "primary", folder / "secondary"), RunOptions(folder / "child"))
print(len(list(plan.tensors)), sorted({"torch", "transformers", "rich", "questionary"} & set(sys.modules)))
"""


@pytest.mark.parametrize("storage", ["safetensors", "bin"])
def test_planning_loads_no_torch(tmp_path, storage):
    make_pair(tmp_path, storage=storage)
    command = [sys.executable, "-B", "-c", PLAN_AND_TELL, str(tmp_path)]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert shown.split(maxsplit=1) == [str(len(llama_tensors(1))), "[]\n"]


def test_a_plan_cannot_be_changed_behind_ones_back(pair):
    plan = planned(pair)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.threads = 64


@pytest.mark.parametrize("name", ["a\ud83d.weight", "__metadata__"], ids=["half-a-character", "metadata"])
def test_a_name_that_safetensors_cannot_hold_is_refused(tmp_path, name):
    """A pickle can hold half of a surrogate pair, and the name that the format keeps for itself."""
    for role, seed in (("primary", 1), ("secondary", 2)):
        make_checkpoint(tmp_path / role, {**llama_tensors(seed), name: torch.ones(2)}, storage="bin")
    with refused("is no name that a safetensors file can hold"):
        planned(tmp_path)


def test_parents_with_the_same_weights_are_told_before_the_start(tmp_path):
    primary, secondary = make_pair(tmp_path)
    assert plan_of(primary, secondary, tmp_path / "child").remarks == ()
    again = make_checkpoint(tmp_path / "again", load_tensors(primary), shards=2)
    (remark,) = plan_of(primary, again, tmp_path / "child").remarks
    assert "hold the same weights" in remark
    other = load_tensors(primary)
    other["model.norm.weight"] = other["model.norm.weight"] + 1
    almost = make_checkpoint(tmp_path / "almost", other)
    assert plan_of(primary, almost, tmp_path / "child").remarks == ()
