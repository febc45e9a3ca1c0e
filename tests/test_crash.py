"""Whatever interrupts a merge, the save directory holds a whole child, or what it held before, and nothing else."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import slerpmerge
from slerpmerge import (
    BytesMerged,
    ChildVerified,
    CompanionCopied,
    DeviceChosen,
    FileHandles,
    ParentOpened,
    ParityChecked,
    PlanReady,
    ShardWritten,
    SlerpMergeError,
    TensorMerged,
)
from tests.builders import add_tokenizer, load_tensors, make_pair
from tests.conftest import fingerprint
from tests.test_merge import assert_same_bits, merge, staging_beside

SCRIPT = Path(slerpmerge.__file__)
MOMENTS = [
    (ParentOpened, 1), (ParentOpened, 2), (ParityChecked, 1), (PlanReady, 1), (DeviceChosen, 1), (BytesMerged, 1),
    (TensorMerged, 1), (TensorMerged, 11), (TensorMerged, 21), (ShardWritten, 1), (ShardWritten, 2),
    (CompanionCopied, 1), (CompanionCopied, 2), (CompanionCopied, 3), (CompanionCopied, 4),
    (ChildVerified, 1),
]  # fmt: skip


def at(moment: type, number: int, act: Callable[[], object]) -> Callable[[object], None]:
    """An observer that acts on the number-th event of a kind."""
    seen = []

    def observe(event: object) -> None:
        if isinstance(event, moment):
            seen.append(event)
            if len(seen) == number:
                act()

    return observe


def throw(error: BaseException) -> None:
    raise error


def interrupt() -> None:
    raise KeyboardInterrupt


def names(folder: Path) -> list[str]:
    """Everything in a folder, hidden or not."""
    return sorted(path.name for path in folder.iterdir())


def damage_middle_of(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def command_line(primary: Path, secondary: Path, child: Path, *more: str) -> list[str]:
    folders = ["--primary", str(primary), "--secondary", str(secondary), "--save-dir", str(child)]
    return [sys.executable, str(SCRIPT), *folders, "--device", "cpu", "--yes", *more]


# ── Errors and Ctrl-C from within ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("error", "moment", "number"),
    [*((KeyboardInterrupt, *moment) for moment in MOMENTS), *((RuntimeError, *moment) for moment in MOMENTS[::4])],
)
def test_an_interruption_at_any_moment_leaves_nothing(tmp_path, parents, error, moment, number):
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(primary)
    parents.watch(primary, secondary)
    observe = at(moment, number, lambda: throw(error("stop")))
    with pytest.raises(error):
        merge(primary, secondary, tmp_path / "new" / "deep" / "child", observe=observe, max_shard_bytes=9000, threads=3)
    assert names(tmp_path) == ["primary", "secondary"]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("merge-", "sync"))]


def test_an_interruption_leaves_an_empty_save_directory_and_its_neighbours(tmp_path):
    primary, secondary = make_pair(tmp_path)
    child = tmp_path / "there" / "child"
    child.mkdir(parents=True)
    (tmp_path / "there" / "neighbour").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, observe=at(TensorMerged, 3, interrupt))
    assert names(tmp_path / "there") == ["child", "neighbour"]
    assert names(child) == []


def test_a_folder_made_on_the_way_stays_if_somebody_else_uses_it(tmp_path):
    primary, secondary = make_pair(tmp_path)

    def act() -> None:
        (tmp_path / "new" / "mine").write_text("mine")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, tmp_path / "new" / "deep" / "child", observe=at(TensorMerged, 3, act))
    assert names(tmp_path / "new") == ["mine"]


def test_torch_has_its_threads_back_after_an_interruption(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(*make_pair(tmp_path), tmp_path / "child", observe=at(TensorMerged, 3, interrupt))
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_folders_made_on_the_way_are_removed_where_the_last_cannot_be(tmp_path, monkeypatch):
    primary, secondary = make_pair(tmp_path)
    make = Path.mkdir

    def refuse(path: Path, *more: object, **options: object) -> None:
        if path.name.startswith("."):
            raise OSError(errno.ENOSPC, "No space left on device")
        make(path, *more, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(SlerpMergeError, match="No space left on device"):
        merge(primary, secondary, tmp_path / "new" / "deep" / "child")
    assert names(tmp_path) == ["primary", "secondary"]


# ── A child that stands there already ───────────────────────────────────────────────────────────


@pytest.mark.parametrize(("moment", "number"), [(DeviceChosen, 1), (TensorMerged, 11), (ChildVerified, 1)])
def test_an_existing_child_survives_a_failed_merge_and_gives_way_to_a_good_one(tmp_path, moment, number):
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2, max_shard_bytes=9000).child
    (child / "notes.txt").write_text("mine")
    before = fingerprint(child)
    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, 0.7, overwrite=True, observe=at(moment, number, interrupt))
    assert fingerprint(child) == before
    assert names(tmp_path) == ["child", "primary", "secondary"]
    merge(primary, secondary, child, 0.7, overwrite=True)
    assert names(child) == ["README.md", "config.json", "merge_recipe.yaml", "model.safetensors"]
    assert names(tmp_path) == ["child", "primary", "secondary"]
    assert_same_bits(load_tensors(child), load_tensors(merge(primary, secondary, tmp_path / "other", 0.7).child))


def test_an_existing_child_is_not_replaced_unasked(tmp_path, parents):
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2).child
    parents.watch(child)
    with pytest.raises(SlerpMergeError, match="is not empty"):
        merge(primary, secondary, child, 0.7)


def test_what_somebody_puts_there_meanwhile_is_not_overwritten(tmp_path):
    primary, secondary = make_pair(tmp_path)
    child = tmp_path / "child"

    def act() -> None:
        child.mkdir()
        (child / "thesis.txt").write_text("mine")

    with pytest.raises(SlerpMergeError, match="is not empty"):
        merge(primary, secondary, child, observe=at(TensorMerged, 5, act))
    assert (child / "thesis.txt").read_text() == "mine"
    assert names(tmp_path) == ["child", "primary", "secondary"]


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_existing_child_is_back_when_the_last_step_fails(tmp_path, monkeypatch, failing, error):
    """Replacing takes two renames: the old child aside, the new one into its place."""
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2).child
    before = fingerprint(child)
    rename, calls = Path.rename, []

    def fail_once(path: Path, target: Path) -> Path:
        calls.append(path)
        return throw(error(errno.EACCES, "Permission denied")) if len(calls) == failing else rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(SlerpMergeError if error is OSError else KeyboardInterrupt):
        merge(primary, secondary, child, 0.7, overwrite=True)
    assert names(tmp_path) == ["child", "primary", "secondary"]
    assert fingerprint(child) == before


# ── The world changes under the merge ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [damage_middle_of, Path.unlink], ids=["truncated", "removed"])
@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("storage", ["safetensors", "bin", "legacy-bin"])
def test_a_parent_that_breaks_during_the_merge_is_named(tmp_path, storage, role, how):
    primary, secondary = make_pair(tmp_path, storage=storage)
    (file,) = (path for path in (tmp_path / role).iterdir() if path.suffix in (".safetensors", ".bin"))
    with pytest.raises(SlerpMergeError, match=re.escape(str(file))) as caught:
        merge(primary, secondary, tmp_path / "child", observe=at(DeviceChosen, 1, lambda: how(file)))
    assert caught.value.hint
    assert names(tmp_path) == ["primary", "secondary"]


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be cut there")
def test_a_parent_that_breaks_halfway_is_named(tmp_path, monkeypatch):
    """Its file is open already, and some of its tensors are merged."""
    monkeypatch.setattr(slerpmerge, "CHUNK_ELEMENTS", 64)
    primary, secondary = make_pair(tmp_path)
    cut = at(TensorMerged, 2, lambda: os.truncate(secondary / "model.safetensors", 2000))
    with pytest.raises(SlerpMergeError, match=r"secondary.model\.safetensors is damaged or incomplete: it ends inside"):
        merge(primary, secondary, tmp_path / "child", observe=cut, threads=1)
    assert names(tmp_path) == ["primary", "secondary"]


class FullDisk(io.FileIO):
    """A file to which the disk has no more room after its first bytes."""

    written = 0

    def write(self, data: memoryview) -> int:
        if self.written >= 512:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.written += 512
        return super().write(data[:512])  # a disk that fills up first writes less than asked


@pytest.mark.parametrize("threads", [1, 4])
def test_a_disk_that_fills_up_gives_one_message_and_leaves_nothing(tmp_path, parents, monkeypatch, threads):
    primary, secondary = make_pair(tmp_path)
    parents.watch(primary, secondary)
    monkeypatch.setattr(slerpmerge.io, "FileIO", FullDisk)
    with pytest.raises(SlerpMergeError, match=r"Could not write .*model\.safetensors: No space left") as caught:
        merge(primary, secondary, tmp_path / "new" / "child", threads=threads)
    assert "Free some space" in caught.value.hint
    assert names(tmp_path) == ["primary", "secondary"]


def test_writes_that_take_less_than_asked_are_continued(tmp_path, monkeypatch):
    plain = merge(*make_pair(tmp_path), tmp_path / "plain").child

    class Hesitant(io.FileIO):
        def write(self, data: memoryview) -> int:
            return super().write(data[:10])

        def readinto(self, data: memoryview) -> int:
            return super().readinto(data[:10])

    monkeypatch.setattr(slerpmerge.io, "FileIO", Hesitant)
    child = merge(tmp_path / "primary", tmp_path / "secondary", tmp_path / "child").child
    assert (child / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


def test_a_disk_that_cannot_sync_fails_the_merge(tmp_path, monkeypatch):
    primary, secondary = make_pair(tmp_path)

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(SlerpMergeError, match="Input/output error"):
        merge(primary, secondary, tmp_path / "child")
    assert names(tmp_path) == ["primary", "secondary"]


def test_open_files_stay_few(tmp_path):
    """A model can have hundreds of shards; a reader keeps only some of them open."""
    folder = tmp_path / "files"
    folder.mkdir()
    handles = FileHandles()
    opened = []
    for number in range(3 * FileHandles.most_open):
        (folder / str(number)).write_bytes(b"0123456789")
        opened.append(handles.at(folder / str(number), "r", 4))
    assert opened[-1].read(2) == b"45"
    assert sum(not handle.closed for handle in opened) == FileHandles.most_open
    handles.close()
    assert all(handle.closed for handle in opened)


# ── Real processes ──────────────────────────────────────────────────────────────────────────────


def test_a_file_size_limit_gives_one_message(tmp_path, parents):
    resource = pytest.importorskip("resource")
    primary, secondary = make_pair(tmp_path)
    parents.watch(primary, secondary)
    done = subprocess.run(
        command_line(primary, secondary, tmp_path / "child"),
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.count("model.safetensors") == 1
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert names(tmp_path) == ["primary", "secondary"]


WAITING_MERGE = """
import sys, time, slerpmerge
from pathlib import Path

