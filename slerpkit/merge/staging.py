"""The child while it grows: taken over, synced, published by one rename.

Knows files and their states, not what stands in them. Read save_directory.py and journal.py before this.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, wait
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit import devices
from slerpkit.files import is_plain_folder, nested_files, remove_folder, sync_to_disk
from slerpkit.merge.events import ChildPublished, MergeStopped, Noted
from slerpkit.merge.journal import Journal
from slerpkit.merge.save_directory import (
    CONFIG_NAME,
    WorkFolder,
    check_disk,
    check_replaceable,
    interruptions_held,
    staged_folders,
    staging_area,
)
from slerpkit.messages import SlerpMergeError, explain_os_error, explain_refusal, format_names
from slerpkit.parents.checkpoint import file_stats_of, stat_items
from slerpkit.threads import TaskThread

if TYPE_CHECKING:
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.tensor_plan import MergedTensor

SCRAP = "scrap-"  # what the names of folders in a staging area begin with that are there to be removed
FLUSH_BYTES = 256_000_000  # written, after which the disk is asked for them while the merge goes on


class BackgroundSync:
    """One thread that asks the disk for what is written while the merge goes on."""

    def __init__(self) -> None:
        self._executor = TaskThread()
        self._tasks: list[Future[None]] = []
        self._given_up = False

    def submit(self, path: Path, then: Callable[[], None] = lambda: None) -> None:
        """Asks for one file; `then` is called once it is on the disk. Raises what went wrong with one before it."""
        for task in self._tasks:
            if task.done():
                task.result()
        self._tasks.append(self._executor.submit(self._sync, path, then))

    @property
    def is_idle(self) -> bool:
        return all(task.done() for task in self._tasks)

    def _sync(self, path: Path, then: Callable[[], None]) -> None:
        sync_to_disk(path)
        if not self._given_up:
            then()

    def finish(self) -> None:
        """Waits until all is on the disk that was asked for; raises what went wrong."""
        self.stop(math.inf)
        for task in self._tasks:
            task.result()

    def stop(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Waits for what was asked for until `seconds` are over or it is `enough`, then gives up the rest."""
        limit = time.monotonic() + seconds
        # A wait without end would be deaf to Ctrl-C on Windows.
        while (waited := wait(self._tasks, timeout=0.1)).not_done and time.monotonic() < limit and not enough():
            pass
        self._given_up = True
        self._executor.shutdown(wait=not waited.not_done, cancel_futures=True)


