"""Whatever interrupts a merge, the save directory holds a whole child or what it held before; the next run goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import pkgutil
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from slerpkit import __version__
from slerpkit.files import MAX_OPEN_FILES, FileHandles
from slerpkit.merge import staging
from slerpkit.merge.events import ChildPublished, MergeStopped, Noted, WorkAdvanced, WorkBegan, ignore
from slerpkit.merge.journal import Journal, Leftover
from slerpkit.merge.save_directory import WorkFolder, staging_area
from slerpkit.merge.staging import StagedChild
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import SlerpMergeError
from slerpkit.story import execute_merge
from tests.builders import (
    DEVICE,
    LLAMA_CONFIG,
    PLAIN_CHILD,
    add_tokenizer,
    assert_same_bits,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    merge,
    plan_of,
    set_block_elements,
    staging_beside,
)
from tests.conftest import fingerprint

SCRIPT = Path(__file__).resolve().parents[1] / "slerpmerge.py"
FINISH_FILE = "slerpkit.merge.staging.StagedChild.finish_file"
COPY_MATCHING, VERIFY_CHILD = "slerpkit.child.companions.copy_matching", "slerpkit.story.verify_child"
# What an observer is told, or a function that is done, and for the how manieth time.
MOMENTS: list[tuple[type | str, int]] = [
    ("slerpkit.parents.checkpoint.open_checkpoint", 1), ("slerpkit.parents.checkpoint.open_checkpoint", 2),
    ("slerpkit.story.check_parity", 1), ("slerpkit.story.plan_merge", 1), (WorkBegan, 1), (WorkAdvanced, 1),
    (MergedTensor, 1), (MergedTensor, 11), (MergedTensor, 21), (FINISH_FILE, 1), (FINISH_FILE, 2),
    ("slerpkit.child.companions.write_child_config", 1), (COPY_MATCHING, 1), (COPY_MATCHING, 3),
    ("slerpkit.story.copy_companions", 1), (VERIFY_CHILD, 1), ("slerpkit.story.write_report", 1),
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


@contextlib.contextmanager
def after(function: str, number: int, act: Callable[[], object]) -> Iterator[None]:
    """Acts as soon as a function is done for the number-th time."""
    original, calls = pkgutil.resolve_name(function), []

    def done(*arguments: object, **settings: object) -> object:
        result = original(*arguments, **settings)
        calls.append(arguments)
        if len(calls) == number:
            act()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, done)
        yield


@contextlib.contextmanager
def when(moment: type | str, number: int, act: Callable[[], object]) -> Iterator[Callable[[object], None]]:
    """Acts at a moment of either kind. Yields the observer of a merge."""
    if isinstance(moment, str):
        with after(moment, number, act):
            yield ignore
    else:
        yield at(moment, number, act)


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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, torch.Tensor]:
    """The child of a pair, three files of it, that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return load_tensors(merge(*make_pair(folder), folder / "child", max_shard_bytes=5000).child)


def left_behind(child: Path) -> list[str]:
    """What an interrupted merge keeps for the next: its journal and finished files, and nothing that is not whole."""
    area = child.with_name(f".{child.name}.slerpmerge-staging")
    if not area.exists():
        return []
    (staged,) = area.glob("child-*")
    assert names(area) == [staged.name, "journal.json"]
    kept = json.loads((area / "journal.json").read_bytes())["files"]
    assert names(staged) == sorted(kept) != []
    for file in staged.iterdir():
        load_file(file)
    return sorted(kept)


@pytest.mark.parametrize(
    ("error", "moment", "number"),
    [*((KeyboardInterrupt, *moment) for moment in MOMENTS), *((RuntimeError, *moment) for moment in MOMENTS[::4])],
)
def test_after_an_interruption_at_any_moment_the_same_merge_carries_on(
    tmp_path, parents, undisturbed, error, moment, number
):
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(primary)
    parents.watch(primary, secondary)
    child, settings = tmp_path / "new" / "deep" / "child", {"max_shard_bytes": 5000, "threads": 3}
    events: list[object] = []
    with when(moment, number, lambda: throw(error("stop"))) as observe, pytest.raises(error):
        merge(primary, secondary, child, observe=lambda event: (events.append(event), observe(event)), **settings)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("merge-", "sync"))]
    kept = left_behind(child)
    stopped = [(event.kept, event.total) for event in events if isinstance(event, MergeStopped)]
    assert stopped == ([(len(kept), 3)] if kept else [])
    assert names(tmp_path) == (["new", "primary", "secondary"] if kept else ["primary", "secondary"])
    events.clear()
    report = merge(primary, secondary, child, observe=events.append, **settings)
    assert told_of_kept(events) == ([f"Carrying on: {len(kept)} of 3 files stand already."] if kept else [])
    assert report.plan.leftover == (Leftover(tuple(sorted(kept)), 3, "") if kept else None)
    assert report.as_dict()["resumed_files"] == len(kept)
    assert_same_bits(load_tensors(report.child), undisturbed)
    assert names(child.parent) == ["child"]


def told_of_kept(events: list[object]) -> list[str]:
    return [event.text for event in events if isinstance(event, Noted) and event.text.startswith("Carrying on")]


INTERRUPTED = {"max_shard_bytes": 5000, "threads": 1}


def interrupted(folder: Path, **settings: Any) -> tuple[Path, Path, Path]:
    """(primary, secondary, save directory) of a merge that was stopped when two of its three files were finished."""
    primary, secondary = make_pair(folder)
    child = folder / "child"

    def stop() -> None:
        journal = staging_beside(child).with_name("journal.json")
        while not journal.exists() or len(left_in(journal)) < 2:
            time.sleep(0.005)
        raise KeyboardInterrupt

    with after(FINISH_FILE, 2, stop), pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, **{**INTERRUPTED, **settings})
    assert len(left_behind(child)) == 2
    return primary, secondary, child


def left_in(journal: Path) -> list[str]:
    return list(json.loads(journal.read_bytes())["files"])


def resumed(primary: Path, secondary: Path, child: Path, **settings: Any) -> tuple[int, str]:
    """(files taken over, why it started anew) of a second run, whose child is then right."""
    events: list[object] = []
    before = names(child.parent)
    t = settings.pop("t", 0.5)
    report = merge(primary, secondary, child, t, observe=events.append, **{**INTERRUPTED, **settings})
    total, kept = len(report.plan.shards), report.merged.resumed_files
    assert told_of_kept(events) == ([f"Carrying on: {kept} of {total} files stand already."] if kept else [])
    merged = [event.tensor.name for event in events if isinstance(event, MergedTensor)]
    assert merged == [tensor.name for tensor in report.plan.tensors]
    assert sum(event.amount for event in events if isinstance(event, WorkAdvanced)) == report.plan.child_bytes
    other = merge(primary, secondary, child.with_name("other"), t, **{**INTERRUPTED, **settings})
    assert_same_bits(load_tensors(report.child), load_tensors(other.child))
    assert (child / "README.md").read_text() == (other.child / "README.md").read_text().replace("# other", "# child")
    assert names(child.parent) == sorted({*before, "child", "other"} - {".child.slerpmerge-staging"})
    if settings.get("restart"):
        assert report.plan.leftover is None
        return kept, "as asked"
    assert (report.plan.leftover.kept, report.plan.leftover.total) == (kept, total)
    return kept, report.plan.leftover.reason


