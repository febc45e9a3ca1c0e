"""What a merge tells while it works, and what it yields."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slerpkit.maths import TensorWeights
    from slerpkit.merge.plan import MergePlan, TensorPlan
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity.report import ParityReport


@dataclass(frozen=True)
class WorkBegan:
    """A stretch of work whose end can be foreseen, beside a merge."""

    what: str
    total: int


@dataclass(frozen=True)
class WorkAdvanced:
    """So much of it is done."""

    amount: int


@dataclass(frozen=True)
class WorkEnded:
    """It is over."""


@dataclass(frozen=True)
class Noted:
    """Something the person may want to know while work goes on."""

    text: str


@dataclass(frozen=True)
class ParentOpened:
    """A parent's headers were read."""

    role: str  # "primary", "secondary" or "base"
    checkpoint: Checkpoint


@dataclass(frozen=True)
class ParityChecked:
    """The parents were held against each other."""

    report: ParityReport


@dataclass(frozen=True)
class PlanReady:
    """All is decided; nothing is written yet."""

    plan: MergePlan


@dataclass(frozen=True)
class MergeResumed:
    """Something of an earlier run stood in the staging folder."""

    kept: int  # finished files that are taken over; 0 where the merge starts anew
    total: int
    reason: str  # why it starts anew


@dataclass(frozen=True)
class MergeStopped:
    """The merge ends early; finished files stay in the staging folder for the next run."""

    kept: int
    total: int


@dataclass(frozen=True)
class ChildPublished:
    """The child stands under its name."""

    child: Path


@dataclass(frozen=True)
class DeviceChosen:
    """Where the arithmetic will run, and why."""

    device: str
    reason: str


@dataclass(frozen=True)
class BytesMerged:
    """The child grew by this many bytes."""

    byte_count: int


@dataclass(frozen=True)
class MergedTensor:
    """One tensor is whole. Comes in the child's order."""

    job: TensorPlan
    blend: TensorWeights
    seconds: float  # from its first byte read to its last byte written
    non_finite: int  # values in the child that are infinite or not a number


@dataclass(frozen=True)
class ShardWritten:
    """One file of the child holds all its tensors."""

    file_name: str
    byte_count: int


@dataclass(frozen=True)
class CompanionCopied:
    """A file beside the weights is in place."""

    file_name: str
    source: str  # "primary", "secondary" or "made"


@dataclass(frozen=True)
class Verification:
    """The child was read back and is right."""

    checks: tuple[str, ...]  # what was found right, in words
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class MergeResult:
    """What streaming the tensors yielded."""

    tensors: tuple[MergedTensor, ...]
    seconds: float  # first byte read to last byte written
    device: str
    resumed_files: int = 0  # taken over from an earlier run

    def count(self, rule: str) -> int:
        return sum(merged.blend.rule == rule for merged in self.tensors)


@dataclass(frozen=True)
class MergeReport:
    """The finished child and how it came about."""

    child: Path
    plan: MergePlan
    result: MergeResult
    checks: tuple[str, ...]
    warnings: tuple[str, ...]
    sync_seconds: float
    total_seconds: float  # of execute_merge

    def as_dict(self) -> dict[str, Any]:
        """The report of `--json`."""
        child_bytes = self.plan.child_bytes
        parity = self.plan.parity
        return {
            "child": str(self.child),
            "tensors": len(self.result.tensors),
            "slerped": self.result.count("slerp"),
            "lerped": self.result.count("lerp"),
            "copied": self.result.count("copy"),
            "bytes": child_bytes,
            "seconds": self.result.seconds,
            "sync_seconds": self.sync_seconds,
            "total_seconds": self.total_seconds,
            "bytes_per_second": child_bytes / max(self.result.seconds, 1e-9),
            "device": self.result.device,
            "resumed_files": self.result.resumed_files,
            "threads": self.plan.threads,
            "method": self.plan.recipe.method,
            "blend": self.plan.recipe.describe_blend(),
            "tokenizer_from": self.plan.tokenizer_role,
            "chat_template_from": self.plan.template_role,
            "vocabulary": parity.vocabulary.as_dict(),
            "resolved": [dataclasses.asdict(m) for m in parity.of_severity("resolved")],
            "notices": [dataclasses.asdict(m) for m in parity.of_severity("notice")],
            "kinship": self.plan.kinship.as_dict(),
            "remarks": list(self.plan.remarks),
            "warnings": list(self.warnings),
            "checks": list(self.checks),
        }


Event = (
    ParentOpened
    | ParityChecked
    | PlanReady
    | MergeResumed
    | MergeStopped
    | ChildPublished
    | DeviceChosen
    | BytesMerged
    | MergedTensor
    | ShardWritten
    | CompanionCopied
    | Verification
    | WorkBegan
    | WorkAdvanced
    | WorkEnded
    | Noted
)
Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An observer of work that nobody watches."""
