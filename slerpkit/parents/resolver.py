"""A model by whatever people call it: a folder, a file in it, an address, or a name on the Hugging Face Hub.

What is found is a folder; whether it holds a whole model is not known here. Read hub_cache.py before this.
"""

from __future__ import annotations

import contextlib
import os
import re
import urllib.parse
from collections.abc import Callable
from pathlib import Path

from slerpkit.files import clean_path
from slerpkit.lazy import huggingface_hub
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.hub_cache import HubName, name_of_snapshot, parse_hub_name

ADDRESS = re.compile(r"(\w[\w+.-]+)://([^/]*)(.*)", re.DOTALL)  # scheme, host, path
HUB_HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
PLACES_IN_A_REPOSITORY = ("tree", "blob", "resolve", "commit", "raw")  # what stands before a revision in an address
FILES_OF_A_MODEL = (".safetensors", ".bin", ".json")


def find_model(text: str, revision: str | None = None, read: Callable[[str], Path] = clean_path) -> Path:
    """A model's folder as people type it: a path, an address, or a name whose model is in the Hugging Face cache.

    A file of a model means its folder. A name that the cache does not have comes back as `org/name@revision`; what is
    neither a name nor there, as the path that it would be. revision: of a name, where it is said apart. read: what
    makes a path of a text. Raises SlerpMergeError for an address that leads to no model.
    """
    bare = text.strip().strip("'\"")
    if bare.lower().startswith(tuple(f"{host}/" for host in HUB_HOSTS)) and not os.path.lexists(bare):
        bare = f"https://{bare}"  # as some browsers copy it
    text = bare if "://" in bare else text
    if (address := ADDRESS.fullmatch(text)) is not None:
        if address[1].lower() != "file":
            named = name_in_address(*address.groups())
            return named.snapshot or Path(str(named))
        text = path_in_address(address[3])
    path = read(text)
    # As it stands; as Windows writes it; as it is completed behind a quote that was opened and not closed.
    for place in (path, Path(str(path).replace("\\", "/")), Path(str(path).lstrip("'\""))):
        with contextlib.suppress(OSError, ValueError):  # no usable path; whoever opens it says why
            if place.exists():
                is_file_of_model = place.is_file() and place.suffix in FILES_OF_A_MODEL
                return place.parent if is_file_of_model else place
    if (named := parse_hub_name(path.as_posix(), revision)) is not None:
        return named.snapshot or Path(str(named))
    return path


def name_in_address(scheme: str, host: str, path: str) -> HubName:
    """The model that a page of the hub shows. Raises SlerpMergeError for any other address."""
    hosts = {*HUB_HOSTS, urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT).netloc.lower()}
    parts = [urllib.parse.unquote(part) for part in re.split("[?#]", path)[0].split("/") if part]
    named = parse_hub_name("/".join(parts[:2]))
    if host.lower() not in hosts or named is None or parts[0] in ("datasets", "spaces"):
        hint = "Give a folder, or the org/name of a model on the Hugging Face Hub."
        raise SlerpMergeError(f"{scheme}://{host}{path} is an address, and no model.", hint)
    is_at_revision = len(parts) > 3 and parts[2] in PLACES_IN_A_REPOSITORY
    return HubName(named.name, parts[3]) if is_at_revision else named


def path_in_address(path: str) -> str:
    """The path of a file:// address; on Windows without the slash before its drive."""
    path = urllib.parse.unquote(path)
    return path.lstrip("/") if os.name == "nt" else path


def hub_name_of(folder: Path) -> HubName | None:
    """The name of a model that was asked for by name: with its commit in the cache, as it was typed where it is not.

    None for a folder of this machine.
    """
    if (named := name_of_snapshot(folder)) is not None:
        return named
    # What the system cannot even look for is not there either.
    return parse_hub_name(folder.as_posix()) if not os.path.exists(folder) else None  # noqa: PTH110


def short_name(folder: Path) -> str:
    """The shortest text that finds a model again: org/name in the cache, a path from here, or its whole path."""
    named = hub_name_of(folder)
    if named is not None:
        bare = HubName(named.name)
        if bare.snapshot == folder:
            return bare.name
        if named.snapshot in (folder, None):
            return str(named)
    with contextlib.suppress(ValueError):
        return str(folder.resolve().relative_to(Path.cwd()))
    return str(folder)
