"""Parity, plan and report as panels; t as curves.

Draws what it is given, and finds nothing out. What was measured is drawn by figures.py; read console.py before this.
"""

from __future__ import annotations

import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from slerpkit.child.upload import repository_name
from slerpkit.messages import format_bytes, format_count, format_names, format_seconds
from slerpkit.parents.checkpoint import describe_checkpoint
from slerpkit.parents.tensors import component_of, find_layer
from slerpkit.schedule import name_of_blend
from slerpkit.screen.console import NARROW_COLUMNS, displayable, fact_table, is_unicode, mark_of, panel

if TYPE_CHECKING:
    from slerpkit.child.report import MergeReport
    from slerpkit.merge.plan import MergePlan
    from slerpkit.parity.kinship import Kinship
    from slerpkit.parity.report import Mismatch, ParityReport
    from slerpkit.recipe import MergeRecipe
    from slerpkit.schedule import Schedule

MAX_NOTICES = 12


def render_parity(console: Console, report: ParityReport) -> RenderableType:
    """Every mismatch with its mark, both values, and what is done about it."""
    if not report.mismatches:
        return panel(console, Text("The parents match in every respect that was checked."), "Parity")
    shown = [m for m in report.mismatches if m.severity != "notice"]
    notices = report.of_severity("notice")
    shown += notices[:MAX_NOTICES]
    more = f"and {len(notices) - MAX_NOTICES} more to know; --json lists them all"
    if console.width < NARROW_COLUMNS:
        content: RenderableType = stacked_mismatches(console, shown)
    else:
        content = Table(box=None, padding=(0, 1), pad_edge=False, expand=True)
        content.add_column("", width=1)
        content.add_column("what", width=min(24, max(len(m.subject) for m in shown)), overflow="fold")
        for heading, ratio in (("primary", 2), ("secondary", 2), ("what follows", 4)):
            content.add_column(heading, ratio=ratio, overflow="fold")
        for m in shown:
            cells = (Text(displayable(console, text)) for text in (m.subject, m.primary, m.secondary, m.consequence))
            content.add_row(mark_of(console, m.severity), *cells)
    if len(notices) > MAX_NOTICES:
        content = Group(content, Text(more, style="dim"))
    title = f"Parity: {len(report.of_severity('resolved'))} resolved, {len(notices)} to know"
    blocking = len(report.of_severity("blocking"))
    return panel(console, content, f"Parity: {blocking} blocking" if blocking else title)


def stacked_mismatches(console: Console, mismatches: Iterable[Mismatch]) -> RenderableType:
    """Mismatches one below the other, for narrow terminals."""
    lines: list[RenderableType] = []
    for m in mismatches:
        lines.append(Text.assemble(mark_of(console, m.severity), " ", (displayable(console, m.subject), "bold")))
        lines.append(Text(f"  primary {displayable(console, m.primary)}"))
        lines.append(Text(f"  secondary {displayable(console, m.secondary)}"))
        lines.append(Text(f"  {displayable(console, m.consequence)}", style="dim"))
    return Group(*lines)


def describe_tensors(plan: MergePlan) -> str:
    """How many tensors fall to each rule, and in how many files they come."""
    parts = [f"{plan.count(rule)} to {rule}" for rule in ("slerp", "lerp", "copy") if plan.count(rule)]
    files = f"{len(plan.shards)} file{'s' * (len(plan.shards) > 1)}"
    return f"{', '.join(parts)}; {format_bytes(plan.child_bytes)} in {files}"


SHOWN_ORDER = ("attention", "mlp", "other")  # of components
CURVE_LEVELS = "▁▂▃▄▅▆▇█"
CURVE_COLUMNS = 24  # a curve is drawn with at most this many cells


def draw_curve(console: Console, values: Sequence[float]) -> str:
    """t over the layers in one line: a bar for each, or a digit from 0 to 9 where bars cannot be shown."""
    if len(values) > CURVE_COLUMNS:
        steps = CURVE_COLUMNS - 1
        values = [values[round(step * (len(values) - 1) / steps)] for step in range(CURVE_COLUMNS)]
    if not is_unicode(console):  # tenths: 5 is 0.5, and 9 stands for all above
        return "".join(str(min(max(int(t * 10 + 1e-9), 0), 9)) for t in values)
    last = len(CURVE_LEVELS) - 1
    return "".join(CURVE_LEVELS[min(max(round(t * last), 0), last)] for t in values)


