"""The one error a person sees, and figures and names in words.

Where words are shown, and in what colours, is not known here. Nothing needs to be read before this.
"""

from __future__ import annotations

import contextlib
import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MAX_SHOWN = 20_000  # characters of one text; a stranger's file may hold millions, which take a terminal minutes


class SlerpMergeError(Exception):
    """Something the world did, in words for the person at the prompt.

    message: what happened, to which file or tensor. hint: what to do about it. The script alone catches it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = shorten(message, MAX_SHOWN)
        self.hint = hint

    def __reduce__(self) -> tuple[type[SlerpMergeError], tuple[str, str]]:
        return SlerpMergeError, (self.message, self.hint)  # workers are processes


@contextlib.contextmanager
def library_faults_named(what: str, hint: str) -> Iterator[None]:
    """Turns whatever another library raises over a stranger's file into a SlerpMergeError: `what`, and its own words.

    They raise errors of all kinds; what Rust calls a panic is not even an Exception.
    """
    try:
        yield
    except BaseException as error:
        is_fault = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_fault or isinstance(error, (SlerpMergeError, MemoryError)):
            raise
        raise SlerpMergeError(f"{what}: {shorten(f'{type(error).__name__}: {error}', 300)}", hint) from error


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
    """Text from a stranger's file without control characters, which could drive the terminal or fake a line.

    What is longer than MAX_SHOWN is cut.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in shorten(text, MAX_SHOWN))


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
    hints = {
        "ENOSPC": "Free some space, or choose a save directory on another disk.",
        "EDQUOT": "Your quota is used up; choose a save directory elsewhere.",
        "EACCES": "Check who owns it and its permissions.",
        "EPERM": "Check who owns it and its permissions.",
        "EROFS": "That disk is mounted read-only; choose another place.",
        "ENAMETOOLONG": "Check the path.",
        "ENOENT": "Check the path; it may have been moved or deleted.",
        "EIO": "The disk reports a fault; copy or download the file again.",
    }
    if not doing.startswith("read"):
        hints["EIO"] = "The disk reports a fault; choose a save directory on another one."
    name = next((name for name in hints if error.errno == getattr(errno, name, None)), "")
    return SlerpMergeError(f"Could not {doing} {path}: {reason}.", hints.get(name, "Check the path and the disk."))


def explain_refusal(error: OSError | MemoryError) -> SlerpMergeError:
    """A refusal of the operating system where none was expected, in words; the error itself knows of which path."""
    if isinstance(error, OSError) and error.filename is not None:
        return explain_os_error(error, Path(str(error.filename)), "use")
    return SlerpMergeError(f"The system refused: {str(error) or 'out of memory'}.", "Put that right and try again.")


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
