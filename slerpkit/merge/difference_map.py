"""How the parents differ, layer by component: figures, colours, the SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import write_json, write_text
from slerpkit.maths import cosine_between, degrees_of
from slerpkit.messages import printable, shorten
from slerpkit.parents.tensors import component_of, find_layer

if TYPE_CHECKING:
    from slerpkit.merge.tensor_plan import MergeResult, TensorInputs


@dataclass(frozen=True)
class TensorDifference:
    """How one tensor of the parents differs, or what each of them learned there since their base."""

    name: str
    parameters: int
    degrees: float | None  # the angle between v0 and v1; None where it is not known
    norms: tuple[float, float] | None  # |v0|, |v1|; None where they were not measured


@dataclass(frozen=True)
class MapCell:
    """The same of all the tensors of one component of one layer, taken as one vector."""

    degrees: float | None
    norm_ratio: float | None  # |v1| / |v0|


@dataclass(frozen=True)
class MapGrid:
    """One stack of layers: a row for each layer, a column for each component."""

    stack: str
    components: tuple[str, ...]
    rows: tuple[tuple[int, tuple[MapCell, ...]], ...]  # (layer, its cells)


@dataclass(frozen=True)
class DifferenceMap:
    """How the parents differ, layer by component, and in the tensors outside every layer."""

    vectors: str  # "weights" or "task vectors"
    grids: tuple[MapGrid, ...]
    outside: tuple[tuple[str, MapCell], ...]
    tensors: tuple[TensorDifference, ...]

    @property
    def cells(self) -> list[MapCell]:
        inside = [cell for grid in self.grids for _, cells in grid.rows for cell in cells]
        return inside + [cell for _, cell in self.outside]

    def as_dict(self) -> dict[str, Any]:
        return {
            "vectors": self.vectors,
            "cells": [
                {"stack": grid.stack, "layer": layer, "component": component, **vars(cell)}
                for grid in self.grids
                for layer, cells in grid.rows
                for component, cell in zip(grid.components, cells)
            ],
            "outside": [{"name": name, **vars(cell)} for name, cell in self.outside],
            "tensors": [
                {**vars(difference), "norms": difference.norms and list(difference.norms)}
                for difference in self.tensors
            ],
        }


ANGLE_RAMP = ((38, 70, 120), (42, 140, 150), (140, 190, 90), (250, 200, 70), (225, 85, 55))  # near to far
RATIO_RAMP = ((50, 100, 180), (235, 235, 230), (200, 90, 50))  # the secondary shorter, alike, longer
FULL_RATIO = 1.5  # has the full colour, so that one of 1.01 is pale in every map
ALIKE_RATIO = 1.05  # up to this norms are as good as equal


@dataclass(frozen=True)
class MapScale:
    """What the colours of one map stand for."""

    title: str
    value: Callable[[MapCell], float | None]
    text: Callable[[float], str]
    place: Callable[[float], float]  # 0 to 1 along the ramp
    ramp: tuple[tuple[int, int, int], ...]
    range_text: str  # in words
    all_alike: str = ""  # where no cell says more than this: a line in place of the map

    def colour(self, value: float) -> tuple[int, int, int]:
        """Red, green and blue, 0 to 255."""
        scaled = min(max(self.place(value), 0.0), 1.0) * (len(self.ramp) - 1)
        index = min(int(scaled), len(self.ramp) - 2)
        return tuple(
            round(low + (scaled - index) * (high - low)) for low, high in zip(self.ramp[index], self.ramp[index + 1])
        )


def angle_scale(angles: Sequence[float], subject: str = "parents") -> MapScale:
    """The scale for angles, in degrees, from the least of them to the greatest."""
    low, high = min(angles, default=0.0), max(angles, default=0.0)
    return MapScale(
        f"Angle between the {subject}, degrees",
        lambda cell: cell.degrees,
        lambda value: f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}",
        lambda value: (value - low) / max(high - low, 1e-9),
        ANGLE_RAMP,
        f"{low:.2f} to {high:.2f}",
    )


def map_scales(found: DifferenceMap) -> tuple[MapScale, MapScale]:
    """Scales for the angles of a map, from its own least to its greatest, and for its norm ratios, always the same."""
    angles = [cell.degrees for cell in found.cells if cell.degrees is not None]
    known = [cell.norm_ratio for cell in found.cells if cell.norm_ratio is not None]
    ratios = [ratio for ratio in known if ratio] or [1.0]
    range_text = f"{min(ratios):.3f} to {max(ratios):.3f}"
    widest = max(abs(math.log(ratio)) for ratio in ratios)
    is_alike = known and all(known) and widest <= math.log(ALIKE_RATIO)
    return (
        angle_scale(angles, "parents" if found.vectors == "weights" else "task vectors"),
        MapScale(
            "Norm of the secondary over the primary's",
            lambda cell: cell.norm_ratio,
            lambda value: f"{value:.2f}" if value < 9.995 else f"{value:.0f}",
            lambda value: 0.5 + math.log(value) / math.log(FULL_RATIO) / 2 if value > 0 else 0.0,
            RATIO_RAMP,
            range_text,
            f"Norms: {range_text} of the primary's, all within 5 %" if is_alike else "",
        ),
    )


def text_colour_on(colour: tuple[int, int, int]) -> str:
    """black or white, whichever reads better on a colour."""
    return "black" if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else "white"


MAP_NAME = "difference_map.svg"


def difference_of(tensor: TensorInputs, degrees: float | None, norms: tuple[float, float] | None) -> TensorDifference:
    """What is known of a tensor; norms that are not finite are not known."""
    known = norms is not None and math.isfinite(sum(norms))
    return TensorDifference(tensor.name, tensor.element_count, degrees, norms if known else None)


def component_label(tensor_name: str) -> str:
    """The column of a tensor inside a layer: its name there without numbers, weight and bias; norms together."""
    stack, _ = find_layer(tensor_name)
    rest = tensor_name[len(stack) :].lstrip(".").split(".")[1:]
    parts = [part for part in rest if part not in ("weight", "bias") and not part.isdecimal()]
    if not parts or "norm" in parts[-1] or parts[-1].startswith("ln_"):
        return "norms" if parts else "itself"
    return ".".join(parts)


COLUMN_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # as data flows


def column_place(component: str) -> tuple[int, int]:
    """Where a component's column stands: attention, MLP, others, norms last; the best known in their own order."""
    last = component.rpartition(".")[2]
    kind = ("attention", "mlp", "other").index(component_of(component)) + 2 * (component == "norms")
    return kind, COLUMN_ORDER.index(last) if last in COLUMN_ORDER else len(COLUMN_ORDER)