class StagedChild:
    """The child while it grows: in a hidden folder beside the save directory, published by one rename.

    Leaving the `with` block by an error keeps the files that are finished, for the same merge to carry on with; where
    there are none, all is as it was. Another run that makes the same child is refused meanwhile.
    """

    def __init__(self, plan: MergePlan, observe: Observer) -> None:
        self.plan = plan
        self.observe = observe
        self.target = plan.options.save_directory.resolve()
        self.area = WorkFolder(staging_area(self.target))
        # Of this run alone: a worker of a run that was killed, should it still write, finds its folder gone.
        self.folder = self.area.path / f"child-{secrets.token_hex(4)}"
        # A child that stood there before, whole, until the new one does; and one that is on its way there file by file.
        self.replaced, self.moving = self.area.path / "replaced", self.area.path / "moving"
        self.journal = Journal(self.area.path, plan.fingerprint, plan.shards)
        self._is_trusted = True
        self._unflushed = 0  # bytes

    def __enter__(self) -> StagedChild:
        self.area.enter()
        try:
            with interruptions_held():
                self._take_over()
            if kept := len(self.journal.finished):
                self.observe(Noted(f"Carrying on: {kept} of {len(self.plan.shards)} files stand already."))
            self._sync = BackgroundSync()
        except BaseException as error:
            with interruptions_held():
                self._hand_back()
            if isinstance(error, OSError):
                raise explain_os_error(error, self.area.path, "prepare the folder") from error
            raise
        return self

    def _take_over(self) -> None:
        """Whatever a run that ended early left: a child half replaced goes back, finished files stay, the rest goes."""
        staged = staged_folders(self.area.path)
        for path in (*staged, self.replaced, self.moving):
            if os.path.lexists(path) and not is_plain_folder(path):
                path.unlink()  # a link or a file; what a link leads to is none of ours
        check_disk(self._scrap_folder())
        for path in filter(is_plain_folder, staged):
            if not is_plain_folder(self.folder):
                move_folder(path, self.folder)
            else:
                self._discard(path)
        self.journal.folder = self.folder
        self._put_back()
        if self.target.is_dir() and any(self.target.iterdir()):
            check_replaceable(self.target, self.plan.options.overwrite)
        if not self.plan.options.restart:
            self.journal.load(devices.is_available)
        self._remove_unfinished()
        self.folder.mkdir(exist_ok=True)

    def _put_back(self) -> None:
        """A child that stood in the save directory returns there, where the new one did not take its place."""
        if is_plain_folder(self.moving):
            move_contents(self.moving, self.target, first=CONFIG_NAME)
        is_empty = self.target.is_dir() and not any(self.target.iterdir())
        if is_plain_folder(self.replaced) and (is_empty or not self.target.exists()):
            if is_empty:
                self.target.rmdir()
            self.replaced.rename(self.target)

    def _hand_back(self) -> None:
        """After an error before anything was merged: nothing is removed that a later run could use."""
        with contextlib.suppress(OSError):  # not there, or not empty
            self.folder.rmdir()
        self.area.leave()
        if self.journal.finished:
            self.observe(MergeStopped(len(self.journal.finished), len(self.plan.shards)))

    def flush(self, file_name: str, byte_count: int) -> None:
        """So much more of a file is written. Now and then the disk is asked for what it has, so that little is left."""
        self._unflushed += byte_count
        if self._unflushed >= FLUSH_BYTES and self._sync.is_idle:
            self._unflushed = 0
            self._sync.submit(self.folder / file_name)

    def finish_file(self, file_name: str, tensors: Sequence[MergedTensor]) -> None:
        """Asks the disk for a finished file of weights in the background; once it is there, the journal has it."""
        self._sync.submit(self.folder / file_name, lambda: self.journal.add(file_name, tensors))

    def distrust(self) -> None:
        """Says that nothing of this child is of use to a later run."""
        self._is_trusted = False

    def sync(self) -> float:
        """Waits until every file is on the disk; returns the seconds waited."""
        started = time.perf_counter()
        for path in nested_files(self.folder):
            if path.relative_to(self.folder).as_posix() not in self.journal.shards:
                self._sync.submit(path)
        self._sync.finish()
        sync_to_disk(self.folder)
        return time.perf_counter() - started

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            if not isinstance(error, (SlerpMergeError, OSError, MemoryError, ImportError, KeyboardInterrupt)):
                self.distrust()  # a fault of a library's, or of ours, which the same command would only meet again
            with interruptions_held() as held:
                # A person who pressed Ctrl-C does not wait for the disk.
                self._sync.stop(30 if isinstance(error, Exception) else 0.5, enough=lambda: bool(held))
                self._leave()
            if isinstance(error, OSError) and error.filename is not None:  # of a disk, where nobody reckoned with it
                raise explain_refusal(error) from error
            return
        with interruptions_held():
            try:
                self._publish()
            except BaseException as fault:
                if is_plain_folder(self.folder):
                    self._leave()
                if isinstance(fault, OSError):
                    raise explain_unpublished(fault, self.target) from fault
                raise
            self._remove_area()
            self.observe(ChildPublished(self.target))

    def _publish(self) -> None:
        try:
            if self.target.is_dir() and any(self.target.iterdir()):
                check_replaceable(self.target, self.plan.options.overwrite)
                self._discard(self.replaced)
                self._put_aside()
            elif self.target.is_dir():
                self.target.rmdir()  # not every system renames onto an empty folder
            self.folder.rename(self.target)
        except BaseException:
            with contextlib.suppress(OSError):  # what cannot go back now, the next run puts back
                self._put_back()
            raise
        sync_to_disk(self.target.parent)

    def _put_aside(self) -> None:
        """The child that stands there leaves its place, by one rename where the system has it."""
        try:
            self.target.rename(self.replaced)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            # While the config is there, the next run knows what stands there for a model.
            move_contents(self.target, self.moving, last=CONFIG_NAME)
            self.moving.rename(self.replaced)

    def _leave(self) -> None:
        """After an error: only what the next run can use stays. Cleaning that fails says nothing of its own."""
        if not self._is_trusted:
            self.journal.finished.clear()
        if not self.journal.finished:
            self._remove_area()
            return
        with contextlib.suppress(OSError):  # what cannot be removed now, the next run removes
            self._remove_unfinished()
        self.area.leave()
        self.observe(MergeStopped(len(self.journal.finished), len(self.plan.shards)))

    def _remove_unfinished(self) -> None:
        remove_all_but({self.folder / name for name in self.journal.finished}, self.folder)
        if not self.journal.finished:
            self.journal.remove()
        self._remove_replaced()

    def _remove_area(self) -> None:
        self._discard(self.folder)
        with contextlib.suppress(OSError):  # what cannot be removed now, the next run removes
            self._remove_replaced()
            self.journal.remove()
        self.area.leave()

    def _remove_replaced(self) -> None:
        """What was put aside goes once something stands in its place; and so does what could not be removed earlier."""
        if self.target.is_dir() and any(self.target.iterdir()):
            self._discard(self.replaced)
        for path in self.area.path.glob(f"{SCRAP}*"):
            remove_folder(path)

    def _scrap_folder(self) -> Path:
        """The name of a folder whose content is of no use to anybody, however much is left of it."""
        return self.area.path / f"{SCRAP}{secrets.token_hex(4)}"

    def _discard(self, folder: Path) -> None:
        """Removes a folder of the area. One that is half removed must not be taken for what it was."""
        scrap = self._scrap_folder()
        try:
            folder.rename(scrap)
        except OSError:  # not there, or of a kind that the system does not rename
            scrap = folder
        remove_folder(scrap)


