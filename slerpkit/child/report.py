"""merge_report.json, and the model card that is made from it.

Reports hold names and figures, never local paths, times or machines, so that the same merge makes the same report.
Findings of later (a taste, a perplexity) join it as they are, each with its own table: what they mean is not known
here. Read findings.py before this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit import __version__
from slerpkit.child.findings import finding_lines, joined, markdown_table, table_cell
from slerpkit.files import read_bytes, read_json_if_there, replace_files, write_json, write_text
from slerpkit.merge.difference_map import MAP_NAME, map_of_merge, save_map
from slerpkit.messages import SlerpMergeError, format_count
from slerpkit.parents.checkpoint import CARD_NAME
from slerpkit.recipe import granularity_of

if TYPE_CHECKING:
    from slerpkit.child.findings import Finding
    from slerpkit.child.verify import Verification
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.merge.tensor_plan import MergedTensor, MergeResult

REPORT_NAME = "merge_report.json"
REPORT_VERSION = 2  # of the keys below; 0.2.0 wrote the first, without saying so
MEASURED_BY_MERGE = "v0 . v1 / (|v0| |v1|) over every element of a tensor, in float32 by chunks, added up exactly"


@dataclass(frozen=True)
class MergeReport:
    """The finished child and how it came about."""

    child: Path
    plan: MergePlan
    merged: MergeResult
    verified: Verification
    content: Mapping[str, Any]  # of merge_report.json
    sync_seconds: float
    total_seconds: float  # of execute_merge

    @property
    def bytes_per_second(self) -> float:
        """How fast the merge itself went, without what an earlier run had finished."""
        return (self.plan.child_bytes - self.plan.kept_bytes) / max(self.merged.seconds, 1e-9)

    def as_dict(self) -> dict[str, Any]:
        """What `--json` prints: merge_report.json, and what only this run knows."""
        return {
            **self.content,
            "child": str(self.child),
            "seconds": self.merged.seconds,
            "sync_seconds": self.sync_seconds,
            "total_seconds": self.total_seconds,
            "bytes_per_second": self.bytes_per_second,
            "device": self.merged.device,
            "threads": self.plan.threads,
            "resumed_files": self.merged.resumed_files,
        }


def write_report(plan: MergePlan, child: StagedChild, merged: MergeResult, verified: Verification) -> dict[str, Any]:
    """Writes the report, its map and the child's card; returns the report."""
    differences = map_of_merge(merged, plan.recipe.compared_vectors)
    report = {
        **lasting_report(plan, merged, verified),
        "angles": {"measured": MEASURED_BY_MERGE, **differences.as_dict()},
    }
    parents = plan.parents
    save_map(differences, child.folder / MAP_NAME, f"{parents.primary.name} and {parents.secondary.name}")
    write_json(child.folder / REPORT_NAME, report)
    write_text(child.folder / CARD_NAME, card_front(report) + card_block(report))
    return report


def lasting_report(plan: MergePlan, merged: MergeResult, verified: Verification) -> dict[str, Any]:
    """merge_report.json without its map: how the child was made and what was found of it.

    What is measured of the child afterwards joins its findings.
    """
    recipe, parents = plan.recipe, plan.parents
    dtypes = f"{', '.join(parents.primary.dtypes)} (the primary's)"
    return {
        "report_version": REPORT_VERSION,
        "slerpmerge": __version__,
        "child": plan.options.save_directory.resolve().name,
        "recipe": {
            **{role: parent.public_place for role, parent in parents.by_role.items()},
            "base": None if parents.base is None else parents.base.public_place,
            "method": recipe.method,
            "granularity": granularity_of(recipe.vectors),
            "blend": recipe.describe_blend(),
            "dtype": dtypes if recipe.dtype == "auto" else recipe.dtype,
            "dot_threshold": recipe.dot_threshold,
            "epsilon": recipe.epsilon,
        },
        "tensors": len(merged.tensors),
        "slerped": merged.count("slerp"),
        "lerped": merged.count("lerp"),
        "copied": merged.count("copy"),
        "bytes": plan.child_bytes,
        "rules": rules_followed(merged),
        "kinship": plan.kinship.as_dict(),
        "remarks": list(plan.remarks),
        "tokenizer_from": plan.tokenizer_role,
        "chat_template_from": plan.parity.template.source,
        **plan.parity.as_dict(),
        "accepted": [mismatch.as_dict() for mismatch in plan.parity.accepted],
        "checks": list(verified.checks),
        "warnings": list(verified.warnings),
        "findings": [],
    }


def rules_followed(result: MergeResult) -> list[dict[str, Any]]:
    """How many tensors were slerped, lerped and copied, why, and the angles between the parents there."""
    groups: dict[tuple[str, str], list[MergedTensor]] = {}
    for merged in result.tensors:
        groups.setdefault((merged.weights.operation, merged.weights.reason), []).append(merged)
    rules = []
    for (operation, reason), members in sorted(groups.items(), key=lambda group: -len(group[1])):
        angles = [m.weights.angle_degrees for m in members if m.weights.angle_degrees is not None]
        rules.append(
            {
                "rule": f"{operation} ({reason})" if reason else operation,
                "tensors": len(members),
                "parameters": sum(merged.tensor.element_count for merged in members),
                "degrees": [min(angles), max(angles)] if angles else None,
            }
        )
    return rules


