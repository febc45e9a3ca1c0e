"""Small files and folders: read within bounds, replaced by one rename, looked at without following links.

Every refusal of the operating system becomes a SlerpMergeError here. What a file means is not known. Read messages.py
before this.
"""

from __future__ import annotations

import contextlib
import errno
import fnmatch
import io
import itertools
import json
import os
import re
import shutil
import stat
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slerpkit.messages import SlerpMergeError, explain_os_error, format_bytes, printable, shorten

MOST_SOURCES = 3  # that one thread reads by turns: two parents and a base
MAX_OPEN_FILES = 16  # of one thread; a model can have hundreds of shards
MAX_JSON_BYTES = 16_000_000  # of an index or of settings, which are read into memory several times their size
MAX_CONFIG_BYTES = 4_000_000  # of a model's config, some of which name twenty thousand labels, and of other settings
MAX_JSON_DEPTH = 64  # of lists and objects inside each other; every walk through them may then be a recursion
MAX_DIGITS = 300  # of a whole number: what a float can hold, and what every Python turns into text
ENDLESS_DIGITS = re.compile(rb"[0-9]{%d}" % (MAX_DIGITS + 1))
# What Python's json takes for numbers, or writes in their place, and JSON has no words for.
NON_FINITE = ("Infinity", "-Infinity", "NaN")
# Of JSON as Python writes it: a string, or one of those words outside of strings.
STRING_OR_NON_FINITE = re.compile(r'"(?:[^"\\]|\\.)*"|-?Infinity|NaN')


def clean_path(text: str) -> Path:
    """A path as people type or paste it: quotes, `~`, `$HOME`, spaces around it, escaped spaces.

    Raises SlerpMergeError for the home of somebody who is not known.
    """
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif os.name != "nt":
        text = re.sub(r"\\([^\w\\])", r"\1", text)  # as a terminal pastes a dropped folder
    path = Path(os.path.expandvars(text))
    try:
        return path.expanduser()
    except RuntimeError as error:
        if os.path.lexists(path.parts[0]):  # a folder's name may begin with ~ too
            return path
        what = f"{path.parts[0]} is nobody's home here."
        raise SlerpMergeError(what, f"Write out the path; of a folder that is called so, write ./{path}") from error


def given_path(text: str) -> Path:
    """A path from a flag or a program: what is there under this very name, or else as clean_path has it."""
    return Path(text) if os.path.lexists(text) else clean_path(text)


def written_path(text: str) -> Path:
    """A path that a file names: with `~`, and with nothing of this person's environment put in for a stranger's $."""
    return Path(os.path.expanduser(text.strip()))  # noqa: PTH111  which leaves the home of nobody as it is


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES) -> bytes:
    """A small file, whole. Raises SlerpMergeError where it cannot be read or is larger than `limit` bytes."""
    try:
        with open(path, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(min(size, limit) + 1)
    except OSError as error:
        raise explain_os_error(error, path, "read") from error
    if max(size, len(data)) > limit:
        raise SlerpMergeError(
            f"{path} is larger than {format_bytes(limit)}, too large for what it should be.",
            "Compare its size with that where the model comes from; it may be another file.",
        )
    return data


def parse_json(data: bytes, source: Path) -> Any:
    """JSON from a stranger's file, and infinities, as Python's json writes them.

    Raises SlerpMergeError for what is no number, or one of endless digits, a name given twice, or endless nesting.
    """
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=dict_of_unique_names,
            parse_int=bounded_int if ENDLESS_DIGITS.search(data) else None,  # a call for each number takes its time
            parse_constant=infinity,
        )
        if is_nested_deeper(value, MAX_JSON_DEPTH):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SlerpMergeError(
            f"{source} does not hold valid JSON: {reason}.", "Correct this file, or download it again."
        ) from error
    return value


def bounded_int(digits: str) -> int:
    """A whole number of JSON. Raises ValueError where it has more digits than any has that means something."""
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a number in it has {len(digits):,} digits")
    return int(digits)


def infinity(word: str) -> float:
    """What one of NON_FINITE stands for. Raises ValueError for NaN."""
    if word == "NaN":
        raise ValueError("NaN is no number")
    return float(word)


def is_nested_deeper(value: Any, depth: int) -> bool:
    """Whether there are more than `depth` lists and objects inside each other."""
    level = [value] if isinstance(value, (dict, list)) else []
    while level and depth:
        members = itertools.chain.from_iterable(part.values() if isinstance(part, dict) else part for part in level)
        level, depth = [part for part in members if isinstance(part, (dict, list))], depth - 1
    return bool(level)


