"""Pictures of the real screens: `python tests/pictures.py` writes them as SVG files into tests/pictures/.

An invented pair of models is merged for real at a tiny size; its plan and report are then given the sizes
of a 7 B-parameter pair, and the program's own screens are drawn from them. The same pictures every time.
"""

from __future__ import annotations

import dataclasses
import io
import math
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from prompt_toolkit.application import create_app_session
from prompt_toolkit.input import DummyInput
from prompt_toolkit.output import DummyOutput
from rich.console import Console

import slerpmerge
from slerpkit.child.report import MergeReport
from slerpkit.merge.difference_map import map_of_merge
from slerpkit.merge.events import WorkAdvanced, WorkBegan
from slerpkit.merge.plan import MergePlan, estimate_memory
from slerpkit.merge.tensor_plan import MergedTensor, MergeResult, TensorPlan, plan_shards
from slerpkit.parents.checkpoint import Checkpoint, Parents
from slerpkit.recipe import MAX_SHARD_BYTES, MergeRecipe, RunOptions
from slerpkit.screen import wizard
from slerpkit.screen.answers import Answers
from slerpkit.screen.figures import render_map
from slerpkit.screen.finder import ModelFinder
from slerpkit.screen.flags import build_parser
from slerpkit.screen.panels import render_parity, render_plan, render_report
from slerpkit.screen.progress import MergeView
from slerpkit.screen.prompts import Prompter
from slerpkit.screen.session import Session
from slerpkit.story import execute_merge, prepare_merge
from tests.builders import LLAMA_CONFIG, add_tokenizer, llama_tensors, make_checkpoint

if TYPE_CHECKING:
    from slerpkit.merge.events import Event

PICTURES = Path(__file__).parent / "pictures"
LAYERS = 32
PRIMARY, SECONDARY = "finch-7b-chat", "finch-7b-code"
CHILD = f"{PRIMARY}-{SECONDARY}-slerp"
GROWN = {16: 4096, 8: 1024, 24: 14336, 48: 32000}  # each dimension of a tiny tensor -> of a real one
MERGE_SECONDS = 11.4


@dataclass(frozen=True)
class Scene:
    """One merge of the invented pair: its plan, every event in order, its report."""

    plan: MergePlan
    events: tuple[Event, ...]
    report: MergeReport


def make_parents(folder: Path) -> tuple[Path, Path]:
    """Two tiny fine-tunes of one base that differ as real ones do."""
    shared = {**LLAMA_CONFIG, "num_hidden_layers": LAYERS}
    base = llama_tensors(0, torch.float32, layers=LAYERS)
    folders = []
    for seed, name, dtype, changes in (
        (1, PRIMARY, torch.bfloat16, {"max_position_embeddings": 32768, "bos_token_id": 1}),
        (2, SECONDARY, torch.float16, {"max_position_embeddings": 16384, "bos_token_id": 1}),
    ):
        drift = llama_tensors(seed, torch.float32, layers=LAYERS, likeness=0)
        tensors = {key: (weight + distance(key) * drift[key]).to(dtype) for key, weight in base.items()}
        config = {**shared, **changes, "_name_or_path": f"meadow/{name}"}
        parent = make_checkpoint(folder / name, tensors, config)
        add_tokenizer(parent)
        template = "{{ messages }}" if seed == 1 else "{% for message in messages %}{{ message }}{% endfor %}"
        (parent / "chat_template.jinja").write_text(template, encoding="utf-8")
        licence = "apache-2.0" if seed == 1 else "mit"
        (parent / "README.md").write_text(f"---\nlicense: {licence}\n---\n", encoding="utf-8")
        folders.append(parent)
    return folders[0], folders[1]


def distance(tensor_name: str) -> float:
    """How far training took a tensor from the base: norms hardly, projections more; the same in every run."""
    return 0.01 if "norm" in tensor_name else 0.04 + 0.08 * (zlib.crc32(tensor_name.encode()) % 100) / 100


