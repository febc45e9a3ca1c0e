"""What was measured, drawn: difference maps, and findings of any kind with their tables; the curve of a sweep.

What a finding says is not known here, but for the figures behind a sweep's curve. Read console.py before this, and
child/findings.py for what a finding is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from slerpkit.merge.difference_map import map_scales, text_colour_on
from slerpkit.messages import shorten
from slerpkit.screen.console import NARROW_COLUMNS, WIDEST_PANEL, displayable, is_unicode, panel

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.merge.difference_map import DifferenceMap, MapCell, MapGrid, MapScale

MAP_CELL_COLUMNS = 7  # of a cell at most; narrower where there are many
PLOT_ROWS = 9
TITLE_COLUMNS = 70  # of a finding's title at most; a prompt may be long
FIGURE = re.compile(r"[-+]?[\d,.]+( (±|\+-) [\d.]+)?")


def render_map(console: Console, differences: DifferenceMap) -> RenderableType:
    """Heat maps, layer by component: angles, then norm ratios unless all are alike; then what is outside layers."""
    parts: list[RenderableType] = []
    for scale in map_scales(differences):
        if scale.all_alike:
            parts.append(Text(scale.all_alike))
            continue
        lines: list[RenderableType] = []
        if differences.cells:
            lines.append(Text(scale.range_text, style="dim"))  # not in the title, which may be cut
        for grid in differences.grids:
            if len(differences.grids) > 1:
                lines.append(Text(displayable(console, grid.stack), style="bold"))
            lines += draw_grid(console, grid, scale)
        for name, cell in differences.outside:
            lines.append(
                Text.assemble(draw_cell(console, cell, scale, MAP_CELL_COLUMNS), " ", displayable(console, name))
            )
        parts.append(panel(console, Group(*lines), scale.title))
    return Group(*parts)


def draw_grid(console: Console, grid: MapGrid, scale: MapScale) -> list[Text]:
    """A line for the headings and one for each layer. Headings that are too long are numbers, told below."""
    room = min(console.width, WIDEST_PANEL) - 10
    width = max(3, min(MAP_CELL_COLUMNS, room // max(1, len(grid.components))))
    numbered = any(len(name) >= width for name in grid.components)
    heads = [str(number) if numbered else name for number, name in enumerate(grid.components, 1)]
    lines = [Text("layer ".rjust(6) + "".join(f"{head:^{width}}" for head in heads), style="bold", no_wrap=True)]
    for layer, cells in grid.rows:
        line = Text(f"{layer:>5} ", no_wrap=True)
        for cell in cells:
            line.append_text(draw_cell(console, cell, scale, width))
        lines.append(line)
    if numbered:
        legend = "  ".join(f"{number} {name}" for number, name in enumerate(grid.components, 1))
        lines.append(Text(displayable(console, legend), style="dim"))
    return lines


def draw_cell(console: Console, cell: MapCell, scale: MapScale, width: int) -> Text:
    """A value on its colour, rounded to the digits for which there is room beside a space."""
    value = scale.value(cell)
    if value is None:
        return Text(f"{'·' if is_unicode(console) else '.':^{width}}", style="dim")
    digits = range(len(scale.text(value).partition(".")[2]), -1, -1)
    texts = (f"{value:.{count}f}" for count in digits)
    text = next((text for text in texts if len(text) < width), "#" * (width - 1))  # as spreadsheets have it
    colour = scale.colour(value)
    return Text(f"{text:^{width}}", style=f"{text_colour_on(colour)} on rgb({','.join(map(str, colour))})")


def render_finding(console: Console, finding: Finding) -> RenderableType:
    """Any finding: its table, or the curve where it has one; then its notes, and how it was measured."""
    content = draw_curves(console, finding["figures"]) if finding["kind"] == "sweep" else draw_table(console, finding)
    notes = [Text(displayable(console, note)) for note in finding["notes"]]
    measured = Text(displayable(console, finding["measured"]), style="dim")
    title = displayable(console, shorten(finding["title"], TITLE_COLUMNS))
    return panel(console, Group(content, *notes, measured), title)


def draw_table(console: Console, finding: Finding) -> RenderableType:
    """A finding's rows; where it is narrow, each row is a few lines: its first cell, and the others below it."""
    heads = [displayable(console, head) for head in finding["heads"]]
    rows = [[displayable(console, cell) for cell in row] for row in finding["rows"]]
    if console.width < NARROW_COLUMNS:
        if len(heads) == 2:
            return Group(*(Text.assemble((f"{first}: ", "bold"), second) for first, second in rows))
        lines = []
        for first, *others in rows:
            lines += [Text(first, style="bold"), *(Text(f"  {head} {cell}") for head, cell in zip(heads[1:], others))]
        return Group(*lines)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for number, head in enumerate(heads):
        are_figures = number > 0 and all(FIGURE.fullmatch(row[number]) for row in rows)
        table.add_column(Text(head), justify="right" if are_figures else "left", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*map(Text, row), style="bold" if number == finding["highlighted_row"] else None)
    return table


