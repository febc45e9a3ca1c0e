"""The child while it grows: taken over, synced, published by one rename.

Knows files and their states, not what stands in them. Read save_directory.py and journal.py before this.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit import devices
from slerpkit.files import is_plain_folder, sync_to_disk
from slerpkit.merge.events import ChildPublished, MergeStopped, Noted
from slerpkit.merge.journal import Journal
from slerpkit.merge.save_directory import (
    WorkFolder,
    check_replaceable,
    interruptions_held,
    staged_folders,
    staging_area,
)
from slerpkit.messages import SlerpMergeError, explain_os_error, format_names
from slerpkit.parents.checkpoint import file_stats_of, stat_items

if TYPE_CHECKING:
    from slerpkit.merge.events import Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.tensor_plan import MergedTensor

FLUSH_BYTES = 256_000_000  # written, after which the disk is asked for them while the merge goes on


class BackgroundSync:
    """One thread that asks the disk for what is written while the merge goes on."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, "sync")
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
        self.replaced = self.area.path / "replaced"  # a child that stood there before, until the new one does
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
        for path in (*staged_folders(self.area.path), self.replaced):
            if os.path.lexists(path) and not is_plain_folder(path):
                path.unlink()  # a link or a file; what a link leads to is none of ours
        for path in staged_folders(self.area.path):
            if not self.folder.exists():
                path.rename(self.folder)
            else:
                shutil.rmtree(path, ignore_errors=True)
        self.journal.folder = self.folder
        is_empty = self.target.is_dir() and not any(self.target.iterdir())
        if self.replaced.is_dir() and (is_empty or not self.target.exists()):
            if is_empty:
                self.target.rmdir()
            self.replaced.rename(self.target)
        if self.target.is_dir() and any(self.target.iterdir()):
            check_replaceable(self.target, self.plan.options.overwrite)
        if not self.plan.options.restart:
            self.journal.load(devices.is_available)
        self._remove_unfinished()
        self.folder.mkdir(exist_ok=True)

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
        for path in self.folder.rglob("*"):
            if path.is_dir() or path.relative_to(self.folder).as_posix() not in self.journal.shards:
                self._sync.submit(path)
        self._sync.finish()
        sync_to_disk(self.folder)
        return time.perf_counter() - started

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is not None:
            with interruptions_held() as held:
                # A person who pressed Ctrl-C does not wait for the disk.
                self._sync.stop(30 if isinstance(error, Exception) else 0.5, enough=lambda: bool(held))
                self._leave()
            return
        with interruptions_held():
            try:
                self._publish()
            except BaseException as fault:
                if self.folder.exists():
                    self._leave()
                if isinstance(fault, OSError):
                    raise explain_os_error(fault, self.target, "put the finished child at") from fault
                raise
            self._remove_area()
            self.observe(ChildPublished(self.target))

    def _publish(self) -> None:
        if self.target.is_dir():
            if any(self.target.iterdir()):
                check_replaceable(self.target, self.plan.options.overwrite)
                shutil.rmtree(self.replaced, ignore_errors=True)
                self.target.rename(self.replaced)
            else:
                self.target.rmdir()  # not every system renames onto an empty folder
        try:
            self.folder.rename(self.target)
        except BaseException:
            if self.replaced.exists():
                self.replaced.rename(self.target)
            raise
        sync_to_disk(self.target.parent)

    def _leave(self) -> None:
        """After an error: only what the next run can use stays."""
        if not self._is_trusted:
            self.journal.finished.clear()
        if self.journal.finished:
            self._remove_unfinished()
            self.area.leave()
            self.observe(MergeStopped(len(self.journal.finished), len(self.plan.shards)))
        else:
            self._remove_area()

    def _remove_unfinished(self) -> None:
        remove_all_but({self.folder / name for name in self.journal.finished}, self.folder)
        if not self.journal.finished:
            self.journal.remove()
        if self.target.is_dir() and any(self.target.iterdir()):
            shutil.rmtree(self.replaced, ignore_errors=True)

    def _remove_area(self) -> None:
        for folder in (self.folder, self.replaced):
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):  # what cannot be removed now, the next run removes
            self.journal.remove()
        self.area.leave()


def remove_all_but(kept: Collection[Path], folder: Path) -> None:
    """Removes what lies below a folder and is not among the files to keep."""
    for path in list(folder.iterdir()) if is_plain_folder(folder) else ():
        if not is_plain_folder(path):
            if path not in kept:
                path.unlink()
        elif any(path in file.parents for file in kept):
            remove_all_but(kept, path)
        else:
            shutil.rmtree(path, ignore_errors=True)


def check_parents_unchanged(plan: MergePlan, child: StagedChild) -> None:
    """Raises SlerpMergeError where a parent's file is not the one that was there when the merge began."""
    for parent in plan.parents.by_role.values():
        now = file_stats_of(parent.folder, parent.file_stats)
        streamed = parent.remote.weights if parent.remote is not None else ()
        changed = stat_items(parent.file_stats) ^ stat_items({k: v for k, v in now.items() if k not in streamed})
        if changed:
            child.distrust()
            raise SlerpMergeError(
                f"{parent.folder} changed during the merge: {format_names(sorted({name for name, _ in changed}))}.",
                "Nothing was saved, for the child would be of neither. Leave the parents alone and run it again.",
            )
