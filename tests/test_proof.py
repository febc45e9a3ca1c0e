"""On models that know something: the sweep finds what an exhaustive grid finds, and its child beats both parents."""

from __future__ import annotations

import time

import pytest

from slerpkit.evaluation.models import ComparedModels
from slerpkit.evaluation.perplexity import compare_perplexity
from slerpkit.merge.events import ignore
from tests.proof import GRADIENTS, Proof, Row, table
from tests.specialists import make_specialists

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def proof(tmp_path_factory) -> Proof:
    folder = tmp_path_factory.mktemp("proof")
    started = time.monotonic()
    made = make_specialists(folder)
    print(f"trained in {time.monotonic() - started:.0f} s")
    return Proof(folder, made)


@pytest.fixture(scope="module")
def every(proof) -> list[tuple[float, Row]]:
    """Every twentieth of t, with its child's costs."""
    return proof.exhaustive()


def test_each_specialist_is_better_at_its_own_skill_and_has_lost_of_the_others(proof):
    base, primary, secondary = (
        proof.measure(name, getattr(proof.made, name)) for name in ("base", "primary", "secondary")
    )
    assert primary.arithmetic < base.arithmetic < secondary.arithmetic
    assert secondary.reversal < base.reversal < primary.reversal


def test_the_sweeps_t_is_an_exhaustive_grids_and_its_child_beats_both_parents_together(proof, every):
    sweep = proof.sweep()["figures"]
    best_t, _ = min(every, key=lambda tried: tried[1].mean)
    assert abs(sweep["best_t"] - best_t) <= 0.05 + 1e-9
    by_role = {trial["role"]: trial for trial in sweep["trials"] if trial["t"] in (0, 1, sweep["best_t"])}
    for role in ("primary", "secondary"):
        parent = by_role[role]
        assert parent["loss_above_best"] > 2 * parent["stderr"], f"the child loses less than the {role}, beyond noise"


def test_the_curve_has_one_valley(every):
    """What is narrowed is a curve, not chance: it falls to its least value and rises from there."""
    means = [row.mean for _, row in every]
    lowest = means.index(min(means))
    assert all(a > b - 0.002 for a, b in zip(means[:lowest], means[1 : lowest + 1]))
    assert all(a < b + 0.002 for a, b in zip(means[lowest:], means[lowest + 1 :]))


def test_methods_and_gradients_are_held_against_each_other(proof):
    rows = proof.methods()
    print(table(rows))
    assert [row.name for row in rows[-len(GRADIENTS) :]] == list(GRADIENTS)
    by_name = {row.name.partition(",")[0]: row for row in rows}
    parents = min(by_name["primary"].mean, by_name["secondary"].mean)
    for method in ("slerp", "slerp-norm", "lerp"):
        assert by_name[method].mean < parents


def test_parents_lose_as_much_whatever_they_are_compared_with(proof):
    """The figures of a model do not depend on what it is compared with."""
    texts = (proof.made.arithmetic,)
    alone = compare_perplexity(ComparedModels((("child", proof.made.primary),), "cpu"), texts, ignore)
    both = compare_perplexity(
        ComparedModels((("primary", proof.made.secondary), ("child", proof.made.primary)), "cpu"), texts, ignore
    )
    assert alone[0]["figures"]["models"][0] == both[0]["figures"]["models"][1]