def journal_beside(child: Path) -> Path:
    return staging_beside(child).with_name("journal.json")


def touch(file: Path) -> None:
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def test_finished_files_are_taken_over_and_not_written_again(tmp_path):
    primary, secondary, child = interrupted(tmp_path)
    before = {file.name: file.stat().st_mtime_ns for file in staging_beside(child).iterdir()}
    assert resumed(primary, secondary, child) == (2, "")
    assert {name: (child / name).stat().st_mtime_ns for name in before} == before


@pytest.mark.parametrize(
    "settings", [{"threads": 4}, {"overwrite": True}, {"device": "cpu"} if DEVICE == "cpu" else {"threads": 2}]
)
def test_what_changes_no_bit_does_not_start_anew(tmp_path, settings):
    assert resumed(*interrupted(tmp_path), **settings) == (2, "")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"t": 0.3}, "t was different"),
        ({"method": "lerp"}, "the method was different"),
        ({"dtype": "float16"}, "the dtype was different"),
        ({"max_shard_bytes": 5001}, "the largest size of a file was different"),
        ({"restart": True}, "as asked"),
    ],
)
def test_another_recipe_starts_anew_and_says_why(tmp_path, settings, reason):
    assert resumed(*interrupted(tmp_path), **settings) == (0, reason)


def test_another_version_starts_anew(tmp_path, monkeypatch):
    folders, version = interrupted(tmp_path), __version__
    monkeypatch.setattr("slerpkit.merge.journal.__version__", "99.0")
    assert resumed(*folders) == (0, f"slerpmerge {version} began it")


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_another_parent_starts_anew(tmp_path, role, file):
    folders = interrupted(tmp_path)
    touch(tmp_path / role / file)
    assert resumed(*folders) == (0, f"the {role}'s {file} has changed since")


@pytest.mark.parametrize("keep", [0, 0.3, 0.9], ids=str)
def test_a_torn_journal_is_as_good_as_none(tmp_path, keep):
    folders = interrupted(tmp_path)
    journal = journal_beside(folders[2])
    content = journal.read_bytes()
    journal.write_bytes(content[: int(keep * len(content))])
    assert resumed(*folders) == (0, "its journal cannot be read")


def test_a_journal_that_lies_is_as_good_as_none(tmp_path):
    folders = interrupted(tmp_path)
    for content in (b"[]", b'{"fingerprint": 3}', b"[" * 100_000):
        journal_beside(folders[2]).write_bytes(content)
        plan = plan_of(*folders, **INTERRUPTED)
        assert plan.leftover.describe() == (
            "An unfinished child stands there and gives way: its journal cannot be read."
        )
        assert plan.as_dict()["remarks"] == [plan.leftover.describe()]
    assert resumed(*folders) == (0, "its journal cannot be read")


def test_what_a_run_wrote_for_its_journal_when_it_was_killed_does_not_stay(tmp_path):
    folders = interrupted(tmp_path)
    (journal_beside(folders[2]).with_name(".journal.json.new")).write_bytes(b"{")
    assert resumed(*folders) == (2, "")


def test_a_finished_file_that_was_changed_is_made_again(tmp_path):
    folders = interrupted(tmp_path)
    touch(sorted(staging_beside(folders[2]).iterdir())[0])
    assert resumed(*folders) == (1, "")


def test_what_stands_already_costs_nothing_again(tmp_path):
    primary, secondary, child = interrupted(tmp_path)
    plan, whole = (plan_of(primary, secondary, child, **INTERRUPTED, restart=restart) for restart in (False, True))
    kept = sum(tensor.byte_count for shard in plan.shards[:2] for tensor in shard.tensors)
    assert (plan.kept_bytes, whole.kept_bytes) == (kept, 0)
    assert plan.disk_needed_bytes == whole.disk_needed_bytes - kept
    report = merge(primary, secondary, child, **INTERRUPTED)
    seconds = report.as_dict()["seconds"]
    assert report.as_dict()["bytes_per_second"] == pytest.approx((plan.child_bytes - kept) / seconds)


def test_the_time_expected_is_that_of_what_is_left(tmp_path, monkeypatch):
    primary, secondary, child = interrupted(tmp_path)
    monkeypatch.setattr("slerpkit.merge.plan.probe_reading", lambda parents: 1e6)
    plan, whole = (plan_of(primary, secondary, child, **INTERRUPTED, restart=restart) for restart in (False, True))
    left = 1 - plan.kept_bytes / plan.child_bytes
    assert plan.expected_seconds == pytest.approx(left * whole.expected_seconds, rel=0.01)


def test_the_plan_tells_of_finished_files_and_counts_their_room(tmp_path, monkeypatch):
    primary, secondary, child = interrupted(tmp_path)
    plan = plan_of(primary, secondary, child, **INTERRUPTED)
    assert plan.leftover.describe() == "2 of 3 files of an earlier run are kept."
    assert plan.as_dict()["remarks"] == ["2 of 3 files of an earlier run are kept."]
    half_done = sum(file.stat().st_size for file in staging_beside(child).iterdir()) - plan.kept_bytes
    room = plan.disk_needed_bytes - half_done
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))
    plan_of(primary, secondary, child, **INTERRUPTED)


def test_an_interruption_leaves_an_empty_save_directory_and_its_neighbours(tmp_path):
    primary, secondary = make_pair(tmp_path)
    child = tmp_path / "there" / "child"
    child.mkdir(parents=True)
    (tmp_path / "there" / "neighbour").write_text("mine")
    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, observe=at(MergedTensor, 3, interrupt))
    assert names(tmp_path / "there") == ["child", "neighbour"]
    assert names(child) == []


def test_a_folder_made_on_the_way_stays_if_somebody_else_uses_it(tmp_path):
    primary, secondary = make_pair(tmp_path)

    def act() -> None:
        (tmp_path / "new" / "mine").write_text("mine")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, tmp_path / "new" / "deep" / "child", observe=at(MergedTensor, 3, act))
    assert names(tmp_path / "new") == ["mine"]


