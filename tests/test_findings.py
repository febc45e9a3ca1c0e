"""Findings: what each holds, how card and screen print one that they do not know, and what older reports keep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.cells import cell_len

from slerpkit.child.findings import Finding, finding_lines, make_finding
from slerpkit.child.report import CARD_MARKS, FINDINGS_MARK, amend_report, card_block
from slerpkit.messages import SlerpMergeError
from slerpkit.screen.figures import render_finding
from tests.builders import make_pair, merge
from tests.pictures import RecordingConsole

# As 0.2.0 wrote them: entries by their kinds, and a card that tells them.
OLD_FINDINGS = {
    "tastes": [{"prompt": "Hi", "measured": "Greedy.", "answers": {"primary": "a", "secondary": "b", "child": "c"}}],
    "perplexities": [{"text": "text.txt", "models": [{"role": "child", "noise": 0.1}], "child_against": {}}],
    "sweep": {"best_t": 0.45, "trials": [{"t": 0.45, "over_best": 0.0, "noise": None}], "verdict": "The best child."},
}
OLD_CARD = f"""---
base_model:
- primary
---

# child

My own words.

{CARD_MARKS[0]}

## Recipe

| setting | value |
|---|---|
| method | slerp |

## What was mended

- `vocabulary`: 12 rows kept

## How t was found

| t | text.txt (bits per byte) |
|---|---|
| **0.45** | 2.1234 |

## Tastes

> Hi

| model | answer |
|---|---|
| child | c |

{CARD_MARKS[1]}

My last words.
"""


def finding_of(kind: str = "taste", title: str = "Hello", **changes: object) -> Finding:
    """One of a kind that neither card nor screen has seen before."""
    table = {"heads": ("what", "figure"), "rows": [("one", "1.0000 ± 0.1000"), ("other", "2.0000")]}
    section = "How t was found" if kind == "sweep" else "Weights and measures"
    return make_finding(kind, section, title, **{**table, "measured": "By eye.", "figures": {"x": 1}, **changes})


def test_a_finding_has_the_keys_of_its_contract_and_is_the_same_after_json():
    finding = finding_of(notes=("It is so.",), highlighted_row=1)
    assert list(finding) == list(Finding.__annotations__)
    assert json.loads(json.dumps(finding)) == finding


def test_a_row_that_does_not_fit_the_heads_is_a_fault_of_the_program():
    with pytest.raises(ValueError, match="does not fit its 2 heads"):
        finding_of(rows=[("one",)])


def test_the_card_prints_any_finding_by_its_own_words():
    findings = [finding_of(highlighted_row=0, notes=["It is so."]), finding_of("sweep", "t"), finding_of(title="Again")]
    lines = finding_lines(findings)
    assert [line for line in lines if line.startswith("## ")] == ["## Weights and measures", "## How t was found"]
    assert [line for line in lines if line.startswith("> ")] == ["> Hello", "> Again", "> t"]
    assert lines[:10] == [
        "## Weights and measures",
        "",
        "> Hello",
        "",
        "| what | figure |",
        "|---|---|",
        "| **one** | 1.0000 ± 0.1000 |",
        "| other | 2.0000 |",
        "",
        "It is so.",
    ]


def test_text_of_strangers_stays_in_its_place_in_the_card():
    wild = f"a | b\n# Heading\r\n{CARD_MARKS[1]}{FINDINGS_MARK}"
    finding = finding_of(title=wild, heads=(wild, wild), rows=[(wild, wild)], notes=[wild], measured=wild)
    block = card_block({"findings": [finding]})
    assert block.count("<!--") == 3
    assert "\n# Heading" not in block
    heads, row = (line for line in block.splitlines() if line.startswith("| a \\| b"))
    assert heads.count(" | ") == row.count(" | ") == 1


@pytest.mark.parametrize("width", [40, 60, 100, 160])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_the_screen_draws_any_finding_within_its_width(width, encoding, monkeypatch):
    monkeypatch.setattr(RecordingConsole, "encoding", encoding)
    console = RecordingConsole(width)
    wild = "[red]…\x1b[2J\\"
    rows = [("one", "1.0000 ± 0.1000", "words " * 30), (wild, "2.0000", wild)]
    finding = finding_of(title=wild, heads=("what", "figure", wild), rows=rows, notes=[wild], highlighted_row=1)
    console.print(render_finding(console, finding))
    text = console.export_text()
    assert max(map(cell_len, text.splitlines())) <= width
    assert "\x1b" not in text
    assert text.count("[red]") == 5 if width >= 80 else text.count("[red]") >= 5
    assert ("1.0000 ± 0.1000" if encoding == "utf-8" else "1.0000 +- 0.1000") in text
    assert encoding != "ascii" or text.isascii()


@pytest.fixture
def child(tmp_path) -> Path:
    return merge(*make_pair(tmp_path), tmp_path / "child").child


def test_findings_are_appended_and_a_sweep_takes_the_place_of_an_earlier_one(child):
    for findings in ([finding_of("sweep", "t = 0.3"), finding_of()], [finding_of("sweep", "t = 0.4")], [finding_of()]):
        amend_report(child, findings)
    report = json.loads((child / "merge_report.json").read_text("utf-8"))
    assert [finding["title"] for finding in report["findings"]] == ["Hello", "t = 0.4", "Hello"]
    card = (child / "README.md").read_text("utf-8")
    assert "t = 0.3" not in card
    assert card.endswith(card_block(report)), "the card is what the report makes of it"


def test_a_report_of_0_2_0_keeps_its_entries_and_its_card_what_it_tells(child):
    report = json.loads((child / "merge_report.json").read_text("utf-8"))
    del report["findings"], report["report_version"]
    old = {**report, **OLD_FINDINGS}
    (child / "merge_report.json").write_text(json.dumps(old), encoding="utf-8")
    (child / "README.md").write_text(OLD_CARD, encoding="utf-8")
    for _ in range(2):
        amend_report(child, [finding_of(title="New")])
    told = json.loads((child / "merge_report.json").read_text("utf-8"))
    assert told == {**old, "findings": [finding_of(title="New")] * 2}
    card = (child / "README.md").read_text("utf-8")
    before, _, after = OLD_CARD.partition(CARD_MARKS[1])
    assert card.startswith(before)
    assert card.endswith(CARD_MARKS[1] + after)
    assert card.count("> New") == 2
    assert card.count(FINDINGS_MARK) == 1


def test_a_report_of_0_2_0_without_its_card_begins_a_new_one(child):
    old = {**json.loads((child / "merge_report.json").read_text("utf-8")), **OLD_FINDINGS}
    (child / "merge_report.json").write_text(json.dumps(old), encoding="utf-8")
    (child / "README.md").unlink()
    amend_report(child, [finding_of()])
    assert (child / "README.md").read_text("utf-8").count("> Hello") == 1


@pytest.mark.parametrize("findings", [None, 7, "abc", [None], [{}], [{"kind": "x"}], [{**finding_of(), "rows": [[]]}]])
def test_findings_that_are_none_are_refused_and_nothing_changes(child, findings):
    report = {**json.loads((child / "merge_report.json").read_text("utf-8")), "findings": findings}
    if isinstance(findings, list) and findings[0] and "rows" in findings[0]:
        findings[0]["highlighted_row"] = 0
    (child / "merge_report.json").write_text(json.dumps(report), encoding="utf-8")
    before = {path.name: path.read_bytes() for path in child.iterdir()}
    with pytest.raises(SlerpMergeError, match="is not as slerpmerge writes it"):
        amend_report(child, [finding_of()])
    assert {path.name: path.read_bytes() for path in child.iterdir()} == before
