"""Which files of an unfinished child are finished, and for what merge they were made."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit import __version__
from slerpkit.files import is_plain_file, read_bytes, sync_to_disk
from slerpkit.maths import TensorWeights
from slerpkit.merge.arithmetic import accelerators
from slerpkit.merge.events import MergedTensor
from slerpkit.merge.save_directory import staging_area
from slerpkit.messages import explain_os_error
from slerpkit.parents.checkpoint import stat_items
from slerpkit.parity.vocabulary import MAX_TOKENIZER_BYTES

if TYPE_CHECKING:
    from slerpkit.merge.plan import MergePlan

JOURNAL_NAME = "journal.json"


def merge_fingerprint(plan: MergePlan) -> dict[str, Any]:
    """All that the bits of the child's files depend on, as JSON can hold it."""
    import hashlib

    settled = (
        "save_directory",
        "threads",
        "overwrite",
        "restart",
        "chat_template",
        "recipe_file",
    )  # these change no weight
    values = {field.name: getattr(plan.recipe, field.name) for field in dataclasses.fields(plan.recipe)}
    recipe = {
        name: str(value.resolve()) if isinstance(value, Path) else repr(value)
        for name, value in values.items()
        if name not in settled
    }
    layout = hashlib.sha256(b"".join(shard.header for shard in plan.shards)).hexdigest()
    file_stats = {
        role: {name: list(stamp) for name, stamp in parent.file_stats.items()} for role, parent in plan.parents.items()
    }
    return {"version": __version__, "recipe": recipe, "parents": file_stats, "layout": layout}


def fingerprint_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Why files made for one identity are of no use for another, in words; None where they are."""
    if before["version"] != now["version"]:
        return f"slerpmerge {before['version']} began it"
    for name, value in now["recipe"].items():
        if before["recipe"].get(name) != value:
            return f"its {name.replace('_', ' ')} was another"
    for role, file_stats in now["parents"].items():
        changed = [name for name, _ in stat_items(file_stats) ^ stat_items(before["parents"].get(role, {}))]
        if changed:
            return f"the {role}'s {min(changed)} has changed since"
    return None if before["layout"] == now["layout"] else "its files were laid out differently"


class Journal:
    """Which files of an unfinished child are finished and on the disk, and for what recipe and parents they were made.

    One JSON object, replaced as a whole by one rename, with its own checksum: a torn one is as good as none.
    """

    def __init__(self, area: Path, plan: MergePlan) -> None:
        self.path = area / JOURNAL_NAME
        self.folder = area / "child"
        self.shards = {shard.file_name: shard for shard in plan.shards}
        self.identity = merge_fingerprint(plan)
        self.device = ""  # where the arithmetic ran; another could round differently
        self.finished: dict[str, list[MergedTensor]] = {}
        self._stamps: dict[str, tuple[int, int]] = {}

    def load(self) -> str:
        """Takes over the finished files that an earlier run left; returns why there are none, or nothing.

        Raises SlerpMergeError where the disk does not let it be read.
        """
        import hashlib

        if not is_plain_file(self.path):
            return "it has no journal"
        text, _, checksum = read_bytes(self.path, MAX_TOKENIZER_BYTES).rpartition(b"\n")
        if hashlib.sha256(text).hexdigest().encode() != checksum:
            return "its journal is torn"
        try:
            content = json.loads(text)
            if (reason := fingerprint_difference(content["identity"], self.identity)) is not None:
                return reason
            found = {name: (entry["stamp"], self.read_tensors(name, entry)) for name, entry in content["files"].items()}
            device = str(content["device"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return "its journal cannot be read"
        if device != "cpu" and not accelerators().get(device):
            return f"it was begun on {device}, which is not there now"
        self.device = device
        for name, (stamp, merged) in found.items():
            if is_plain_file(self.folder / name) and list(self.stamp(name)) == stamp:
                self._stamps[name], self.finished[name] = self.stamp(name), merged
        return "" if self.finished else "none of its files was finished"

    def read_tensors(self, file_name: str, entry: Mapping[str, Any]) -> list[MergedTensor]:
        """The tensors of a finished file as they were recorded. Raises ValueError and the like where that is not so."""
        jobs = {job.name: job for job in self.shards[file_name].jobs}
        merged = []
        for name, (first, second, rule, reason, angle, norms), seconds, non_finite in entry["tensors"]:
            angle = None if angle is None else float(angle)
            norms = None if norms is None else (float(norms[0]), float(norms[1]))
            blend = TensorWeights(float(first), float(second), str(rule), str(reason), angle, norms)
            merged.append(MergedTensor(jobs.pop(name), blend, float(seconds), int(non_finite)))
        if jobs:
            raise ValueError("tensors are missing")
        return merged

    def stamp(self, file_name: str) -> tuple[int, int]:
        """(bytes, nanoseconds of the last change) of a file of the child."""
        status = (self.folder / file_name).lstat()
        return status.st_size, status.st_mtime_ns

    def add(self, file_name: str, tensors: Sequence[MergedTensor]) -> None:
        """Records a file that is on the disk."""
        import hashlib

        self.finished[file_name], self._stamps[file_name] = list(tensors), self.stamp(file_name)
        files = {
            name: {
                "stamp": list(self._stamps[name]),
                "tensors": [
                    [m.job.name, dataclasses.astuple(m.blend), m.seconds, m.non_finite] for m in self.finished[name]
                ],
            }
            for name in self.finished
        }
        text = json.dumps({"identity": self.identity, "device": self.device, "files": files}).encode()
        fresh = self.path.with_suffix(".new")
        try:
            fresh.unlink(missing_ok=True)
            with open(fresh, "xb") as stream:
                stream.write(text + b"\n" + hashlib.sha256(text).hexdigest().encode())
            sync_to_disk(fresh)
            fresh.replace(self.path)
        except OSError as error:
            del self.finished[file_name]
            raise explain_os_error(error, self.path, "write") from error


GIVES_WAY = "An unfinished child stands there and gives way"


def leftover_remarks(plan: MergePlan) -> Iterator[str]:
    """What a run that ended early left for this one, in words."""
    journal = Journal(staging_area(plan.recipe.save_directory), plan)
    if is_plain_file(journal.path) and not plan.recipe.restart:
        reason = journal.load()
        kept = f"{len(journal.finished)} of {len(plan.shards)} files of an earlier run are kept."
        yield f"{GIVES_WAY}: {reason}." if reason else kept