def amend_report(folder: Path, findings: Sequence[Finding]) -> None:
    """Adds what was found of a child to its report and card. Of the card only the findings' own part changes.

    folder: the child's. What a report of 0.2.0 holds under other keys stays there, and its card keeps it as it was
    drawn. Raises SlerpMergeError where report and card are not the tool's own, or where the disk refuses; the files
    are then as before.
    """
    report, card = read_json_if_there(folder / REPORT_NAME), ""
    path = folder / CARD_NAME
    try:
        report["findings"] = joined(report.get("findings", []), findings)
        whole, told = card_block(report), findings_block(report)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{folder / REPORT_NAME} is not as slerpmerge writes it."
        raise SlerpMergeError(what, "Move it away; a new one is then begun.") from error
    if path.exists():  # bytes that are not UTF-8 stay what they are
        card = read_bytes(path).decode("utf-8", "surrogateescape")
    begin = card.find(CARD_MARKS[0])
    end = card.find(CARD_MARKS[1], begin)
    if 0 <= begin < end:
        earlier = card.find(FINDINGS_MARK, begin, end)
        before = card[: end if earlier < 0 else earlier].rstrip("\n")
        card = f"{before}\n\n{told}{card[end:]}"
    else:
        card = card.rstrip("\n") + "\n\n" * bool(card) + whole
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    replace_files(
        {folder / REPORT_NAME: text.encode("utf-8", "backslashreplace"), path: card.encode("utf-8", "surrogateescape")}
    )


CARD_MARKS = ("<!-- made by slerpmerge from merge_report.json -->", "<!-- until here -->")
FINDINGS_MARK = "<!-- what was found of the child -->"  # stands between those two, where there are findings


def card_front(report: Mapping[str, Any]) -> str:
    """What hubs read of a card, and its title: the part that is the person's to change."""
    recipe = report["recipe"]
    names = [recipe["primary"], recipe["secondary"]]
    front = ["---", "base_model:", *(f"- {json.dumps(name, ensure_ascii=False)}" for name in names)]
    front += ["library_name: transformers", "tags:", "- merge", "- slerp", "---", "", f"# {report['child']}", ""]
    front += [
        f"A merge of **{names[0]}** and **{names[1]}** by spherical linear interpolation,",
        f"made with slerpmerge {report['slerpmerge']}.",
        "",
    ]
    return "\n".join(front) + "\n"


def card_block(report: Mapping[str, Any]) -> str:
    """The part of a card that tells what the report tells, between two marks."""
    parts = [CARD_MARKS[0], ""]
    for section in (card_recipe, card_rules, card_resolved, card_accepted):
        lines = section(report)
        parts += [*lines, ""] if lines else []
    return "\n".join([*parts, findings_block(report) + CARD_MARKS[1], ""])


def findings_block(report: Mapping[str, Any]) -> str:
    """The last part of that: what was found of the child since; empty where there is nothing."""
    findings = report.get("findings", [])
    return "\n".join([FINDINGS_MARK, "", *finding_lines(findings), ""]) if findings else ""


def card_recipe(report: Mapping[str, Any]) -> list[str]:
    """What the person decided. Names, never local paths."""
    recipe = report.get("recipe")
    if recipe is None:
        return []
    sources = {**report, **recipe}  # where 0.2.0 kept whose tokenizer it is
    settings = [
        ("primary (t = 0)", recipe["primary"]),
        ("secondary (t = 1)", recipe["secondary"]),
        *([("base of the task vectors", recipe["base"])] if recipe["base"] is not None else []),
        ("method", recipe["method"]),
        ("blend", recipe["blend"]),
        ("dtype", recipe["dtype"]),
        ("dot threshold", f"{recipe['dot_threshold']:g}"),
        ("epsilon", f"{recipe['epsilon']:g}"),
        ("tokenizer from", sources["tokenizer_from"] or "neither"),
    ]
    if sources["chat_template_from"] != sources["tokenizer_from"]:
        settings.append(("chat template from", sources["chat_template_from"]))
    return ["## Recipe", "", *markdown_table(("setting", "value"), settings)]


def card_rules(report: Mapping[str, Any]) -> list[str]:
    """What was done with the tensors, and the map of how the parents differ."""
    if "rules" not in report:
        return []
    rows = []
    for entry in report["rules"]:
        degrees = entry["degrees"]
        angles = f"{degrees[0]:.2f}° to {degrees[1]:.2f}°" if degrees else ""
        rows.append((entry["rule"], str(entry["tensors"]), format_count(entry["parameters"]), angles))
    table = markdown_table(("rule", "tensors", "parameters", "angle between the parents"), rows)
    picture = f"![How the parents differ, layer by component]({MAP_NAME})"
    return ["## What was done", "", *table, "", picture]


def card_resolved(report: Mapping[str, Any]) -> list[str]:
    """The differences that a stated rule resolved."""
    resolved = report.get("resolved", [])
    lines = [f"- `{table_cell(entry['subject'])}`: {table_cell(entry['consequence'])}" for entry in resolved]
    return ["## What was resolved", "", *lines] if lines else []


def card_accepted(report: Mapping[str, Any]) -> list[str]:
    """The differences that the person let pass, as a warning."""
    lines = [
        f"- `{table_cell(entry['subject'])}`: {table_cell(entry['primary'])} in the primary,"
        f" {table_cell(entry['secondary'])} in the secondary. {table_cell(entry['consequence'])}"
        for entry in report.get("accepted", [])
    ]
    warning = "The parents use their weights in different ways; this was accepted, and the child may be worse for it."
    return ["## Warning", "", warning, "", *lines] if lines else []