def test_torch_has_its_threads_back_after_an_interruption(tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        with pytest.raises(KeyboardInterrupt):
            merge(*make_pair(tmp_path), tmp_path / "child", observe=at(MergedTensor, 3, interrupt))
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


@pytest.mark.parametrize(("moment", "number"), [(WorkBegan, 1), (MergedTensor, 11), (VERIFY_CHILD, 1)])
def test_an_existing_child_survives_a_failed_merge_and_gives_way_to_a_good_one(tmp_path, moment, number):
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2, max_shard_bytes=5000).child
    (child / "notes.txt").write_text("mine")
    before = fingerprint(child)
    with when(moment, number, interrupt) as observe, pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, 0.7, overwrite=True, observe=observe)
    assert fingerprint(child) == before
    left_behind(child)
    merge(primary, secondary, child, 0.7, overwrite=True)
    assert names(child) == PLAIN_CHILD
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
        merge(primary, secondary, child, observe=at(MergedTensor, 5, act))
    assert (child / "thesis.txt").read_text() == "mine"
    assert left_behind(child) == ["model.safetensors"]
    (child / "thesis.txt").rename(tmp_path / "thesis.txt")
    assert merge(primary, secondary, child).as_dict()["resumed_files"] == 1


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_an_existing_child_is_back_when_the_last_step_fails(tmp_path, monkeypatch, failing, error):
    """Replacing takes two renames: the old child aside, the new one into its place."""
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2).child
    before = fingerprint(child)
    rename, calls = Path.rename, []

    def fail_once(path: Path, target: Path) -> Path:
        calls.extend([path] if child in (path, target) else [])
        return (
            throw(error(errno.EACCES, "Permission denied")) if calls[failing - 1 :] == [path] else rename(path, target)
        )

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(SlerpMergeError if error is OSError else KeyboardInterrupt) as caught:
        merge(primary, secondary, child, 0.7, overwrite=True)
    if error is OSError:  # which may be so each time
        assert f"move {child} out of the way yourself; the same command carries on" in caught.value.hint
    assert fingerprint(child) == before
    assert left_behind(child) == ["model.safetensors"]
    monkeypatch.undo()
    assert merge(primary, secondary, child, 0.7, overwrite=True).as_dict()["resumed_files"] == 1
    assert names(tmp_path) == ["child", "primary", "secondary"]


def test_an_observer_that_fails_when_the_child_stands_leaves_nothing_beside_it(tmp_path):
    """Its error is its own: nothing says that the child could not be put there."""
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2).child
    with pytest.raises(OSError, match="the terminal is gone"):
        merge(
            primary, secondary, child, 0.7, overwrite=True,
            observe=at(ChildPublished, 1, lambda: throw(OSError("the terminal is gone"))),
        )  # fmt: skip
    assert names(tmp_path) == ["child", "primary", "secondary"]
    assert_same_bits(load_tensors(child), load_tensors(merge(primary, secondary, tmp_path / "other", 0.7).child))


def test_a_child_half_replaced_when_the_process_was_killed_is_back_at_the_next_start(tmp_path):
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2).child
    before = fingerprint(child)
    area = tmp_path / ".child.slerpmerge-staging"
    area.mkdir()
    child.rename(area / "replaced")
    with pytest.raises(SlerpMergeError, match="is not empty"):
        merge(primary, secondary, child, 0.7)
    assert fingerprint(child) == before
    assert names(tmp_path) == ["child", "primary", "secondary"]


# ── The world changes under the merge ───────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", [damage_middle_of, Path.unlink], ids=["truncated", "removed"])
@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("storage", ["safetensors", "bin", "legacy-bin"])
def test_a_parent_that_breaks_during_the_merge_is_named(tmp_path, storage, role, how):
    primary, secondary = make_pair(tmp_path, storage=storage)
    (file,) = (path for path in (tmp_path / role).iterdir() if path.suffix in (".safetensors", ".bin"))
    with pytest.raises(SlerpMergeError, match=re.escape(str(file))) as caught:
        merge(primary, secondary, tmp_path / "child", observe=at(WorkBegan, 1, lambda: how(file)))
    assert caught.value.hint
    assert names(tmp_path) == ["primary", "secondary"]


@pytest.mark.skipif(os.name == "nt", reason="an open file cannot be cut there")
def test_a_parent_that_breaks_halfway_is_named(tmp_path, monkeypatch):
    """Its file is open already, and some of its tensors are merged."""
    set_block_elements(monkeypatch, 64)
    monkeypatch.setattr("slerpkit.merge.stream.SMALL_ELEMENTS", 0)  # one task after the other
    primary, secondary = make_pair(tmp_path)
    cut = at(MergedTensor, 2, lambda: os.truncate(secondary / "model.safetensors", 2000))
    with pytest.raises(SlerpMergeError, match=r"secondary.model\.safetensors became shorter while it was read"):
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
    monkeypatch.setattr(io, "FileIO", FullDisk)
    with pytest.raises(SlerpMergeError, match=r"Could not write .*model\.safetensors: No space left") as caught:
        merge(primary, secondary, tmp_path / "new" / "child", threads=threads)
    assert "Free some space" in caught.value.hint
    assert names(tmp_path) == ["primary", "secondary"]


class DyingDisk(io.FileIO):
    """A file whose disk is gone after some reads and writes, of all such files together."""

    calls = itertools.count()
    last = 0

    def _live(self) -> None:
        if next(self.calls) >= self.last:
            raise OSError(errno.EIO, "Input/output error")

    def readinto(self, data: memoryview) -> int:
        self._live()
        return super().readinto(data)

    def write(self, data: memoryview) -> int:
        self._live()
        return super().write(data)

    def seek(self, *place: int) -> int:
        self._live()
        return super().seek(*place)

    def close(self) -> None:
        super().close()
        self._live()


@pytest.mark.parametrize("last", [0, 1, 2, 5, 20, 60])
def test_a_disk_that_dies_under_the_workers_gives_one_message(tmp_path, parents, monkeypatch, capfd, last):
    primary, secondary = make_pair(tmp_path)
    parents.watch(primary, secondary)
    plan = plan_of(primary, secondary, tmp_path / "child", threads=3)
    monkeypatch.setattr(DyingDisk, "calls", itertools.count())
    monkeypatch.setattr(DyingDisk, "last", last)
    monkeypatch.setattr(io, "FileIO", DyingDisk)
    with pytest.raises(SlerpMergeError, match=r"Could not .*: Input/output error"):
        execute_merge(plan)
    assert capfd.readouterr().err == ""  # no thread tells of it by itself
    assert names(tmp_path) == ["primary", "secondary"]


@pytest.mark.parametrize("threads", [1, 3])
def test_a_fault_that_nobody_expects_in_a_worker_is_raised_once(tmp_path, monkeypatch, capfd, threads):
    def fail(*_: object) -> None:
        raise MemoryError

    plan = plan_of(*make_pair(tmp_path), tmp_path / "child", threads=threads)
    monkeypatch.setattr("slerpkit.merge.worker.Worker.blend", fail)
    with pytest.raises(MemoryError):
        execute_merge(plan)
    assert capfd.readouterr().err == ""


def test_writes_that_take_less_than_asked_are_continued(tmp_path, monkeypatch):
    plain = merge(*make_pair(tmp_path), tmp_path / "plain").child

    class Hesitant(io.FileIO):
        def write(self, data: memoryview) -> int:
            return super().write(data[:10])

        def readinto(self, data: memoryview) -> int:
            return super().readinto(data[:10])

    monkeypatch.setattr(io, "FileIO", Hesitant)
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


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("how", [touch, lambda file: file.rename(file.with_name("elsewhere"))], ids=["changed", "gone"])
def test_a_parent_that_is_another_by_the_end_has_no_child(tmp_path, role, how):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        add_tokenizer(folder)
    refused = pytest.raises(SlerpMergeError, match=rf"{role} changed during the merge: tokenizer\.json")
    with after(VERIFY_CHILD, 1, lambda: how(tmp_path / role / "tokenizer.json")), refused:
        merge(primary, secondary, tmp_path / "child")
    assert names(tmp_path) == ["primary", "secondary"]


