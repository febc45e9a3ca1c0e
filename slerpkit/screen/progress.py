"""Events become a live picture on a terminal, and plain lines elsewhere."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from slerpkit.merge.events import (
    Noted,
    WorkAdvanced,
    WorkBegan,
    WorkEnded,
)
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import format_bytes
from slerpkit.parents.tensors import find_layer
from slerpkit.screen.console import displayable, is_unicode

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from slerpkit.merge.events import Event

REFRESHES_PER_SECOND = 8
PLAIN_STEP_PERCENT = 5  # how often a line is printed where there is no terminal
ANGLE_COLOURS = ((5, "blue"), (15, "cyan"), (30, "green"), (60, "yellow"), (91, "red"), (181, "magenta"))


class LayerStrip:
    """One cell for each layer of the language model, coloured by the angle between the parents there."""

    def __init__(self, names: Iterable[str]) -> None:
        places = Counter(place for name in names if (place := find_layer(name)) is not None)
        stacks = Counter(stack for stack, _ in places.elements())
        self.stack = max(stacks, key=lambda stack: stacks[stack], default=None)
        self.layers = sorted(layer for stack, layer in places if stack == self.stack)
        self.angles: dict[int, list[float]] = {}

    def add(self, event: MergedTensor) -> None:
        """Takes a finished tensor's angle."""
        place = find_layer(event.tensor.name)
        if place is not None and place[0] == self.stack and event.weights.angle_degrees is not None:
            self.angles.setdefault(place[1], []).append(event.weights.angle_degrees)

    def render(self, console: Console) -> Text:
        """The strip, in as many cells as there is room for; where there is no Unicode, an angle's tens."""
        from rich.text import Text

        count = min(len(self.layers), max(10, console.width - 12))
        text = Text("layers  " if count else "", style="dim", no_wrap=True)
        for cell in range(count):
            part = self.layers[cell * len(self.layers) // count : (cell + 1) * len(self.layers) // count]
            angles = [angle for layer in part for angle in self.angles.get(layer, ())]
            if not angles:
                text.append("·" if is_unicode(console) else ".")
                continue
            mean = sum(angles) / len(angles)
            colour = next(colour for limit, colour in ANGLE_COLOURS if mean < limit)
            text.append("█" if is_unicode(console) else str(min(int(mean / 10), 9)), style=f"not dim {colour}")
        return text


class MergeView:
    """Turns events into a live picture on a terminal, and into plain lines elsewhere."""

    def __init__(self, console: Console, quiet: bool = False) -> None:
        self.console = console
        self.quiet = quiet
        self.live: Any = None
        self.progress: Any = None
        self.task: Any = None
        self.total_bytes = 0
        self.merged_bytes = 0
        self.next_percent = PLAIN_STEP_PERCENT
        self.line = ""
        self.strip = LayerStrip(())
        self.work: Any = None  # the bar of work beside a merge
        self.work_task: Any = None

    def __enter__(self) -> MergeView:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def observe(self, event: Event) -> None:
        """Takes any event; those that mean nothing to the eye are let pass."""
        if self.quiet:
            return
        if isinstance(event, WorkBegan):
            if event.in_bytes:
                self.total_bytes = event.total
                self.strip = LayerStrip(event.tensors)
                self.start()
            else:
                self.begin_work(event)
        elif isinstance(event, WorkAdvanced):
            if self.work is None:
                self.advance(event.amount)
            else:
                self.advance_work(event.amount)
        elif isinstance(event, MergedTensor):
            self.line = describe_tensor(event)
            self.strip.add(event)
        elif isinstance(event, Noted):
            self.console.print(displayable(self.console, event.text), style="dim", highlight=False, markup=False)
        elif isinstance(event, WorkEnded):
            self.stop()

    def begin_work(self, event: WorkBegan) -> None:
        """A bar for work beside a merge; a line where there is no terminal."""
        self.stop()
        self.work = self.work_task = None
        if not self.console.is_terminal:
            self.console.print(f"{event.what} ...", highlight=False, markup=False)
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.work = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
            transient=True,
            refresh_per_second=REFRESHES_PER_SECOND,
        )
        self.work_task = self.work.add_task(event.what, total=event.total)
        self.live = self.work
        self.work.start()

    def advance_work(self, amount: int) -> None:
        if self.work is not None:
            self.work.advance(self.work_task, amount)

    def start(self) -> None:
        self.work = None
        if not self.console.is_terminal:
            return
        from rich.live import Live
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
            expand=True,
        )
        self.task = self.progress.add_task("", total=self.total_bytes, speed="")
        self.live = Live(
            console=self.console, get_renderable=self.render, refresh_per_second=REFRESHES_PER_SECOND, transient=True
        )
        self.live.start()

    def advance(self, byte_count: int) -> None:
        self.merged_bytes += byte_count
        if self.progress is not None:
            self.progress.update(self.task, completed=self.merged_bytes)
            return
        percent = 100 * self.merged_bytes // max(self.total_bytes, 1)
        if percent >= self.next_percent:
            self.next_percent = percent - percent % PLAIN_STEP_PERCENT + PLAIN_STEP_PERCENT
            text = f"{percent:3d} %  {format_bytes(self.merged_bytes)} of {format_bytes(self.total_bytes)}"
            self.console.print(text, highlight=False, markup=False)

    def render(self) -> RenderableType:
        """The live picture: a bar over all bytes, and the tensor at hand."""
        from rich.console import Group
        from rich.text import Text

        speed = self.progress.tasks[0].speed
        self.progress.update(self.task, speed=f"{format_bytes(speed)}/s" if speed else "")
        overflow = "ellipsis" if is_unicode(self.console) else "crop"
        line = Text(displayable(self.console, self.line), style="dim", no_wrap=True, overflow=overflow)
        return Group(self.progress.get_renderable(), self.strip.render(self.console), line)

    def stop(self) -> None:
        if self.live is not None:
            with contextlib.suppress(OSError):  # a terminal that is gone needs no tidying
                self.live.stop()
            self.live = None


def describe_tensor(event: MergedTensor) -> str:
    """One line for the tensor at hand: its name, rule and angle."""
    weights = event.weights
    angle = f", {weights.angle_degrees:.2f}°" if weights.angle_degrees is not None else ""
    reason = f" ({weights.reason})" if weights.reason else ""
    return f"{event.tensor.name}  {weights.operation}{reason}{angle}"
