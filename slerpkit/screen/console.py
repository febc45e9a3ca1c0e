"""What every drawing needs: marks, frames, tables, text a terminal can show.

Knows nothing of models; every function takes the console that it draws for.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import IO, TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from slerpkit.messages import printable
from slerpkit.screen.terminal import drop_output

if TYPE_CHECKING:
    from slerpkit.messages import SlerpMergeError

UNREAD = "Nobody reads the output any more; the run goes on without it."
WIDEST_PANEL = 110  # longer lines are hard to read
NARROW_COLUMNS = 80  # below this, tables become stacked lines
MARKS = {"blocking": ("✗", "x", "red"), "resolved": ("✓", "+", "green"), "notice": ("•", "-", "yellow")}


class OutputStream:
    """A stream whose reader may go away, as `head` does, or whose disk may be full: what it cannot take is dropped."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.is_unread = False  # whether its reader went

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        try:
            return self.stream.write(text)
        except OSError as error:
            self.drop(error)
            return len(text)

    def flush(self) -> None:
        """Writes what the stream still holds, or drops it."""
        try:
            self.stream.flush()
        except OSError as error:
            self.drop(error)

    def drop(self, error: OSError) -> None:
        """Lets all that follows go nowhere; where the reader went, that is said where errors go."""
        drop_output(self.stream)
        if isinstance(error, BrokenPipeError) and self.stream is not sys.stderr and not self.is_unread:
            self.is_unread = True
            tell_errors(UNREAD)


class OutputConsole(Console):
    """A console on which words mean themselves: no markup, no emoji. The run goes on where nobody can read them."""

    def __init__(self, file: IO[str]) -> None:
        self.stream = OutputStream(file)
        super().__init__(file=self.stream, highlight=False, markup=False, emoji=False)

    @property
    def is_unread(self) -> bool:
        """Whether its reader went, as `head` does."""
        return self.stream.is_unread


def tell_errors(line: str) -> None:
    """A line where errors go, for who looks there; where nobody can, there is nobody to tell."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def is_unicode(console: Console) -> bool:
    """Whether the terminal shows more than ASCII."""
    return not console.options.ascii_only


def displayable(console: Console, text: str) -> str:
    """Printable text, in characters that the terminal's encoding has."""
    encoding = console.encoding or "ascii"
    text = printable(text, keep="\n")
    if not is_unicode(console):
        text = text.replace("°", " degrees").replace("…", "...").replace("±", "+-")
    return text.encode(encoding, "backslashreplace").decode(encoding)


def mark_of(console: Console, severity: str) -> Text:
    """The sign for a severity, in its colour."""
    fancy, plain, colour = MARKS[severity]
    return Text(fancy if is_unicode(console) else plain, style=f"bold {colour}")


def panel(console: Console, content: RenderableType, title: str) -> RenderableType:
    """A titled frame; plain ASCII where the terminal cannot show more."""
    width = min(console.width, WIDEST_PANEL)
    return Panel(content, title=Text(title), title_align="left", border_style="cyan", padding=(0, 1), width=width)


def fact_table(console: Console, facts: Iterable[tuple[str, str | Text]]) -> Table:
    """Two columns: what, and its value."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value if isinstance(value, Text) else Text(displayable(console, value)))
    return table


def render_error(console: Console, error: SlerpMergeError) -> RenderableType:
    """Cause, then remedy. Comes last on the screen."""
    arrow = "→" if is_unicode(console) else "->"
    cause, remedy = displayable(console, error.message), displayable(console, error.hint)
    return Text.assemble(mark_of(console, "blocking"), " ", cause, "\n", (f"{arrow} ", "bold"), remedy)


def show_error(error: SlerpMergeError) -> None:
    """The one message that a run ends in when something goes wrong, on stderr."""
    console = OutputConsole(sys.stderr)
    console.print(render_error(console, error), soft_wrap=not console.is_terminal)