def test_open_files_stay_few(tmp_path):
    """A model can have hundreds of shards; a reader keeps only some of them open."""
    folder = tmp_path / "files"
    folder.mkdir()
    handles = FileHandles()
    opened = []
    for number in range(3 * MAX_OPEN_FILES):
        (folder / str(number)).write_bytes(b"0123456789")
        opened.append(handles.at(folder / str(number), "r", 4))
    assert opened[-1].read(2) == b"45"
    assert sum(not handle.closed for handle in opened) == MAX_OPEN_FILES
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
    assert "--max-shard-size" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert names(tmp_path) == ["primary", "secondary"]


WAITING_MERGE = """
import sys, time
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.story import merge_models

def observe(event):
    if isinstance(event, MergedTensor):
        print("there", flush=True)
        time.sleep(60)

merge_models(*sys.argv[1:], observe=observe, device="cpu", max_shard_bytes=5000)
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
    assert names(child) == PLAIN_CHILD
    assert report.verified.warnings == ()


def test_a_child_that_fails_its_check_is_of_no_use_to_the_next_run(tmp_path):
    primary, secondary = make_pair(tmp_path)

    def tamper() -> None:
        file = staging_beside(tmp_path / "child") / "model.safetensors"
        content = bytearray(file.read_bytes())
        content[-20_000:] = bytes(20_000)
        file.write_bytes(content)

    refused = pytest.raises(SlerpMergeError, match="did not pass its own check")
    with after("slerpkit.story.copy_companions", 1, tamper), refused:
        merge(primary, secondary, tmp_path / "child")
    assert names(tmp_path) == ["primary", "secondary"]


def test_a_second_merge_to_the_same_place_does_not_take_the_firsts_away(tmp_path):
    primary, secondary = make_pair(tmp_path)
    child = tmp_path / "child"
    second = []

    def act() -> None:
        command = command_line(primary, secondary, child, "--t", "0.9")
        second.append(subprocess.run(command, capture_output=True, text=True, timeout=60))

    merge(primary, secondary, child, 0.1, observe=at(MergedTensor, 5, act))
    assert second[0].returncode == 1
    assert_same_bits(load_tensors(child), load_tensors(merge(primary, secondary, tmp_path / "other", 0.1).child))


def test_staging_left_by_a_killed_run_is_not_mixed_into_the_child(tmp_path):
    primary, secondary = make_pair(tmp_path)
    staged = []

    def act() -> None:
        staged.append(staging_beside(tmp_path / "child").parent)
        shutil.copytree(staged[0], tmp_path / "kept")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, tmp_path / "child", observe=at(MergedTensor, 20, act))
    (kept,) = (tmp_path / "kept").glob("child-*")
    (kept / "model-00001-of-00099.safetensors").write_bytes(b"from another recipe")
    (tmp_path / "kept").rename(staged[0])
    child = merge(primary, secondary, tmp_path / "child").child
    assert names(child) == PLAIN_CHILD
    assert names(tmp_path) == ["child", "primary", "secondary"]


# ── Killed, at any moment ───────────────────────────────────────────────────────────────────────

# Loads everything once; then, for each line it is given, a copy of itself merges, slowly enough to be hit.
MERGES_ON_DEMAND = """
import json, os, sys, time
import filelock, numpy, torch
from slerpkit.story import merge_models

def observe(event):
    time.sleep(0.003)

print("ready", flush=True)
for line in sys.stdin:
    *folders, device, cut = json.loads(line)
    process = os.fork()
    if process == 0:
        merge_models(*folders, observe=observe, device=device, max_shard_bytes=cut, overwrite=True)
        os._exit(0)
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process cannot be copied there")
@pytest.mark.parametrize("overwriting", [False, True])
def test_killed_at_any_moment_a_merge_goes_on_to_the_same_bits(tmp_path, parents, overwriting):
    """25 merges in all, each killed up to three times at moments drawn by chance."""
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(primary)
    parents.watch(primary, secondary)
    expected = fingerprint(merge(primary, secondary, tmp_path / "expected" / "child", max_shard_bytes=2000).child)
    chance, kills, carried_on = random.Random(7 + overwriting), 0, 0
    command = [sys.executable, "-c", MERGES_ON_DEMAND]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=SCRIPT.parent
    ) as server:
        assert server.stdout.readline() == "ready\n"
        for number in range(13 if overwriting else 12):
            child = tmp_path / str(number) / "child"
            before = {}
            if overwriting:
                before = fingerprint(merge(primary, secondary, child, 0.1).child)
            for _ in range(chance.randint(1, 3)):
                print(
                    json.dumps([str(primary), str(secondary), str(child), DEVICE, 2000]), file=server.stdin, flush=True
                )
                process = int(server.stdout.readline())
                waits = chance.random() < 0.5  # on a busy disk, nothing would be finished otherwise
                limit = time.monotonic() + 2
                while waits and not (staging_area(child) / "journal.json").exists() and time.monotonic() < limit:
                    time.sleep(0.001)
                time.sleep(chance.uniform(0, 0.03) if waits else chance.uniform(0.005, 0.25))
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(process, signal.SIGKILL)
                kills += int(server.stdout.readline()) == signal.SIGKILL
                # The whole right child, what stood there before, or nothing.
                found = fingerprint(child) if child.exists() else {}
                assert found in (expected, before, {})
            report = merge(primary, secondary, child, max_shard_bytes=2000, overwrite=True)
            carried_on += report.as_dict()["resumed_files"] > 0
            assert fingerprint(child) == expected
            assert names(child.parent) == ["child"]
        server.stdin.close()
    assert kills >= 12, "too few were hit"
    assert carried_on >= 4, "too few had anything to carry on with"


# As above; but the disk fails a copy of it, or the copy is killed, at the change of the disk whose number it is given.
# It says how it ended, and how many changes it came to.
FAULTY_MERGES = """
import ctypes, json, os, sys
import filelock, numpy
from slerpkit.messages import SlerpMergeError
from slerpkit.story import merge_models

library = ctypes.CDLL(None)
at, mode, count = (ctypes.c_int.in_dll(library, f"fault_{name}") for name in ("at", "mode", "count"))
place = (ctypes.c_char * 4096).in_dll(library, "fault_folder")
for line in sys.stdin:
    primary, secondary, child, number, how = json.loads(line)
    process = os.fork()
    if process == 0:
        outcome = "done"
        place.value, mode.value, at.value = os.fsencode(os.path.dirname(child)), how, number
        try:
            merge_models(primary, secondary, child, device="cpu", threads=1, max_shard_bytes=5000, overwrite=True)
        except SlerpMergeError as error:
            outcome = error.message
        at.value = 0
        print(json.dumps([outcome, count.value]), flush=True)
        os._exit(0)
    if os.waitpid(process, 0)[1]:
        print(json.dumps(["killed", number]), flush=True)
"""
ONCE, FOR_GOOD, KILLED = range(3)


