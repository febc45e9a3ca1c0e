"""Which t each tensor gets: gradients over layers, filters, and where a tensor stands in its stack."""

from __future__ import annotations

import random

import numpy as np
import pytest

from slerpkit.messages import SlerpMergeError
from slerpkit.parents.tensors import layer_positions
from slerpkit.schedule import Schedule, ScheduleRule

SEEDS = range(12)


def schedule_of(*rules: tuple[str, list[float]]) -> Schedule:
    """A schedule from (filter, gradient) pairs."""
    return Schedule(tuple(ScheduleRule(tuple(gradient), name_filter) for name_filter, gradient in rules))


def stack(prefix: str, count: int, suffix: str = "mlp.weight") -> list[str]:
    """One tensor in each layer of a stack."""
    return [f"{prefix}.{index}.{suffix}" for index in range(count)]


def interpolated(gradient: list[float], layer: int, layers: int) -> float:
    """t of a layer, by numpy's interpolation between evenly spaced anchors."""
    position = layer / (layers - 1) if layers > 1 else 1.0
    return float(np.interp(position, np.linspace(0, 1, len(gradient)), gradient)) if len(gradient) > 1 else gradient[0]


# ── Gradients ──


@pytest.mark.parametrize(
    ("layer", "t"), [(0, 0.0), (7, 0.4516), (8, 0.4935), (15, 0.3129), (16, 0.3258), (24, 0.7290), (31, 1.0)]
)
def test_worked_values_of_thirty_two_layers(layer, t):
    names = stack("model.layers", 32)
    positions = layer_positions(names)
    found = schedule_of(("*", [0, 0.5, 0.3, 0.7, 1])).t_for(names[layer], positions[names[layer]])
    assert found == pytest.approx(t, abs=5e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_gradients_over_random_stacks(seed):
    chooser = random.Random(seed)
    for _ in range(20):
        layers = chooser.randint(1, 90)
        gradient = [chooser.random() for _ in range(chooser.randint(1, 9))]
        names = stack(chooser.choice(["model.layers", "transformer.h", "gpt_neox.layers", "blocks"]), layers)
        chooser.shuffle(names)
        positions = layer_positions(names)
        schedule = schedule_of(("*", gradient))
        for name in names:
            layer = next(int(part) for part in name.split(".") if part.isdigit())
            expected = interpolated(gradient, layer, layers)
            assert schedule.t_for(name, positions[name]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("gradient", [[0.2, 0.9], [0, 0.5, 0.3, 0.7, 1], [1, 0, 1]])
def test_the_ends_of_a_gradient_are_met_exactly(gradient):
    rule = ScheduleRule(tuple(gradient))
    assert rule.value_at(0.0) == gradient[0]
    assert rule.value_at(1.0) == gradient[-1]


@pytest.mark.parametrize("position", [0.0, 0.37, 1.0])
def test_one_value_is_the_same_everywhere(position):
    assert ScheduleRule((0.3,)).value_at(position) == 0.3
    assert Schedule.constant(0.3).t_for("lm_head.weight", position) == 0.3


def test_outside_layers_the_first_value_of_a_gradient_is_taken():
    names = ["model.embed_tokens.weight", *stack("model.layers", 4), "model.norm.weight", "lm_head.weight"]
    positions = layer_positions(names)
    schedule = schedule_of(("*", [0.1, 0.9]))
    assert {schedule.t_for(name, positions[name]) for name in (names[0], *names[-2:])} == {0.1}


# ── Filters ──


def test_the_first_matching_filter_wins():
    name = "model.layers.3.mlp.gate_proj.weight"
    narrow, wide, rest = ("gate_proj", [0.1]), ("mlp", [0.2]), ("*", [0.3])
    assert schedule_of(narrow, wide, rest).t_for(name, 0) == 0.1
    assert schedule_of(wide, narrow, rest).t_for(name, 0) == 0.2
    assert schedule_of(rest, narrow, wide).t_for(name, 0) == 0.3


@pytest.mark.parametrize(
    ("name_filter", "name", "fits"),
    [
        ("*", "anything.at.all", True),
        ("self_attn", "model.layers.0.self_attn.q_proj.weight", True),
        ("layers.1.", "model.layers.1.mlp.weight", True),
        ("layers.1.", "model.layers.11.mlp.weight", False),
        ("MLP", "model.layers.0.mlp.weight", False),
        ("m*p", "model.layers.0.mlp.weight", False),  # a substring, not a pattern
        ("lm_head.weight.", "lm_head.weight", False),
    ],
)
def test_a_filter_is_a_case_sensitive_substring(name_filter, name, fits):
    assert ScheduleRule((0.5,), name_filter).matches(name) is fits


def test_each_filter_has_its_own_gradient():
    schedule = schedule_of(("self_attn", [0, 1]), ("mlp", [1, 0]), ("*", [0.5]))
    found = [schedule.t_for(f"model.layers.1.{part}.weight", 0.25) for part in ("self_attn", "mlp", "input_norm")]
    assert found == [0.25, 0.75, 0.5]


def test_a_tensor_that_no_filter_matches_is_named():
    schedule = schedule_of(("mlp", [0.2]), ("self_attn", [0.3]))
    with pytest.raises(SlerpMergeError, match=r"no value for the tensor model\.norm\.weight") as caught:
        schedule.t_for("model.norm.weight", 0)
    assert caught.value.hint


def test_a_schedule_in_words_names_filters_and_values():
    assert Schedule.constant(0.5).describe() == "t = 0.5"
    assert schedule_of(("mlp", [0, 1]), ("*", [0.3])).describe() == "mlp: t = 0, 1; t = 0.3"


# ── Positions ──


def test_a_decoder():
    names = ["model.embed_tokens.weight", *stack("model.layers", 5), "model.norm.weight", "lm_head.weight"]
    positions = layer_positions(names)
    assert [positions[name] for name in names] == [0, 0, 0.25, 0.5, 0.75, 1, 0, 0]


def test_layers_are_numbered_and_not_sorted_as_text():
    names = stack("model.layers", 12)
    positions = layer_positions(sorted(names))
    assert [round(11 * positions[name]) for name in names] == list(range(12))


def test_every_tensor_of_a_layer_stands_at_one_place():
    names = stack("model.layers", 3, "mlp.weight") + stack("model.layers", 3, "self_attn.q_proj.bias")
    positions = layer_positions(names)
    for mlp, attention in zip(names[:3], names[3:]):
        assert positions[mlp] == positions[attention]


def test_encoder_and_decoder_have_a_stack_each():
    encoder = stack("encoder.block", 3, "layer.1.DenseReluDense.wi.weight")
    decoder = stack("decoder.block", 5, "layer.2.DenseReluDense.wi.weight")
    positions = layer_positions(["shared.weight", *encoder, *decoder])
    assert [positions[name] for name in encoder] == [0, 0.5, 1]
    assert [positions[name] for name in decoder] == [0, 0.25, 0.5, 0.75, 1]
    assert positions["shared.weight"] == 0


def test_a_vision_tower_beside_a_language_model():
    vision = stack("vision_tower.vision_model.encoder.layers", 5)
    language = stack("language_model.model.layers", 3)
    projector = "multi_modal_projector.linear_1.weight"
    positions = layer_positions([*vision, projector, *language])
    assert [positions[name] for name in vision] == [0, 0.25, 0.5, 0.75, 1]
    assert [positions[name] for name in language] == [0, 0.5, 1]
    assert positions[projector] == 0


def test_expert_numbers_are_not_layers():
    names = [
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight" for layer in range(3) for expert in range(8)
    ]
    positions = layer_positions(names)
    for name in names:
        assert positions[name] == int(name.split(".")[2]) / 2


def test_a_single_layer_stands_at_the_end():
    positions = layer_positions(["model.embed_tokens.weight", *stack("model.layers", 1)])
    assert positions == {"model.embed_tokens.weight": 0, "model.layers.0.mlp.weight": 1}


def test_numbers_inside_words_are_not_layers():
    names = ["model.norm2.weight", "h10x.weight", "encoder.conv1.bias", "wte.weight"]
    assert set(layer_positions(names).values()) == {0.0}