def draw_curves(console: Console, sweep: Mapping[str, Any]) -> RenderableType:
    """A sweep's curves over t, one for each text or task and one for their mean; both parents are their ends."""
    trials, names = sweep["trials"], list(sweep["names"])
    curves = [(name, [trial["values"][number] for trial in trials]) for number, name in enumerate(names)]
    if len(names) > 1 and sweep["less_is_better"]:
        curves.append(("mean of all", [trial["loss"] for trial in trials]))
    lines = []
    for number, (name, values) in enumerate(curves):
        lines.append(Text(displayable(console, f"{name}, {sweep['unit']}"), style="bold"))
        stderrs = [trial["stderr"] if number == len(curves) - 1 else None for trial in trials]
        lines += [Text(line, no_wrap=True) for line in draw_plot(console, trials, values, stderrs, sweep["best_t"])]
    marks = (
        "● child  ◆ best  ■ parent  │ noise against the best" if is_unicode(console) else "o child  # best  @ parent"
    )
    return Group(*lines, Text(marks, style="dim"))


def draw_plot(
    console: Console,
    trials: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    stderrs: Sequence[float | None],
    best_t: float,
) -> list[str]:
    """Values over t as rows of characters, with their scale at the left and t below."""
    marks = {"child": "●", "best": "◆", "parent": "■", "noise": "│"}
    marks = marks if is_unicode(console) else {"child": "o", "best": "#", "parent": "@", "noise": "|"}
    width = max(24, min(console.width, WIDEST_PANEL) - 18)
    low, high = min(values), max(values)
    cells = [[" "] * width for _ in range(PLOT_ROWS)]

    def row_of(value: float) -> int:
        share = (high - value) / (high - low) if high > low else 0.5
        return min(max(round(share * (PLOT_ROWS - 1)), 0), PLOT_ROWS - 1)

    columns = [round(trial["t"] * (width - 1)) for trial in trials]
    for column, value, error in zip(columns, values, stderrs):
        if error is not None:
            for row in range(row_of(value + error), row_of(value - error) + 1):
                cells[row][column] = marks["noise"]
    for trial, column, value in zip(trials, columns, values):
        kind = "parent" if trial["role"] != "child" else "best" if trial["t"] == best_t else "child"
        cells[row_of(value)][column] = marks[kind]
    lines = []
    for number, row in enumerate(cells):
        label = f"{high - number * (high - low) / (PLOT_ROWS - 1):9.4f} " if number % 4 == 0 else " " * 10
        lines.append(label + "".join(row).rstrip())
    ticks = [" "] * (width + 2)
    for t in (0, 0.25, 0.5, 0.75, 1):
        text = f"{t:g}"
        start = min(round(t * (width - 1)), width + 1 - len(text))
        ticks[start : start + len(text)] = text
    return [*lines, " " * 10 + "".join(ticks).rstrip()]