@pytest.fixture(scope="module")
def faulty_disk(tmp_path_factory) -> Iterator[Callable[..., tuple[str, int]]]:
    """`faulty_disk(primary, secondary, child, number, how)`: (outcome, changes of the disk) of such a merge."""
    folder = tmp_path_factory.mktemp("faulty")
    library, said = folder / "faulty_disk.so", folder / "stderr"
    source = Path(__file__).with_name("faulty_disk.c")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("it takes a C compiler, and Linux")
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    # In this mode Python tells of files that could not be closed, as later versions do in any.
    command = [sys.executable, "-X", "dev", "-W", "ignore", "-c", FAULTY_MERGES]
    with said.open("w") as stderr, subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
        text=True, cwd=SCRIPT.parent, env=environment,
    ) as server:  # fmt: skip

        def faulty_disk(*request: Any) -> tuple[str, int]:
            print(json.dumps([*map(str, request[:3]), *request[3:]]), file=server.stdin, flush=True)
            outcome, count = json.loads(server.stdout.readline())
            assert said.read_text() == ""
            return outcome, count

        yield faulty_disk
        server.stdin.close()


@pytest.fixture
def memory(tmp_path) -> Iterator[Path]:
    """A new folder in memory, where there is such a disk; a real one is slow to sync."""
    place = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.mark.parametrize("how", [ONCE, FOR_GOOD, KILLED], ids=["once", "for good", "killed"])
@pytest.mark.parametrize("overwriting", [False, True])
@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_at_whichever_change_the_disk_fails_there_is_a_whole_child_or_one_that_carries_on(
    memory, parents, faulty_disk, overwriting, how, step
):
    """Every write, sync, rename, removal, lock and new file or folder of a merge and its publication, one by one."""
    config = {**LLAMA_CONFIG, "num_hidden_layers": 1}
    primary, secondary = (
        make_checkpoint(memory / name, llama_tensors(seed, layers=1), config)
        for seed, name in enumerate(("primary", "secondary"))
    )
    add_tokenizer(primary)
    (primary / "additional_chat_templates").mkdir()
    (primary / "additional_chat_templates" / "x.jinja").write_text("x")
    parents.watch(primary, secondary)
    expected = fingerprint(merge(primary, secondary, memory / "expected" / "child", max_shard_bytes=5000).child)
    old = merge(primary, secondary, memory / "old" / "child", 0.2).child
    before = fingerprint(old) if overwriting else {}
    child, failed, number = memory / "disk" / "child", 0, how + 1 - step
    while True:
        number += step
        shutil.rmtree(child.parent, ignore_errors=True)
        child.parent.mkdir()
        if overwriting:
            shutil.copytree(old, child)
        outcome, count = faulty_disk(primary, secondary, child, number, how)
        found = fingerprint(child)
        where = f"change {number}: {outcome}"
        is_done = outcome == "done"
        # Only what is killed, or was left alone, between two renames has nothing under its name.
        assert found in ([expected] if is_done else [before] if how == ONCE else [before, expected, {}]), where
        if how != KILLED and not is_done:
            assert "Input/output error" in outcome
        assert faulty_disk(primary, secondary, child, 0, ONCE)[0] == "done", where
        assert fingerprint(child) == expected, where
        assert names(child.parent) == ["child"], where
        failed += not is_done
        if is_done and (count < number or how == KILLED):
            break
    assert failed * step > 70 < number


SLOW_MAIN = """
import sys, time, slerpmerge
from slerpkit.merge.staging import StagedChild

finish_file = StagedChild.finish_file

def slowly(child, file_name, tensors):
    time.sleep(0.03 * len(tensors))
    finish_file(child, file_name, tensors)
    print("written", flush=True)

StagedChild.finish_file = slowly
sys.exit(slerpmerge.main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="it has no such signals")
@pytest.mark.parametrize(
    ("name", "status", "words"),
    [
        ("SIGINT", 130, "Stopped. "),
        ("SIGTERM", 128 + 15, "Stopped by SIGTERM. "),
        ("SIGHUP", 128 + 1, "Stopped by SIGHUP. "),
    ],
)
def test_a_signal_ends_it_with_one_line_and_the_same_command_carries_on(tmp_path, parents, name, status, words):
    primary, secondary = make_pair(tmp_path)
    parents.watch(primary, secondary)
    arguments = command_line(primary, secondary, tmp_path / "child", "--max-shard-size", "2000B")[2:]
    command = [sys.executable, "-c", SLOW_MAIN, *arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=SCRIPT.parent
    ) as process:
        for _ in range(2):
            while process.stdout.readline() != "written\n":
                assert process.poll() is None
        time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        started = time.monotonic()
        _, said = process.communicate(timeout=20)
    assert time.monotonic() - started < 2
    assert process.returncode == status
    assert said.strip().startswith(words)
    assert said.strip().count("\n") == 0
    kept = int(
        re.search(r"(\d+) of \d+ weight files (?:is|are) finished and kept; the same command carries on", said)[1]
    )
    assert kept >= 1
    again = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=60)
    assert again.returncode == 0
    assert f"Carrying on: {kept} of" in again.stdout
    expected = load_tensors(merge(primary, secondary, tmp_path / "expected", max_shard_bytes=2000).child)
    assert_same_bits(load_tensors(tmp_path / "child"), expected)


@pytest.fixture
def mount() -> Iterator[Callable[..., None]]:
    """`mount(folder, ...)`, with the arguments of the program of that name; all is unmounted when the test is over."""
    mounted: list[Path] = []

    def mount(folder: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        try:
            subprocess.run(["mount", *arguments, folder], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("a disk can be mounted by root on Linux alone, and this kind not everywhere")
        mounted.append(folder)

    yield mount
    for folder in reversed(mounted):
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def small_disk(tmp_path, mount) -> Path:
    """A disk of 256 KB that lies in memory."""
    mount(tmp_path / "small", "-t", "tmpfs", "-o", "size=256k", "tmpfs")
    return tmp_path / "small"


def test_a_disk_that_is_really_full_keeps_what_is_finished(tmp_path, parents, monkeypatch, small_disk):
    monkeypatch.setattr("slerpkit.merge.stream.SMALL_ELEMENTS", 0)  # one file after the other
    primary, secondary = make_pair(tmp_path)
    parents.watch(primary, secondary)

    def fill() -> None:
        with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as stream:
            while stream.write(bytes(512)):
                pass

    settings = {"max_shard_bytes": 2000, "threads": 1}
    with after(FINISH_FILE, 3, fill), pytest.raises(SlerpMergeError, match="No space left on device") as caught:
        merge(primary, secondary, small_disk / "child", **settings)
    assert "Free some space" in caught.value.hint
    (small_disk / "filler").unlink()
    report = merge(primary, secondary, small_disk / "child", **settings)
    assert report.as_dict()["resumed_files"] >= 1
    assert_same_bits(load_tensors(report.child), load_tensors(merge(primary, secondary, tmp_path / "other").child))
    assert names(small_disk) == ["child"]


def test_a_disk_with_just_the_room_that_the_plan_counts_holds_the_child(tmp_path, mount):
    """Report, map, index and journal of many small tensors are larger than their weights."""
    primary, secondary = (make_checkpoint(tmp_path / name, crowd(seed)) for seed, name in enumerate(("a", "b")))
    needed = plan_of(primary, secondary, tmp_path / "child", max_shard_bytes=20_000).disk_needed_bytes
    mount(tmp_path / "small", "-t", "tmpfs", "-o", f"size={needed // 1024 + 1}k", "tmpfs")
    child = merge(primary, secondary, tmp_path / "small" / "child", max_shard_bytes=20_000).child
    beside = sum(file.stat().st_size for file in child.iterdir() if file.suffix != ".safetensors")
    assert beside > 2 * sum(file.stat().st_size for file in child.glob("*.safetensors"))


def crowd(seed: int) -> dict[str, torch.Tensor]:
    """A tiny Llama's weights, and 1,500 tensors of a handful of numbers beside them."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{n % 2}.mlp.experts.{n // 2}.down_proj.weight" for n in range(1500)]
    return {**llama_tensors(seed), **{name: torch.randn(2, 4, generator=generator) for name in names}}


