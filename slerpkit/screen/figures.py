"""What was measured: maps, answers, perplexities, scores, the curve of a sweep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.merge.difference_map import map_scales, text_colour_on
from slerpkit.messages import shorten
from slerpkit.screen.console import (
    NARROW_COLUMNS,
    WIDEST_PANEL,
    displayable,
    figure_table,
    is_unicode,
    panel,
    with_noise,
)

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.text import Text

    from slerpkit.merge.difference_map import DifferenceMap, MapCell, MapGrid, MapScale

MAP_CELL_COLUMNS = 7  # of a cell at most; narrower where there are many
PLOT_ROWS = 9
ROLES = ("primary", "secondary", "child")


def render_map(console: Console, found: DifferenceMap) -> RenderableType:
    """Two heat maps, layer by component: angles, then norm ratios; then the tensors outside layers."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for number, scale in enumerate(map_scales(found)):
        lines: list[RenderableType] = []
        for grid in found.grids:
            if len(found.grids) > 1:
                lines.append(Text(displayable(console, grid.stack), style="bold"))
            lines += draw_grid(console, grid, scale)
        for name, cell in found.outside:
            lines.append(
                Text.assemble(draw_cell(console, cell, scale, MAP_CELL_COLUMNS), " ", displayable(console, name))
            )
        title = f"{scale.title}: {scale.range_text}"
        parts += [panel(console, Group(*lines), title)] if number or lines else []
    return Group(*parts)


def draw_grid(console: Console, grid: MapGrid, scale: MapScale) -> list[Text]:
    """A line for the headings and one for each layer. Headings that are too long are numbers, told below."""
    from rich.text import Text

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
    """A value on its colour, in as many digits as there is room for."""
    from rich.text import Text

    value = scale.value(cell)
    if value is None:
        return Text(f"{'·' if is_unicode(console) else '.':^{width}}", style="dim")
    text = scale.text(value)
    if len(text) >= width:
        text = text[:width].rstrip(".") if "." in text[:width] else "99+"[:width]
    colour = scale.colour(value)
    return Text(f"{text:^{width}}", style=f"{text_colour_on(colour)} on rgb({','.join(map(str, colour))})")


def render_tastes(console: Console, entries: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The answers to each prompt side by side, or one below the other where it is narrow."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for entry in entries:
        answers = {role: displayable(console, text) or "(nothing)" for role, text in entry["answers"].items()}
        if console.width < NARROW_COLUMNS:
            lines = [Text.assemble((f"{role}: ", "bold"), text) for role, text in answers.items()]
            content: RenderableType = Group(*lines)
        else:
            content = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, expand=True)
            for role in answers:
                content.add_column(role, ratio=1, overflow="fold")
            content.add_row(*map(Text, answers.values()))
        measured = Text(displayable(console, entry["measured"]), style="dim")
        parts.append(panel(console, Group(content, measured), displayable(console, shorten(entry["prompt"], 70))))
    return Group(*parts)


def render_perplexities(console: Console, entries: Iterable[Mapping[str, Any]]) -> RenderableType:
    """How well parents and child predict each text, and what the differences are worth."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    for entry in entries:
        rows = [
            (
                model["role"],
                f"{model['tokens']:,}",
                f"{model['perplexity']:.4f}",
                with_noise(console, model["bits_per_byte"], model["noise"]),
            )
            for model in entry["models"]
        ]
        lines: list[RenderableType] = [figure_table(console, ("model", "tokens", "perplexity", "bits per byte"), rows)]
        for role, difference in entry["child_against"].items():
            amount, noise = difference["bits_per_byte"], difference["noise"]
            word = "better" if amount < 0 else "worse"
            if noise is None or abs(amount) <= 2 * noise:
                word = "not to be told apart" if noise is not None else f"{word}, as far as so short a text tells"
            shown = with_noise(console, amount, noise, "+.4f")
            lines.append(Text(f"child against {role}: {shown} bits per byte: {word}"))
        lines.append(Text(displayable(console, entry["measured"]), style="dim"))
        parts.append(panel(console, Group(*lines), f"Perplexity on {displayable(console, entry['text'])}"))
    return Group(*parts)


def render_scores(console: Console, entries: Iterable[Mapping[str, Any]]) -> RenderableType:
    """The harness's figures for all three, and what the child's differences are worth."""
    from rich.console import Group
    from rich.text import Text

    parts = []
    for entry in entries:
        lines: list[RenderableType] = []
        rows = [
            (row["task"], row["metric"], *(with_noise(console, *row["figures"][role]) for role in ROLES))
            for row in entry["rows"]
        ]
        lines.append(figure_table(console, ("task", "metric", *ROLES), rows))
        for row in entry["rows"]:
            for role, verdict in zip(ROLES, row["verdicts"]):
                lines.append(Text(displayable(console, f"{row['metric']}, child against {role}: {verdict}")))
        lines.append(Text(displayable(console, entry["measured"]), style="dim"))
        parts.append(panel(console, Group(*lines), "Scores"))
    return Group(*parts)


def render_sweep(console: Console, entry: Mapping[str, Any]) -> RenderableType:
    """The curve over t, one for each text or task and one for their mean; both parents are its ends."""
    from rich.console import Group
    from rich.text import Text

    trials, names = entry["trials"], list(entry["names"])
    curves = [(name, [trial["values"][place] for trial in trials]) for place, name in enumerate(names)]
    if len(names) > 1 and entry["less_is_better"]:
        curves.append(("mean of all", [trial["loss"] for trial in trials]))
    lines: list[RenderableType] = []
    for number, (name, values) in enumerate(curves):
        lines.append(Text(displayable(console, f"{name}, {entry['unit']}"), style="bold"))
        noise = [trial["noise"] if number == len(curves) - 1 else None for trial in trials]
        lines += [Text(line, no_wrap=True) for line in draw_plot(console, trials, values, noise, entry["best_t"])]
    marks = (
        "● child  ◆ best  ■ parent  │ noise against the best" if is_unicode(console) else "o child  # best  @ parent"
    )
    lines += [Text(marks, style="dim"), Text(displayable(console, entry["verdict"]))]
    lines.append(Text(displayable(console, entry["measured"]), style="dim"))
    return panel(console, Group(*lines), f"A good t: {entry['best_t']:g}")


def draw_plot(
    console: Console,
    trials: Sequence[Mapping[str, Any]],
    values: Sequence[float],
    noise: Sequence[float | None],
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

    places = [round(trial["t"] * (width - 1)) for trial in trials]
    for place, value, error in zip(places, values, noise):
        if error is not None:
            for row in range(row_of(value + error), row_of(value - error) + 1):
                cells[row][place] = marks["noise"]
    for trial, place, value in zip(trials, places, values):
        kind = "parent" if trial["role"] != "child" else "best" if trial["t"] == best_t else "child"
        cells[row_of(value)][place] = marks[kind]
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