def json_fault(data: bytes) -> str | None:
    """Why a file's content is no JSON as every program reads it, in words; None where it is."""

    def refuse(word: str) -> None:
        raise ValueError(f"it has {word} in place of a number")

    try:
        json.loads(data.decode("utf-8"), parse_int=bounded_int, parse_constant=refuse)
    except RecursionError:
        return "it is nested too deeply"
    except ValueError as error:
        return str(error)
    return None


def parse_json_object(data: bytes, source: Path) -> dict[str, Any]:
    """A JSON object from a stranger's file. Raises SlerpMergeError as parse_json does, and where it holds none."""
    value = parse_json(data, source)
    if not isinstance(value, dict):
        raise SlerpMergeError(f"{source} holds no JSON object.", "Download this file again.")
    return value


def dict_of_unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of these pairs. Raises ValueError where two have one name."""
    members = dict(pairs)
    if len(members) != len(pairs):
        duplicate, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {duplicate!r} stands there twice")
    return members


def read_json(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises SlerpMergeError where it holds none."""
    return parse_json_object(read_bytes(path, limit), path)


def read_json_if_there(path: Path, limit: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes, empty where there is none."""
    return read_json(path, limit) if path.is_file() else {}


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a file of at most MAX_CONFIG_BYTES. Raises SlerpMergeError where it holds none."""
    value = parse_json(read_bytes(path, MAX_CONFIG_BYTES), path)
    if not isinstance(value, list):
        raise SlerpMergeError(f"{path} holds no JSON list.", "Download this file again.")
    return value


def json_text(content: Mapping[str, Any], **how: Any) -> str:
    """JSON that is JSON whatever numbers it holds. how: as json.dumps takes it.

    An infinity becomes a number too large for a float, which Python and most others read as one; NaN becomes null.
    """
    try:
        return json.dumps(content, allow_nan=False, **how)
    except ValueError:
        text = json.dumps(content, **how)
    words = dict(zip(NON_FINITE, ("1e999", "-1e999", "null")))
    return STRING_OR_NON_FINITE.sub(lambda match: words.get(match[0], match[0]), text)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A small JSON file, as people like to read it."""
    write_text(path, json_text(content, indent=2, ensure_ascii=False) + "\n")


def writable(text: str) -> str:
    """A text that UTF-8 can hold: half a surrogate pair, from a stranger's JSON, is the escape again that it was."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def write_text(path: Path, text: str) -> None:
    """A small text file, UTF-8. Raises SlerpMergeError where the disk refuses."""
    try:
        path.write_text(writable(text), encoding="utf-8", newline="\n")
    except OSError as error:
        raise explain_os_error(error, path, "write") from error


def fresh_path(path: Path) -> Path:
    """Where `replace_files` writes a file's new content before it takes the old one's place."""
    return path.with_name(f".{path.name}.new")


def replace_files(contents: Mapping[Path, bytes]) -> None:
    """Gives small files new content, by renames once all of it is written; a link in the way is not followed.

    Raises SlerpMergeError where the disk refuses; files that are not yet renamed are then as before.
    """
    fresh = {path: fresh_path(path) for path in contents}
    try:
        for path, content in contents.items():
            fresh[path].unlink(missing_ok=True)
            with open(fresh[path], "xb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
        for path, new in fresh.items():
            new.replace(path)
    except OSError as error:
        for new in fresh.values():
            with contextlib.suppress(OSError):
                new.unlink(missing_ok=True)
        raise explain_os_error(error, path, "write") from error


def file_size(path: Path) -> int:
    """A file's size in bytes. Raises SlerpMergeError where the system will not tell."""
    try:
        return path.stat().st_size
    except OSError as error:
        raise explain_os_error(error, path, "look at") from error


def check_path(path: Path, what: str) -> None:
    """Raises SlerpMergeError for a path that the system cannot even look for: absurdly long, or links in a ring."""
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        name = printable(shorten(str(path), 200))
        raise SlerpMergeError(f"The {what} {name} is no usable path: {reason}.", "Check the path.") from error


LEFT_BY_MACOS = "._*"  # beside each file, on disks that cannot keep its attributes


def matching_files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files and folders directly in a folder, where it is there, whose names match; in the order of the patterns.

    Raises SlerpMergeError where the folder cannot be listed, from which no file would else be missed.
    """
    try:
        paths = [path for path in sorted(folder.iterdir()) if not fnmatch.fnmatch(path.name, LEFT_BY_MACOS)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise explain_os_error(error, folder, "list") from error
    matching = ((pattern, path) for pattern in patterns for path in paths if fnmatch.fnmatch(path.name, pattern))
    return [path for pattern, path in matching if path.name != pattern or path.exists()]


def nested_files(folder: Path) -> Iterator[Path]:
    """Every file and folder below a folder; folders that are links are named and not entered.

    Raises SlerpMergeError where one cannot be listed.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise explain_os_error(error, Path(os.fsdecode(error.filename)), "list") from error

    for parent, folders, files in os.walk(folder, onerror=refuse):
        for name in (*folders, *files):
            if not fnmatch.fnmatch(name, LEFT_BY_MACOS):
                yield Path(parent, name)


class FileHandles:
    """Open files of one thread, the last MAX_OPEN_FILES that were asked for. Portable: no call that only POSIX has.

    Each `source` has a handle, and so a position, of its own: both parents may be the same file.
    """

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[Path, str, int], io.FileIO] = OrderedDict()

    def at(self, path: Path, mode: str, offset: int, source: int = 0) -> io.FileIO:
        """The file, unbuffered, standing at `offset` bytes. Raises OSError where it cannot be opened."""
        key = path, mode, source
        if key not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                self._open.popitem(last=False)[1].close()
            self._open[key] = self._opened(path, mode)
        self._open.move_to_end(key)
        self._open[key].seek(offset)
        return self._open[key]

    def _opened(self, path: Path, mode: str) -> io.FileIO:
        """A file, opened with as few others as a tight limit on open files asks for."""
        while True:
            try:
                return io.FileIO(path, mode)
            except OSError as error:
                if error.errno != errno.EMFILE or len(self._open) <= MOST_SOURCES:
                    raise
                self._open.popitem(last=False)[1].close()

    def close(self) -> None:
        """Closes them all; others can be opened afterwards.

        A disk that died says so once more here. Whoever read or wrote knows, and what was written is synced elsewhere.
        """
        while self._open:
            with contextlib.suppress(OSError):
                self._open.popitem()[1].close()


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path is a folder or lies somewhere below it."""
    return path == folder or folder in path.parents


def stays_within(path: Path, folder: Path) -> bool:
    """Whether a file of a model lies in its folder, links followed, or where a hub's cache keeps what it links to."""
    target = path.resolve()
    in_cache = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return in_cache or is_inside(target, folder.resolve())


def check_kind(path: Path) -> None:
    """Raises SlerpMergeError where a file of a model is a pipe or a device, or a link to a folder, perhaps its own."""
    if path.exists() and not (path.is_file() or is_plain_folder(path)):
        raise SlerpMergeError(f"{path} is neither a file nor a folder.", "Put the file itself in its place.")


def existing_folder(path: Path) -> Path:
    """The nearest folder above `path` that exists: where its bytes will come to lie."""
    return next(folder for folder in (path.resolve(), *path.resolve().parents) if folder.is_dir())


def is_plain_file(path: Path) -> bool:
    """Whether a path is a file itself, and no link, pipe or folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def is_plain_folder(path: Path) -> bool:
    """Whether a path is a folder itself, and no link to one."""
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except OSError:
        return False


def read_text_if_there(path: Path) -> str | None:
    """A small text file, or None; what is not UTF-8 shows as replacement characters."""
    return read_bytes(path).decode("utf-8", "replace") if path.is_file() else None


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk. Folders: where the system can.

    Raises SlerpMergeError where a file cannot be synced.
    """
    is_folder = is_plain_folder(path)
    if is_folder and os.name == "nt":
        return  # Windows has no call for it
    flags = os.O_RDONLY if is_folder else os.O_RDWR | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not is_folder:  # some network disks cannot sync a folder; the files themselves are safe
            raise explain_os_error(error, path, "write to the disk") from error


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies files by their paths from the folder `source`. Links are followed, as in a hub's cache.

    Folders that are made for them are a new folder's, whatever the source's may be written to by. Raises
    SlerpMergeError where one cannot be read or written.
    """
    for name in names:
        try:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        except OSError as error:
            raise explain_os_error(error, source / name, "copy") from error


def copy_matching(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies the files that match, and those in whole folders that do, as copy_files does; not what macOS leaves."""
    for path in matching_files(source, patterns):
        inside = (inner for inner in nested_files(path) if not inner.is_dir()) if path.is_dir() else (path,)
        wanted = (file for file in inside if not fnmatch.fnmatch(file.name, LEFT_BY_MACOS))
        copy_files(source, target, [file.relative_to(source).as_posix() for file in wanted])


def remove_folder(folder: Path) -> None:
    """Removes a folder and all in it, as far as the system lets; folders that may not be written to as well."""
    if not is_plain_folder(folder):
        return
    make_writable(folder)
    for parent, names, _ in os.walk(folder):
        for name in names:
            make_writable(Path(parent, name))
    with contextlib.suppress(OSError):  # of a folder that cannot be closed, which rmtree raises all the same
        shutil.rmtree(folder, ignore_errors=True)


def make_writable(folder: Path) -> None:
    """Lets the owner of a folder list it and remove what is in it, where the system lets us; of a link, nothing."""
    with contextlib.suppress(OSError):  # another person's: it stays
        if is_plain_folder(folder):
            folder.chmod(stat.S_IRWXU)