def test_a_disk_that_does_not_tell_its_size_is_no_full_one(tmp_path, mount):
    primary, secondary = make_pair(tmp_path)
    mount(tmp_path / "memory", "-t", "ramfs", "ramfs")
    assert merge(primary, secondary, tmp_path / "memory" / "child").plan.disk_free_bytes is None
    assert names(tmp_path / "memory") == ["child"]


def test_a_save_directory_that_is_mounted_is_refused_at_once(tmp_path, mount):
    """As a folder of the same disk that a container is given; spaces in its name are written otherwise in the list."""
    primary, secondary = make_pair(tmp_path)
    (tmp_path / "source").mkdir()
    mount(tmp_path / "a child", "--bind", str(tmp_path / "source"))
    assert not os.path.ismount(tmp_path / "a child")
    with pytest.raises(SlerpMergeError, match="is a disk of its own") as caught:
        plan_of(primary, secondary, tmp_path / "a child")
    assert str(tmp_path / "a child" / "child") in caught.value.hint


@pytest.fixture
def image(tmp_path, mount) -> Iterator[Callable[[], Path]]:
    """`image()` makes the folder `box` what a container sees of its image: it reads `image`, and writes beside it."""
    (tmp_path / "image").mkdir()

    def start() -> Path:
        for name in ("written", "work"):
            (tmp_path / name).mkdir()
        layers = f"lowerdir={tmp_path / 'image'},upperdir={tmp_path / 'written'},workdir={tmp_path / 'work'}"
        mount(tmp_path / "box", "-t", "overlay", "-o", layers, "overlay")
        return tmp_path / "box"

    return start


def test_a_child_that_came_with_a_containers_image_is_replaced(tmp_path, image):
    """Its system renames none of an image's folders."""
    primary, secondary = make_pair(tmp_path)
    old = merge(primary, secondary, tmp_path / "image" / "child", 0.2).child
    (old / "nested" / "deep").mkdir(parents=True)
    (old / "nested" / "deep" / "notes").write_text("mine")
    child = image() / "child"
    with pytest.raises(OSError, match="cross-device"):
        child.rename(child.with_name("other"))
    merge(primary, secondary, child, 0.7, overwrite=True)
    assert names(child) == PLAIN_CHILD
    assert names(child.parent) == ["child"]
    assert_same_bits(load_tensors(child), load_tensors(merge(primary, secondary, tmp_path / "other", 0.7).child))


@pytest.mark.parametrize("failing", range(1, 9))
@pytest.mark.parametrize("is_dead", [False, True], ids=["once", "for good"])
def test_a_child_of_an_image_is_back_when_a_step_fails(tmp_path, image, monkeypatch, failing, is_dead):
    """It moves aside file by file, and back; where it cannot go back now, the next run sees to that."""
    primary, secondary = make_pair(tmp_path)
    merge(primary, secondary, tmp_path / "image" / "child", 0.2)
    child = image() / "child"
    before, rename, calls = fingerprint(child), Path.rename, []

    def fail(path: Path, target: Path) -> Path:
        calls.extend([path] if child in (path, target, path.parent) else [])
        fails = len(calls) >= failing if is_dead else calls[failing - 1 :] == [path]
        return throw(OSError(errno.EIO, "Input/output error")) if fails else rename(path, target)

    with monkeypatch.context() as patch, pytest.raises(SlerpMergeError, match="Input/output error"):
        patch.setattr(Path, "rename", fail)
        merge(primary, secondary, child, 0.7, overwrite=True)
    assert is_dead or fingerprint(child) == before
    assert not child.exists() or (child / "config.json").exists()  # else the next run takes it for no model's
    with pytest.raises(KeyboardInterrupt):  # the next run puts it back before anything else
        merge(primary, secondary, child, 0.7, overwrite=True, observe=at(WorkBegan, 1, interrupt))
    assert fingerprint(child) == before
    assert merge(primary, secondary, child, 0.7, overwrite=True).as_dict()["resumed_files"] == 1
    assert names(child.parent) == ["child"]


def test_an_unfinished_child_that_came_with_an_image_is_carried_on(tmp_path, image):
    primary, secondary, child = interrupted(tmp_path / "image")
    again = image() / "child"
    journal = journal_beside(again)
    text = journal.read_text().replace(str(tmp_path / "image"), str(tmp_path / "box"))
    journal.write_text(text)
    report = merge(tmp_path / "box" / "primary", tmp_path / "box" / "secondary", again, **INTERRUPTED)
    assert report.as_dict()["resumed_files"] == 2
    assert_same_bits(load_tensors(report.child), load_tensors(merge(primary, secondary, tmp_path / "other").child))
    assert names(again.parent) == ["child", "primary", "secondary"]


RECORDED_MERGE = """
import os, sys

written = set()

def record(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path, mode, flags = arguments
        if set(mode or "") & set("wax+") or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            written.add(os.path.abspath(os.fsdecode(path)))
    elif event in ("os.remove", "os.rmdir") and arguments[-1] != -1:
        pass  # inside a folder that shutil.rmtree is asked to remove
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
        written.add(os.path.abspath(os.fsdecode(arguments[0])))
    elif event in ("os.rename", "os.link", "os.symlink", "shutil.copyfile"):
        written.update(os.path.abspath(os.fsdecode(path)) for path in arguments[event == "shutil.copyfile" : 2])

import tempfile

import slerpmerge
tempfile.gettempdir()  # finds its place by a file that it makes and removes, whichever library asks first
sys.addaudithook(record)
status = slerpmerge.main(sys.argv[1:])
print("\\n".join(sorted(written)), file=sys.stderr)
sys.exit(status)
"""


