"""Models of the Hugging Face Hub by name, and where the library's cache on this machine has them.

Reads folder names and refs, as huggingface_hub lays them out, never the network. What a model's folder holds is not
known here. https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import read_bytes
from slerpkit.lazy import huggingface_hub

if TYPE_CHECKING:
    from slerpkit.parents.tensors import TensorInfo

MAIN = "main"  # the branch that a bare name means
NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
NAME_AND_REVISION = re.compile(rf"({NAME.pattern})(?:@([\w.][\w./-]*))?")
COMMIT = re.compile(r"[0-9a-f]{40}")
MAX_REF_BYTES = 1000


@dataclass(frozen=True)
class HubName:
    """A model as people name it: org/name, or org/name@revision, which is a branch, a tag or a commit."""

    name: str
    revision: str | None = None  # None: its main branch

    def __str__(self) -> str:
        return self.name if self.revision is None else f"{self.name}@{self.revision}"

    @property
    def folder(self) -> Path:
        """The model's folder in the cache, whether it is there or not."""
        return Path(huggingface_hub.constants.HF_HUB_CACHE) / f"models--{self.name.replace('/', '--')}"

    def snapshot_of(self, commit: str) -> Path:
        """The folder where the cache has, or will have, the files of a commit."""
        return self.folder / "snapshots" / commit

    @property
    def cached_commit(self) -> str | None:
        """The commit that the revision means, as the cache knows it; None where it has no folder for that."""
        revision = self.revision or MAIN
        ref = self.folder / "refs" / revision
        is_ref = ".." not in ref.parts and ref.is_file()
        commit = read_bytes(ref, MAX_REF_BYTES).decode("utf-8", "replace").strip() if is_ref else revision
        return commit if COMMIT.fullmatch(commit) and self.snapshot_of(commit).is_dir() else None

    @property
    def snapshot(self) -> Path | None:
        """The folder of that commit in the cache; None where there is none."""
        commit = self.cached_commit
        return self.snapshot_of(commit) if commit is not None else None

    @property
    def cached_commits(self) -> list[str]:
        """Every commit that the cache has a folder for."""
        folder = self.folder / "snapshots"
        return sorted(path.name for path in folder.iterdir() if COMMIT.fullmatch(path.name)) if folder.is_dir() else []


def parse_hub_name(text: str, revision: str | None = None) -> HubName | None:
    """`org/name` or `org/name@revision`; None for what is no such name. revision: where it is said apart."""
    match = NAME_AND_REVISION.fullmatch(text)
    if match is None or ".." in text:
        return None
    return HubName(match[1], match[2] or revision)


def name_of_snapshot(folder: Path) -> HubName | None:
    """The name and the commit of a folder inside the cache, models--org--name/snapshots/commit; None elsewhere."""
    for inner, outer in zip((folder, *folder.parents), folder.parents):
        if outer.name == "snapshots" and outer.parent.name.startswith("models--"):
            return HubName(outer.parent.name[len("models--") :].replace("--", "/"), inner.name)
    return None


@dataclass(frozen=True)
class RemoteModel:
    """What the Hub has of a model at one commit, as far as it was looked up: its weights are not read for that."""

    named: HubName  # with its commit
    sizes: Mapping[str, int]  # bytes of every file that a merge may need, by its path in the repository
    weights: Mapping[str, Mapping[str, TensorInfo]]  # the tensors of each file of weights, from its header

    @property
    def folder(self) -> Path:
        """Where the cache has its files, or will have them."""
        return self.named.snapshot_of(self.named.revision or "")

    @property
    def awaited(self) -> dict[str, int]:
        """Bytes of each file of weights that is not on this machine yet."""
        return {name: self.sizes[name] for name in self.weights if not (self.folder / name).is_file()}


# What this process has looked up, by the folder that it is for: asked once, however often a model is opened.
REMOTE_MODELS: dict[Path, RemoteModel] = {}


def cached_names() -> Iterator[HubName]:
    """Every model that the cache has, by its bare name where its main branch is there, else at each commit."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    for folder in sorted(cache.glob("models--*--*")) if cache.is_dir() else ():
        named = HubName(folder.name[len("models--") :].replace("--", "/"))
        if named.snapshot is not None:
            yield named
        else:
            yield from (HubName(named.name, commit) for commit in named.cached_commits)


def public_name(folder: Path, config: Mapping[str, Any]) -> str:
    """What people call the model of a folder: org/name where the place or the config tells, else its name."""
    if (named := name_of_snapshot(folder)) is not None:
        return named.name
    claimed = config.get("_name_or_path")
    if isinstance(claimed, str) and NAME.fullmatch(claimed) and claimed.endswith("/" + folder.name):
        return claimed
    return folder.name