def move_folder(source: Path, target: Path) -> None:
    """Renames a folder of the staging area; file by file where the system does not, as with a container's image."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        move_contents(source, target)


def explain_unpublished(error: OSError, target: Path) -> SlerpMergeError:
    """Why a finished child could not be put in its place, and what helps if that stays so."""
    explained = explain_os_error(error, target, "put the finished child at")
    if not is_plain_folder(target):
        return explained
    way_out = f"If it stays so, move {target} out of the way yourself; the same command carries on."
    return SlerpMergeError(explained.message, f"{explained.hint} {way_out}")


def remove_all_but(kept: Collection[Path], folder: Path) -> None:
    """Removes what lies below a folder and is not among the files to keep."""
    for path in list(folder.iterdir()) if is_plain_folder(folder) else ():
        if not is_plain_folder(path):
            if path not in kept:
                path.unlink()
        elif any(path in file.parents for file in kept):
            remove_all_but(kept, path)
        else:
            remove_folder(path)


def check_parents_unchanged(plan: MergePlan, child: StagedChild) -> None:
    """Raises SlerpMergeError where a parent's file is not the one that was there when the merge began."""
    for parent in plan.parents.by_folder.values():
        now = file_stats_of(parent.folder, parent.file_stats)
        streamed = parent.remote.weights if parent.remote is not None else ()
        changed = stat_items(parent.file_stats) ^ stat_items({k: v for k, v in now.items() if k not in streamed})
        if changed:
            child.distrust()
            raise SlerpMergeError(
                f"{parent.folder} changed during the merge: {format_names(sorted({name for name, _ in changed}))}.",
                "Nothing was saved, for the child would be of neither. Leave the parents alone and run it again.",
            )


def move_contents(source: Path, target: Path, last: str = "", first: str = "") -> None:
    """Moves the files of a folder into another, one by one, and removes the folders that they leave.

    For disks that do not rename some folders, such as those of a container's image. last, first: the names of files
    that are to be the last, or the first, to move. Raises OSError where one cannot be moved; those before it are then
    moved.
    """
    target.mkdir(exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: (path.name != first, path.name == last)):
        place = target / path.name
        if is_plain_folder(path):
            move_contents(path, place)
        elif os.path.lexists(place):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        else:
            path.rename(place)
    source.rmdir()