def test_nothing_is_written_but_the_child_and_its_staging_folder(tmp_path, parents):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        add_tokenizer(folder)
    parents.watch(primary, secondary)
    arguments = command_line(primary, secondary, tmp_path / "child", "--quiet", "--max-shard-size", "5000B")[2:]
    done = subprocess.run(
        [sys.executable, "-c", RECORDED_MERGE, *arguments],
        capture_output=True,
        text=True,
        cwd=SCRIPT.parent,
        timeout=60,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    assert done.returncode == 0, done.stderr
    allowed = tmp_path / "child", tmp_path / ".child.slerpmerge-staging"
    written = [Path(line) for line in done.stderr.splitlines() if line != os.devnull]
    assert [path for path in written if not any(folder in (path, *path.parents) for folder in allowed)] == []
    staged = [path for path in written if path.name == "config.json"]
    assert [path.parent.parent for path in staged] == [tmp_path / ".child.slerpmerge-staging"]


# ── What stands in the way ──────────────────────────────────────────────────────────────────────


@pytest.fixture
def area(tmp_path) -> Path:
    """The staging folder of `child`, as yet empty."""
    folder = tmp_path / ".child.slerpmerge-staging"
    folder.mkdir()
    return folder


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("name", ["child", "replaced", "journal.json", ".lock", "."])
def test_a_link_in_the_staging_folder_is_not_followed(tmp_path, area, name):
    primary, secondary = make_pair(tmp_path)
    precious = tmp_path / "precious"
    (precious / "sub").mkdir(parents=True)
    (precious / "sub" / "b").write_text("mine")
    (precious / "child").mkdir()
    (precious / "child" / "a.txt").write_text("mine")
    before = fingerprint(precious)
    if name == ".":
        area.rmdir()
    (area if name == "." else area / name).symlink_to(precious)
    try:
        merge(primary, secondary, tmp_path / "child")
    except SlerpMergeError as error:
        assert "is in the way" in error.message
    else:
        assert not (tmp_path / "child").is_symlink()
    assert fingerprint(precious) == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes there")
@pytest.mark.parametrize("make", [os.mkdir, getattr(os, "mkfifo", None), lambda path: Path(path).write_text("x")])
@pytest.mark.parametrize("name", ["child", "replaced", "journal.json", ".journal.json.new", ".lock"])
def test_whatever_stands_in_the_staging_folder_is_no_dead_end(tmp_path, area, name, make):
    primary, secondary = make_pair(tmp_path)
    make(area / name)
    try:
        merge(primary, secondary, tmp_path / "child")
    except SlerpMergeError as error:
        assert (name, "Move it away" in error.hint) == (".lock", True)
    else:
        assert names(tmp_path) == ["child", "primary", "secondary"]


def fail(error: BaseException) -> Callable[..., None]:
    return lambda *_: throw(error)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "Input/output error")], ids=repr)
@pytest.mark.parametrize("place", ["load", "_take_over"])
def test_an_error_while_taking_over_loses_nothing(tmp_path, monkeypatch, error, place):
    folders = interrupted(tmp_path)
    before = fingerprint(staging_beside(folders[2]))
    with monkeypatch.context() as patch:
        patch.setattr("slerpkit.merge.plan.find_leftover", lambda *_: None)
        patch.setattr(Journal if place == "load" else StagedChild, place, fail(error))
        with pytest.raises((KeyboardInterrupt, SlerpMergeError)):
            merge(*folders, **INTERRUPTED)
    assert fingerprint(staging_beside(folders[2])) == before
    assert resumed(*folders) == (2, "")


@pytest.mark.skipif(os.name == "nt", reason="it has no such signals")
@pytest.mark.parametrize(("kept", "restart"), [(0, False), (2, False), (2, True)])
def test_ctrl_c_while_taking_over_leaves_what_it_says(tmp_path, monkeypatch, kept, restart):
    """It is held until all is taken over; what the next run can use is then kept, and else nothing stays."""
    if kept:
        primary, secondary, child = interrupted(tmp_path)
    else:
        primary, secondary = make_pair(tmp_path)
        child = tmp_path / "new" / "deep" / "child"
    take_over, told = StagedChild._take_over, []

    def interrupted_take_over(staged: StagedChild) -> None:
        signal.raise_signal(signal.SIGINT)
        take_over(staged)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StagedChild, "_take_over", interrupted_take_over)
        merge(primary, secondary, child, observe=told.append, **INTERRUPTED, restart=restart)
    if kept and not restart:
        assert (len(left_behind(child)), told) == (2, [MergeStopped(2, 3)])
        assert resumed(primary, secondary, child) == (2, "")
    else:
        assert (names(tmp_path), told) == (["primary", "secondary"], [])


def test_where_another_run_lives_nothing_is_promised(tmp_path):
    """The plan itself is refused; the lock of a run that was killed holds nobody out."""
    primary, secondary, child = interrupted(tmp_path)
    before = fingerprint(tmp_path)
    other = WorkFolder(staging_area(child))
    other.enter()
    with pytest.raises(SlerpMergeError, match="Another run is making this child just now"):
        plan_of(primary, secondary, child, 0.3, **INTERRUPTED)
    other.leave()
    (staging_area(child) / ".lock").touch()
    assert plan_of(primary, secondary, child, **INTERRUPTED).leftover.kept == 2
    assert fingerprint(tmp_path) == before


def test_a_finished_child_is_kept_where_the_old_one_may_not_be_replaced(tmp_path, area):
    """The old child was aside when the process was killed; the next run was not told to overwrite."""
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2).child
    refused = pytest.raises(SlerpMergeError, match="is not empty")
    with after(VERIFY_CHILD, 1, lambda: shutil.copytree(child, tmp_path / "new")), refused:
        merge(primary, secondary, tmp_path / "new")
    finished = tmp_path / ".new.slerpmerge-staging"
    before = fingerprint(next(finished.glob("child-*")))
    (tmp_path / "new").rename(finished / "replaced")
    with pytest.raises(SlerpMergeError, match="is not empty"):
        merge(primary, secondary, tmp_path / "new")
    assert fingerprint(next(finished.glob("child-*"))) == before
    assert merge(primary, secondary, tmp_path / "new", overwrite=True).as_dict()["resumed_files"] == 1


def test_an_empty_folder_does_not_cost_the_old_child(tmp_path, area):
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2, restart=True).child
    before = fingerprint(child)
    area.mkdir()
    child.rename(area / "replaced")
    child.mkdir()
    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, 0.7, overwrite=True, observe=at(MergedTensor, 1, interrupt))
    assert fingerprint(child) == before


