"""The screens: events of a real merge in, pictures out, at several widths and on lesser terminals."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from rich.cells import cell_len
from rich.console import Console

from slerpkit.child.report import MergeReport
from slerpkit.maths import TensorWeights
from slerpkit.merge.events import Noted, WorkAdvanced, WorkBegan
from slerpkit.merge.journal import Leftover
from slerpkit.merge.plan import MergePlan
from slerpkit.merge.tensor_plan import MergedTensor
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.tensors import find_layer, layer_positions
from slerpkit.parity.kinship import Kinship
from slerpkit.parity.report import Mismatch, ParityReport
from slerpkit.schedule import parse_blend
from slerpkit.screen.console import render_error
from slerpkit.screen.panels import (
    draw_curve,
    next_commands,
    render_curves,
    render_parity,
    render_plan,
    render_report,
)
from slerpkit.screen.progress import LayerStrip, MergeView
from slerpkit.threads import BackgroundThread
from tests.pictures import Clock, RecordingConsole, Scene, draw_pictures, draw_progress, make_scene
from tests.terminal import words

WIDTHS = (60, 80, 100, 160)
COLOUR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9\d|10[0-7])[;\dm]")


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    return make_scene(tmp_path_factory.mktemp("scene"))


def plain_console(width: int = 100, encoding: str = "utf-8", **settings) -> Console:
    """A stream that is no terminal, and takes only what its encoding can hold."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(file=stream, width=width, highlight=False, legacy_windows=False, **settings)


def written(console: Console) -> str:
    return console.file.buffer.getvalue().decode(console.file.encoding)


def screens(console: Console, scene: Scene) -> Iterator[str]:
    """Every picture of the view, one after another, as drawn on this console."""
    error = SlerpMergeError("model.safetensors is damaged or incomplete: it ends early.", "Download it again.")
    for picture in (
        render_parity(console, scene.plan.parity),
        render_plan(console, scene.plan),
        render_report(console, scene.report),
        render_error(console, error),
    ):
        with console.capture() as capture:
            console.print(picture)
        yield capture.get()


def shown(picture, width: int) -> str:
    console = RecordingConsole(width)
    console.print(picture(console))
    return console.export_text()


def parity_of(*mismatches: Mismatch) -> ParityReport:
    return ParityReport(mismatches, ())


def merge_began(scene: Scene) -> WorkBegan:
    """What the view is told of the merge first."""
    return next(event for event in scene.events if isinstance(event, WorkBegan))


def long_named(scene: Scene) -> MergedTensor:
    """A tensor whose name no terminal is wide enough for."""
    merged = scene.report.merged.tensors[0]
    return dataclasses.replace(
        merged, tensor=dataclasses.replace(merged.tensor, name="model.layers.0." + "expert." * 40)
    )


DTYPE = Mismatch("resolved", "dtype of 3 tensors", "bfloat16", "float16", "Saved in the primary's.")
LICENCE = Mismatch("notice", "licence", "apache-2.0", "mit", "A child is bound by both.")
ROPE = Mismatch("blocking", "rope_theta", "10000", "500000", "Equal shapes hide this.")


