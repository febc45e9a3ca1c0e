"""Small files and folders: read within bounds, replaced by one rename, looked at without following links.

Every refusal of the operating system becomes a SlerpMergeError here. What a file means is not known. Read messages.py
before this.
"""

from __future__ import annotations

import contextlib
import io
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

MAX_OPEN_FILES = 16  # of one thread; a model can have hundreds of shards
MAX_JSON_BYTES = 16_000_000  # of a config or an index, which are read into memory several times their size


def clean_path(text: str) -> Path:
    """A path as people type or paste it: quotes, `~`, `$HOME`, spaces around it, escaped spaces."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    elif os.name != "nt":
        text = re.sub(r"\\([^\w\\])", r"\1", text)  # as a terminal pastes a dropped folder
    path = Path(os.path.expandvars(text))
    with contextlib.suppress(RuntimeError):  # nobody is called so: a folder's name may begin with ~ too
        return path.expanduser()
    return path


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
            "Download this file again from where the model comes from.",
        )
    return data


def parse_json(data: bytes, source: Path) -> Any:
    """JSON from a stranger's file. Raises SlerpMergeError for a name given twice, or nesting without end."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=dict_of_unique_names)
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise SlerpMergeError(f"{source} does not hold valid JSON: {reason}.", "Download this file again.") from error


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


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of at most MAX_JSON_BYTES. Raises SlerpMergeError where it holds none."""
    return parse_json_object(read_bytes(path), path)


def read_json_if_there(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty where there is none."""
    return read_json(path) if path.is_file() else {}


def read_json_list(path: Path) -> list[Any]:
    """A JSON list from a file of at most MAX_JSON_BYTES. Raises SlerpMergeError where it holds none."""
    value = parse_json(read_bytes(path), path)
    if not isinstance(value, list):
        raise SlerpMergeError(f"{path} holds no JSON list.", "Download this file again.")
    return value


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """A small JSON file, as people like to read it."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A small text file, UTF-8. Raises SlerpMergeError where the disk refuses."""
    try:
        # Half a surrogate pair from a stranger's config stays the escape it was.
        path.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
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


def nested_files(folder: Path) -> Iterator[Path]:
    """Every file and folder below a folder; folders that are links are named and not entered."""
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
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
            self._open[key] = io.FileIO(path, mode)
        self._open.move_to_end(key)
        self._open[key].seek(offset)
        return self._open[key]

    def close(self) -> None:
        """Closes them all; others can be opened afterwards."""
        while self._open:
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
        raise SlerpMergeError(f"{path} is neither a file nor a folder.", "Remove it, or download the model again.")


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
    return path.is_dir() and not path.is_symlink()


def read_text_if_there(path: Path) -> str | None:
    """A small text file, or None; what is not UTF-8 shows as replacement characters."""
    return read_bytes(path).decode("utf-8", "replace") if path.is_file() else None


def sync_to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, is on the disk. Folders: where the system can.

    Raises SlerpMergeError where a file cannot be synced.
    """
    if path.is_dir() and os.name == "nt":
        return  # Windows has no call for it
    flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not path.is_dir():  # some network disks cannot sync a folder; the files themselves are safe
            raise explain_os_error(error, path, "write to the disk") from error


def copy_files(source: Path, target: Path, names: Iterable[str]) -> None:
    """Copies files by their paths from the folder `source`. Links are followed, as in a hub's cache.

    Raises SlerpMergeError where one cannot be read or written.
    """
    for name in names:
        try:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / name, target / name)
        except OSError as error:
            raise explain_os_error(error, source / name, "copy") from error


def copy_matching(source: Path, target: Path, patterns: Sequence[str]) -> None:
    """Copies the files, and whole folders, that match. Links are followed, as in a hub's cache.

    Raises SlerpMergeError where one cannot be read or written.
    """
    for pattern in patterns:
        for path in sorted(source.glob(pattern)):
            try:
                if path.is_dir():
                    shutil.copytree(path, target / path.name, copy_function=shutil.copyfile)
                else:
                    shutil.copyfile(path, target / path.name)
            except OSError as error:
                raise explain_os_error(error, path, "copy") from error


def free_path(stem: str, suffix: str = "") -> Path:
    """A path below the current folder where nothing stands: the stem itself, or the first number behind it."""
    numbered = (Path(f"{stem}-{number}{suffix}") for number in range(2, 1000))
    return next(path for path in (Path(f"{stem}{suffix}"), *numbered) if not os.path.lexists(path))