def grow(info: Any) -> Any:
    """A tensor's description at the size that the invented models have."""
    shape = tuple(GROWN[length] for length in info.shape)
    if isinstance(info, TensorPlan):
        return dataclasses.replace(info, shape=shape, sources=tuple(map(grow, info.sources)))
    growth = math.prod(shape) // info.element_count
    return dataclasses.replace(info, shape=shape, byte_count=info.byte_count * growth)


def grow_checkpoint(checkpoint: Checkpoint) -> Checkpoint:
    return dataclasses.replace(checkpoint, tensors={name: grow(info) for name, info in checkpoint.tensors.items()})


def grow_plan(plan: MergePlan) -> MergePlan:
    """The plan for models of real size, on a machine that is always the same."""
    tensors = [grow(tensor) for tensor in plan.tensors]
    shards = plan_shards(tensors, MAX_SHARD_BYTES)
    return dataclasses.replace(
        plan,
        recipe=MergeRecipe(Path("models", PRIMARY), Path("models", SECONDARY)),
        options=RunOptions(Path(CHILD)),
        parents=Parents(grow_checkpoint(plan.parents.primary), grow_checkpoint(plan.parents.secondary)),
        shards=shards,
        threads=8,
        peak_memory_bytes=estimate_memory(8),
        disk_needed_bytes=sum(shard.byte_count for shard in shards) + 2_000_000,
        disk_free_bytes=412_000_000_000,
        read_bytes_per_second=6.1e9,
        expected_seconds=12.8,
    )


def grow_event(event: Event, plan: MergePlan) -> Iterator[Event]:
    """What would be told of the merge of the grown plan."""
    if isinstance(event, MergedTensor):
        merged = dataclasses.replace(event, tensor=grow(event.tensor))
        yield WorkAdvanced(merged.tensor.byte_count)
        yield merged
    elif isinstance(event, WorkBegan):
        yield dataclasses.replace(event, total=plan.child_bytes)
    elif not isinstance(event, WorkAdvanced):  # those come with their tensor, above
        yield event


def make_scene(folder: Path) -> Scene:
    """Merges the tiny pair below `folder` and tells of it as of a pair of real size."""
    told: list[Event] = []
    tiny_plan = prepare_merge(MergeRecipe(*make_parents(folder)), RunOptions(folder / CHILD, threads=1))
    report = execute_merge(tiny_plan, told.append)
    plan = grow_plan(tiny_plan)
    events = tuple(grown for event in told for grown in grow_event(event, plan))
    tensors = tuple(event for event in events if isinstance(event, MergedTensor))
    report = dataclasses.replace(
        report,
        child=Path("/home/ada/models", CHILD),
        plan=plan,
        merged=MergeResult(tensors, MERGE_SECONDS, "cpu"),
        sync_seconds=1.9,
        total_seconds=15.2,
    )
    return Scene(plan, events, report)


class Clock:
    """Seconds that pass only when the picture says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class RecordingConsole(Console):
    """A terminal that remembers what was drawn on it, the same for every environment."""

    def __init__(self, width: int = 100, **settings: Any) -> None:
        settings = {"force_terminal": True, "color_system": "truecolor", "_environ": {}, **settings}
        super().__init__(
            file=io.StringIO(), width=width, record=True, legacy_windows=False, highlight=False, **settings
        )

    def print(self, *objects: Any, soft_wrap: bool | None = None, **how: Any) -> None:
        """A terminal breaks a line that is too long for it; a picture would cut it."""
        super().print(*objects, **{**how, **({"overflow": "fold"} if soft_wrap else {})})


def draw_progress(view: MergeView, clock: Clock, scene: Scene, stop_at: float) -> None:
    """Feeds the view the merge; at `stop_at` of its bytes, the live picture is drawn once."""
    drawn = False
    for event in scene.events:
        if isinstance(event, WorkAdvanced):
            clock.now += MERGE_SECONDS * event.amount / scene.plan.child_bytes
        with mock.patch("rich.live.Live.start"):  # a picture needs no refreshing thread
            view.observe(event)
        if not drawn and isinstance(event, MergedTensor) and view.done >= stop_at * view.work.total:
            view.console.print(view.render())
            drawn = True


class TypedAnswers(Prompter):
    """Prompts that are answered at once; what stays of each on the screen is the program's own."""

    typed = (f"models/{PRIMARY}", f"models/{SECONDARY}", "", "", "", "")  # Enter at all but the first two

    def __init__(self, console: Console) -> None:
        super().__init__(console, lambda: None)
        self.next_answer = iter(self.typed)

    def ask(self, question: Any) -> str:
        return next(self.next_answer)


