"""Models on this machine, for Tab: looked for in the background, while the person reads and types.

Opens headers only, and never the network. What was merged last is known to history.py.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from questionary.prompts.path import GreatUXPathCompleter

from slerpkit.lazy import LazyModule, lazy_modules
from slerpkit.messages import SlerpMergeError, format_bytes, format_count, printable
from slerpkit.threads import BackgroundThread

if TYPE_CHECKING:
    from slerpkit import demo
    from slerpkit.parents import adapters, checkpoint, hub_cache, resolver
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity import check
else:  # not before the first prompt stands
    adapters, checkpoint = lazy_modules("slerpkit.parents", "adapters", "checkpoint")
    hub_cache, resolver = lazy_modules("slerpkit.parents", "hub_cache", "resolver")
    check, demo = LazyModule("slerpkit.parity.check"), LazyModule("slerpkit.demo")

FOUND_LEVELS = 2  # folders below the current one that are looked into for models
FOUND_ENTRIES = 2000  # entries of folders that are looked at, at most
TELL_SECONDS = 0.3  # between two tellings that there are more models


class ModelFinder:
    """Looks, in the background, for models on this machine: recent ones, folders hereabouts, the hub's cache."""

    def __init__(self, recent: Sequence[Path]) -> None:
        self.recent = recent
        self.models: list[Checkpoint] = []
        self.is_looking = True
        self.on_change: Callable[[], object] = lambda: None  # told, in the finder's thread, of more models and the end
        self.primary: Path | None = None  # once it is answered, what fits it comes first
        self.adapter_bases: dict[Path, Path] = {}  # as MergeRecipe.adapter_bases; the wizard's
        self._reasons: dict[tuple[Path, Path], str | None] = {}  # by primary and other

    def start(self) -> None:
        """Begins to look; the person reads and types meanwhile."""

        def look() -> None:
            with contextlib.suppress(OSError, ImportError):  # what cannot be looked for can still be typed
                self._look()

        with contextlib.suppress(SlerpMergeError):
            BackgroundThread(look)

    def _look(self) -> None:
        try:
            self._find_models()
        finally:
            self.is_looking = False
            self.on_change()

    def _find_models(self) -> None:
        seen, told = set(), time.monotonic()
        for folder in self._folders():
            with contextlib.suppress(OSError, SlerpMergeError):
                real = folder.resolve()
                if real not in seen and any(
                    (folder / name).is_file() for name in ("config.json", adapters.CONFIG_NAME)
                ):
                    seen.add(real)
                    if (model := checkpoint.open_if_whole(folder)) is not None:
                        self.models.append(model)
                        self.incompatibility_of(model)
                        if time.monotonic() - told > TELL_SECONDS:
                            told = time.monotonic()
                            self.on_change()

    def _folders(self) -> Iterator[Path]:
        return (folder for folder in self._all_folders() if folder.name not in demo.DEMO_MODELS)

    def _all_folders(self) -> Iterator[Path]:
        yield from self.recent
        yield from folders_below(Path(), FOUND_LEVELS)
        yield from folders_below(Path("models"), FOUND_LEVELS)
        for named in hub_cache.cached_names():
            if named.snapshot is not None:
                yield named.snapshot

    def incompatibility_of(self, model: Checkpoint) -> str | None:
        """Why a found model cannot be merged with the primary; None where it can, or where there is no primary yet."""
        if self.primary is None:
            return None
        key = self.primary, model.folder
        if key not in self._reasons:
            primary = checkpoint.open_if_whole(self.primary, self.adapter_bases.get(self.primary))
            self._reasons[key] = check.incompatibility(primary, model) if primary is not None else None
        return self._reasons[key]

    def offers(self, text: str) -> list[tuple[str, str]]:
        """(what to type, what it is) of found models whose name holds `text`; those that fit the primary first."""
        offers = []
        for model in list(self.models):
            name, reason = resolver.short_name(model.folder), self.incompatibility_of(model)
            if text.lower() in name.lower():
                count, size = format_count(model.parameter_count), format_bytes(model.byte_count)
                size = f"{count} {model.dtypes[0]} {size}"
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


class ModelCompleter(Completer):
    """Completes paths of folders, and where there is a finder the models that it found."""

    def __init__(self, finder: ModelFinder | None) -> None:
        self.finder = finder
        self.paths = GreatUXPathCompleter(only_directories=True, expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        """Found models first, then folders; hidden ones only where a dot was typed."""
        text = document.text_before_cursor
        bare = text[1:] if text[:1] in ("'", '"') else text  # a quote before a pasted path
        offers = self.finder.offers(bare) if self.finder is not None else []
        for name, what in offers:
            yield Completion(name, -len(text), display=shortened(printable(name)), display_meta=printable(what))
        for path in self.paths.get_completions(Document(bare), event):
            whole = (bare[: len(bare) + path.start_position] + path.text).rstrip("/\\")
            is_hidden = Path(whole).name.startswith(".") and not bare.rpartition("/")[2].startswith(".")
            if whole not in dict(offers) and not is_hidden:
                yield path
