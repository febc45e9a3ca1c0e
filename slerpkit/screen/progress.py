"""Events become a live picture on a terminal, and plain lines elsewhere.

Knows events and a console; what is being done, and when it is over, is told to it. Read merge/events.py before this.
"""

from __future__ import annotations

import contextlib
import functools
import math
import threading
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from slerpkit.merge.difference_map import angle_scale
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.save_directory import interruptions_held
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import SlerpMergeError, format_bytes
from slerpkit.parents.tensors import find_layer
from slerpkit.screen.console import displayable, is_unicode
from slerpkit.threads import BackgroundThread

if TYPE_CHECKING:
    from slerpkit.merge.events import Event

REFRESHES_PER_SECOND = 8
WIDEST_PICTURE = 60  # columns: of a wider one, a terminal that is made narrower leaves broken lines on the screen
# How often a line is printed at most where there is no terminal, and how long work must take to get one.
PLAIN_STEP_PERCENT, PLAIN_STEP_SECONDS, PLAIN_PATIENCE_SECONDS = 10, 10.0, 2.0


class LayerStrip:
    """One cell for each layer of the language model, in the difference map's colour for the angle there."""

    def __init__(self, names: Iterable[str]) -> None:
        found = Counter(layer for name in names if (layer := find_layer(name)) is not None)
        stacks = Counter(stack for stack, _ in found.elements())
        self.stack = max(stacks, key=lambda stack: stacks[stack], default=None)
        self.layers = sorted(layer for stack, layer in found if stack == self.stack)
        self.angles: dict[int, list[float]] = {}  # degrees, by layer; none of what was copied unseen

    def add(self, merged: MergedTensor) -> None:
        """Takes a finished tensor's angle."""
        found = find_layer(merged.tensor.name)
        if found is not None and found[0] == self.stack:
            angle = merged.weights.angle_degrees
            self.angles.setdefault(found[1], []).extend([] if angle is None else [angle])

    def cells(self, count: int) -> list[float | None]:
        """The mean angle in each of `count` stretches of layers, in degrees.

        NaN where all that is done was copied without a look, None where nothing is done yet.
        """
        means: list[float | None] = []
        for cell in range(count):
            layers = self.layers[cell * len(self.layers) // count : (cell + 1) * len(self.layers) // count]
            done = [self.angles[layer] for layer in layers if layer in self.angles]
            angles = [angle for found in done for angle in found]
            means.append(sum(angles) / len(angles) if angles else math.nan if done else None)
        return means

    def render(self, console: Console) -> Text:
        """The strip, in as many cells as there is room for; where there is no Unicode, an angle's tens."""
        fancy = is_unicode(console)
        cells = self.cells(min(len(self.layers), max(10, min(console.width, WIDEST_PICTURE) - 12)))
        text = Text("layers  " if cells else "", style="dim", no_wrap=True)
        scale = angle_scale([angle for angle in cells if angle is not None and not math.isnan(angle)])
        for angle in cells:
            if angle is None:
                text.append("·" if fancy else ".")
            elif math.isnan(angle):
                text.append("░" if fancy else "=")
            else:
                colour = ",".join(map(str, scale.colour(angle)))
                text.append("█" if fancy else str(min(int(angle / 10), 9)), style=f"not dim rgb({colour})")
        return text


class MergeView:
    """Shows one stretch of work at a time: a bar on a terminal, with layers and tensors where it has them."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.work = WorkBegan("", 0)
        self.done = 0  # of work.total
        self.next_percent, self.next_time = PLAIN_STEP_PERCENT, 0.0
        self.bar = self.bar_of(self.work)
        self.live: Live | None = None
        self.strip = LayerStrip(())
        self.line = ""  # the tensor at hand

    def __enter__(self) -> MergeView:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def observe(self, event: Event) -> None:
        """Takes any event; those that mean nothing to the eye are let pass."""
        if self.quiet:
            return
        if isinstance(event, WorkBegan):
            self.begin(event)
        elif isinstance(event, WorkAdvanced):
            self.advance(event.amount)
        elif isinstance(event, MergedTensor):
            self.line = describe_tensor(event)
            self.strip.add(event)
        elif isinstance(event, Noted):
            self.console.print(displayable(self.console, event.text), style="dim", highlight=False, markup=False)
        elif isinstance(event, WorkEnded):
            self.stop()

    def bar_of(self, work: WorkBegan) -> Progress:
        """The bar of a stretch of work: named where it has a name, with what it counts where that says something."""
        counts = {
            "bytes": [TaskProgressColumn(), TransferSpeedColumn()],
            "tokens": [TextColumn("{task.completed:,} of {task.total:,} tokens", markup=False)],
        }
        columns = [
            *([TextColumn("{task.description}", markup=False)] if work.what else []),
            BarColumn(bar_width=None),
            *counts.get(work.unit, [TaskProgressColumn()]),
            TimeRemainingColumn(compact=True),
        ]
        bar = Progress(*columns, console=self.console, expand=True)
        bar.add_task(work.what, total=work.total or None)
        return bar

    def begin(self, work: WorkBegan) -> None:
        """A picture for new work; a line where there is no terminal."""
        self.stop()
        self.work, self.done, self.next_percent = work, 0, PLAIN_STEP_PERCENT
        self.next_time = self.console.get_time() + PLAIN_PATIENCE_SECONDS
        self.bar, self.strip, self.line = self.bar_of(work), LayerStrip(work.tensors), ""
        if self.console.is_terminal:
            self.live = Live(console=self.console, get_renderable=self.render, auto_refresh=False, transient=True)
            with interruptions_held():  # half started, it could not be stopped
                self.live.start(refresh=True)
            self.ending = threading.Event()
            with contextlib.suppress(SlerpMergeError):  # a picture that stands still is no reason to stop
                BackgroundThread(functools.partial(self.refresh_until, self.live, self.ending))
        elif work.what and work.total and work.unit != "bytes":
            self.console.print(f"{work.what} ...", highlight=False, markup=False)

    def advance(self, amount: int) -> None:
        """So much more of the work is done."""
        self.done += amount
        self.bar.update(self.bar.task_ids[0], completed=self.done)
        if self.console.is_terminal or self.work.unit != "bytes":
            return
        percent = 100 * self.done // max(self.work.total, 1)
        if percent >= self.next_percent and self.console.get_time() >= self.next_time:
            self.next_percent = percent - percent % PLAIN_STEP_PERCENT + PLAIN_STEP_PERCENT
            self.next_time = self.console.get_time() + PLAIN_STEP_SECONDS
            text = f"{self.work.what}: {percent:3d} %, {format_bytes(self.done)} of {format_bytes(self.work.total)}"
            self.console.print(text, highlight=False, markup=False)

    def render(self) -> RenderableType:
        """The live picture: a bar, and of a merge the layers and the tensor at hand."""
        parts: list[RenderableType] = [self.bar.get_renderable()]
        if self.work.tensors:
            overflow = "ellipsis" if is_unicode(self.console) else "crop"
            line = Text(displayable(self.console, self.line), style="dim", no_wrap=True, overflow=overflow)
            parts += [self.strip.render(self.console), line]
        return Constrain(Group(*parts), min(self.console.width, WIDEST_PICTURE))

    def stop(self) -> None:
        """Takes the live picture away."""
        if self.live is not None:
            self.ending.set()
            live, self.live = self.live, None
            with contextlib.suppress(OSError), interruptions_held():  # a terminal that is gone needs no tidying
                live.stop()

    @staticmethod
    def refresh_until(live: Live, ending: threading.Event) -> None:
        """Draws the live picture again and again."""
        while not ending.wait(1 / REFRESHES_PER_SECOND):
            live.refresh()


def describe_tensor(merged: MergedTensor) -> str:
    """One line for the tensor at hand: its name, what was done with it, and the angle between the parents there."""
    weights = merged.weights
    angle = f", {weights.angle_degrees:.2f}°" if weights.angle_degrees is not None else ""
    reason = f" ({weights.reason})" if weights.reason else ""
    return f"{merged.tensor.name}  {weights.operation}{reason}{angle}"