def test_a_disk_that_cannot_sync_is_noticed_soon(tmp_path, monkeypatch):
    """The next file to be finished finds out, not the end of hours."""
    primary, secondary = make_pair(tmp_path)
    written, finish_file = [], StagedChild.finish_file

    def finish_slowly(child: StagedChild, file_name: str, tensors: list[MergedTensor]) -> None:
        finish_file(child, file_name, tensors)
        written.append(file_name)
        time.sleep(0.05)

    monkeypatch.setattr(StagedChild, "finish_file", finish_slowly)
    monkeypatch.setattr(os, "fsync", fail(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(SlerpMergeError, match="Input/output error") as caught:
        merge(primary, secondary, tmp_path / "child", max_shard_bytes=1000)
    assert len(written) < 4
    assert "another one" in caught.value.hint
    assert names(tmp_path) == ["primary", "secondary"]


def test_a_lock_whose_file_is_gone_holds_nobody_out(tmp_path):
    """Who waited at a file that its holder then removed must not think that it holds the folder."""
    first, second, third = (WorkFolder(tmp_path / "area") for _ in range(3))
    first.enter()
    (tmp_path / "area" / ".lock").unlink()
    second.enter()
    with pytest.raises(SlerpMergeError, match="Another run"):
        third.enter()
    second.leave()
    third.enter()
    third.leave()
    first.leave()
    assert names(tmp_path) == []


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path, monkeypatch):
    """Its holder removes it between the moment it is opened by another and the moment it is locked."""
    fcntl = pytest.importorskip("fcntl")
    holder, other = WorkFolder(tmp_path / "area"), WorkFolder(tmp_path / "area")
    holder.enter()
    lock, left = fcntl.flock, []

    def leave_first(descriptor: int, how: int) -> None:
        if how & fcntl.LOCK_EX and not left:
            left.append(descriptor)
            holder.leave()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", leave_first)
    with pytest.raises(SlerpMergeError, match="Another run"):
        other.enter()
    assert left
    other.enter()
    other.leave()
    assert names(tmp_path) == []


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
@pytest.mark.filterwarnings("error")
def test_a_disk_without_locks_keeps_nobody_out(tmp_path, monkeypatch, area, reason):
    """What a run that was killed on another machine left there neither."""
    fcntl = pytest.importorskip("fcntl")
    primary, secondary = make_pair(tmp_path)
    (area / ".lock").write_text("1234\nanother-machine\n")
    monkeypatch.setattr(fcntl, "flock", fail(OSError(reason, os.strerror(reason))))
    merge(primary, secondary, tmp_path / "child")
    assert names(tmp_path) == ["child", "primary", "secondary"]


# Each: what a disk refuses, with which error, and what is said of it.
POOR_DISKS = [
    ("os.truncate", errno.EPERM, "cannot make room for a file before it is written"),
    ("os.fsync", errno.EINVAL, "cannot write in the middle of a file"),
    ("pathlib.Path.replace", errno.ENOSYS, "cannot replace one file by another"),
    ("pathlib.Path.rename", errno.EXDEV, "cannot rename a folder"),
    ("pathlib.Path.read_bytes", errno.EINVAL, "cannot give back what was written"),
]


@pytest.mark.parametrize(("function", "reason", "said"), POOR_DISKS)
def test_a_disk_that_cannot_do_what_a_merge_needs_is_told_before_it(tmp_path, monkeypatch, function, reason, said):
    """As some that stand for a store of objects; nothing is merged for nothing."""
    primary, secondary = make_pair(tmp_path)
    plan = plan_of(primary, secondary, tmp_path / "new" / "child")
    monkeypatch.setattr(function, fail(OSError(reason, os.strerror(reason))))
    events: list[object] = []
    with pytest.raises(SlerpMergeError, match=said) as caught:
        execute_merge(plan, events.append)
    assert (str(tmp_path / "new") in caught.value.message, "copy the child there" in caught.value.hint) == (True, True)
    assert events == []
    monkeypatch.undo()
    assert names(tmp_path) == ["primary", "secondary"]


def test_a_disk_that_is_full_before_the_merge_is_not_blamed(tmp_path, monkeypatch):
    primary, secondary = make_pair(tmp_path)
    plan = plan_of(primary, secondary, tmp_path / "child")
    monkeypatch.setattr(os, "truncate", fail(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(SlerpMergeError, match="No space left") as caught:
        execute_merge(plan)
    assert "Free some space" in caught.value.hint
    assert names(tmp_path) == ["primary", "secondary"]


def test_an_old_child_that_is_half_removed_is_not_taken_for_one(tmp_path, monkeypatch):
    """A run was killed while it removed the child that it had replaced, and the new one is moved away by hand."""
    primary, secondary = make_pair(tmp_path)
    child = merge(primary, secondary, tmp_path / "child", 0.2).child
    with monkeypatch.context() as patch:
        patch.setattr(staging, "remove_folder", lambda folder: (folder / "model.safetensors").unlink(missing_ok=True))
        merge(primary, secondary, child, 0.7, overwrite=True)
    assert names(tmp_path) != ["child", "primary", "secondary"]
    child.rename(tmp_path / "elsewhere")
    with pytest.raises(KeyboardInterrupt):
        merge(primary, secondary, child, observe=at(WorkBegan, 1, interrupt))
    assert names(tmp_path) == ["elsewhere", "primary", "secondary"]


REMOVAL = """
import os, sys
from pathlib import Path
from slerpkit.files import remove_folder

if os.geteuid() == 0:  # whom no mode keeps out
    os.chown(sys.argv[1], 1, 1)
    os.setuid(1)
folder = Path(sys.argv[1]) / "a" / "b" / "c"
folder.mkdir(parents=True)
(folder / "file").write_text("x")
(folder / "link").symlink_to("/")
for inner in (folder, folder.parent, folder.parent.parent):
    inner.chmod(0o400 if inner is folder else 0o555)
remove_folder(Path(sys.argv[1]) / "a")
sys.exit(os.listdir(sys.argv[1]) != [])
"""


@pytest.mark.skipif(os.name == "nt", reason="folders have no such modes there")
def test_folders_that_may_not_be_written_to_can_be_removed():
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", REMOVAL, folder], cwd=SCRIPT.parent, check=True, timeout=60)


@pytest.mark.parametrize("content", [["a", "b", "c", "d", "e"], [0.5, 0.5, "slerp"], [None, 1, "", "", 0], "slerp", 3])
def test_a_journal_of_wrong_types_is_as_good_as_none(tmp_path, content):
    folders = interrupted(tmp_path)
    said = json.loads(journal_beside(folders[2]).read_bytes())
    next(iter(said["files"].values()))["tensors"][0][1] = content
    journal_beside(folders[2]).write_bytes(json.dumps(said).encode())
    assert resumed(*folders) == (0, "its journal cannot be read")


@pytest.mark.skipif(DEVICE != "cpu", reason="it is about a device that is not there")
def test_a_device_that_is_gone_is_told(tmp_path, monkeypatch):
    folders = interrupted(tmp_path, device="auto")
    text = journal_beside(folders[2]).read_bytes().replace(b'"device": "cpu"', b'"device": "cuda"')
    journal_beside(folders[2]).write_bytes(text)
    monkeypatch.setattr("slerpkit.devices.accelerators", lambda: {"cuda": False})
    assert resumed(*folders, device="auto") == (0, "it was begun on cuda, which is not there now")


def test_a_chat_template_does_not_start_anew(tmp_path):
    folders = interrupted(tmp_path)
    plan = plan_of(*folders, **INTERRUPTED)
    recipe = dataclasses.replace(plan.recipe, chat_template="secondary")
    assert plan.fingerprint == dataclasses.replace(plan, recipe=recipe).fingerprint


def test_a_save_directory_that_is_a_disk_of_its_own_is_refused_at_once(tmp_path, small_disk):
    primary, secondary = make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match="is a disk of its own") as caught:
        plan_of(primary, secondary, small_disk)
    assert str(small_disk / "child") in caught.value.hint


def test_a_name_too_long_to_grow_beside_is_refused_at_once(tmp_path):
    primary, secondary = make_pair(tmp_path)
    with pytest.raises(SlerpMergeError, match="no usable path"):
        plan_of(primary, secondary, tmp_path / ("x" * 250))


@pytest.mark.skipif(os.name == "nt", reason="it has no such signals")
def test_what_nohup_ignores_stays_ignored(tmp_path):
    primary, secondary = make_pair(tmp_path)
    arguments = command_line(primary, secondary, tmp_path / "child", "--max-shard-size", "2000B")[2:]
    command = [sys.executable, "-c", SLOW_MAIN, *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        cwd=SCRIPT.parent,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ) as process:
        while process.stdout.readline() != "written\n":
            assert process.poll() is None
        process.send_signal(signal.SIGHUP)
        process.stdout.read()
    assert process.returncode == 0
    assert (tmp_path / "child").exists()
