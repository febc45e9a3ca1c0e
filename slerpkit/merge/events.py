"""What is told while work goes on: progress and notes.

Results are returned, never told. An observer is one callable that takes an event; it is always called on the main
thread of the main process. Who shows an event, and how, is not known here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slerpkit.merge.tensor_plan import MergedTensor


@dataclass(frozen=True)
class WorkBegan:
    """A stretch of work."""

    what: str
    total: int  # 0 where its end cannot be foreseen
    unit: str = ""  # what `total` counts, and WorkAdvanced.amount: "bytes", "tokens", or nothing to speak of
    tensors: tuple[str, ...] = ()  # of a merge: the names of those that MergedTensor will tell of, in order


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
class MergeStopped:
    """The merge ends early; finished files stay in the staging folder for the next run."""

    kept: int
    total: int


@dataclass(frozen=True)
class ChildPublished:
    """The child stands under its name."""

    child: Path


if TYPE_CHECKING:
    Event = WorkBegan | WorkAdvanced | WorkEnded | Noted | MergeStopped | ChildPublished | MergedTensor
    Observer = Callable[[Event], None]


def ignore(event: Event) -> None:
    """An observer of work that nobody watches."""
