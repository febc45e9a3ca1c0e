"""Brings parents' weights from the Hub: all of them before a merge, or file by file as the merge comes to them.

In the second case each file is dropped when no tensor needs it any more, so that a disk holds the child and a few
files. How a file is fetched is parents/hub_download.py's business; the order of tensors is the plan's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from slerpkit.files import existing_folder, nested_files
from slerpkit.lazy import huggingface_hub
from slerpkit.merge.events import WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.save_directory import free_bytes
from slerpkit.messages import SlerpMergeError, format_bytes
from slerpkit.parents.hub_download import fetch_files

if TYPE_CHECKING:
    from slerpkit.merge.events import Observer
    from slerpkit.merge.tensor_plan import MergedTensor, TensorPlan
    from slerpkit.parents.checkpoint import Checkpoint, Parents
    from slerpkit.parents.hub_cache import RemoteModel


def awaited_models(parents: Parents) -> list[RemoteModel]:
    """The models whose weights are not all here, each once."""
    remotes = (model.remote for model in parents.by_role.values())
    return list({remote.folder: remote for remote in remotes if remote is not None}.values())


def download_bytes(models: Iterable[Checkpoint]) -> int:
    """Bytes of weights that are still to be fetched."""
    awaited = {model.companion_folder: model.awaited for model in models}  # two adapters may have one base
    return sum(sum(sizes.values()) for sizes in awaited.values())


def fetch_parents(parents: Parents, observe: Observer) -> None:
    """Fetches all weights that are not here. Raises SlerpMergeError as fetch_files does; whole files are kept."""
    for remote in awaited_models(parents):
        awaited = remote.awaited
        observe(WorkBegan(f"Fetching {remote.named.name}", sum(awaited.values()), unit="bytes"))
        try:
            fetch_files(remote, list(awaited), lambda amount: observe(WorkAdvanced(amount)))
        finally:
            observe(WorkEnded())


class DiskTooSmall(SlerpMergeError):
    """What is to be fetched does not fit beside the child. can_stream: it would, file by file."""

    def __init__(self, message: str, hint: str, can_stream: bool) -> None:
        super().__init__(message, hint)
        self.can_stream = can_stream


def check_download_space(
    fetched: int, streamed: int, child_bytes: int, save_directory: Path, is_streamed: bool
) -> None:
    """Raises DiskTooSmall where the parents' files do not fit on the disk of the library's cache.

    fetched: bytes that come from the Hub. streamed: of these, on the disk at once where they are streamed.
    """
    if not fetched:
        return
    cache = existing_folder(Path(huggingface_hub.constants.HF_HUB_CACHE))
    free = free_bytes(cache)
    beside = child_bytes if cache.stat().st_dev == existing_folder(save_directory).stat().st_dev else 0
    needed = streamed if is_streamed else fetched
    if free is None or needed + beside <= free:
        return
    can_stream = not is_streamed and streamed + beside <= free
    child = f" and the child's {format_bytes(beside)}" if beside else ""
    streaming = f"Add --stream-parents, which takes {format_bytes(streamed)} of it at once. " if can_stream else ""
    raise DiskTooSmall(
        f"The parents' {format_bytes(needed)}{child} do not fit into the {format_bytes(free)} free at {cache}.",
        f"{streaming}Free some space, or set HF_HOME to a folder on another disk.",
        can_stream,
    )


def streamed_sizes(parents: Parents) -> dict[Path, int]:
    """Bytes of every file that a streamed merge fetches and drops."""
    return {remote.folder / name: remote.sizes[name] for remote in awaited_models(parents) for name in remote.weights}


def last_uses(tensors: Iterable[TensorPlan]) -> dict[Path, int]:
    """The number, in the child's order, of the last tensor that each file of a parent is needed for."""
    return {source.file: number for number, tensor in enumerate(tensors) for source in tensor.sources}


def peak_parent_bytes(tensors: Sequence[TensorPlan], sizes: dict[Path, int]) -> int:
    """Bytes of parents' files that a streamed merge has on the disk at its worst moment.

    sizes: of the files that are fetched and dropped.
    """
    last_use, held, peak = last_uses(tensors), set(), 0
    for number, tensor in enumerate(tensors):
        needed = {source.file for source in tensor.sources} & sizes.keys()
        if not needed <= held:
            held = {file for file in held if last_use[file] >= number} | needed
            peak = max(peak, sum(sizes[file] for file in held))
    return peak


class StreamedSupply:
    """The files of parents on the Hub, fetched when a tensor needs them and dropped after the last one that does.

    check: holds tensors that are done against their parents, for which these must still be there. release: has
    whoever reads them close them.
    """

    def __init__(
        self,
        parents: Parents,
        tensors: Sequence[TensorPlan],
        check: Callable[[Sequence[MergedTensor]], tuple[int, int]],
        release: Callable[[], None],
        observe: Observer,
    ) -> None:
        self.observe = observe
        self.release = release
        self.check = check
        self.remotes = {remote.folder / name: remote for remote in awaited_models(parents) for name in remote.weights}
        self.last_use = last_uses(tensors)
        self.unchecked: list[MergedTensor] = []
        self.checked = (0, 0)  # tensors recomputed whole, and stretches of others
        self.shard_name: str | None = None

    def bytes_to_fetch(self, tensors: Iterable[TensorPlan]) -> int:
        """Bytes that must come from the Hub for some tensors."""
        files = {source.file for tensor in tensors for source in tensor.sources} & self.remotes.keys()
        return sum(self.remotes[file].sizes[file.name] for file in files if not file.is_file())

    def is_ready(self, tensor: TensorPlan, number: int, shard_name: str, is_idle: bool) -> bool:
        """Whether a tensor can begin: its files are here. Where nothing is under way, they are brought.

        A new file of the child waits for the one before it, so that this is checked before it is called finished.
        Raises SlerpMergeError where a file cannot be fetched.
        """
        missing = sorted(f for f in {source.file for source in tensor.sources} & self.remotes.keys() if not f.is_file())
        if not missing and shard_name == self.shard_name:
            return True
        if is_idle:
            self.shard_name = shard_name
            self.check_done()
            self.drop(number)
            for file in missing:
                fetch_files(self.remotes[file], [file.name], lambda amount: self.observe(WorkAdvanced(amount)))
        return is_idle

    def check_done(self) -> None:
        """Has what is done checked while its parents' files are here. Raises SlerpMergeError where it is wrong."""
        done, self.unchecked = self.unchecked, []
        if done:
            whole, stretches = self.check(done)
            self.checked = self.checked[0] + whole, self.checked[1] + stretches

    def drop(self, number: int | None = None) -> None:
        """Drops the files that no tensor from this number on needs; all of them where none is given."""
        unneeded = [file for file in self.remotes if number is None or self.last_use.get(file, -1) < number]
        if dropped := [file for file in unneeded if file.is_file()]:
            self.release()
            for file in dropped:
                drop_file(file)


def drop_file(file: Path) -> None:
    """Removes a file of a snapshot from the cache, and what it links to there unless another snapshot does too."""
    blob, snapshots = file.resolve(), file.parent.parent
    with contextlib.suppress(OSError):  # it takes room, and harms nothing
        file.unlink()
        is_shared = any(path.is_symlink() and path.resolve() == blob for path in nested_files(snapshots))
        if blob.parent.name == "blobs" and not is_shared:
            blob.unlink()