def short_labels(components: Sequence[str]) -> tuple[str, ...]:
    """Column headings as short as they can be told apart: q for self_attn.q_proj."""
    cut = [re.sub(r"_(proj|layer)$", "", name) for name in components]
    for parts in (1, 2, 3):
        short = [".".join(name.split(".")[-parts:]) for name in cut]
        if len(set(short)) == len(short):
            return tuple(short)
    return tuple(components)


def combine_differences(differences: Sequence[TensorDifference]) -> MapCell:
    """Several tensors as one vector: their dot products and squared norms add up."""
    known = [part for part in differences if part.norms is not None]
    if not known:
        return MapCell(None, None)
    norms = [math.sqrt(math.fsum(part.norms[side] ** 2 for part in known)) for side in (0, 1)]
    ratio = norms[1] / norms[0] if norms[0] else None
    if len(known) == 1:
        return MapCell(known[0].degrees, ratio)
    dot = math.fsum(math.prod(part.norms) * math.cos(math.radians(part.degrees or 0.0)) for part in known)
    return MapCell(degrees_of(cosine_between(dot, *norms)), ratio)


def build_map(differences: Sequence[TensorDifference], vectors: str) -> DifferenceMap:
    """The tensors by stack, layer and component."""
    by_place: dict[str, dict[int, dict[str, list[TensorDifference]]]] = {}
    outside = []
    for difference in differences:
        if (place := find_layer(difference.name)) is None:
            outside.append((difference.name.removesuffix(".weight"), combine_differences([difference])))
        else:
            layer = by_place.setdefault(place[0], {}).setdefault(place[1], {})
            layer.setdefault(component_label(difference.name), []).append(difference)
    grids = []
    for stack, layers in by_place.items():
        components = list(dict.fromkeys(name for layer in sorted(layers) for name in layers[layer]))
        components.sort(key=column_place)
        rows = tuple(
            (layer, tuple(combine_differences(layers[layer].get(name, ())) for name in components))
            for layer in sorted(layers)
        )
        grids.append(MapGrid(stack, short_labels(components), rows))
    return DifferenceMap(vectors, tuple(grids), tuple(outside), tuple(differences))


