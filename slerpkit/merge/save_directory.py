"""Where a child may stand, and the hidden, locked folder beside it in which it grows.

Knows paths and locks; what is put into the hidden folder is the business of staging.py and of the sweep.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slerpkit.files import check_path, is_inside, is_plain_file, is_plain_folder, remove_folder
from slerpkit.lazy import filelock
from slerpkit.messages import SlerpMergeError, explain_os_error
from slerpkit.parents.hub_cache import public_name

# Where locks cannot be had, as on some disks in networks, none is needed to go on.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)
CONFIG_NAME = "config.json"  # what a folder is known for a model's by
# Refusals that a person can do something about; any other says what a disk cannot do.
USUAL_REFUSALS = (errno.EACCES, errno.EIO, errno.ENOSPC, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC))
STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def staging_area(save_directory: Path) -> Path:
    """The hidden folder beside the save directory in which a child grows."""
    target = save_directory.resolve()
    return target.with_name(f".{target.name}.slerpmerge-staging")


def staged_folders(area: Path) -> list[Path]:
    """What stands in a staging area under the name that a growing child's folder begins with."""
    return sorted(area.glob("child*"))


def check_save_directory(save_directory: Path, parents: Sequence[Path], overwrite: bool) -> None:
    """Raises SlerpMergeError where a child must not, or cannot, be put at `save_directory`."""
    check_path(save_directory, "save directory")
    target = save_directory.resolve()
    check_path(staging_area(target), "folder in which the child would grow,")
    if is_mount_point(target):
        raise SlerpMergeError(
            f"The save directory {save_directory} is a disk of its own, which no finished child can take the place of.",
            f"Give a folder on it, such as {save_directory / 'child'}.",
        )
    for parent in parents:
        folder = parent.resolve()
        if is_inside(target, folder) or is_inside(folder, target):
            where = "is a parent's folder" if target == folder else "overlaps a parent's folder"
            raise SlerpMergeError(
                f"The save directory {save_directory} {where} ({parent}).",
                "Parents are never written to. Give the child a folder of its own.",
            )
    if target.exists() and not target.is_dir():
        raise SlerpMergeError(f"The save directory {save_directory} is a file.", "Give another name for the child.")
    if target.is_dir() and any(target.iterdir()):
        check_replaceable(save_directory, overwrite)
    existing = next(folder for folder in (target.parent, *target.parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        hint = "Choose a place you may write to, or change the permissions."
        if target.is_dir() and not any(target.iterdir()) and os.access(target, os.W_OK | os.X_OK):
            hint = f"The child grows beside it at first. Give a folder in it, such as {save_directory / 'child'}."
        what = f"The save directory {save_directory} cannot be made: {existing} is not writable."
        raise SlerpMergeError(what, hint)
    WorkFolder(staging_area(target)).check_free()


def check_replaceable(save_directory: Path, overwrite: bool) -> None:
    """A folder that is not empty may be replaced only when asked for, and only if it is a model's."""
    if not overwrite:
        raise SlerpMergeError(
            f"The save directory {save_directory} is not empty.", "Give a new folder, or allow it with --overwrite."
        )
    if not (save_directory / CONFIG_NAME).is_file():
        raise SlerpMergeError(
            f"The save directory {save_directory} holds files that are not a model's; nothing was overwritten.",
            "Overwriting replaces a whole folder. Give a new folder, or empty this one yourself.",
        )


def is_mount_point(folder: Path) -> bool:
    """Whether something is mounted at a resolved path: no other folder can take its place."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:  # not Linux
        return False
    # A folder of the same disk can be mounted too, and then looks like any other. Spaces stand there as octal digits.
    places = (re.sub(rb"\\([0-7]{3})", lambda digits: bytes([int(digits[1], 8)]), line.split()[4]) for line in lines)
    return os.fsencode(folder) in places


def free_bytes(folder: Path) -> int | None:
    """What is free on a folder's disk; None where the disk does not tell, as memory and many networks do not."""
    usage = shutil.disk_usage(folder)
    return usage.free if usage.total else None


def check_disk(scrap: Path) -> None:
    """Does with a few bytes all that a merge will ask of a disk, so that no merge is lost to one that cannot do it.

    scrap: a folder that is not there yet, and is not there afterwards. Raises SlerpMergeError where the disk refuses.
    """
    doing = "keep files"
    file, other = scrap / "a" / "file", scrap / "a" / "other"
    try:
        file.parent.mkdir(parents=True)
        file.write_bytes(b"0123")
        doing = "make room for a file before it is written"
        os.truncate(file, 8)
        doing = "write in the middle of a file"
        with open(file, "r+b", buffering=0) as stream:
            stream.seek(4)
            stream.write(b"4567")
            os.fsync(stream.fileno())
        doing = "replace one file by another"
        other.write_bytes(b"")
        file.replace(other)
        doing = "rename a folder"
        file.parent.rename(scrap / "b")
        doing = "give back what was written"
        if (scrap / "b" / "other").read_bytes() != b"01234567":
            raise OSError(errno.EINVAL, "other bytes came back")
    except OSError as error:
        if error.errno in USUAL_REFUSALS:
            raise explain_os_error(error, scrap.parent, "write in") from error
        raise SlerpMergeError(
            f"The disk that {scrap.parent.parent} lies on cannot {doing}, as a merge must: {error.strerror or error}.",
            "Give a save directory on a disk of this machine, and copy the child there once it is made.",
        ) from error
    finally:
        remove_folder(scrap)


def staged_bytes(save_directory: Path) -> int:
    """What an earlier run left on the disk; the next takes it over or removes it."""
    found = 0
    for path in staging_area(save_directory).rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            found += min(status.st_size, getattr(status, "st_blocks", math.inf) * 512)
    return found


class WorkFolder:
    """A hidden folder beside the save directory in which a single living process works.

    A lock in it tells; the system lets go of that when the process ends, however it ends. A lock whose file was
    removed meanwhile counts for nothing: filelock looks for that from 3.21 on, and removes no file itself from 3.29 on.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path / ".lock"
        self._made: list[Path] = []

    def enter(self) -> None:
        """Makes the folder, where it is not there, and locks it.

        Raises SlerpMergeError where something else is in the way, or another process works there.
        """
        try:
            if os.path.lexists(self.path) and not is_plain_folder(self.path):
                raise SlerpMergeError(f"{self.path} is in the way; it is no folder of this tool's.", "Move it away.")
            for folder in reversed([self.path, *self.path.parents]):
                if not folder.exists():
                    folder.mkdir()
                    self._made.append(folder)
            if os.path.lexists(self._lock_path) and not is_plain_file(self._lock_path):
                raise SlerpMergeError(
                    f"{self._lock_path} is in the way; it is no file of this tool's.", "Move it away."
                )
            self._lock = filelock.FileLock(self._lock_path, timeout=0)
            self._acquire()
        except BaseException as error:
            self._remove_made()
            if isinstance(error, filelock.Timeout):
                raise SlerpMergeError(
                    f"Another run is making this child just now, in {self.path}.",
                    "Wait for it, stop it, or give another save directory.",
                ) from error
            if isinstance(error, OSError):
                raise explain_os_error(error, self.path, "make the folder") from error
            raise

    def check_free(self) -> None:
        """Raises SlerpMergeError where another process works there just now."""
        if is_plain_file(self._lock_path):  # a killed process leaves it too
            self.enter()
            self.leave()

    def _acquire(self) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                self._lock.acquire()
            except OSError as error:
                # Without locks of the system the library takes files for locks, and some versions only say so in a
                # warning; those of a run that was killed would stay.
                is_file = isinstance(self._lock, filelock.SoftFileLock) or "SoftFileLock" in " ".join(map(str, told))
                if error.errno not in NO_LOCKS and not is_file:
                    raise

    def leave(self) -> None:
        """Lets go, and removes the folder, and those above it that were made for it, where they are empty."""
        try:
            self._lock_path.unlink()  # while it is held, so that nobody gets hold of a file about to go
        except OSError:  # Windows removes no open file
            with contextlib.suppress(OSError):
                self._lock.release()
                self._lock_path.unlink()
        with contextlib.suppress(OSError):  # the system lets go in any case, at the latest with this process
            self._lock.release()
        with contextlib.suppress(OSError):  # the next run may be there already
            self.path.rmdir()
        self._remove_made()

    def _remove_made(self) -> None:
        for folder in reversed(self._made):
            with contextlib.suppress(OSError):  # somebody else put something there meanwhile
                folder.rmdir()


@contextlib.contextmanager
def interruptions_held() -> Iterator[list[Any]]:
    """Lets Ctrl-C and the like wait until a step that must not be cut in two is over. Yields those that do."""
    held: list[Any] = []
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    before = {number: handler for number, handler in before.items() if handler is not None}
    for number in before:
        signal.signal(number, lambda number, frame: held.append((number, frame)))
    try:
        yield held
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    for number, frame in held[:1]:
        if callable(before[number]):
            before[number](number, frame)


def proposed_save_directory(primary: Path, secondary: Path, blend: Sequence[str] = ("slerp",)) -> Path:
    """A readable name under the current folder that is not taken yet: of both parents, and of the blend."""
    whole = [public_name(folder.resolve(), {}).rpartition("/")[2] for folder in (primary, secondary)]
    names = [re.sub(r"[^\w.-]+", "-", name) or "model" for name in whole]
    return free_path("-".join([*names, *blend]))


def free_path(stem: str, suffix: str = "") -> Path:
    """A path below the current folder where nothing stands: the stem itself, or the first number behind it."""
    numbered = (Path(f"{stem}-{number}{suffix}") for number in range(2, 1000))
    return next(path for path in (Path(f"{stem}{suffix}"), *numbered) if not os.path.lexists(path))