def schedule_curves(console: Console, schedule: Schedule, layers: int = 16) -> list[tuple[str, str]]:
    """(component, curve) of a schedule before any model is known, as a decoder of so many layers would have it."""
    examples = dict(zip(SHOWN_ORDER, ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")))
    positions = [layer / (layers - 1) for layer in range(layers)]
    rows = []
    for component, name in examples.items():
        values = [schedule.t_for(f"model.layers.{layer}.{name}", p) for layer, p in enumerate(positions)]
        rows.append((component, draw_curve(console, values)))
    return rows if len({curve for _, curve in rows}) > 1 else [("all", rows[0][1])]


def t_by_component(plan: MergePlan) -> list[tuple[str, str, list[float]]]:
    """(stack, component, t over its layers); a component whose tensors differ stands once for each difference."""
    by_tensor: dict[tuple[str, str], dict[int, float]] = {}
    for tensor in plan.tensors:
        if (place := find_layer(tensor.name)) is not None:
            rest = tensor.name[len(place[0]) :].lstrip(".").partition(".")[2]
            by_tensor.setdefault((place[0], rest), {})[place[1]] = tensor.t
    groups: dict[tuple[str, str, tuple[float, ...]], list[str]] = {}
    for (stack, rest), by_layer in by_tensor.items():
        values = tuple(by_layer[layer] for layer in sorted(by_layer))
        groups.setdefault((stack, component_of(rest), values), []).append(rest)
    alone = Counter((stack, component) for stack, component, _ in groups)
    stacks = list(dict.fromkeys(stack for stack, _, _ in groups))
    in_order = sorted(groups.items(), key=lambda group: (stacks.index(group[0][0]), SHOWN_ORDER.index(group[0][1])))
    return [
        (stack, component if alone[stack, component] == 1 else format_names(names, 2), list(values))
        for (stack, component, values), names in in_order
    ]


def render_curves(console: Console, plan: MergePlan) -> RenderableType:
    """t over the layers, for each component of each stack, as it will be used; then the tensors outside layers."""
    lines: list[RenderableType] = []
    for stack, component, values in t_by_component(plan):
        name = displayable(console, f"{stack}  {component:<10}")
        ends = f"{values[0]:.4g} to {values[-1]:.4g}" if len(set(values)) > 1 else f"{values[0]:.4g}"
        curve = f"{draw_curve(console, values)}  {ends}"
        narrow = console.width < NARROW_COLUMNS or len(name) > 50
        lines.append(Text(f"{name}\n  {curve}" if narrow else f"{name:<26}  {curve}"))
    outside: dict[float, list[str]] = {}
    for tensor in plan.tensors:
        if find_layer(tensor.name) is None:
            outside.setdefault(tensor.t, []).append(tensor.name)
    for t, names in outside.items():
        lines.append(Text(displayable(console, f"{t:.4g} for {format_names(names, 3)}")))
    return panel(console, Group(*lines), "t of every tensor")


KINSHIP_COLOURS = {"siblings": "green", "relatives": "yellow", "strangers": "red", "unknown": "yellow"}


def render_kinship(console: Console, kinship: Kinship) -> Text:
    """How near the parents are, in the colour of what that means for their child."""
    apart = "" if kinship.degrees is None else f" {kinship.degrees:.1f} degrees apart,"
    text = displayable(console, f"{kinship.verdict}:{apart} {kinship.meaning}")
    return Text(text, style=KINSHIP_COLOURS[kinship.verdict])


def describe_blend(recipe: MergeRecipe) -> str:
    """A blend by its name where it has one, with its t."""
    has_own = recipe.slices or recipe.weights is not None
    name = None if has_own else name_of_blend(recipe.schedule)
    return recipe.describe_blend() if name is None else f"{name} ({recipe.describe_blend()})"


def describe_tokenizer(plan: MergePlan) -> str:
    """Whose tokenizer the child has; and why, where it is not simply the primary's, which has the other's tokens."""
    vocabulary, role = plan.parity.vocabulary, plan.tokenizer_role
    if role == "primary" and vocabulary.row_map is None and plan.recipe.tokenizer == "auto":
        return "from the primary"
    return f"{f'from the {role}' if role else 'none'}: {vocabulary.reason}"


def render_plan(console: Console, plan: MergePlan, finds_t: bool = False, warning: str | None = None) -> RenderableType:
    """What will be made, from what, and what it will cost.

    finds_t: a sweep will decide on t, not the plan. warning: of what was found of the parents meanwhile.
    """
    recipe = plan.recipe
    threads = f"{plan.threads} thread{'s' * (plan.threads > 1)}"
    free = "" if plan.disk_free_bytes is None else f", {format_bytes(plan.disk_free_bytes)} are free"
    disk = f"{format_bytes(plan.disk_needed_bytes)} of disk{free}"
    facts: list[tuple[str, str | Text]] = [
        ("primary", describe_checkpoint(plan.parents.primary)),
        ("secondary", describe_checkpoint(plan.parents.secondary)),
        ("child", str(plan.options.save_directory)),
        ("blend", f"{recipe.describe_method()}, {'t to be found' if finds_t else describe_blend(recipe)}"),
        *([("base", describe_checkpoint(plan.parents.base))] if plan.parents.base is not None else []),
        ("kinship", render_kinship(console, plan.kinship)),
        ("tensors", describe_tensors(plan)),
        ("tokenizer", describe_tokenizer(plan)),
        ("needs", f"{disk}; {format_bytes(plan.peak_memory_bytes)} of memory"),
        ("time", f"{format_seconds(plan.expected_seconds)} expected, with {threads}"),
    ]
    facts[-1:-1] = [("fetch", describe_download(plan))] if plan.download_bytes else []
    notes = (*plan.remarks, warning, advice_on_base(plan), plan.leftover and plan.leftover.describe())
    facts += [("note", note) for note in notes if note is not None]
    return panel(console, fact_table(console, facts), "Plan")


def advice_on_base(plan: MergePlan) -> str | None:
    """Plain words where most tensors are so near each other that SLERP has nothing to follow."""
    recipe, straight = plan.recipe, math.degrees(math.acos(plan.recipe.dot_threshold))
    if recipe.base is not None or recipe.method == "lerp" or not plan.kinship.are_mostly_within(straight):
        return None
    return (
        f"Most tensors lie less than {straight:.1f} degrees apart, where SLERP is a straight line. What each parent"
        " learned since their common base lies further apart: to blend that, name the base (`task vectors` at Blend,"
        " or --base)."
    )


def describe_download(plan: MergePlan) -> str:
    """What is fetched of the parents' weights, and how much of it stands on the disk at once."""
    whole = f"{format_bytes(plan.download_bytes)} of weights from the Hugging Face Hub"
    if not plan.options.stream_parents:
        return whole
    return f"{whole}, at most {format_bytes(plan.streamed_disk_bytes)} of it on the disk at once"


def describe_outcome(report: MergeReport) -> str:
    """How many tensors were slerped, lerped and copied, and why some were not slerped."""
    result = report.merged
    reasons: dict[str, int] = {}
    for merged in result.tensors:
        if merged.weights.operation == "lerp" and merged.weights.reason:
            reasons[merged.weights.reason] = reasons.get(merged.weights.reason, 0) + 1
    why = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    counts = ", ".join(f"{result.count(r)} {r}ed" for r in ("slerp", "lerp") if result.count(r))
    copied = f"{result.count('copy')} copied" if result.count("copy") else ""
    return ", ".join(part for part in (counts, copied) if part) + (f" (of the lerped: {why})" if why else "")


def render_report(console: Console, report: MergeReport) -> RenderableType:
    """The closing summary: what stands where, how fast it was, what to know, what to do next."""
    plan, result = report.plan, report.merged
    parameters = format_count(sum(tensor.element_count for tensor in plan.tensors))
    merging = f"{format_seconds(result.seconds)} to merge"
    merging += f" ({format_bytes(report.bytes_per_second)}/s)" if plan.kept_bytes < plan.child_bytes else ""
    facts = [
        ("child", str(report.child)),
        ("size", f"{parameters} parameters, {format_bytes(plan.child_bytes)}"),
        ("tensors", describe_outcome(report)),
        ("time", f"{merging}, {format_seconds(report.total_seconds)} in all"),
        ("tokenizer", f"from the {plan.tokenizer_role}" if plan.tokenizer_role else "none"),
        *(("resolved", f"{m.subject}: {m.consequence}") for m in plan.parity.of_severity("resolved")[:MAX_NOTICES]),
    ]
    lines: list[RenderableType] = [fact_table(console, facts), Text()]
    lines += [
        Text.assemble(mark_of(console, "resolved"), " ", displayable(console, check))
        for check in report.verified.checks
    ]
    warnings = list(report.verified.warnings[:MAX_NOTICES])
    if len(report.verified.warnings) > MAX_NOTICES:
        warnings.append(f"and {len(report.verified.warnings) - MAX_NOTICES} more; --json lists them all")
    lines += [Text.assemble(mark_of(console, "notice"), " ", displayable(console, warning)) for warning in warnings]
    return panel(console, Group(*lines), "Done")


def next_commands(report: MergeReport) -> list[str]:
    """Commands to try the child with, ready to paste."""
    child = repr(str(report.child))
    if report.plan.tokenizer_role and report.plan.parents.primary.architecture.endswith("ForCausalLM"):
        speak = f"pipeline('text-generation', {child})('Once upon a time', max_new_tokens=40)"
        code = f"from transformers import pipeline; print({speak}[0]['generated_text'])"
    else:
        code = f"from transformers import AutoModel; print(AutoModel.from_pretrained({child}))"
    plain = not set('"$`!%\\') & set(code)  # double quotes are understood everywhere, but keep these special
    speak = f'python -c "{code}"' if plain or os.name == "nt" else f"python -c {shlex.quote(code)}"
    folder = shlex.quote(str(report.child))
    return [
        speak,
        *([f"python llama.cpp/convert_hf_to_gguf.py {folder}"] if report.plan.tokenizer_role else []),
        f"hf upload {repository_name(report.child.name)} {folder}",
    ]