class TestPlainLines:
    def lines_of(self, scene: Scene, seconds: float, steps: int = 1000) -> list[str]:
        """What is printed of a merge that takes so long, and tells of its work in so many steps."""
        console = plain_console(get_time=(clock := Clock()))
        with MergeView(console) as view:
            view.observe(merge_began(scene))
            for _ in range(steps):
                clock.now += seconds / steps
                view.observe(WorkAdvanced(scene.plan.child_bytes // steps + 1))
        return written(console).splitlines()

    @pytest.mark.parametrize(("seconds", "lines"), [(1.9, 0), (9, 1), (24, 3), (110, 10), (10_000, 10)])
    def test_a_line_comes_every_ten_percent_and_ten_seconds_at_most(self, scene, seconds, lines):
        assert len(self.lines_of(scene, seconds)) == lines

    def test_each_line_says_how_much_of_how_much(self, scene):
        lines = self.lines_of(scene, 1000)
        percents = [int(re.fullmatch(r"Merging: +(\d+) %, [\d.]+ GB of 14.5 GB", line)[1]) for line in lines]
        assert percents == list(range(10, 101, 10))

    def test_one_large_tensor_gives_one_line(self, scene):
        assert self.lines_of(scene, 60, steps=1) == ["Merging: 100 %, 14.5 GB of 14.5 GB"]

    def test_a_stream_that_is_no_terminal_gets_no_escape_code(self, scene):
        assert "\x1b" not in "".join((*self.lines_of(scene, 100), *screens(plain_console(), scene)))

    def test_a_quiet_view_says_nothing(self, scene):
        console = plain_console()
        with MergeView(console, quiet=True) as view:
            for event in scene.events:
                view.observe(event)
        assert written(console) == ""


class TestWidths:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_no_line_of_a_screen_is_wider_than_the_terminal(self, scene, width):
        for screen in screens(plain_console(width), scene):
            assert max(cell_len(line) for line in screen.splitlines()) <= width

    @pytest.mark.parametrize("width", WIDTHS)
    def test_nor_is_the_progress(self, scene, width):
        console = RecordingConsole(width, get_time=(clock := Clock()))
        view = MergeView(console)
        draw_progress(view, clock, scene, stop_at=0.5)
        text = console.export_text()
        assert max(cell_len(line) for line in text.splitlines()) <= width
        assert "50%" in text
        assert "1.3 GB/s" in text
        assert re.search(r"\b00:0[56]\b", text), "the time left"
        assert re.search(r"model\.layers\.1\d\.\S+ +slerp, \d+\.\d\d°", text), "the tensor at hand and its angle"

    @pytest.mark.parametrize("width", WIDTHS)
    def test_a_long_tensor_name_stays_on_its_line(self, scene, width):
        console = RecordingConsole(width, get_time=Clock())
        view = MergeView(console)
        view.observe(merge_began(scene))
        view.observe(Noted("Merging on cpu: as asked."))
        view.observe(long_named(scene))
        view.stop()
        console.export_text()  # forgets what the live display drew
        console.print(view.render())
        lines = console.export_text().splitlines()
        assert len(lines) == 3
        assert max(map(cell_len, lines)) <= width


class TestParityPanel:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_both_values_and_what_follows_are_shown(self, width):
        text = words(shown(lambda console: render_parity(console, parity_of(DTYPE, LICENCE)), width))
        for value in ("dtype of 3 tensors", "bfloat16", "float16", "Saved in", "licence", "apache-2.0", "mit"):
            assert value in text
        assert "1 resolved, 1 to know" in text

    @pytest.mark.parametrize("width", WIDTHS)
    def test_common_names_are_not_cut_in_two(self, width):
        names = ("max_position_embeddings", "generation_config.json")
        report = parity_of(*(dataclasses.replace(LICENCE, subject=name) for name in names))
        text = shown(lambda console: render_parity(console, report), width)
        for name in names:
            assert name in text

    def test_what_blocks_is_counted(self):
        text = shown(lambda console: render_parity(console, parity_of(ROPE, LICENCE)), 100)
        assert "1 blocking" in text
        assert "10000" in text
        assert "500000" in text

    def test_equal_parents_are_said_to_be_equal(self):
        assert "match" in shown(lambda console: render_parity(console, parity_of()), 100)

    def test_no_mismatch_is_left_out_in_silence(self):
        many = [dataclasses.replace(LICENCE, subject=f"key_{number}") for number in range(30)]
        text = shown(lambda console: render_parity(console, parity_of(*many)), 100)
        listed = sum(f"key_{number} " in text for number in range(30))
        assert listed == 30 or f"{30 - listed} more" in text

    def test_markup_and_control_characters_are_shown_not_obeyed(self):
        odd = dataclasses.replace(LICENCE, subject="[red]key[/]", primary="a\x1b[31mb", secondary="c\x9b\u202ed")
        for width in WIDTHS:
            text = shown(lambda console: render_parity(console, parity_of(odd)), width)
            assert "[red]key[/]" in text
            assert r"a\x1b[31mb" in text
            assert not {"\x1b", "\x9b", "\u202e"} & set(text)


class TestPlanPanel:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_parents_child_and_cost_are_named(self, scene, width):
        text = words(shown(lambda console: render_plan(console, scene.plan), width))
        for value in (
            "meadow/finch-7b-chat: LlamaForCausalLM, 7.2B parameters, 14.5 GB, bfloat16",
            "meadow/finch-7b-code: LlamaForCausalLM, 7.2B parameters, 14.5 GB, float16",
            "child finch-7b-chat-finch-7b-code-slerp",
            "blend slerp, even (t = 0.5)",
            "tensors 291 to slerp; 14.5 GB in 3 files",
            "tokenizer from the primary",
            "needs 14.5 GB of disk, 412 GB are free; ",
            "time 13 s expected, with 8 threads",
        ):
            assert value in text

    def test_a_disk_that_does_not_tell_has_no_free_room_in_the_plan(self, scene):
        plan = dataclasses.replace(scene.plan, disk_free_bytes=None)
        text = words(shown(lambda console: render_plan(console, plan), 100))
        assert "14.5 GB of disk;" in text
        assert "free" not in text

    def test_one_thread_is_one(self, scene):
        plan = dataclasses.replace(scene.plan, threads=1)
        assert "1 thread " in words(shown(lambda console: render_plan(console, plan), 100)) + " "

    @pytest.mark.parametrize(
        ("degrees", "colour", "told"),
        [
            (3.2, "32", "siblings: 3.2 degrees apart, fine-tunes of one base"),
            (40.0, "33", "relatives: 40.0 degrees apart, more than fine-tunes usually are"),
            (89.8, "31", "strangers: 89.8 degrees apart, their children seldom speak"),
            (None, "33", "unknown: no matrices to compare"),
        ],
    )
    def test_kinship_has_its_meaning_and_its_colour(self, scene, degrees, colour, told):
        plan = dataclasses.replace(scene.plan, kinship=Kinship(degrees, ()))
        console = RecordingConsole(100)
        with console.capture() as capture:
            console.print(render_plan(console, plan))
        assert f"\x1b[{colour}m{told}" in capture.get()

    @pytest.mark.parametrize(
        ("angles", "recipe", "advised"),
        [
            ((0.5, 1.7, 9.0), {}, True),
            ((0.5, 9.0, 9.0), {}, False),
            ((0.0, 0.0, 0.5), {}, False),
            ((0.5, 1.7, 9.0), {"base": Path("base")}, False),
            ((0.5, 1.7, 9.0), {"method": "lerp"}, False),
            ((), {}, False),
        ],
    )
    def test_where_slerp_is_a_straight_line_a_base_is_advised(self, scene, angles, recipe, advised):
        recipe = dataclasses.replace(scene.plan.recipe, **recipe)
        plan = dataclasses.replace(scene.plan, recipe=recipe, kinship=Kinship(5.0, (), angles))
        text = words(shown(lambda console: render_plan(console, plan), 100))
        assert ("note Most tensors lie less than 1.8 degrees apart" in text) is advised

    @pytest.mark.parametrize(
        ("answer", "told"),
        [
            ("ramp", "slerp, ramp (t = 0, 0.1, 0.5, 0.9, 1)"),
            ("0.3", "slerp, lean to primary (t = 0.3)"),
            ("0.31", "slerp, t = 0.31"),
        ],
    )
    def test_a_blend_that_has_a_name_is_called_by_it(self, scene, answer, told):
        recipe = dataclasses.replace(scene.plan.recipe, schedule=parse_blend(answer))
        plan = dataclasses.replace(scene.plan, recipe=recipe)
        assert f"blend {told} kinship" in words(shown(lambda console: render_plan(console, plan), 100))

    def test_why_a_tokenizer_is_taken_is_told_where_it_is_not_simply_the_primarys(self, scene):
        assert "tokenizer from the primary needs" in words(shown(lambda console: render_plan(console, scene.plan), 100))
        vocabulary = dataclasses.replace(scene.plan.parity.vocabulary, tokenizer_source="secondary", reason="it alone")
        parity = dataclasses.replace(scene.plan.parity, vocabulary=vocabulary)
        plan = dataclasses.replace(scene.plan, parity=parity)
        text = words(shown(lambda console: render_plan(console, plan), 100))
        assert "tokenizer from the secondary: it alone needs" in text

    def test_where_a_sweep_finds_t_the_plan_says_none(self, scene):
        text = words(shown(lambda console: render_plan(console, scene.plan, warning="It lacks a norm."), 100))
        assert "note It lacks a norm." in text
        text = words(shown(lambda console: render_plan(console, scene.plan, finds_t=True), 100))
        assert "blend slerp, t to be found" in text
        assert "0.5" not in text.partition("blend")[2].partition("kinship")[0]


class TestReportPanel:
    def report_with(self, scene: Scene, *warnings: str) -> MergeReport:
        """The scene's report cut down to four tensors: two slerped, one lerped, one copied."""
        slerped = [merged for merged in scene.report.merged.tensors if merged.weights.operation == "slerp"][:2]
        lerped, copied = (
            dataclasses.replace(slerped[0], weights=TensorWeights(0.5, 0.5, rule, reason, 1.0))
            for rule, reason in (("lerp", "parallel"), ("copy", "identical"))
        )
        merged = dataclasses.replace(scene.report.merged, tensors=(*slerped, lerped, copied))
        verified = dataclasses.replace(scene.report.verified, warnings=warnings)
        return dataclasses.replace(scene.report, merged=merged, verified=verified)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_counts_place_speed_and_checks_are_shown(self, scene, width):
        report = self.report_with(scene)
        text = words(shown(lambda console: render_report(console, report), width))
        assert "/home/ada/models/finch-7b-chat-finch-7b-code-slerp" in text.replace(" ", ""), "folded where it must be"
        assert "2 slerped, 1 lerped, 1 copied" in text
        assert "1 parallel" in text
        assert "11 s to merge (1.3 GB/s), 15 s in all" in text
        assert "291 tensors stand under the primary's names and shapes" in text

    def test_speed_is_over_what_this_run_merged(self, scene):
        """Two of three files of about 5 GB stood already."""
        names = [shard.file_name for shard in scene.plan.shards]
        for kept, told in ((names[:2], "11 s to merge (411 MB/s)"), (names, "11 s to merge, 15 s in all")):
            plan = dataclasses.replace(scene.plan, leftover=Leftover(tuple(kept), len(names), ""))
            report = dataclasses.replace(self.report_with(scene), plan=plan)
            assert told in words(shown(lambda console, report=report: render_report(console, report), 100))

    def test_a_child_without_a_tokenizer_is_not_said_to_convert(self, scene):
        vocabulary = dataclasses.replace(scene.plan.parity.vocabulary, tokenizer_source=None)
        parity = dataclasses.replace(scene.plan.parity, vocabulary=vocabulary)
        without = dataclasses.replace(scene.report, plan=dataclasses.replace(scene.plan, parity=parity))
        commands = ["\n".join(next_commands(report)) for report in (scene.report, without)]
        assert ["convert_hf_to_gguf" in lines for lines in commands] == [True, False]
        assert all("hf upload" in lines for lines in commands)

    @pytest.mark.parametrize("width", WIDTHS)
    def test_warnings_are_shown(self, scene, width):
        report = self.report_with(scene, "lm_head.weight: 3 values are infinite or not a number")
        text = words(shown(lambda console: render_report(console, report), width))
        assert "• lm_head.weight: 3 values are infinite or not a number" in text

    def test_thousands_of_warnings_do_not_bury_the_summary(self, scene):
        report = self.report_with(scene, *(f"tensor_{number}: 1 value is infinite" for number in range(3000)))
        text = shown(lambda console: render_report(console, report), 100)
        assert len(text.splitlines()) < 100


class TestError:
    @pytest.mark.parametrize("width", WIDTHS)
    def test_cause_comes_before_remedy(self, width):
        error = SlerpMergeError("The folder [red]x does not exist.", "Give another folder.")
        lines = shown(lambda console: render_error(console, error), width).splitlines()
        assert lines == ["✗ The folder [red]x does not exist.", "→ Give another folder."]


class TestLesserTerminals:
    def test_an_ascii_terminal_gets_ascii_only(self, scene):
        for screen in screens(plain_console(60, "ascii"), scene):
            assert screen.isascii()

    @pytest.mark.parametrize("width", WIDTHS)
    def test_so_does_its_progress(self, scene, width):
        console = plain_console(width, "ascii", force_terminal=True, get_time=(clock := Clock()))
        view = MergeView(console)
        draw_progress(view, clock, scene, stop_at=0.5)
        assert "50%" in written(console)

    def test_so_does_the_name_of_a_tensor_that_is_too_long(self, scene):
        console = plain_console(60, "ascii", force_terminal=True)
        with MergeView(console) as view:
            view.observe(merge_began(scene))
            view.observe(Noted("Merging on cpu: as asked."))
            view.observe(long_named(scene))
            console.print(view.render())
        assert "model.layers.0.expert." in written(console)

    def test_no_color_takes_every_colour_away(self, scene):
        coloured, without = (
            RecordingConsole(_environ=environment) for environment in ({}, {"NO_COLOR": "1", "TERM": "xterm"})
        )
        assert COLOUR.search("".join(screens(coloured, scene)))
        assert not COLOUR.search("".join(screens(without, scene)))


class TestLiveDisplay:
    def live_events(self, scene: Scene) -> list[object]:
        return [merge_began(scene), *scene.events[2:5]]

    def end_of(self, threads: set[BackgroundThread]) -> bool:
        """Whether these threads end by themselves; one that was told to may need a moment."""
        for thread in threads:
            thread.join(2)
        return not threads & BackgroundThread.running

    def test_it_stops_when_an_exception_passes(self, scene):
        console = plain_console(force_terminal=True)
        threads = set(BackgroundThread.running)
        with pytest.raises(KeyboardInterrupt), MergeView(console) as view:
            for event in self.live_events(scene):
                view.observe(event)
            refreshing = BackgroundThread.running - threads
            assert refreshing, "the display is live"
            raise KeyboardInterrupt
        assert self.end_of(refreshing)
        assert written(console).rfind("\x1b[?25h") > written(console).rfind("\x1b[?25l"), "the cursor is shown again"

    def test_it_stops_before_the_summary(self, scene):
        console = plain_console(force_terminal=True)
        threads = set(BackgroundThread.running)
        view = MergeView(console)
        for event in scene.events:
            view.observe(event)
        assert self.end_of(BackgroundThread.running - threads)
        assert written(console).count("\x1b[?25h") == 1, "the cursor is shown again"

    def test_the_bar_leaves_nothing_behind(self, scene):
        console = plain_console(force_terminal=True)
        with MergeView(console) as view:
            for event in self.live_events(scene):
                view.observe(event)
        drawn = written(console).rindex("━")
        assert written(console)[drawn:].count("\x1b[2K") >= 2, "both lines of the display are erased"

    @pytest.mark.parametrize("width", [100, 160])
    def test_a_window_made_narrower_breaks_no_line_of_it(self, scene, width):
        """What broke would stay on the screen: nobody is told of the new width before the terminal has broken it."""
        console = RecordingConsole(width, get_time=(clock := Clock()))
        view = MergeView(console)
        draw_progress(view, clock, scene, stop_at=0.5)
        view.observe(long_named(scene))
        with console.capture() as capture:
            console.print(view.render())
        assert max(map(cell_len, re.sub(r"\x1b\[[^m]*m", "", capture.get()).splitlines())) <= 60

    def test_layers_that_are_copied_are_told_from_those_to_come(self, scene):
        copied, others = 6, 26  # of 32 layers, each in a cell of its own
        strip = LayerStrip(merge_began(scene).tensors)
        for merged in scene.report.merged.tensors:
            layer = find_layer(merged.tensor.name)
            if layer is not None and layer[1] < copied:
                strip.add(dataclasses.replace(merged, weights=TensorWeights(1.0, 0.0, "copy", "t = 0", None)))
        for encoding, marks in (("utf-8", "░·"), ("ascii", "=.")):
            strip_text = strip.render(plain_console(100, encoding)).plain
            assert strip_text.split()[1] == marks[0] * copied + marks[1] * others

    @pytest.mark.parametrize(("work", "told"), [
        (WorkBegan("Measuring the primary", 40960, unit="tokens"), "12,288 of 40,960 tokens"),
        (WorkBegan("Finding a good t", 100), "0%"),
    ])  # fmt: skip
    def test_what_is_counted_is_said(self, work, told):
        for width in WIDTHS:
            console = RecordingConsole(width, get_time=Clock())
            view = MergeView(console)
            with mock.patch("rich.live.Live.start"):
                view.observe(work)
            if work.unit:
                view.observe(WorkAdvanced(12288))
            console.print(view.render())
            text = console.export_text()
            assert told in text
            assert work.what in text

    def test_work_whose_end_is_not_known_has_a_bar_without_figures(self):
        console = RecordingConsole(80, get_time=Clock())
        view = MergeView(console)
        with mock.patch("rich.live.Live.start"):
            view.observe(WorkBegan("Loading the primary", 0))
        console.print(view.render())
        text = console.export_text()
        assert "Loading the primary" in text
        assert "%" not in text


def test_the_pictures_show_the_whole_session(scene):
    pictures = {name: console.export_text() for name, console in draw_pictures(scene)}
    places = [
        pictures["merge"].index(part)
        for part in (
            "slerpmerge 0.",
            "? Primary model",
            "? Secondary model",
            "? Save directory",
            "? Blend",
            "Parity",
            "Plan",
            "? Start the merge?",
            "62%",
            "Done",
            "Try it, convert it, share it:",
        )  # fmt: skip
    ]
    assert places == sorted(places)
    assert str(Path.cwd()) not in "".join(pictures.values())


def scheduled(plan: MergePlan, blend: str) -> MergePlan:
    """The plan with each tensor's t as this answer to `Blend` gives it."""
    schedule = parse_blend(blend)
    positions = layer_positions([tensor.name for tensor in plan.tensors])
    shards = []
    for shard in plan.shards:
        ts = [schedule.t_for(tensor.name, positions.get(tensor.name, 0)) for tensor in shard.tensors]
        tensors = tuple(dataclasses.replace(tensor, t=t) for tensor, t in zip(shard.tensors, ts))
        shards.append(dataclasses.replace(shard, tensors=tensors))
    return dataclasses.replace(plan, shards=tuple(shards))


class TestCurves:
    @pytest.mark.parametrize(
        ("values", "bars", "digits"),
        [
            ([0, 1], "▁█", "09"),
            ([0, 0.25, 0.5, 0.75, 1], "▁▃▅▆█", "02579"),
            ([1, 0.5, 0], "█▅▁", "950"),
            ([0.3], "▃", "3"),
            ([-0.5, 1.5], "▁█", "09"),
            ([], "", ""),
        ],
    )
    def test_a_curve_is_bars_or_digits(self, values, bars, digits):
        assert draw_curve(plain_console(), values) == bars
        assert draw_curve(plain_console(encoding="ascii"), values) == digits

    def test_a_long_curve_is_thinned_and_keeps_its_ends(self):
        curve = draw_curve(plain_console(), [layer / 99 for layer in range(100)])
        assert len(curve) == 24
        assert curve == "".join(sorted(curve))
        assert (curve[0], curve[-1]) == ("▁", "█")

    @pytest.fixture
    def plan(self, scene) -> MergePlan:
        """The scene's plan with attention from 0 to 1, MLP from 1 to 0, and 0.25 for the rest."""
        return scheduled(scene.plan, "self_attn=0,1 mlp=1,0 0.25")

    @pytest.mark.parametrize("width", [60, 100])
    def test_a_table_has_a_row_for_each_component(self, plan, width):
        text = shown(lambda console: render_curves(console, plan), width)
        assert max(map(cell_len, text.splitlines())) <= width
        assert "t of every tensor" in text
        whole = words(text)
        for component in ("attention", "mlp", "other"):
            assert component in whole
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert name in "".join(whole.replace("0.25", "").split()), "names may be folded, but not cut"
        assert "0.25" in whole

    def test_at_100_columns_curves_and_ends_stand_in_one_line(self, plan):
        lines = shown(lambda console: render_curves(console, plan), 100).splitlines()
        rows = [line.strip("│ ").split() for line in lines]
        found = {row[1]: row[2:] for row in rows if row[:1] == ["model.layers"]}
        assert found.keys() == {"attention", "mlp", "other"}
        assert len(found["attention"][0]) == 24
        assert found["attention"][0] == "".join(sorted(found["attention"][0]))
        assert found["attention"][1:] == ["0", "to", "1"]
        assert found["mlp"][0] == "".join(sorted(found["mlp"][0], reverse=True))
        assert found["mlp"][1:] == ["1", "to", "0"]
        assert found["other"][1:] == ["0.25"]
        assert [row[1] for row in rows if row[:1] == ["model.layers"]] == ["attention", "mlp", "other"]

    def test_at_60_columns_no_curve_is_broken(self, plan):
        text = shown(lambda console: render_curves(console, plan), 60)
        curves = re.findall(r"[▁▂▃▄▅▆▇█]+", text)
        assert [len(curve) for curve in curves] == [24, 24, 24]

    def test_a_component_whose_tensors_differ_is_not_drawn_as_if_they_did_not(self, scene):
        """q_proj at 0 among attention at 1 shows in the table, as t of every tensor."""
        plans = [scheduled(scene.plan, blend) for blend in ("q_proj=0 self_attn=1 0.5", "self_attn=1 0.5")]
        tables = [shown(lambda console, plan=plan: render_curves(console, plan), 100) for plan in plans]
        assert tables[0] != tables[1]
