"""Where a child may stand, and the hidden, locked folder beside it in which it grows."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slerpkit.files import check_path, is_inside, is_plain_file
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import public_name

STOP_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def staging_area(save_directory: Path) -> Path:
    """The hidden folder beside the save directory in which a child grows."""
    target = save_directory.resolve()
    return target.with_name(f".{target.name}.slerpmerge-staging")


def check_save_directory(save_directory: Path, parents: Sequence[Path], overwrite: bool) -> None:
    """Raises SlerpMergeError where a child must not, or cannot, be put at `save_directory`."""
    check_path(save_directory, "save directory")
    target = save_directory.resolve()
    check_path(staging_area(target), "folder in which the child would grow,")
    if os.path.ismount(target):
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
        raise SlerpMergeError(
            f"The save directory {save_directory} cannot be made: {existing} is not writable.",
            "Choose a place you may write to, or change the permissions.",
        )


def check_replaceable(save_directory: Path, overwrite: bool) -> None:
    """A folder that is not empty may be replaced only when asked for, and only if it is a model's."""
    if not overwrite:
        raise SlerpMergeError(
            f"The save directory {save_directory} is not empty.", "Give a new folder, or allow it with --overwrite."
        )
    if not (save_directory / "config.json").is_file():
        raise SlerpMergeError(
            f"The save directory {save_directory} holds files that are not a model's; nothing was overwritten.",
            "Overwriting replaces a whole folder. Give a new folder, or empty this one yourself.",
        )


def staged_bytes(save_directory: Path) -> int:
    """What an earlier run left on the disk; the next takes it over or removes it."""
    found = 0
    for path in staging_area(save_directory).rglob("*"):
        with contextlib.suppress(OSError):
            status = path.lstat()
            found += min(status.st_size, getattr(status, "st_blocks", math.inf) * 512)
    return found


class FolderLock:
    """Says that a living process works in a folder. The system lets go of it when the process ends, however it ends.

    Raises SlerpMergeError where another process holds it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / ".lock"
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        while True:
            if os.path.lexists(self._path) and not is_plain_file(self._path):
                raise SlerpMergeError(f"{self._path} is in the way; it is no file of this tool's.", "Remove it.")
            self._descriptor = os.open(self._path, flags, 0o600)
            try:
                self._hold()
            except OSError as error:
                os.close(self._descriptor)
                raise SlerpMergeError(
                    f"Another run is making this child just now, in {folder}.",
                    "Wait for it, stop it, or give another save directory.",
                ) from error
            with contextlib.suppress(OSError):
                if os.name == "nt" or os.path.samestat(os.fstat(self._descriptor), self._path.lstat()):
                    return
            os.close(self._descriptor)  # its holder removed it just before; look again

    def _hold(self) -> None:
        """Raises OSError where another process holds the lock. A disk without locks, as some in networks, has none."""
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK, errno.EDEADLK):
                raise

    def release(self) -> None:
        """Lets go, and leaves no trace in the folder."""
        try:
            self._path.unlink()  # while it is held, so that nobody gets hold of a file about to go
            os.close(self._descriptor)
        except OSError:  # Windows removes no open file
            os.close(self._descriptor)
            with contextlib.suppress(OSError):
                self._path.unlink()


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


def proposed_save_directory(primary: Path, secondary: Path, settings: Mapping[str, Any] | None = None) -> Path:
    """A readable name under the current folder that is not taken yet: of both parents, and of the blend if given."""
    whole = [public_name(folder.resolve(), {}).rpartition("/")[2] for folder in (primary, secondary)]
    names = [re.sub(r"[^\w.-]+", "-", name) or "model" for name in whole]
    settings = settings or {}
    blend = [settings.get("method", "slerp")]
    if (schedule := settings.get("schedule")) is not None and len(list(schedule.values())) == 1:
        blend.append(f"{next(schedule.values()):g}")
    first = "-".join([*names, *blend])
    numbered = (Path(f"{first}-{number}") for number in range(2, 1000))
    return next(path for path in (Path(first), *numbered) if not path.exists())
