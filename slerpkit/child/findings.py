"""What a finding is: something measured of a child that carries its own table.

Whoever measures makes one with make_finding; the card prints it with finding_lines, the screen draws it, `--json` and
merge_report.json hold it as it is. None of these knows what it says, nor does this module.

A finding is a dict that JSON can hold, with these keys and no others:

- kind: "taste", "perplexity", "score" or "sweep", for programs.
- section: the heading under which a card gathers findings of its kind.
- title: what was asked or measured on, in words. A prompt in full, so it may be long and hold any character.
- heads, rows: the table. Every row has as many cells as there are heads; every cell is text.
- highlighted_row: the number of the row that is the answer, from 0; None where no row is.
- notes: sentences that say what the table means, in order.
- measured: one paragraph on how it was measured.
- figures: the same for programs, as unrounded numbers and as texts that nothing was cut from. A standard error is
  called stderr, and is None where it cannot be told. What stands here depends on the kind.

Text of models and strangers stands in a finding as it came: finding_lines escapes it for Markdown, the screen for its
terminal.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

SINGLE_KINDS = ("sweep",)  # of which a child has one: a later finding takes the place of the one before it


class Finding(TypedDict):
    """Something measured of a child; the module's docstring is the contract of its keys."""

    kind: str
    section: str
    title: str
    heads: list[str]
    rows: list[list[str]]
    highlighted_row: int | None
    notes: list[str]
    measured: str
    figures: dict[str, Any]


def make_finding(
    kind: str,
    section: str,
    title: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    measured: str,
    figures: Mapping[str, Any],
    notes: Sequence[str] = (),
    highlighted_row: int | None = None,
) -> Finding:
    """A finding as the module's docstring says. Raises ValueError where a row has not a cell for each head."""
    rows = [list(row) for row in rows]
    if any(len(row) != len(heads) for row in rows):
        raise ValueError(f"a finding of kind {kind} has a row that does not fit its {len(heads)} heads")
    return {
        "kind": kind,
        "section": section,
        "title": title,
        "heads": list(heads),
        "rows": rows,
        "highlighted_row": highlighted_row,
        "notes": list(notes),
        "measured": measured,
        "figures": dict(figures),
    }


def with_stderr(value: float, stderr: float | None, form: str = ".4f") -> str:
    """A figure as a cell shows it, with its standard error where that is known."""
    return f"{value:{form}}" if stderr is None else f"{value:{form}} ± {stderr:.4f}"


def joined(earlier: Sequence[Mapping[str, Any]], later: Sequence[Finding]) -> list[Mapping[str, Any]]:
    """Findings of before with those that came since; of SINGLE_KINDS only the latest stays."""
    replaced = {finding["kind"] for finding in later} & set(SINGLE_KINDS)
    return [*(finding for finding in earlier if finding["kind"] not in replaced), *later]


def finding_lines(findings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Findings as lines of Markdown, gathered by their sections, in the order in which those first occur."""
    sections: dict[str, list[str]] = {}
    for finding in findings:
        rows = [list(row) for row in finding["rows"]]
        if (number := finding["highlighted_row"]) is not None:
            rows[number][0] = f"**{rows[number][0]}**"
        lines = [f"> {table_cell(finding['title'])}", "", *markdown_table(finding["heads"], rows), ""]
        for paragraph in (*finding["notes"], finding["measured"]):
            lines += [table_cell(paragraph), ""]
        sections.setdefault(finding["section"], []).extend(lines)
    return [line for name, lines in sections.items() for line in (f"## {table_cell(name)}", "", *lines)]


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(map(table_cell, heads)) + " |", "|---" * len(heads) + "|"]
    return lines + ["| " + " | ".join(map(table_cell, row)) + " |" for row in rows]


def table_cell(text: str) -> str:
    """Text that cannot break out of a Markdown table's cell or a paragraph, nor be taken for a mark of the card."""
    text = text.replace("\\", "\\\\").replace("|", "\\|").replace("<!--", "&lt;!--")
    return text.replace("\r", "").replace("\n", "<br>")
