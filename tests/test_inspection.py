"""How the parents differ: every angle and norm against float64, the map's cells, its pictures, what it reads."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.cells import cell_len

from slerpkit.merge.difference_map import (
    ANGLE_RAMP,
    RATIO_RAMP,
    DifferenceMap,
    MapCell,
    TensorDifference,
    angle_scale,
    build_map,
    map_scales,
    save_map,
)
from slerpkit.merge.events import WorkAdvanced, WorkBegan, ignore
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.tensors import TensorReader
from slerpkit.recipe import recipe_and_options
from slerpkit.schedule import parse_blend
from slerpkit.screen.figures import draw_cell, render_map
from slerpkit.story import inspect_parents
from tests.builders import (
    DEVICE,
    add_tokenizer,
    edit_json,
    llama_tensors,
    load_tensors,
    make_checkpoint,
    make_pair,
    merge,
)
from tests.pictures import RecordingConsole
from tests.test_command_line import pair, run  # noqa: F401  (fixtures)


def inspected(primary: Path, secondary: Path, observe=ignore, **settings) -> DifferenceMap:
    settings = {"device": DEVICE, "save_directory": Path(), **settings}
    return inspect_parents(*recipe_and_options({"primary": primary, "secondary": secondary, **settings}), observe)


def exact(v0: torch.Tensor, v1: torch.Tensor) -> tuple[float, float, float]:
    """(degrees, |v0|, |v1|) in float64, written from the definition; by the chord, which keeps its digits near 0."""
    a, b = v0.double().flatten(), v1.double().flatten()
    norms = float(a.norm()), float(b.norm())
    half = float((a / norms[0] - b / norms[1]).norm()) / 2
    return math.degrees(2 * math.asin(min(half, 1.0))), *norms


# ── Figures ──


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_tensor_has_its_angle_and_norms(tmp_path, parents, dtype):
    folders = make_pair(tmp_path, dtype)
    parents.watch(*folders)
    found = inspected(*folders)
    left, right = map(load_tensors, folders)
    assert {difference.name for difference in found.tensors} == left.keys()
    for difference in found.tensors:
        degrees, *norms = exact(left[difference.name], right[difference.name])
        assert difference.degrees == pytest.approx(degrees, abs=1e-4)
        assert difference.norms == pytest.approx(norms, rel=1e-6)
        assert difference.parameters == left[difference.name].numel()


def test_a_tensor_of_many_blocks_is_measured_whole(tmp_path):
    generator = torch.Generator().manual_seed(5)
    left = torch.randn(1500, 1500, generator=generator).bfloat16()
    right = (left.float() + 0.02 * torch.randn(1500, 1500, generator=generator)).bfloat16()
    folders = [make_checkpoint(tmp_path / name, {"x.weight": v}) for name, v in (("a", left), ("b", right))]
    (difference,) = inspected(*folders).tensors
    assert difference.degrees == pytest.approx(exact(left, right)[0], abs=1e-3)


def test_a_cell_is_the_angle_of_its_tensors_laid_end_to_end(tmp_path):
    folders = make_pair(tmp_path)
    left, right = map(load_tensors, folders)
    (grid,) = inspected(*folders).grids
    assert grid.stack == "model.layers"
    assert grid.components == ("q", "k", "v", "o", "gate", "up", "down", "norms")
    for layer, cells in grid.rows:
        names = [f"model.layers.{layer}.{kind}_layernorm.weight" for kind in ("input", "post_attention")]
        joined = [torch.cat([tensors[name].double() for name in names]) for tensors in (left, right)]
        degrees, *norms = exact(*joined)
        assert cells[-1].degrees == pytest.approx(degrees, abs=1e-4)
        assert cells[-1].norm_ratio == pytest.approx(norms[1] / norms[0], rel=1e-6)
        degrees, *norms = exact(*(tensors[f"model.layers.{layer}.mlp.up_proj.weight"] for tensors in (left, right)))
        assert cells[5].degrees == pytest.approx(degrees, abs=1e-4)


def test_experts_of_a_layer_share_a_cell():
    names = [f"model.layers.3.mlp.experts.{number}.up_proj.weight" for number in range(4)]
    found = build_map([TensorDifference(name, 10, 60.0, (1.0, 2.0)) for name in names], "weights")
    (grid,) = found.grids
    assert grid.rows == ((3, (MapCell(pytest.approx(60.0), pytest.approx(2.0)),)),)


def test_what_has_no_direction_has_no_angle(tmp_path):
    left = {
        "zero.weight": torch.zeros(4, 4),
        "same.weight": torch.ones(4, 4),
        "inf.weight": torch.full((4,), torch.inf),
    }
    right = {**left, "zero.weight": torch.ones(4, 4)}
    found = inspected(make_checkpoint(tmp_path / "a", left), make_checkpoint(tmp_path / "b", right))
    by_name = {difference.name: difference.degrees for difference in found.tensors}
    assert by_name["zero.weight"] is None
    assert by_name["same.weight"] == 0.0
    assert by_name["inf.weight"] is None
    json.dumps(found.as_dict(), allow_nan=False)


def test_with_a_base_it_is_the_task_vectors_that_are_measured(tmp_path):
    folders = make_pair(tmp_path, torch.float32)
    base = make_checkpoint(tmp_path / "base", llama_tensors(3, torch.float32))
    found = inspected(*folders, base=base)
    assert found.vectors == "task vectors"
    left, right, base_tensor = map(load_tensors, (*folders, base))
    for difference in found.tensors:
        name = difference.name
        degrees, *norms = exact(left[name] - base_tensor[name], right[name] - base_tensor[name])
        assert difference.degrees == pytest.approx(degrees, abs=1e-3)
        assert difference.norms == pytest.approx(norms, rel=1e-5)


def test_threads_change_no_figure(tmp_path):
    folders = make_pair(tmp_path)
    assert inspected(*folders, threads=1) == inspected(*folders, threads=5)


# ── What it costs ──


def test_each_parent_is_read_once_and_nothing_is_written(tmp_path, parents, monkeypatch):
    folders = make_pair(tmp_path)
    parents.watch(*folders)
    monkeypatch.chdir(tmp_path)
    read = []
    fill = TensorReader._fill
    monkeypatch.setattr(
        TensorReader,
        "_fill",
        staticmethod(lambda handle, info, view: (read.append(len(view)), fill(handle, info, view))),
    )
    events: list[object] = []
    inspected(*folders, observe=events.append)
    size = sum(tensor.nbytes for folder in folders for tensor in load_tensors(folder).values())
    assert sum(read) == size
    (began,) = (event for event in events if isinstance(event, WorkBegan))
    assert began.total == sum(event.amount for event in events if isinstance(event, WorkAdvanced)) == size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["primary", "secondary"]


def test_parents_that_do_not_fit_are_refused(tmp_path):
    primary, secondary = make_pair(tmp_path)
    edit_json(secondary / "config.json", rms_norm_eps=1e-3)
    with pytest.raises(SlerpMergeError, match="rms_norm_eps"):
        inspected(primary, secondary)


# ── With a merge ──


def test_a_child_carries_the_map_of_its_parents(tmp_path):
    folders = make_pair(tmp_path)
    child = merge(*folders, tmp_path / "child").child
    told = json.loads((child / "merge_report.json").read_text("utf-8"))["angles"]
    measured = inspected(*folders).as_dict()
    assert told.pop("measured")
    assert told == json.loads(json.dumps(measured))
    ElementTree.parse(child / "difference_map.svg")
    assert "](difference_map.svg)" in (child / "README.md").read_text("utf-8")


def test_what_a_merge_only_copied_is_left_blank(tmp_path):
    schedule = parse_blend("self_attn=0 0.5")
    child = merge(*make_pair(tmp_path), tmp_path / "child", schedule=schedule).child
    cells = json.loads((child / "merge_report.json").read_text("utf-8"))["angles"]["cells"]
    blank = {cell["component"] for cell in cells if cell["degrees"] is None}
    assert blank == {"q", "k", "v", "o"}


def test_a_report_holds_no_place_and_no_time(tmp_path):
    for name in ("here", "there"):
        merge(*make_pair(tmp_path / name), tmp_path / name / "child")
    texts = [(tmp_path / name / "child" / "merge_report.json").read_text("utf-8") for name in ("here", "there")]
    assert texts[0] == texts[1]
    assert str(tmp_path) not in texts[0]


# ── Pictures ──


def large_map(layers: int = 40, components: int = 14) -> DifferenceMap:
    """A map with more columns than a narrow terminal has room for, and a blank."""
    differences = [
        TensorDifference(
            f"m.layers.{layer}.part_{number:02d}.weight", 4, 1.0 + layer + number, (1.0, 1.0 + number / 50)
        )
        for layer in range(layers)
        for number in range(components)
    ]
    odd = TensorDifference("a<b>&[red]\x1b[31m.weight", 4, 170.0, (1.0, 1.5))
    return build_map([*differences, TensorDifference("blank.weight", 4, None, None), odd], "weights")


@pytest.mark.parametrize("width", [60, 100, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_screen_shows_every_layer_within_its_width(width, encoding, monkeypatch):
    monkeypatch.setattr(RecordingConsole, "encoding", encoding)
    console = RecordingConsole(width)
    console.print(render_map(console, large_map()))
    text = console.export_text()
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    for layer in range(40):
        assert sum(re.match(rf"\W+{layer} ", line) is not None for line in lines) >= 2
    assert "\x1b[31m" not in text
    assert encoding != "ascii" or text.isascii()


@pytest.mark.parametrize("width", [40, 45, 60, 100])
def test_what_a_map_ranges_over_is_never_cut(width):
    console = RecordingConsole(width)
    console.print(render_map(console, large_map()))
    lines = [line.strip("│ ") for line in console.export_text().splitlines()]
    assert [line for line in lines if " to " in line] == [scale.range_text for scale in map_scales(large_map())]


@pytest.mark.parametrize(
    ("degrees", "width", "shown"),
    [
        (21.83, 7, "21.8"),
        (21.83, 5, "21.8"),
        (28.7, 4, "29"),
        (28.7, 3, "29"),
        (0.99, 4, "1.0"),
        (9.96, 4, "10"),
        (113.4, 4, "113"),
        (113.4, 3, "##"),
    ],
)
def test_a_cell_is_rounded_to_what_fits_beside_a_space(degrees, width, shown):
    cell = draw_cell(RecordingConsole(), MapCell(degrees, 1.0), angle_scale([0, 180]), width).plain
    assert cell.strip() == shown
    assert cell.endswith(" ")
    assert len(cell) == width


def test_headings_too_long_for_their_columns_are_numbers_told_below():
    console = RecordingConsole(60)
    console.print(render_map(console, large_map()))
    text = console.export_text()
    assert "1 part_00" in text
    assert "14 part_13" in text


def test_the_picture_is_xml_whatever_the_names(tmp_path):
    save_map(large_map(), tmp_path / "map.svg", "a <title> & more")
    root = ElementTree.parse(tmp_path / "map.svg").getroot()
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "a <title> & more" in texts
    assert len(list(root.iter("{http://www.w3.org/2000/svg}rect"))) == 1 + 2 * (40 * 14 + 2)


def test_angles_run_from_the_least_to_the_greatest_and_norm_ratios_over_a_fixed_scale():
    angles, ratios = map_scales(large_map())
    assert angles.colour(1.0) == ANGLE_RAMP[0]
    assert angles.colour(170.0) == ANGLE_RAMP[-1]
    assert ratios.colour(1.0) == RATIO_RAMP[1]
    assert ratios.colour(1.5) == ratios.colour(4.0) == RATIO_RAMP[2]


def map_of_ratios(*ratios: float) -> DifferenceMap:
    """A map of one component whose layers have these norm ratios."""
    parts = [TensorDifference(f"m.layers.{n}.q_proj.weight", 4, 9.0 + n, (1.0, r)) for n, r in enumerate(ratios)]
    return build_map(parts, "weights")


def test_a_ratio_of_one_percent_is_pale():
    _, ratios = map_scales(map_of_ratios(1.0, 1.01))
    assert max(abs(a - b) for a, b in zip(ratios.colour(1.01), RATIO_RAMP[1])) < 10


@pytest.mark.parametrize("width", [60, 80, 100, 160])
@pytest.mark.parametrize(("least", "is_line"), [(0.96, True), (0.94, False), (0.0, False)])
def test_norms_that_are_all_alike_are_one_line(width, least, is_line):
    console = RecordingConsole(width)
    console.print(render_map(console, map_of_ratios(least, 1.0, 1.049)))
    lines = console.export_text().splitlines()
    assert ("Norms: 0.960 to 1.049 of the primary's, all within 5 %" in lines) == is_line
    assert any("Norm of the secondary over" in line for line in lines) != is_line


# ── The command line ──


def test_inspect_asks_for_no_save_directory_and_makes_no_child(run, pair, tmp_path):  # noqa: F811
    outcome = run("--inspect", "--primary", "primary", "--secondary", "secondary")
    assert outcome.status == 0, outcome.err
    assert "Angle between the parents" in outcome.out
    assert "Norm of the secondary" in outcome.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["primary", "secondary"]


def test_inspect_prints_json_and_saves_what_is_asked_for(run, pair, tmp_path):  # noqa: F811
    files = ("--map", "map.svg", "--map", "map.json")
    outcome = run("--inspect", "--primary", "primary", "--secondary", "secondary", "--json", *files)
    assert outcome.report == json.loads((tmp_path / "map.json").read_text("utf-8"))
    ElementTree.parse(tmp_path / "map.svg")
    assert len(outcome.report["tensors"]) == 21


def test_a_merge_saves_its_map_too(run, pair, tmp_path):  # noqa: F811
    arguments = ("--primary", "primary", "--secondary", "secondary", "--save-dir", "child", "--yes")
    assert run(*arguments, "--map", "m.svg").status == 0
    ElementTree.parse(tmp_path / "m.svg")


@pytest.mark.parametrize("name", ["[red].svg", "[bold]b.json", ":warning:.svg"])
def test_the_name_of_a_map_is_shown_as_it_is(run, pair, tmp_path, name):  # noqa: F811
    outcome = run("--inspect", "--primary", "primary", "--secondary", "secondary", "--map", name)
    assert outcome.status == 0
    assert f"The map stands in {name}." in outcome.out
    assert (tmp_path / name).is_file()


def test_a_map_of_no_known_format_is_wrong_usage(run, pair):  # noqa: F811
    outcome = run("--inspect", "--primary", "primary", "--secondary", "secondary", "--map", "map.png")
    assert outcome.status == 2
    assert ".svg" in outcome.err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("primary/config.json", "lies in a model's folder"),
        ("nowhere/m.svg", "is not there"),
        ("mine.svg", "exists already"),
    ],
)
def test_a_map_overwrites_nothing(run, pair, tmp_path, path, words):  # noqa: F811
    (tmp_path / "mine.svg").write_text("mine")
    more = ("--overwrite",) if path.startswith("primary") else ()
    for arguments in (("--inspect",), ("--save-dir", "child", "--yes")):
        outcome = run("--primary", "primary", "--secondary", "secondary", *arguments, "--map", path, *more)
        assert outcome.status == 1
        assert words in outcome.err
    assert (tmp_path / "mine.svg").read_text() == "mine"
    assert not (tmp_path / "child").exists()


def test_without_a_terminal_inspect_names_what_is_missing(run, pair):  # noqa: F811
    outcome = run("--inspect", "--primary", "primary")
    assert outcome.status == 2
    assert "--secondary" in outcome.err
    assert "--save-dir" not in outcome.err


def test_a_map_shows_where_there_is_a_tokenizer_too(tmp_path):
    """Rows that follow tokens are measured where both have them."""
    primary, secondary = make_pair(tmp_path)
    add_tokenizer(primary)
    add_tokenizer(secondary)
    assert len(inspected(primary, secondary).tensors) == 21