def observe(event):
    if isinstance(event, slerpmerge.TensorMerged):
        print("there", flush=True)
        time.sleep(60)

slerpmerge.execute_merge(
    slerpmerge.prepare_merge(
        slerpmerge.MergeRecipe(*map(Path, sys.argv[1:]), device="cpu", max_shard_bytes=9000), observe
    ),
    observe,
)
"""


def test_a_killed_merge_leaves_nothing_under_the_asked_name_and_the_next_succeeds(tmp_path, parents):
    primary, secondary = make_pair(tmp_path)
    parents.watch(primary, secondary)
    child = tmp_path / "new" / "child"
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING_MERGE, str(primary), str(secondary), str(child)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=SCRIPT.parent,
    )
    with process:
        assert process.stdout.readline() == "there\n"
        process.kill()
    assert process.returncode != 0
    assert not child.exists()
    report = merge(primary, secondary, child, 0.3)
    assert names(child.parent) == ["child"]
    assert names(child) == ["README.md", "config.json", "merge_recipe.yaml", "model.safetensors"]
    assert report.warnings == ()


def test_a_second_merge_to_the_same_place_does_not_take_the_firsts_away(tmp_path):
    primary, secondary = make_pair(tmp_path)
    child = tmp_path / "child"
    second = []

    def act() -> None:
        command = command_line(primary, secondary, child, "--t", "0.9")
        second.append(subprocess.run(command, capture_output=True, text=True, timeout=60))

    merge(primary, secondary, child, 0.1, observe=at(TensorMerged, 5, act))
    assert second[0].returncode == 1
    assert_same_bits(load_tensors(child), load_tensors(merge(primary, secondary, tmp_path / "other", 0.1).child))


def test_staging_left_by_a_killed_run_is_not_mixed_into_the_child(tmp_path):
    primary, secondary = make_pair(tmp_path)
    staged = []

    def act() -> None:
        staged.append(staging_beside(tmp_path / "child"))
        shutil.copytree(staged[0], tmp_path / "kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, tmp_path / "child", observe=at(TensorMerged, 20, act))
    (tmp_path / "kept" / "model-00001-of-00099.safetensors").write_bytes(b"from another recipe")
    (tmp_path / "kept").rename(staged[0])
    child = merge(primary, secondary, tmp_path / "child").child
    assert names(child) == ["README.md", "config.json", "merge_recipe.yaml", "model.safetensors"]
    assert names(tmp_path) == ["child", "primary", "secondary"]
