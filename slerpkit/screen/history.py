"""What is remembered of the last merge: its folders and its blend, to be offered again. Nothing else, nowhere else.

Knows the file that it is kept in, and nothing of prompts; a torn file is no loss.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit.files import read_json_if_there, write_json
from slerpkit.lazy import LazyModule
from slerpkit.messages import SlerpMergeError
from slerpkit.screen.answers import Answers, Blend

if TYPE_CHECKING:
    from slerpkit.parents import resolver
    from slerpkit.recipe import MergeRecipe, RunOptions
else:  # only where something is remembered
    resolver = LazyModule("slerpkit.parents.resolver")

NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)


def home_folder() -> Path:
    """This person's own folder; for one who has none, as in some containers, a place where nothing is and can be."""
    with contextlib.suppress(RuntimeError):
        return Path.home()
    return Path(os.devnull)


def settings_folder() -> Path:
    """Where this person's programs keep their settings, as the system has it."""
    if os.name == "nt":
        base = Path(os.environ.get("APPDATA") or home_folder() / "AppData" / "Roaming")
    elif sys.platform == "darwin":
        base = home_folder() / "Library" / "Application Support"
    else:
        base = Path(os.environ.get("XDG_CONFIG_HOME") or home_folder() / ".config")
    return base / "slerpmerge"


def lasting_name(folder: Path) -> str:
    """What finds a model again from anywhere: its name on the Hub, else its whole path."""
    return resolver.short_name(folder) if resolver.hub_name_of(folder) is not None else str(folder.resolve())


def place_of(stored: object) -> Path | None:
    """The folder that was stored by its lasting name; None for what is no text, or no model's place."""
    if not isinstance(stored, str):
        return None
    try:
        return Path(stored) if Path(stored).is_absolute() else resolver.find_model(stored)
    except (SlerpMergeError, OSError, ValueError):  # from a stranger's hand
        return None


class History:
    """The folders and the blend of the last merge, to be offered again. Nothing else, and nowhere else."""

    max_recent = 12  # models

    def __init__(self) -> None:
        self.path = settings_folder() / "settings.json"
        try:
            self.content = read_json_if_there(self.path)
        except (SlerpMergeError, OSError):  # a torn file is no loss
            self.content = {}

    def answers(self) -> Answers:
        """The last models, which may be gone, and the last blend, in whatever words it was stored."""
        folders = {name: self.content.get(name) for name in ("primary", "secondary")}
        models = {name: found for name, path in folders.items() if (found := place_of(path)) is not None}
        blend = self.content.get("blend")
        return Answers(**models, blend=Blend(text=blend) if isinstance(blend, str) else None)

    @property
    def recent(self) -> list[Path]:
        """Models used of late, the last first; some may be gone."""
        values = self.content.get("places")
        values = values if isinstance(values, list) else []
        return [found for value in values if (found := place_of(value)) is not None]

    def remember(self, recipe: MergeRecipe, options: RunOptions, blend: str | None) -> None:
        """Keeps what a merge was made of. A disk that does not take it is no reason to stop."""
        with contextlib.suppress(OSError, SlerpMergeError):
            used = [lasting_name(folder) for folder in (recipe.primary, recipe.secondary)]
            recent = [*used, str(options.save_directory.resolve()), *map(lasting_name, self.recent)]
            content = {
                "primary": used[0],
                "secondary": used[1],
                "blend": blend or self.content.get("blend"),
                "places": list(dict.fromkeys(recent))[: self.max_recent],
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, content)

    def forget(self) -> bool:
        """Removes what was remembered; whether there was anything."""
        try:
            self.path.unlink()
        except OSError as error:
            if error.errno in NOTHING_THERE:
                return False
            raise
        with contextlib.suppress(OSError):  # something else may stand there
            self.path.parent.rmdir()
        return True
