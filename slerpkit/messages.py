"""The one error a person sees, and figures and names in words.

Where words are shown, and in what colours, is not known here. Nothing needs to be read before this.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# What to do where a limit is reached, whichever part of the tool met it.
MEMORY_HINT = "Close other programs, raise the limit on memory (ulimit -v, or the container's), or give it --threads 1."
PROCESS_HINT = "Raise the limit on processes (ulimit -u, a container's pids) or on memory (ulimit -v), or end some."
FILES_HINT = "Raise the limit on open files, as in: ulimit -n 1024. Fewer --threads need fewer."


class SlerpMergeError(Exception):
    """Something the world did, in words for the person at the prompt.

    message: what happened, to which file or tensor. hint: what to do about it. The script alone catches it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[type[SlerpMergeError], tuple[str, str]]:
        return SlerpMergeError, (self.message, self.hint)  # workers are processes


def format_bytes(count: float) -> str:
    """A byte count in decimal units, as disks and hubs state them: 2.2 GB."""
    for unit in ("B", "KB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_count(count: int) -> str:
    """A parameter count as people say it: 1.1B, 7.2B, 350M."""
    for limit, unit in ((999_500_000, "B"), (999_500, "M"), (999.5, "K")):
        if count >= limit:
            size = {"B": 1e9, "M": 1e6, "K": 1e3}[unit]
            return f"{count / size:.1f}{unit}" if count < 99.5 * size else f"{count / size:.0f}{unit}"
    return str(count)


def format_seconds(seconds: float) -> str:
    """A duration as people say it: under 0.1 s, 0.8 s, 42 s, 3 min 05 s."""
    if seconds < 0.1:
        return "under 0.1 s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def printable(text: str, keep: str = "") -> str:
    """Text from a stranger's file without control characters, which could drive the terminal or fake a line."""
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def shorten(value: Any, max_length: int = 60) -> str:
    """Any value for people, in at most `max_length` characters; long ones are cut."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= max_length else text[: max_length - 1] + "…"


def format_names(names: Sequence[str], max_count: int = 6) -> str:
    """A list of names that stays readable when there are thousands of them."""
    first_names = ", ".join(map(printable, names[:max_count]))
    return first_names if len(names) <= max_count else f"{first_names} and {len(names) - max_count} more"


def explain_os_error(error: OSError, path: Path, doing: str) -> SlerpMergeError:
    """The operating system's refusal, in words. `doing` completes "Could not ..."."""
    reason = error.strerror or str(error)
    reads = doing.startswith(("read", "look", "list"))
    permissions = "Check who owns it and its permissions"
    hints = {
        "ENOSPC": "Free some space, or choose a save directory on another disk.",
        "EDQUOT": "Your quota is used up; choose a save directory elsewhere.",
        "EACCES": f"{permissions}." if reads else f"{permissions}, or choose another place.",
        "EROFS": "That disk is mounted read-only; choose another place.",
        "ENAMETOOLONG": "Check the path.",
        "ENOENT": "Check the path; it may have been moved or deleted.",
        "EIO": "The disk reports a fault; if it stays, copy what is on it to another one, or choose another one.",
        "EFBIG": "Neither that disk, nor perhaps the limit on a file's size (ulimit -f), takes one so large: raise the "
        "limit, or cut the child with --max-shard-size.",
        "EMFILE": FILES_HINT,
        "ENFILE": "The whole system has no more files to open; close other programs.",
        "EAGAIN": PROCESS_HINT,
        "ENOMEM": MEMORY_HINT,
    }
    hints["EPERM"] = hints["EACCES"]
    name = next((name for name in hints if error.errno == getattr(errno, name, None)), "")
    told = shorten(str(path), 500)
    return SlerpMergeError(f"Could not {doing} {told}: {reason}.", hints.get(name, "Check the path and the disk."))


def explain_refusal(error: OSError | MemoryError) -> SlerpMergeError:
    """A refusal of the operating system where none was expected, in words; the error itself knows of which path."""
    if isinstance(error, MemoryError):
        return SlerpMergeError("The system refused: out of memory.", MEMORY_HINT)
    if error.filename is not None:
        return explain_os_error(error, Path(os.fsdecode(error.filename)), "use")
    hint = explain_os_error(error, Path(), "use").hint if error.errno is not None else "Put that right and try again."
    return SlerpMergeError(f"The system refused: {error.strerror or error}.", hint)


def explain_import_error(error: Exception) -> SlerpMergeError:
    """A package that cannot be loaded, in words; the fault is not always its own."""
    cause: BaseException = error
    while isinstance(cause.__cause__, ImportError):  # what numpy says of it fills a page
        cause = cause.__cause__
    reason = " ".join(str(cause).split())
    lacks_memory = re.search(r"failed to map|cannot allocate|MemoryError", reason, re.IGNORECASE)
    hint = MEMORY_HINT if lacks_memory else "Run: pip install -r requirements.txt"
    return SlerpMergeError(f"A package cannot be loaded: {shorten(reason, 300)}.", hint)


def is_utf8(text: str) -> bool:
    """False for halves of surrogate pairs, which a pickle can hold and UTF-8 cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def shortest_number(value: float) -> str:
    """A number in the fewest digits that mean it."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)
