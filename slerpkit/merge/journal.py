"""Which files of an unfinished child are finished, and for what merge they were made.

Knows files and fingerprints; nothing of workers, and nothing of torch: who asks says which devices there are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit import __version__
from slerpkit.files import fresh_path, is_plain_file, is_plain_folder, read_bytes, replace_files
from slerpkit.maths import TensorWeights
from slerpkit.merge.save_directory import staged_folders
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import explain_os_error
from slerpkit.parents.checkpoint import stat_items

if TYPE_CHECKING:
    from slerpkit.merge.tensor_plan import ShardPlan
    from slerpkit.parents.checkpoint import Parents
    from slerpkit.recipe import MergeRecipe, RunOptions

JOURNAL_NAME = "journal.json"
# What people call a setting whose name is another.
WORDS = {"schedule": "t", "vectors": "the granularity", "max_shard_bytes": "the largest size of a file"}
MAX_JOURNAL_BYTES = 64_000_000  # some hundred for each tensor; the largest models have a thousandth of them


def merge_fingerprint(
    recipe: MergeRecipe, options: RunOptions, parents: Parents, shards: Sequence[ShardPlan]
) -> dict[str, Any]:
    """All that the bits of the child's files depend on, as JSON can hold it."""
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe)}
    for name in ("accept", "chat_template", "origin"):  # they change no weight
        del values[name]
    values["adapter_bases"] = {role: str(model.folder.resolve()) for role, model in parents.by_folder.items()}
    settings = {"device": options.device, "max_shard_bytes": options.max_shard_bytes}
    return {
        "version": __version__,
        "recipe": {
            name: str(value.resolve()) if isinstance(value, Path) else repr(value)
            for name, value in {**values, **settings}.items()
        },
        "parents": {
            # The folder of a model from the Hub names its commit, which says all.
            role: {name: list(stat) for name, stat in parent.file_stats.items() if parent.hub_name is None}
            for role, parent in parents.by_folder.items()
        },
        "layout": hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest(),
    }


def fingerprint_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why files made for one fingerprint are of no use for another, in words; None where they are."""
    if before["version"] != now["version"]:
        return f"slerpmerge {before['version']} began it"
    for name, value in now["recipe"].items():
        if before["recipe"].get(name) != value:
            return f"{WORDS.get(name, f'the {name}').replace('_', ' ')} was different"
    for role, file_stats in now["parents"].items():
        changed = [name for name, _ in stat_items(file_stats) ^ stat_items(before["parents"].get(role, {}))]
        if changed:
            return f"the {role}'s {min(changed)} has changed since"
    return None if before["layout"] == now["layout"] else "its files were laid out differently"


@dataclass(frozen=True)
class Leftover:
    """What a run that ended early left for this one."""

    kept_files: tuple[str, ...]  # finished files of weights that are taken over
    total: int
    reason: str  # why none is, or nothing
    device: str = "cpu"  # where they were made

    @property
    def kept(self) -> int:
        return len(self.kept_files)

    def describe(self) -> str:
        if self.reason:
            return f"An unfinished child stands there and gives way: {self.reason}."
        return f"{self.kept} of {self.total} files of an earlier run {'is' if self.kept == 1 else 'are'} kept."


class Journal:
    """Which files of an unfinished child are finished and on the disk, and for what recipe and parents they were made.

    One JSON object, replaced as a whole by one rename, so that it is never torn.
    """

    def __init__(self, area: Path, fingerprint: Mapping[str, Any], shards: Sequence[ShardPlan]) -> None:
        self.path = area / JOURNAL_NAME
        self.folder = next(iter(staged_folders(area)), area)  # of the child; a run that takes it over moves it
        self.shards = {shard.file_name: shard for shard in shards}
        self.fingerprint = fingerprint
        self.device = ""  # where the arithmetic ran; another could round differently
        self.finished: dict[str, list[MergedTensor]] = {}
        self._file_stats: dict[str, tuple[int, int]] = {}

    def leftover(self, is_available: Callable[[str], bool]) -> Leftover | None:
        """What stands of an earlier run; None where nothing does. Changes nothing on the disk."""
        if not is_plain_file(self.path):
            return None
        reason = self.load(is_available)
        return Leftover(tuple(self.finished), len(self.shards), reason, self.device or "cpu")

    def load(self, is_available: Callable[[str], bool]) -> str:
        """Takes over the finished files that an earlier run left; returns why there are none, or nothing.

        is_available: tells whether a device is there. Raises SlerpMergeError where the disk does not let it be read.
        """
        if not is_plain_file(self.path):
            return "it has no journal"
        try:
            content = json.loads(read_bytes(self.path, MAX_JOURNAL_BYTES))
            if (reason := fingerprint_difference(content["fingerprint"], self.fingerprint)) is not None:
                return reason
            files = {name: (entry["stat"], self.read_tensors(name, entry)) for name, entry in content["files"].items()}
            device = str(content["device"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "its journal cannot be read"
        if not is_available(device):
            return f"it was begun on {device}, which is not there now"
        self.device = device
        for name, (stat, merged) in files.items():
            if is_plain_file(self.folder / name) and list(self.file_stat(name)) == stat:
                self._file_stats[name], self.finished[name] = self.file_stat(name), merged
        return "" if self.finished else "none of its files was finished"

    def read_tensors(self, file_name: str, entry: Mapping[str, Any]) -> list[MergedTensor]:
        """The tensors of a finished file as they were recorded. Raises ValueError and the like where that is not so."""
        tensors = {tensor.name: tensor for tensor in self.shards[file_name].tensors}
        merged = []
        for name, (first, second, operation, reason, angle, norms), seconds, non_finite in entry["tensors"]:
            angle = None if angle is None else float(angle)
            norms = None if norms is None else (float(norms[0]), float(norms[1]))
            weights = TensorWeights(float(first), float(second), str(operation), str(reason), angle, norms)
            merged.append(MergedTensor(tensors.pop(name), weights, float(seconds), int(non_finite)))
        if tensors:
            raise ValueError("tensors are missing")
        return merged

    def file_stat(self, file_name: str) -> tuple[int, int]:
        """(bytes, nanoseconds of the last change) of a file of the child."""
        status = (self.folder / file_name).lstat()
        return status.st_size, status.st_mtime_ns

    def add(self, file_name: str, tensors: Sequence[MergedTensor]) -> None:
        """Records a file that is on the disk. Raises SlerpMergeError where the disk refuses."""
        try:
            self._file_stats[file_name] = self.file_stat(file_name)
        except OSError as error:
            raise explain_os_error(error, self.folder / file_name, "look at") from error
        self.finished[file_name] = list(tensors)
        files = {
            name: {
                "stat": list(self._file_stats[name]),
                "tensors": [
                    [m.tensor.name, dataclasses.astuple(m.weights), m.seconds, m.non_finite]
                    for m in self.finished[name]
                ],
            }
            for name in self.finished
        }
        content = {"fingerprint": self.fingerprint, "device": self.device, "files": files}
        try:
            replace_files({self.path: json.dumps(content).encode()})
        except BaseException:
            del self.finished[file_name]
            raise

    def remove(self) -> None:
        """Removes the journal, whatever stands in its place, and what a run that was killed wrote for it."""
        for path in (self.path, fresh_path(self.path)):
            if is_plain_folder(path):
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