def draw_session(console: Console, clock: Clock, scene: Scene) -> None:
    """The whole session, by the program's own story; only typing and merging are stood in for."""
    session = Session(build_parser().parse_args([]), slerpmerge.NOTHING_WRITTEN)
    session.console, session.interactive = console, True
    session.view = MergeView(console)
    session.prepare_for = lambda *_: None
    session.history = mock.Mock(content={}, recent=[], answers=Answers)
    session.wizard = wizard.Wizard(TypedAnswers(console), ModelFinder([]), lambda *_: None)

    def execute(*_: Any) -> MergeReport:
        draw_progress(session.view, clock, scene, stop_at=0.62)
        clock.now = scene.report.total_seconds
        return scene.report

    with (
        mock.patch.multiple(
            slerpmerge.story,
            locate_parents=lambda recipe, *_: recipe,
            open_parents=lambda *_: scene.plan.parents,
            check_parity=lambda *_: scene.plan.parity,
            execute_merge=execute,
        ),
        mock.patch.object(slerpmerge.fetching, "plan_within_disk", lambda *_: scene.plan),
        mock.patch.object(wizard.checkpoint, "open_checkpoint", lambda *_: scene.plan.parents.primary),
        mock.patch.object(wizard.hub, "must_be_looked_up", lambda folder: False),
        mock.patch.object(wizard.hub, "locate", lambda folder: folder),
        mock.patch.object(wizard.hub, "locate_base", lambda *_: None),
        mock.patch.object(wizard.story, "check_fit", lambda *_: None),
        mock.patch("shutil.disk_usage", lambda path: mock.Mock(free=scene.plan.disk_free_bytes)),
        mock.patch("sys.argv", ["slerpmerge.py"]),
        mock.patch("time.perf_counter", clock),
        create_app_session(input=DummyInput(), output=DummyOutput()),
    ):
        slerpmerge.run(session)
    console.print()  # room for the last line's underscores


def draw_pictures(scene: Scene) -> Iterator[tuple[str, Console]]:
    """(name, screen) of every picture."""
    for name, width in (("plan", 100), ("plan-narrow", 60)):
        console = RecordingConsole(width)
        console.print(render_parity(console, scene.plan.parity))
        console.print(render_plan(console, scene.plan))
        yield name, console
    clock = Clock()
    console = RecordingConsole(get_time=clock)
    view = MergeView(console)
    draw_progress(view, clock, scene, stop_at=0.62)
    yield "progress", console
    console = RecordingConsole()
    console.print(render_report(console, scene.report))
    yield "summary", console
    console = RecordingConsole()
    console.print(render_map(console, map_of_merge(scene.report.merged, "weights")))
    yield "map", console
    for width in (100, 60, 80, 160):
        console = RecordingConsole(width, get_time=(clock := Clock()))
        draw_session(console, clock, scene)
        yield "merge" if width == 100 else f"merge-{width}", console


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        scene = make_scene(Path(folder))
    for name, console in draw_pictures(scene):
        # 0.6 is how wide most monospaced fonts are; the picture then also fits where its own font is not there.
        svg = console.export_svg(title="python slerpmerge.py", unique_id=f"slerpmerge-{name}", font_aspect_ratio=0.6)
        path = PICTURES / f"{name}.svg"
        path.write_text(svg.replace("<svg ", '<svg xml:space="preserve" ', 1), encoding="utf-8", newline="\n")
        print(path.relative_to(PICTURES.parents[1]))


if __name__ == "__main__":
    main()