def map_of_merge(result: MergeResult, vectors: str) -> DifferenceMap:
    """The map that a merge measured on its way. Tensors that it copied without a look at both parents are blank."""
    return build_map(
        [
            difference_of(merged.tensor, merged.weights.angle_degrees, merged.weights.norms)
            for merged in result.tensors
            if merged.tensor.sources[0].is_float and merged.tensor.element_count
        ],
        vectors,
    )


def draw_map(found: DifferenceMap, title: str) -> str:
    """A map as an SVG picture: both scales side by side for each stack of layers, then what is outside them."""
    from xml.sax.saxutils import escape

    cell_width, cell_height, margin, gap = 54, 18, 64, 40
    parts: list[str] = []
    scales = map_scales(found)

    def text(x: float, y: float, words: str, style: str = "", ink: str = "#222") -> None:
        parts.append(f'<text x="{x:g}" y="{y:g}" fill="{ink}" {style}>{escape(printable(words))}</text>')

    def cell(x: float, y: float, scale: MapScale, content: MapCell, what: str) -> None:
        value = scale.value(content)
        colour = scale.colour(value) if value is not None else (245, 245, 245)
        shown = scale.text(value) if value is not None else "·"
        parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{cell_width - 1}" height="{cell_height - 1}" '
            f'fill="#{bytes(colour).hex()}"><title>{escape(printable(what))}: {shown}</title></rect>'
        )
        text(x + cell_width / 2, y + 13, shown, 'text-anchor="middle"', text_colour_on(colour))

    text(12, 24, title, 'font-size="15" font-weight="bold"')
    top, width = 44.0, 400.0
    for grid in found.grids:
        left = float(margin)
        for scale in scales:
            text(left, top + 12, f"{scale.title}: {scale.range_text}", 'font-weight="bold"')
            for column, name in enumerate(grid.components):
                text(left + (column + 0.5) * cell_width, top + 30, shorten(name, 8), 'text-anchor="middle"')
            for row, (layer, cells) in enumerate(grid.rows):
                y = top + 36 + row * cell_height
                text(left - 6, y + 13, str(layer), 'text-anchor="end"')
                for column, content in enumerate(cells):
                    what = f"{grid.stack}.{layer} {grid.components[column]}"
                    cell(left + column * cell_width, y, scale, content, what)
            left += max(len(grid.components) * cell_width, 330) + gap
        width = max(width, left)
        top += 60 + len(grid.rows) * cell_height
    for name, content in found.outside:
        for place, scale in enumerate(scales):
            cell(margin + place * cell_width, top, scale, content, name)
        text(margin + 2 * cell_width + 8, top + 13, name)
        top += cell_height
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{top + 16:g}" '
    head += 'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *parts, "</svg>", ""])


def save_map(found: DifferenceMap, path: Path, title: str) -> None:
    """Writes a map as a picture (.svg) or as figures (.json). Raises SlerpMergeError where the disk refuses."""
    if path.suffix.lower() == ".json":
        write_json(path, found.as_dict())
    else:
        write_text(path, draw_map(found, title))
