"""Embedding models: what sentence-transformers puts behind a model is the child's too, its weights blended like any."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slerpkit.merge.plan import MergePlan
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_checkpoint
from slerpkit.parity.check import incompatibility
from slerpkit.schedule import Schedule, ScheduleRule
from tests.builders import (
    HIDDEN,
    copy_model,
    distance,
    edit_json,
    make_pair,
    merge,
    plan_of,
    reference_slerp,
    staging_beside,
)
from tests.test_crash import FINISH_FILE, after, interrupt

LIBRARY = "sentence_transformers.models."
POOLING = {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
WIDE = 8


def dense_weights(seed: int, width: int = WIDE) -> dict[str, torch.Tensor]:
    common, own = (torch.Generator().manual_seed(number) for number in (77, seed))
    shapes = {"linear.weight": (width, HIDDEN), "linear.bias": (width,)}
    return {
        name: torch.randn(shape, generator=common) + 0.4 * torch.randn(shape, generator=own)
        for name, shape in shapes.items()
    }


def write_modules(folder: Path, entries: Mapping[str, str]) -> None:
    content = [{"idx": n, "name": str(n), "path": path, "type": kind} for n, (path, kind) in enumerate(entries.items())]
    (folder / "modules.json").write_text(json.dumps(content))


ENTRIES = {"": LIBRARY + "Transformer", "1_Pooling": LIBRARY + "Pooling", "2_Dense": LIBRARY + "Dense"}


def dress(folder: Path, seed: int, storage: str = "safetensors", dense: bool = True) -> Path:
    """Makes an embedding model of a model's folder."""
    write_modules(folder, {path: kind for path, kind in ENTRIES.items() if dense or path != "2_Dense"})
    (folder / "1_Pooling").mkdir()
    edit_json(folder / "1_Pooling" / "config.json", **POOLING)
    edit_json(folder / "config_sentence_transformers.json", __version__={"pytorch": seed}, prompts={"query": "find: "})
    edit_json(folder / "sentence_roberta_config.json", max_seq_length=32)
    if dense:
        (folder / "2_Dense").mkdir()
        edit_json(folder / "2_Dense" / "config.json", in_features=HIDDEN, out_features=WIDE)
        if storage == "safetensors":
            save_file(dense_weights(seed), folder / "2_Dense" / "model.safetensors")
        else:
            torch.save(dense_weights(seed), folder / "2_Dense" / "pytorch_model.bin")
    return folder


def make_embedders(folder: Path, storages: tuple[str, str] = ("safetensors",) * 2, **how: Any) -> tuple[Path, Path]:
    primary, secondary = make_pair(folder)
    return dress(primary, 1, storages[0], **how), dress(secondary, 2, storages[1], **how)


def stored_names(file: Path) -> set[str]:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]).keys() - {"__metadata__"}


# ── The child ──


@pytest.mark.parametrize("storages", [("safetensors",) * 2, ("bin", "safetensors"), ("bin", "bin")])
def test_dense_weights_are_blended_where_they_lie(tmp_path, parents, storages):
    primary, secondary = make_embedders(tmp_path, storages)
    parents.watch(primary, secondary)
    report = merge(primary, secondary, tmp_path / "child", 0.3)
    file = report.child / "2_Dense" / "model.safetensors"
    assert stored_names(file) == {"linear.weight", "linear.bias"}
    child, first, second = load_file(file), dense_weights(1), dense_weights(2)
    for name, found in child.items():
        exact = reference_slerp(first[name], second[name], 0.3)
        assert distance(found, first[name], second[name], exact) <= 1
    assert sorted(path.name for path in (report.child / "2_Dense").iterdir()) == ["config.json", "model.safetensors"]
    assert not any("2_Dense" in name for name in stored_names(report.child / "model.safetensors"))
    assert report.as_dict()["tensors"] == len(list(report.plan.tensors))


def test_settings_and_folders_are_the_primarys(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    child = merge(primary, secondary, tmp_path / "child").child
    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "config_sentence_transformers.json",
                 "sentence_roberta_config.json"):  # fmt: skip
        assert (child / name).read_bytes() == (primary / name).read_bytes(), name


def test_an_index_of_shards_names_no_tensor_of_a_module(tmp_path):
    report = merge(*make_embedders(tmp_path), tmp_path / "child", max_shard_bytes=5000)
    index = json.loads((report.child / "model.safetensors.index.json").read_text())
    stored = {name for file in report.child.glob("*.safetensors") for name in stored_names(file)}
    assert index["weight_map"].keys() == stored
    own = sum(tensor.byte_count for tensor in report.plan.tensors if not tensor.folder)
    assert index["metadata"]["total_size"] == own < report.plan.child_bytes


