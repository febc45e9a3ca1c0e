"""What a sweep and the methods are worth on models that know something: `python tests/proof.py [FOLDER]`.

Trains the base and the two specialists of tests/specialists.py, finds a good t on their two texts by the program's own
command, tries every twentieth for comparison, and holds the methods and the gradient blends against each other.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console

from slerpkit.child.findings import Finding
from slerpkit.evaluation.models import ComparedModels
from slerpkit.evaluation.objectives import Objective
from slerpkit.evaluation.perplexity import compare_perplexity
from slerpkit.evaluation.sweep import find_t, forget_sweep
from slerpkit.merge.events import ignore
from slerpkit.merge.plan import MergePlan
from slerpkit.schedule import parse_blend
from slerpkit.screen.figures import render_finding, render_map
from slerpkit.story import execute_merge, inspect_parents
from tests.builders import plan_of
from tests.specialists import Specialists, make_specialists

GRADIENTS = ("attention and mlp", "primary at the ends", "secondary at the ends", "ramp")


@dataclass(frozen=True)
class Row:
    """One way to merge, and what its child costs on both texts, in bits per byte."""

    name: str
    arithmetic: float
    reversal: float

    @property
    def mean(self) -> float:
        return (self.arithmetic + self.reversal) / 2


class Proof:
    """Children of one pair of specialists."""

    def __init__(self, folder: Path, made: Specialists) -> None:
        self.folder = folder
        self.made = made
        self.count = 0

    def plan(self, t: float = 0.5, **settings: Any) -> MergePlan:
        """Of a new child, t as builders.plan_of takes it."""
        self.count += 1
        child = self.folder / f"child-{self.count}"
        return plan_of(self.made.primary, self.made.secondary, child, t, device="cpu", **settings)

    def measure(self, name: str, folder: Path) -> Row:
        """A model's bits per byte on both texts."""
        findings = compare_perplexity(
            ComparedModels((("child", folder),), "cpu"), (self.made.arithmetic, self.made.reversal), ignore
        )
        return Row(name, *(finding["figures"]["models"][0]["bits_per_byte"] for finding in findings))

    def merged(self, name: str, **settings: Any) -> Row:
        """A child made for it."""
        return self.measure(name, execute_merge(self.plan(**settings)).child)

    def sweep(self, **settings: Any) -> Finding:
        """What a sweep on both texts finds."""
        plan = self.plan(**settings)
        finding = find_t(plan, Objective((self.made.arithmetic, self.made.reversal)), ignore)
        forget_sweep(plan.options.save_directory)
        return finding

    def swept(self, name: str, **settings: Any) -> Row:
        """The best child of a sweep."""
        sweep = self.sweep(**settings)["figures"]
        (best,) = (trial for trial in sweep["trials"] if trial["role"] == "child" and trial["t"] == sweep["best_t"])
        return Row(f"{name}, t = {best['t']:g} (found)", *best["values"])

    def exhaustive(self, step: float = 0.05) -> list[tuple[float, Row]]:
        """Every t from one step to one before the end, with its child's costs."""
        ts = [round(number * step, 4) for number in range(1, round(1 / step))]
        return [(t, self.merged(f"t = {t:g}", t=t)) for t in ts]

    def methods(self) -> list[Row]:
        """Both parents and the base, then each method at the t that a sweep finds for it, then the gradient blends."""
        rows = [self.measure(name, getattr(self.made, name)) for name in ("base", "primary", "secondary")]
        rows += [self.swept(method, method=method) for method in ("slerp", "slerp-norm", "lerp")]
        rows.append(self.swept("slerp of task vectors", base=self.made.base))
        return rows + [self.merged(name, schedule=parse_blend(name)) for name in GRADIENTS]


def table(rows: list[Row]) -> str:
    """Rows as Markdown, the least mean in bold."""
    least = min(row.mean for row in rows)
    lines = ["| model | arithmetic | reversal | mean |", "|---|---|---|---|"]
    for row in rows:
        mean = f"**{row.mean:.3f}**" if row.mean == least else f"{row.mean:.3f}"
        lines.append(f"| {row.name} | {row.arithmetic:.3f} | {row.reversal:.3f} | {mean} |")
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1] if len(sys.argv) > 1 else temporary)
        proof = Proof(folder, make_specialists(folder))
        finding = proof.sweep()
        console = Console(width=100)
        console.print(render_finding(console, finding))
        every = proof.exhaustive()
        best = min(every, key=lambda tried: tried[1].mean)
        taken = finding["figures"]["best_t"]
        print(f"Of every twentieth the best is t = {best[0]:g} ({best[1].mean:.4f}); the sweep took {taken:g}.")
        rows = proof.methods()
        print(table(rows))
        plan = proof.plan()
        console.print(render_map(console, inspect_parents(plan.recipe, plan.options)))


if __name__ == "__main__":
    main()
