"""Models on this machine, for Tab; what is remembered from the last merge."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import read_json_if_there, write_json
from slerpkit.messages import SlerpMergeError, format_bytes, format_count, printable
from slerpkit.parents.checkpoint import open_if_whole, short_name
from slerpkit.parity.check import incompatibility

if TYPE_CHECKING:
    from prompt_toolkit.completion import Completer

    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.recipe import MergeRecipe, RunOptions

FOUND_LEVELS = 2  # folders below the current one that are looked into for models
FOUND_ENTRIES = 2000  # entries of folders that are looked at, at most


class ModelFinder:
    """Looks, in the background, for models on this machine: last used places, folders hereabouts, the hub's cache."""

    def __init__(self, places: Sequence[Path]) -> None:
        self.places = places
        self.found: list[Checkpoint] = []
        self.primary: Path | None = None  # once it is answered, what fits it comes first
        self._misfits: dict[tuple[Path, Path], str | None] = {}
        self._thread = threading.Thread(target=self._look, name="finder", daemon=True)

    def start(self) -> None:
        """Begins to look; the person reads and types meanwhile."""
        self._thread.start()

    def _look(self) -> None:
        seen = set()
        for folder in self._folders():
            with contextlib.suppress(OSError, SlerpMergeError):
                real = folder.resolve()
                if real not in seen and (folder / "config.json").is_file():
                    seen.add(real)
                    if (checkpoint := open_if_whole(folder)) is not None:
                        self.found.append(checkpoint)
                        self.incompatibility_of(checkpoint)

    def _folders(self) -> Iterator[Path]:
        yield from self.places
        yield from folders_below(Path(), FOUND_LEVELS)
        yield from folders_below(Path("models"), FOUND_LEVELS)
        from huggingface_hub import constants, scan_cache_dir

        cache = Path(constants.HF_HUB_CACHE)
        if not cache.is_dir():
            return
        try:
            repositories = scan_cache_dir(cache).repos
        except Exception:  # whatever is wrong with a cache, a model in it can still be typed
            return
        for repository in sorted(repositories, key=lambda repository: repository.repo_id):
            if repository.repo_type == "model":
                snapshots = sorted(repository.revisions, key=lambda revision: -revision.last_modified)
                whole = (revision.snapshot_path for revision in snapshots if open_if_whole(revision.snapshot_path))
                yield from itertools.islice(whole, 1)

    def incompatibility_of(self, checkpoint: Checkpoint) -> str | None:
        """Why a found model cannot be merged with the primary; None where it can, or where there is no primary yet."""
        if self.primary is None:
            return None
        key = self.primary, checkpoint.folder
        if key not in self._misfits:
            primary = open_if_whole(self.primary)
            self._misfits[key] = incompatibility(primary, checkpoint) if primary is not None else None
        return self._misfits[key]

    def offers(self, text: str) -> list[tuple[str, str]]:
        """(what to type, what it is) of found models whose name holds `text`; those that fit the primary first."""
        offers = []
        for checkpoint in list(self.found):
            name, reason = short_name(checkpoint.folder), self.incompatibility_of(checkpoint)
            if text.lower() in name.lower():
                count, size = format_count(checkpoint.parameter_count), format_bytes(checkpoint.byte_count)
                size = f"{count} {checkpoint.dtypes[0]} {size}"
                offers.append((reason is not None, name, f"{reason}; {size}" if reason else size))
        return [(name, what) for _, name, what in sorted(offers)]


MAX_NAME_COLUMNS = 40  # in a menu, so that what stands beside it has room


def shortened(name: str) -> str:
    """A name for a menu, its middle left out where it is long."""
    half = MAX_NAME_COLUMNS // 2
    return name if len(name) <= MAX_NAME_COLUMNS else f"{name[: half - 1]}...{name[2 - half :]}"


def folders_below(folder: Path, levels: int) -> Iterator[Path]:
    """A folder, and the folders below it down to some levels; hidden ones are left out."""
    if not folder.is_dir():
        return
    yield folder
    if levels:
        with contextlib.suppress(OSError):
            for path in sorted(itertools.islice(folder.iterdir(), FOUND_ENTRIES)):
                if path.is_dir() and not path.name.startswith("."):
                    yield from folders_below(path, levels - 1)


def model_completer(finder: ModelFinder | None) -> Completer:
    """Completes paths, and where there is a finder the models that it found."""
    from prompt_toolkit.completion import Completer, Completion
    from prompt_toolkit.document import Document
    from questionary.prompts.path import GreatUXPathCompleter

    paths = GreatUXPathCompleter(only_directories=True, expanduser=True)

    class ModelCompleter(Completer):
        def get_completions(self, document: Any, event: Any) -> Iterator[Any]:
            text = document.text_before_cursor
            bare = text[1:] if text[:1] in ("'", '"') else text  # a quote before a pasted path
            offers = finder.offers(bare) if finder is not None else []
            for name, what in offers:
                yield Completion(name, -len(text), display=shortened(printable(name)), display_meta=printable(what))
            for path in paths.get_completions(Document(bare), event):
                whole = (bare[: len(bare) + path.start_position] + path.text).rstrip("/\\")
                is_hidden = Path(whole).name.startswith(".") and not bare.rpartition("/")[2].startswith(".")
                if whole not in dict(offers) and not is_hidden:
                    yield path

    return ModelCompleter()


def settings_folder() -> Path:
    """Where this person's programs keep their settings, as the system has it."""
    if os.name == "nt":
        base = Path(os.environ.get("APPDATA") or Path.home() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return base / "slerpmerge"


class History:
    """The folders and the blend of the last merge, to be offered again. Nothing else, and nowhere else."""

    max_places = 12

    def __init__(self) -> None:
        self.path = settings_folder() / "settings.json"
        try:
            self.content = read_json_if_there(self.path)
        except SlerpMergeError:  # a torn file is no loss
            self.content = {}

    def folder(self, name: str) -> Path | None:
        """A remembered folder, where it is still there."""
        value = self.content.get(name)
        return Path(value) if isinstance(value, str) and Path(value).is_dir() else None

    @property
    def places(self) -> list[Path]:
        """Models used of late, the last first."""
        values = self.content.get("places")
        return [Path(value) for value in values if isinstance(value, str)] if isinstance(values, list) else []

    def remember(self, recipe: MergeRecipe, options: RunOptions, blend: str | None) -> None:
        """Keeps what a merge was made of. A disk that does not take it is no reason to stop."""
        used = [folder.resolve() for folder in (recipe.primary, recipe.secondary)]
        places = [*used, options.save_directory.resolve(), *(place for place in self.places if place not in used)]
        content = {
            "primary": str(used[0]),
            "secondary": str(used[1]),
            "blend": blend or self.content.get("blend"),
            "places": list(dict.fromkeys(map(str, places)))[: self.max_places],
        }
        with contextlib.suppress(OSError, SlerpMergeError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content)

    def forget(self) -> bool:
        """Removes what was remembered; whether there was anything."""
        try:
            self.path.unlink()
        except FileNotFoundError:
            return False
        return True