def test_modules_follow_the_schedule_as_what_is_outside_layers(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    plan = plan_of(primary, secondary, tmp_path / "child", schedule=Schedule((ScheduleRule((0.2, 0.8)),)))
    assert {tensor.t for tensor in plan.tensors if tensor.folder} == {0.2}
    rules = Schedule((ScheduleRule((1.0,), "2_Dense"), ScheduleRule((0.5,))))
    child = merge(primary, secondary, tmp_path / "child", schedule=rules).child
    found, expected = load_file(child / "2_Dense" / "model.safetensors"), dense_weights(2)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_an_asked_dtype_is_the_modules_too(tmp_path):
    child = merge(*make_embedders(tmp_path), tmp_path / "child", dtype="float16").child
    assert {tensor.dtype for tensor in load_file(child / "2_Dense" / "model.safetensors").values()} == {torch.float16}


def test_modules_inside_modules_keep_their_places(tmp_path):
    for parent in make_pair(tmp_path):
        write_modules(parent, {"": LIBRARY + "Transformer", "1_Router": LIBRARY + "Router"})
        for route in ("query_0_Dense", "document_0_Dense"):
            (parent / "1_Router" / route).mkdir(parents=True)
            save_file(dense_weights(len(route)), parent / "1_Router" / route / "model.safetensors")
    child = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child").child
    for route in ("query_0_Dense", "document_0_Dense"):
        assert stored_names(child / "1_Router" / route / "model.safetensors") == {"linear.weight", "linear.bias"}


def test_a_merge_of_task_vectors_needs_the_modules_of_the_base(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    base = copy_model(primary, tmp_path / "base")
    child = merge(primary, secondary, tmp_path / "child", base=base, t=1.0, method="lerp").child
    found, expected = load_file(child / "2_Dense" / "model.safetensors"), dense_weights(2)
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    shutil.rmtree(base / "2_Dense")
    (base / "modules.json").unlink()
    with pytest.raises(SlerpMergeError, match="2_Dense/linear.weight of the base"):
        plan_of(primary, secondary, tmp_path / "other", base=base)


# ── What differs ──


def refusal(primary: Path, secondary: Path) -> str:
    with pytest.raises(SlerpMergeError) as caught:
        plan_of(primary, secondary, secondary.parent / "child")
    return caught.value.message


def test_another_pooling_is_refused_by_its_file(tmp_path):
    primary, secondary = make_embedders(tmp_path, dense=False)
    edit_json(secondary / "1_Pooling" / "config.json", pooling_mode_cls_token=False, pooling_mode_mean_tokens=True)
    message = refusal(primary, secondary)
    assert "1_Pooling/config.json" in message and "cls" in message and "mean" in message
    assert "1_Pooling" in incompatibility(*map(open_checkpoint, (primary, secondary)))


@pytest.mark.parametrize(
    "same",
    [
        {"pooling_mode_lasttoken": False, "include_prompt": True},
        {"word_embedding_dimension": ..., "embedding_dimension": HIDDEN},
        {"pooling_mode_cls_token": ..., "pooling_mode_mean_tokens": ..., "pooling_mode": "cls"},
    ],
)
def test_one_pooling_written_in_two_ways_is_one(tmp_path, same):
    primary, secondary = make_embedders(tmp_path)
    edit_json(secondary / "1_Pooling" / "config.json", **same)
    moved = {path: kind.replace("models.", "base.modules.x.") for path, kind in ENTRIES.items()}
    write_modules(secondary, moved)
    assert not any("Pooling" in m.subject for m in plan_of(primary, secondary, tmp_path / "child").parity.mismatches)


def test_other_modules_are_refused(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    write_modules(secondary, {**ENTRIES, "3_Normalize": LIBRARY + "Normalize"})
    assert "modules.json" in refusal(primary, secondary)
    write_modules(secondary, {**ENTRIES, "2_Dense": "own_code.Dense"})
    assert "own_code.Dense" in refusal(primary, secondary)


@pytest.mark.parametrize(("change", "told"), [("shape", "[8, 16]"), ("missing", "linear.bias"), ("file", "2_Dense")])
def test_dense_layers_that_do_not_fit_are_refused(tmp_path, change, told):
    primary, secondary = make_embedders(tmp_path)
    file = secondary / "2_Dense" / "model.safetensors"
    weights = dense_weights(2, width=WIDE + 1 if change == "shape" else WIDE)
    save_file({name: weights[name] for name in weights if change != "missing" or name == "linear.weight"}, file)
    if change == "file":
        (secondary / "2_Dense" / "merges.bin").write_bytes(b"x")
    assert told in refusal(primary, secondary)


@pytest.mark.parametrize("single", ["primary", "secondary"])
def test_what_one_parent_alone_has_is_kept_without_weights_and_refused_with(tmp_path, single):
    primary, secondary = make_pair(tmp_path)
    dress(tmp_path / single, 1, dense=False)
    report = merge(primary, secondary, tmp_path / "child")
    (notice,) = (m for m in report.plan.parity.of_severity("notice") if m.subject == "modules.json")
    assert f"Only the {single}" in notice.consequence
    for name in ("modules.json", "1_Pooling/config.json", "sentence_roberta_config.json"):
        assert (report.child / name).read_bytes() == (tmp_path / single / name).read_bytes()
    shutil.rmtree(tmp_path / single / "1_Pooling")
    dress(tmp_path / single, 1)
    assert "2_Dense/linear.weight" in refusal(primary, secondary)


def test_other_prompts_are_told_and_another_version_is_not(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    subjects = [m.subject for m in plan_of(primary, secondary, tmp_path / "child").parity.mismatches]
    assert not any("sentence" in subject for subject in subjects)
    edit_json(secondary / "config_sentence_transformers.json", prompts={"query": "search: "})
    (secondary / "sentence_roberta_config.json").unlink()
    notices = plan_of(primary, secondary, tmp_path / "child").parity.of_severity("notice")
    told = {m.subject: (m.primary, m.secondary) for m in notices if "sentence" in m.subject}
    assert told.keys() == {"config_sentence_transformers.json", "sentence_roberta_config.json"}
    assert told["sentence_roberta_config.json"][1] == "none"


# ── A stranger's files ──


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b", "a\\b", "C:x", "nul\0"])
def test_a_module_outside_the_folder_is_refused(tmp_path, path):
    primary, secondary = make_embedders(tmp_path)
    write_modules(secondary, {**ENTRIES, path: LIBRARY + "Dense"})
    assert "outside its own" in refusal(primary, secondary)


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("link", ["2_Dense", "2_Dense/config.json"])
def test_a_module_that_is_a_link_out_of_the_folder_is_refused(tmp_path, link):
    primary, secondary = make_embedders(tmp_path)
    outside = tmp_path / "outside"
    (primary / link).rename(outside)
    (primary / link).symlink_to(outside)
    with pytest.raises(SlerpMergeError, match="leads outside its folder"):
        merge(primary, secondary, tmp_path / "child")


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
def test_a_parent_that_is_reached_by_a_link_has_its_modules(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    (tmp_path / "link").symlink_to(primary)
    child = merge(tmp_path / "link", secondary, tmp_path / "child").child
    assert (child / "2_Dense" / "model.safetensors").is_file()


@pytest.mark.parametrize("text", ["{}", "[5]", '[{"path": 5, "type": "x"}]', '[{"path": "a"}]', "[", "[" * 9999])
def test_modules_that_cannot_be_read_are_refused(tmp_path, text):
    primary, secondary = make_embedders(tmp_path)
    (secondary / "modules.json").write_text(text)
    assert "modules.json" in refusal(primary, secondary)


def test_two_modules_of_one_folder_are_refused(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    write_modules(secondary, {**ENTRIES, "2_Dense/inner": LIBRARY + "Dense"})
    assert "two modules" in refusal(primary, secondary)


# ── On the way ──


def finished(plan: MergePlan) -> int:
    return 0 if plan.leftover is None else plan.leftover.kept


def test_a_finished_module_is_taken_over_by_the_next_run(tmp_path):
    primary, secondary = make_embedders(tmp_path)
    child = tmp_path / "child"

    def stop() -> None:
        journal = staging_beside(child).with_name("journal.json")
        while not journal.exists() or "2_Dense/model.safetensors" not in json.loads(journal.read_bytes())["files"]:
            time.sleep(0.005)
        interrupt()

    with after(FINISH_FILE, 2, stop), pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, threads=1)
    assert sorted(path.name for path in staging_beside(child).iterdir()) == ["2_Dense", "model.safetensors"]
    assert finished(plan_of(primary, secondary, child)) == 2
    report = merge(primary, secondary, child)
    assert report.merged.resumed_files == 2
    other = merge(primary, secondary, tmp_path / "other").child
    for name in ("2_Dense/model.safetensors", "2_Dense/config.json", "1_Pooling/config.json"):
        assert (child / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.parametrize("name", ["2_Dense/model.safetensors", "1_Pooling/config.json", "modules.json"])
def test_a_module_that_changes_during_the_merge_fails_it(tmp_path, name):
    primary, secondary = make_embedders(tmp_path)

    def touch() -> None:
        status = (secondary / name).stat()
        os.utime(secondary / name, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))

    with (
        after("slerpkit.story.write_report", 1, touch),
        pytest.raises(SlerpMergeError, match=f"changed during.*{name}"),
    ):
        merge(primary, secondary, tmp_path / "child")
    assert not (tmp_path / "child").exists()


def test_a_module_that_is_not_as_planned_fails_the_check(tmp_path):
    primary, secondary = make_embedders(tmp_path)

    def damage() -> None:
        file = staging_beside(tmp_path / "child") / "2_Dense" / "model.safetensors"
        save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, {"format": "pt"})

    with (
        after("slerpkit.story.copy_companions", 1, damage),
        pytest.raises(SlerpMergeError, match="did not pass its own check: 2_Dense/linear"),
    ):
        merge(primary, secondary, tmp_path / "child")
