"""Folders that are no whole model, and nearly: a download that was not finished, or a folder of models.

Says what such a folder is; that it is none was found by whoever asks. Read hub_cache.py before this.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from slerpkit.messages import SlerpMergeError, format_names
from slerpkit.parents.hub_cache import HubName, name_of_snapshot

NAMED_BELOW = 50  # models one level below a folder that is none, which its refusal may name


def folder_of_models(folder: Path) -> SlerpMergeError | None:
    """The refusal of a folder that is no model and holds some one level below; None for any other."""
    below = [path.parent.name for path in sorted(itertools.islice(folder.glob("*/config.json"), NAMED_BELOW))]
    if not below or (folder / "config.json").is_file():
        return None
    what = f"{folder} is no model itself; it holds {format_names(below)}."
    return SlerpMergeError(what, f"Give one of them: {folder / below[0]}")


def half_downloaded(folder: Path, error: SlerpMergeError) -> SlerpMergeError | None:
    """The refusal of a model in the cache that lacks files; None for what is no such model."""
    named = name_of_snapshot(folder)
    if named is None or "GGUF" in error.message:
        return None
    reason = error.message.replace(f"{folder}{os.sep}", "").replace(str(folder), "its folder").rstrip(".")
    if lost := sorted(path.name for path in folder.iterdir() if path.is_symlink() and not path.exists()):
        reason = f"what {format_names(lost)} lead to in the cache is not there any more"
    revision = "" if HubName(named.name).snapshot == folder else f" --revision {named.revision}"
    return SlerpMergeError(
        f"{named.name} is only half downloaded: {reason}.", f"Fetch the rest: hf download {named.name}{revision}"
    )
