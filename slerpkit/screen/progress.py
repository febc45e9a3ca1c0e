"""Events become a live picture on a terminal, and plain lines elsewhere.

Knows events and a console; what is being done, and when it is over, is told to it. Read merge/events.py before this.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.control import Control
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.segment import ControlType
from rich.text import Text

from slerpkit.merge.difference_map import angle_scale
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan, WorkEnded
from slerpkit.merge.save_directory import interruptions_held
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import format_bytes
from slerpkit.parents.tensors import find_layer
from slerpkit.screen.console import displayable, is_unicode

if TYPE_CHECKING:
    from slerpkit.merge.events import Event

REFRESHES_PER_SECOND = 8
# How often a line is printed at most where there is no terminal, and how long work must take to get one.
PLAIN_STEP_PERCENT, PLAIN_STEP_SECONDS, PLAIN_PATIENCE_SECONDS = 10, 10.0, 2.0


class LayerStrip:
    """One cell for each layer of the language model, in the difference map's colour for the angle there."""

    def __init__(self, names: Iterable[str]) -> None:
        found = Counter(layer for name in names if (layer := find_layer(name)) is not None)
        stacks = Counter(stack for stack, _ in found.elements())
        self.stack = max(stacks, key=lambda stack: stacks[stack], default=None)
        self.layers = sorted(layer for stack, layer in found if stack == self.stack)
        self.angles: dict[int, list[float]] = {}  # degrees, by layer

    def add(self, merged: MergedTensor) -> None:
        """Takes a finished tensor's angle."""
        found = find_layer(merged.tensor.name)
        if found is not None and found[0] == self.stack and merged.weights.angle_degrees is not None:
            self.angles.setdefault(found[1], []).append(merged.weights.angle_degrees)

    def cells(self, count: int) -> list[float | None]:
        """The mean angle in each of `count` stretches of layers, in degrees; None where none is known yet."""
        means: list[float | None] = []
        for cell in range(count):
            layers = self.layers[cell * len(self.layers) // count : (cell + 1) * len(self.layers) // count]
            angles = [angle for layer in layers for angle in self.angles.get(layer, ())]
            means.append(sum(angles) / len(angles) if angles else None)
        return means

    def render(self, console: Console) -> Text:
        """The strip, in as many cells as there is room for; where there is no Unicode, an angle's tens."""
        fancy = is_unicode(console)
        cells = self.cells(min(len(self.layers), max(10, console.width - 12)))
        text = Text("layers  " if cells else "", style="dim", no_wrap=True)
        scale = angle_scale([angle for angle in cells if angle is not None])
        for angle in cells:
            if angle is None:
                text.append("·" if fancy else ".")
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
        self.drawn: list[int] = []  # columns that each line of the live picture takes
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
        """The bar of a stretch of work: named where it has a name, with its speed where it counts bytes."""
        columns = [
            *([TextColumn("{task.description}", markup=False)] if work.what else []),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            *([TransferSpeedColumn()] if work.in_bytes else []),
            TimeRemainingColumn(compact=True),
        ]
        bar = Progress(*columns, console=self.console, expand=True)
        bar.add_task(work.what, total=work.total)
        return bar

    def begin(self, work: WorkBegan) -> None:
        """A picture for new work; a line where there is no terminal."""
        self.stop()
        self.work, self.done, self.next_percent = work, 0, PLAIN_STEP_PERCENT
        self.next_time = self.console.get_time() + PLAIN_PATIENCE_SECONDS
        self.bar, self.strip, self.line = self.bar_of(work), LayerStrip(work.tensors), ""
        if self.console.is_terminal:
            self.drawn = []
            self.live = Live(
                console=self.console,
                get_renderable=self.draw,
                refresh_per_second=REFRESHES_PER_SECOND,
                transient=True,
            )
            with interruptions_held():  # half started, it could not be stopped
                self.live.start()
        elif work.what and not work.in_bytes:
            self.console.print(f"{work.what} ...", highlight=False, markup=False)

    def advance(self, amount: int) -> None:
        """So much more of the work is done."""
        self.done += amount
        self.bar.update(self.bar.task_ids[0], completed=self.done)
        if self.console.is_terminal or not self.work.in_bytes:
            return
        percent = 100 * self.done // max(self.work.total, 1)
        if percent >= self.next_percent and self.console.get_time() >= self.next_time:
            self.next_percent = percent - percent % PLAIN_STEP_PERCENT + PLAIN_STEP_PERCENT
            self.next_time = self.console.get_time() + PLAIN_STEP_SECONDS
            text = f"{self.work.what}: {percent:3d} %, {format_bytes(self.done)} of {format_bytes(self.work.total)}"
            self.console.print(text, highlight=False, markup=False)

    def draw(self) -> RenderableType:
        """The next live picture. Where the window has become narrower, what that broke off the last one goes first."""
        width = self.console.width
        for length in self.drawn:
            for _ in range((length - 1) // width if length else 0):
                self.console.control(Control((ControlType.ERASE_IN_LINE, 2), (ControlType.CURSOR_UP, 1)))
        picture = self.render()
        lines = self.console.render_lines(picture, pad=False)
        self.drawn = [sum(segment.cell_length for segment in line) for line in lines]
        return picture

    def render(self) -> RenderableType:
        """The live picture: a bar, and of a merge the layers and the tensor at hand."""
        if not self.work.tensors:
            return self.bar.get_renderable()
        overflow = "ellipsis" if is_unicode(self.console) else "crop"
        line = Text(displayable(self.console, self.line), style="dim", no_wrap=True, overflow=overflow)
        return Group(self.bar.get_renderable(), self.strip.render(self.console), line)

    def stop(self) -> None:
        """Takes the live picture away."""
        if self.live is not None:
            live, self.live = self.live, None
            with contextlib.suppress(OSError), interruptions_held():  # a terminal that is gone needs no tidying
                live.stop()


def describe_tensor(merged: MergedTensor) -> str:
    """One line for the tensor at hand: its name, what was done with it, and the angle between the parents there."""
    weights = merged.weights
    angle = f", {weights.angle_degrees:.2f}°" if weights.angle_degrees is not None else ""
    reason = f" ({weights.reason})" if weights.reason else ""
    return f"{merged.tensor.name}  {weights.operation}{reason}{angle}"
