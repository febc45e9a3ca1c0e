"""Can these two make a right child? Every rule that blocks, resolves or notes, and pairs that must pass in silence."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import open_checkpoint, open_parents
from slerpkit.parity.check import check_parity
from slerpkit.parity.config_meaning import OLDER, as_class_of, flatten_config, read_meaning, readable_config
from slerpkit.parity.report import Mismatch, ParityReport
from slerpkit.recipe import MergeRecipe
from tests.builders import (
    HIDDEN,
    LLAMA_CONFIG,
    VOCABULARY,
    add_tokenizer,
    copy_model,
    edit_json,
    llama_tensors,
    make_checkpoint,
    make_pair,
    make_real_model,
    plan_of,
)

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INTEGERS, FLOATS = torch.ones(4, 2).long(), torch.ones(4)


def parity_of(primary: Path, secondary: Path, dtype: str = "auto") -> ParityReport:
    recipe = MergeRecipe(primary, secondary, dtype=dtype)
    return check_parity(open_parents(recipe), recipe)


def compare_configs(folder: Path, left: Mapping[str, Any], right: Mapping[str, Any]) -> ParityReport:
    """The report on two parents of equal tensors whose configs have these changes; a value of ... removes a key."""
    for role, changes in (("primary", left), ("secondary", right)):
        config = {key: value for key, value in {**LLAMA_CONFIG, **changes}.items() if value is not ...}
        make_checkpoint(folder / role, llama_tensors(1), config)
    return parity_of(folder / "primary", folder / "secondary")


def compare_tensors(
    folder: Path, left: Mapping[str, Any], right: Mapping[str, Any], config: Mapping[str, Any] = LLAMA_CONFIG
) -> ParityReport:
    """The report on two Llamas with these tensors changed; a value of ... removes a tensor."""
    for seed, role, changes in ((1, "primary", left), (2, "secondary", right)):
        tensors = {name: t.clone() for name, t in {**llama_tensors(seed), **changes}.items() if t is not ...}
        make_checkpoint(folder / role, tensors, config)
    return parity_of(folder / "primary", folder / "secondary")


def only(report: ParityReport, severity: str) -> Mismatch:
    """The report's one mismatch, which has this severity."""
    assert [mismatch.severity for mismatch in report.mismatches] == [severity]
    return report.mismatches[0]


def subjects(report: ParityReport, severity: str) -> list[str]:
    return [mismatch.subject for mismatch in report.of_severity(severity)]


# ── Blocking: configs ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "left", "right"),
    [
        ("model_type", "llama", "mistral"),
        ("architectures", ["LlamaForCausalLM"], ["MistralForCausalLM"]),
        ("num_hidden_layers", 2, 3),
        ("num_attention_heads", 4, 8),
        ("num_key_value_heads", 2, 1),
        ("n_head", 4, 8),
        ("head_dim", 4, 8),
        ("rms_norm_eps", 1e-6, 1e-5),
        ("layer_norm_epsilon", 1e-6, 1e-5),
        ("hidden_act", "silu", "gelu"),
        ("activation_function", "gelu", "gelu_new"),
        ("hidden_activation", "gelu", "gelu_pytorch_tanh"),
        ("sliding_window", 4096, 2048),
        ("num_experts_per_tok", 2, 4),
        ("attn_logit_softcapping", 50.0, 30.0),
        ("layer_types", ["full_attention", "sliding_attention"], ["full_attention", "full_attention"]),
    ],
)
def test_a_config_that_gives_the_weights_another_meaning_blocks(tmp_path, key, left, right):
    head_dim = {} if key == "head_dim" else {"head_dim": 4}  # else another head count implies another head_dim
    report = compare_configs(tmp_path, {**head_dim, key: left}, {**head_dim, key: right})
    found = only(report, "blocking")
    assert found.subject == key
    for shown, value in ((found.primary, left), (found.secondary, right)):
        assert shown == (value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("left", "right", "subject", "shown"),
    [
        ({"rope_theta": 10000.0}, {"rope_theta": 500000.0}, "rope_theta", ("10000.0", "500000.0")),
        (
            {"rope_theta": 10000.0},
            {"rope_theta": ..., "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
            "rope_theta",
            ("10000.0", "500000.0"),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "factor",
            ("2.0", "4.0"),
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type",
            ("linear", "dynamic"),
        ),
        ({"partial_rotary_factor": 0.5}, {"partial_rotary_factor": 0.25}, "partial_rotary_factor", ("0.5", "0.25")),
    ],
)
def test_rotary_settings_that_differ_block_under_any_spelling(tmp_path, left, right, subject, shown):
    found = only(compare_configs(tmp_path, left, right), "blocking")
    assert found.subject.endswith(subject)
    assert (found.primary, found.secondary) == shown


@pytest.mark.parametrize(
    ("key", "left", "right"),
    [
        ("token_dropout", True, False), ("moe_token_dropout", 0.2, 0.0), ("router_jitter_noise", 0.01, 0.1),
        ("output_logit_soft_cap", 30.0, 15.0), ("output_multiplier", 1.0, 0.5),
        ("_remove_final_layer_norm", True, False),
    ],
)  # fmt: skip
def test_what_only_looks_like_a_setting_of_training_blocks(tmp_path, key, left, right):
    stranger = {"model_type": "nobody", "architectures": ["Nobody"]}
    assert only(compare_configs(tmp_path, {**stranger, key: left}, {**stranger, key: right}), "blocking").subject == key


def scaled(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": kind, **more}}


TRAINED = {"original_max_position_embeddings": 32}
FACTORS = {"short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("both", "severity"),
    [
        ({}, "notice"),
        (scaled("linear", factor=4.0), "notice"),
        (scaled("yarn", factor=4.0, **TRAINED), "notice"),
        (scaled("longrope", factor=4.0, **FACTORS, **TRAINED), "notice"),
        (scaled("dynamic", factor=4.0), "blocking"),
        (scaled("yarn", factor=4.0), "blocking"),
        (scaled("longrope", **FACTORS, **TRAINED), "blocking"),
        ({**scaled("longrope", **FACTORS), **TRAINED}, "blocking"),
        ({"max_relative_positions": -1}, "blocking"),
        ({"max_relative_positions": 16}, "notice"),
    ],
)
def test_a_limit_blocks_where_positions_are_computed_from_it(tmp_path, both, severity):
    """Elsewhere it only says where the child ends, as the primary does."""
    stranger = {"model_type": "nobody", "architectures": ["Nobody"], **both}
    limits = ({**stranger, "max_position_embeddings": limit} for limit in (64, 128))
    found = only(compare_configs(tmp_path, *limits), severity)
    assert found.subject == "max_position_embeddings"
    assert ("computed from it" in found.consequence) is (severity == "blocking") is (found.accepted_as is not None)


@pytest.mark.parametrize("both", [{}, {"rope_theta": ...}], ids=["theta stated", "theta not stated"])
@pytest.mark.parametrize("none", [None, ...], ids=["null", "absent"])
def test_scaled_positions_beside_unscaled_ones_block(tmp_path, both, none):
    scaled = {**both, "rope_scaling": {"type": "linear", "factor": 4.0}}
    report = compare_configs(tmp_path, {**both, "rope_scaling": none}, scaled)
    assert any("rope" in subject for subject in subjects(report, "blocking"))


def test_a_sliding_window_beside_none_blocks(tmp_path):
    """Null means attention to everything: the first and second Mistral differ in it and in no shape."""
    report = compare_configs(tmp_path, {"sliding_window": 4096}, {"sliding_window": None})
    assert subjects(report, "blocking") == ["sliding_window"]


@pytest.mark.parametrize(
    ("model_type", "key", "default"),
    [
        ("starcoder2", "sliding_window", None),
        ("mistral", "sliding_window", 4096),
        ("gemma2", "final_logit_softcapping", 30.0),
    ],
)
def test_none_beside_silence_is_what_the_class_makes_of_it(tmp_path, model_type, key, default):
    kind = {"model_type": model_type, "architectures": ...}
    report = compare_configs(tmp_path, {**kind, key: None}, kind)
    assert subjects(report, "blocking") == ([] if default is None else [key])


def skip_unless_known(model_type: str) -> None:
    """What a class makes of a config cannot be asked of a library that has none for it."""
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} does not have it yet")


@pytest.mark.parametrize(
    ("model_type", "key", "value", "other", "blocks"),
    [
        ("gemma2", "final_logit_softcapping", 30, 30.0, False),
        ("gemma2", "final_logit_softcapping", 50, 30.0, True),
        ("mistral", "sliding_window", 4096.0, 4096, False),
        ("llama", "attention_bias", None, False, False),
        ("llama4_text", "attn_temperature_tuning", 4, True, False),
    ],
)
def test_a_value_of_another_type_does_not_keep_a_class_from_reading(tmp_path, model_type, key, value, other, blocks):
    skip_unless_known(model_type)
    kind = {"model_type": model_type, "architectures": ...}
    silent_key = {"attention_dropout": 0.0, "mlp_bias" if model_type == "llama" else "hidden_act": ...}
    report = compare_configs(tmp_path, {**kind, **silent_key, key: value}, {**kind, key: other})
    assert subjects(report, "blocking") == ([key] if blocks else [])


@pytest.mark.parametrize("key", ["deterministic_flash_attn", "reference_compile", "sparse_prediction"])
def test_how_an_encoder_is_run_and_trained_is_silent(tmp_path, key):
    kind = {"model_type": "modernbert", "architectures": ...}
    assert compare_configs(tmp_path, {**kind, key: False}, {**kind, key: True}).mismatches == ()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({"max_window_layers": 24, "sliding_window": 32768}, {"max_window_layers": 21, "sliding_window": 32768}),
        ({"sliding_window": 131072}, {"sliding_window": 32768}),
        ({"sliding_window": 32768}, {"sliding_window": None}),
    ],
)
def test_a_window_that_is_switched_off_on_both_sides_does_not_block(tmp_path, left, right):
    """Small Qwen2.5 models and their instruct versions differ so, and are merged every day."""
    off = {"use_sliding_window": False}
    assert subjects(compare_configs(tmp_path, {**off, **left}, {**off, **right}), "blocking") == []


def test_nested_language_settings_are_compared(tmp_path):
    text = {"num_attention_heads": 4, "hidden_size": 16, "rope_theta": 1e4, "vocab_size": 48, "dtype": "float16"}
    other = {**text, "num_attention_heads": 8, "rope_theta": 5e5, "dtype": "bfloat16"}
    report = compare_configs(tmp_path, {"text_config": text}, {"text_config": other})
    assert subjects(report, "blocking") == [
        "text_config.head_dim",
        "text_config.num_attention_heads",
        "text_config.num_key_value_heads",
        "text_config.rope_parameters.rope_theta",
    ]


def of_type(model_type: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a Llama's config one of another type, which keeps no rotary settings unless they are given."""
    return {"model_type": model_type, "architectures": ..., "rope_theta": ..., **changes}


@pytest.mark.parametrize(
    ("model_type", "key", "default", "other"),
    [
        ("olmo2", "rope_theta", 10000.0, 500000.0),
        ("granite", "residual_multiplier", 1.0, 0.22),
        ("granite", "attention_multiplier", 1.0, 0.0156),
        ("stablelm", "use_qkv_bias", False, True),
        ("starcoder2", "use_bias", True, False),
        ("glm", "partial_rotary_factor", 0.5, 0.25),
    ],
)
def test_a_setting_left_to_the_class_is_its_default(tmp_path, model_type, key, default, other):
    skip_unless_known(model_type)
    silent = of_type(model_type, {})
    assert compare_configs(tmp_path, silent, {**silent, key: default}).mismatches == ()
    for number, sides in enumerate(((silent, {**silent, key: other}), ({**silent, key: other}, silent))):
        found = only(compare_configs(tmp_path / str(number), *sides), "blocking")
        assert found.accepted_as == found.subject
        assert key in found.subject
        assert " by default" in found.primary + found.secondary


def test_a_rotary_setting_that_a_class_does_not_know_is_what_models_without_it_do(tmp_path, monkeypatch):
    """As classes of version 4 for models whose later ones state it."""
    meanings = [dict(LLAMA_CONFIG), {**LLAMA_CONFIG, "rope_scaling": {"rope_type": "default"}}]
    monkeypatch.setattr("slerpkit.parity.configs.read_meanings", lambda *_: meanings)
    silent = {"rope_theta": ...}
    for number, (factor, severity) in enumerate(((1.0, None), (0.5, "blocking"))):
        meanings[1]["partial_rotary_factor"] = factor
        report = compare_configs(tmp_path / str(number), silent, {**silent, "partial_rotary_factor": factor})
        if severity is None:
            assert report.mismatches == ()
        else:
            found = only(report, severity)
            assert (found.primary, found.secondary) == ("1.0 by default", "0.5")


def test_two_spellings_of_a_setting_that_disagree_are_both_compared(tmp_path):
    stranger = {"model_type": "nobody", "architectures": ["Nobody"], "rope_theta": ..., "partial_rotary_factor": 0.25}
    report = compare_configs(tmp_path, {**stranger, "rotary_pct": 0.25}, {**stranger, "rotary_pct": 0.5})
    assert subjects(report, "blocking") == ["rotary_pct"]


def test_what_no_class_reads_is_compared_as_it_stands(tmp_path):
    stranger = {"model_type": "nobody", "architectures": ["Nobody"]}
    assert compare_configs(tmp_path, stranger, stranger).mismatches == ()
    for number, changes in enumerate(({"scale_depth": 1.4}, {"rope_theta": ...}, {"mlp_bias": False})):
        found = only(compare_configs(tmp_path / str(number), stranger, {**stranger, **changes}), "blocking")
        assert "not stated" in (found.primary, found.secondary)
        assert "not known" in found.consequence
    found = only(compare_configs(tmp_path / "both", *({**stranger, "scale_depth": n} for n in (1, 2))), "blocking")
    assert "not known" not in found.consequence


@pytest.mark.parametrize(
    "refused", [{"num_attention_heads": "four"}, {"rope_scaling": 4}, {"num_hidden_layers": 10**9}], ids=str
)
def test_a_config_that_its_class_refuses_is_compared_as_it_stands(tmp_path, refused):
    report = compare_configs(tmp_path, refused, {**refused, "mlp_bias": False})
    assert "mlp_bias" in subjects(report, "blocking")


def test_what_the_class_does_not_read_is_noted(tmp_path):
    found = only(compare_configs(tmp_path, {}, {"quiet_alpha": 2}), "notice")
    assert (found.subject, found.primary, found.secondary) == ("quiet_alpha", "not stated", "2")
    many = {f"quiet_{number}": number for number in range(5)}
    found = only(compare_configs(tmp_path / "many", many, {"loud": 3}), "notice")
    assert found.subject == "loud, quiet_0, quiet_1 and 3 more"
    assert (found.primary, found.secondary) == ("5 stated", "1 stated")


@pytest.mark.parametrize(
    "changes", [{"max_position_embeddings": 128}, {"eos_token_id": 3}, {"use_cache": False}], ids=str
)
def test_no_class_is_asked_where_nothing_that_matters_differs(tmp_path, monkeypatch, changes):
    monkeypatch.setattr("slerpkit.parity.configs.read_meanings", lambda *_: pytest.fail("a class was asked"))
    assert subjects(compare_configs(tmp_path, {}, changes), "blocking") == []


def test_settings_of_another_architecture_are_not_missing(tmp_path):
    report = compare_configs(tmp_path, {}, {"model_type": "gpt2", "n_inner": 24})
    assert subjects(report, "blocking") == ["model_type"]


def test_a_difference_that_is_accepted_is_noted_and_no_other(tmp_path):
    both = {"rms_norm_eps": 1e-6, "hidden_act": "silu"}
    for role, config in (("primary", both), ("secondary", {"rms_norm_eps": 1e-5, "hidden_act": "gelu"})):
        make_checkpoint(tmp_path / role, llama_tensors(1), {**LLAMA_CONFIG, **config})
    recipe = MergeRecipe(tmp_path / "primary", tmp_path / "secondary", accept=("hidden_act", "model_type"))
    report = check_parity(open_parents(recipe), recipe)
    assert (subjects(report, "blocking"), subjects(report, "notice")) == (["rms_norm_eps"], ["hidden_act"])
    assert [found.subject for found in report.accepted] == ["hidden_act"]
    assert report.acceptable == ("rms_norm_eps",)
    with pytest.raises(SlerpMergeError) as caught:
        report.raise_if_blocking()
    assert caught.value.hint.endswith("--accept rms_norm_eps")


def test_what_cannot_be_accepted_is_offered_to_nobody(tmp_path):
    report = compare_configs(tmp_path, {}, {"model_type": "mistral", "hidden_act": "gelu"})
    assert report.acceptable == ()
    with pytest.raises(SlerpMergeError) as caught:
        report.raise_if_blocking()
    assert "--accept" not in caught.value.hint


# ── Blocking: tensors ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("left", "right"),
    [((16, 16), (16, 8)), ((16, 16), (256,)), ((16,), (1, 16)), ((), (1,))],
    ids=str,
)
def test_tensors_of_different_shape_block(tmp_path, left, right):
    found = only(compare_tensors(tmp_path, {"x": torch.ones(left)}, {"x": torch.ones(right)}), "blocking")
    assert (found.subject, found.primary, found.secondary) == ("x", str(list(left)), str(list(right)))
    assert "shape" in found.consequence


def test_vocabularies_of_different_size_block_and_say_so(tmp_path):
    rows = {name: torch.ones(VOCABULARY + 2, HIDDEN) for name in (HEAD, EMBEDDING)}
    report = compare_tensors(tmp_path, {}, rows)
    blocking = report.of_severity("blocking")
    assert {found.subject for found in blocking} == {HEAD, EMBEDDING, "vocabulary"}
    for found in blocking[1:]:
        assert (found.primary, found.secondary) == ("[48, 16]", "[50, 16]")
        assert "Vocabularies of different size" in found.consequence


def test_weights_that_only_one_parent_has_block_on_either_side(tmp_path):
    report = compare_tensors(tmp_path, {"left.weight": torch.ones(3)}, {"right.weight": torch.ones(3)})
    blocking = [(found.subject, found.primary, found.secondary) for found in report.of_severity("blocking")]
    assert blocking == [("left.weight", "present", "missing"), ("right.weight", "missing", "present")]
    assert "primary" in report.of_severity("blocking")[0].consequence


def test_many_missing_weights_are_one_line_in_layer_order(tmp_path):
    extra = {f"model.layers.{layer}.extra.weight": torch.ones(2) for layer in range(12)}
    found = only(compare_tensors(tmp_path, extra, {}), "blocking")
    assert found.subject.startswith("model.layers.0.extra.weight, model.layers.1.extra.weight, model.layers.2.")
    assert found.subject.endswith("and 6 more")
    assert "12 tensors" in found.consequence


def test_real_numbers_beside_integers_block(tmp_path):
    report = compare_tensors(tmp_path, {"x": torch.ones(3)}, {"x": torch.ones(3).long()})
    (found,) = report.of_severity("blocking")
    assert (found.subject, found.primary, found.secondary) == ("x", "F32", "I64")


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32], ids=str)
def test_integers_are_never_said_to_be_blended(tmp_path, dtype):
    report = compare_tensors(tmp_path, {"x": torch.ones(3, dtype=dtype)}, {"x": torch.ones(3).long()})
    assert all("Blended" not in mismatch.consequence for mismatch in report.mismatches)


def test_a_missing_head_blocks_where_nothing_is_tied(tmp_path):
    report = compare_tensors(tmp_path, {}, {HEAD: ...})  # both configs say tie_word_embeddings: false
    assert subjects(report, "blocking") == [HEAD]


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"quant_method": "gptq", "bits": 4}, "GPTQ"),
        ({"quant_method": "awq", "bits": 4}, "AWQ"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes 4-bit"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6.0}, "bitsandbytes 8-bit"),  # before the method was written down
        ({"quant_method": "fp8"}, "FP8"),
        ({"quant_method": "mxfp4"}, "MXFP4"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    ],
)
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_quantised_parent_is_named_from_its_config(tmp_path, settings, name, role):
    primary, secondary = make_pair(tmp_path)
    edit_json(tmp_path / role / "config.json", quantization_config=settings)
    found = only(parity_of(primary, secondary), "blocking")
    assert {found.primary, found.secondary} == {name, "not quantised"}
    assert getattr(found, role) == name
    assert "unquantised" in found.consequence


@pytest.mark.parametrize(
    ("extra", "name"),
    [
        ({"q_proj.qzeros": torch.ones(2).int(), "q_proj.g_idx": torch.ones(2).int()}, "GPTQ"),
        ({"q_proj.qzeros": torch.ones(2).int(), "q_proj.qweight": torch.ones(2).int()}, "AWQ"),
        ({"q_proj.weight.absmax": torch.ones(2).byte()}, "bitsandbytes 4-bit"),
        ({"q_proj.SCB": torch.ones(2)}, "bitsandbytes 8-bit"),
        ({"mlp.experts.gate_up_proj_blocks": torch.ones(2).byte()}, "MXFP4"),
        ({"q_proj.weight_scale_inv": torch.ones(2)}, "FP8"),
        ({"q_proj.weight": torch.ones(2).to(torch.float8_e4m3fn)}, "FP8"),
        ({"q_proj.weight": torch.ones(2).to(torch.float8_e5m2)}, "FP8"),
        ({"q_proj.weight_packed": torch.ones(2).int()}, "compressed-tensors"),
        ({"q_proj.weight": INTEGERS.int(), "q_proj.scales": FLOATS, "q_proj.biases": FLOATS}, "MLX"),
        ({"q_proj.q_weight": INTEGERS.int(), "q_proj.q_scale_max": FLOATS}, "EXL2"),
        ({"q_proj.W_q": INTEGERS.byte(), "q_proj.scale": FLOATS, "q_proj.zero": FLOATS}, "HQQ"),
        ({"q_proj.weight._data": INTEGERS.char(), "q_proj.weight._scale": FLOATS}, "quanto"),
        ({"q_proj.weight": INTEGERS.char(), "q_proj.weight_scale": FLOATS}, "int8 for weights beside weight_scale"),
        ({"q_proj.weight": INTEGERS.byte(), "q_proj.bias": FLOATS}, "uint8 for weights"),
        ({"experts.up_proj": INTEGERS.byte(), "experts.up_proj_scale": FLOATS}, "uint8 for weights beside"),
    ],
)
@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_quantised_parent_is_named_from_its_tensors(tmp_path, extra, name, role):
    changes = (extra, {}) if role == "primary" else ({}, extra)
    report = compare_tensors(tmp_path, *changes)
    (found,) = (found for found in report.of_severity("blocking") if found.subject == "quantisation")
    assert name in getattr(found, role)


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_what_follows_from_packed_weights_is_not_said_beside_them(tmp_path, role):
    """Shapes of packed weights, and their scales without a counterpart, are no reasons of their own."""
    name = "model.layers.0.mlp.up_proj.weight"
    packed = {name: torch.ones(12 * HIDDEN, 1).byte(), f"{name}.absmax": FLOATS}
    report = compare_tensors(tmp_path, *((packed, {}) if role == "primary" else ({}, packed)))
    assert subjects(report, "blocking") == ["quantisation"]


@pytest.mark.parametrize(
    ("method", "remedy"),
    [
        ("gptq", None), ("awq", None), ("bitsandbytes", "call dequantize() on it"),
        ("fp8", "FineGrainedFP8Config(dequantize=True)"), ("mxfp4", "Mxfp4Config(dequantize=True)"),
    ],
)  # fmt: skip
def test_a_quantised_parent_is_refused_with_the_remedy_that_fits(tmp_path, method, remedy):
    primary, secondary = make_pair(tmp_path)
    edit_json(primary / "config.json", quantization_config={"quant_method": method})
    found = only(parity_of(primary, secondary), "blocking").consequence
    assert (remedy in found) if remedy else found.endswith("use the original, unquantised model.")


@pytest.mark.parametrize("stated", [{}, {"quantization_config": {"bits": 4}}], ids=["alone", "twice"])
def test_a_model_of_mlx_is_named_from_its_config(tmp_path, stated):
    primary, secondary = make_pair(tmp_path)
    edit_json(secondary / "config.json", quantization={"group_size": 64, "bits": 4}, **stated)
    report = parity_of(primary, secondary)
    (found,) = (found for found in report.of_severity("blocking") if found.subject == "quantisation")
    assert (found.primary, found.secondary) == ("not quantised", "MLX 4-bit")


def test_integers_that_are_no_weights_are_not_quantised(tmp_path):
    more = {
        "window.relative_position_index": INTEGERS, "window.logit_scale": FLOATS, "hash.table": INTEGERS.int(),
        "window.mask": INTEGERS.bool(), "router.ids": torch.ones(4).int(), "router.scale": FLOATS,
    }  # fmt: skip
    assert compare_tensors(tmp_path, more, more).mismatches == ()


# ── Blocking: parents that are broken by themselves ───────────────────────────────────────────────


@pytest.mark.parametrize("ending", ["lora_A.default.weight", "lora_magnitude_vector", "modules_to_save.weight"])
@pytest.mark.parametrize("both", [True, False])
def test_adapters_among_the_weights_are_refused_with_the_remedy(tmp_path, ending, both):
    left = {f"model.layers.1.mlp.up_proj.{ending}": torch.ones(4, HIDDEN)}
    report = compare_tensors(tmp_path, left, left if both else {})
    found = report.of_severity("blocking")[0]
    assert (found.subject, found.secondary == "none") == ("adapters", not both)
    assert "up_proj" in found.primary
    assert "merge_and_unload" in found.consequence


def test_adapters_that_are_the_models_own_are_weights(tmp_path):
    own = {"model.layers.1.mlp.up_proj.lora_A.speech.weight": torch.ones(4, HIDDEN)}
    assert compare_tensors(tmp_path, own, own, {**LLAMA_CONFIG, "speech_lora": {"r": 4}}).mismatches == ()


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({EMBEDDING: torch.zeros(0), "model.norm.weight": torch.zeros(0)}, {}),
        ({EMBEDDING: torch.zeros(0)}, {EMBEDDING: torch.zeros(0)}),
        ({"router.bias": torch.ones(4)}, {"router.bias": torch.zeros(0)}),
    ],
    ids=["one", "both", "a bias that the other has"],
)
def test_weights_that_were_not_gathered_are_refused(tmp_path, left, right):
    found = compare_tensors(tmp_path, left, right).of_severity("blocking")[0]
    assert found.subject == "empty weights"
    assert ("all there" in (found.primary, found.secondary)) is (left.keys() != right.keys() or "router.bias" in left)
    assert "gather" in found.consequence


@pytest.mark.parametrize("tied", [False, ...], ids=["stated", "by its class"])
@pytest.mark.parametrize("lacking", ["primary", "secondary", "both"])
def test_a_head_that_is_neither_tied_nor_stored_is_refused(tmp_path, tied, lacking):
    config = {**LLAMA_CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    config = {key: value for key, value in {**config, "tie_word_embeddings": tied}.items() if value is not ...}
    sides = [{HEAD: ...} if lacking in (role, "both") else {} for role in ("primary", "secondary")]
    found = only(compare_tensors(tmp_path, *sides, config), "blocking")
    assert found.subject == ("head" if lacking == "both" else HEAD)
    assert "none is stored" in found.consequence


@pytest.mark.parametrize("broken", ["primary", "base"])
def test_a_broken_base_is_told_and_a_broken_primary_once(tmp_path, broken):
    for seed, role in enumerate(("primary", "secondary", "base")):
        tensors = llama_tensors(seed)
        if role == broken:
            tensors["model.norm.weight"] = torch.zeros(0)
        make_checkpoint(tmp_path / role, tensors)
    recipe = MergeRecipe(tmp_path / "primary", tmp_path / "secondary", base=tmp_path / "base")
    found = [name for name in subjects(check_parity(open_parents(recipe), recipe), "blocking") if "empty" in name]
    assert found == ["empty weights" if broken == "primary" else "empty weights of the base"]


def test_a_model_without_a_head_by_nature_lacks_none(tmp_path):
    config = {**LLAMA_CONFIG, "architectures": ["LlamaModel"]}
    assert compare_tensors(tmp_path, {HEAD: ...}, {HEAD: ...}, config).mismatches == ()


def test_a_gguf_parent_is_named_as_such(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_CONFIG))
    with pytest.raises(SlerpMergeError, match="GGUF"):
        open_checkpoint(tmp_path)


def test_everything_that_blocks_is_said_at_once_with_both_values(tmp_path):
    primary = make_checkpoint(tmp_path / "primary", {**llama_tensors(1), "left": torch.ones(1)})
    secondary = make_checkpoint(
        tmp_path / "secondary",
        {**llama_tensors(2), "right": torch.ones(1), "model.norm.weight": torch.ones(HIDDEN + 1)},
        {**LLAMA_CONFIG, "hidden_act": "gelu", "rope_theta": 5e5},
    )
    quantised = {"quant_method": "gptq"}
    edit_json(secondary / "config.json", quantization_config=quantised, max_position_embeddings=9)
    report = parity_of(primary, secondary)
    assert [mismatch.severity for mismatch in report.mismatches] == ["blocking"] * 6 + ["resolved", "notice"]
    with pytest.raises(SlerpMergeError, match="These two cannot be merged") as caught:
        report.raise_if_blocking()
    for words in (
        "hidden_act: primary silu, secondary gelu",
        "rope_theta: primary 10000.0, secondary 500000.0",
        "primary not quantised, secondary GPTQ",
        "model.norm.weight: primary [16], secondary [17]",
        "left: primary present, secondary missing",
        "right: primary missing, secondary present",
    ):
        assert words in caught.value.message
    assert "max_position_embeddings" not in caught.value.message
    assert caught.value.hint


def wider(scale: int) -> dict[str, torch.Tensor]:
    """A Llama whose every tensor is so much wider, under the same names."""
    return {name: torch.ones([size * scale for size in tensor.shape]) for name, tensor in llama_tensors(2).items()}


def test_another_architecture_is_told_alone(tmp_path):
    primary = make_checkpoint(tmp_path / "primary", llama_tensors(1))
    config = {**LLAMA_CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 32}
    secondary = make_checkpoint(tmp_path / "secondary", {**wider(2), "extra": torch.ones(1)}, config)
    (found,) = parity_of(primary, secondary).mismatches
    assert (found.severity, found.subject) == ("blocking", "architectures")


def test_many_tensors_of_another_shape_are_one_line(tmp_path):
    primary = make_checkpoint(tmp_path / "primary", llama_tensors(1))
    secondary = make_checkpoint(tmp_path / "secondary", wider(2))
    with pytest.raises(SlerpMergeError) as caught:
        parity_of(primary, secondary).raise_if_blocking()
    lines = caught.value.message.splitlines()
    assert len(lines) <= 10
    assert "  21 tensors, such as lm_head.weight: primary [48, 16], secondary [96, 32]." in caught.value.message


def test_a_norm_is_no_vocabulary(tmp_path):
    report = compare_tensors(tmp_path, {}, {"model.norm.weight": torch.ones(HIDDEN + 1)})
    (found,) = report.of_severity("blocking")
    assert (found.subject, found.consequence) == ("model.norm.weight", "Tensors of different shape cannot be blended.")


def test_a_refusal_is_about_ten_lines_at_most(tmp_path):
    many = {f"setting_{number}": number for number in range(30)}
    report = compare_configs(tmp_path, many, {key: value + 1 for key, value in many.items()})
    with pytest.raises(SlerpMergeError) as caught:
        report.raise_if_blocking()
    assert caught.value.message.endswith("\n  and 22 more")
    assert len(caught.value.message.splitlines()) == 10


@pytest.mark.parametrize("config", [LLAMA_CONFIG, {**LLAMA_CONFIG, "model_type": "mistral"}], ids=["shape", "kind"])
def test_a_base_that_does_not_fit_asks_for_another_base(tmp_path, config):
    recipe = MergeRecipe(*make_pair(tmp_path), base=make_checkpoint(tmp_path / "base", wider(2), config))
    with pytest.raises(SlerpMergeError, match="This base does not go with these two") as caught:
        check_parity(open_parents(recipe), recipe).raise_if_blocking()
    assert len(caught.value.message.splitlines()) <= 5
    assert "primary" in caught.value.message
    assert "base [" in caught.value.message or "base mistral" in caught.value.message
    assert caught.value.hint.startswith("Choose as base the model that both were fine-tuned from")


# ── Resolved ──────────────────────────────────────────────────────────────────────────────────────


WRAPPERS = {
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "module.": lambda name: f"module.{name}",
    "base_model.model.": lambda name: f"base_model.model.{name}",
    "model.": lambda name: f"model.{name}",
    "_fsdp_wrapped_module.": lambda name: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", name),
    "_forward_module., module.": lambda name: f"_forward_module.module.{name}",
}


@pytest.mark.parametrize("wrapped", ["primary", "secondary", "both"])
@pytest.mark.parametrize("taken", WRAPPERS)
def test_what_wrappers_put_into_names_is_taken_off_and_told(tmp_path, wrapped, taken):
    for seed, role in enumerate(("primary", "secondary")):
        wrap = WRAPPERS[taken] if wrapped in (role, "both") else str
        make_checkpoint(tmp_path / role, {wrap(name): tensor for name, tensor in llama_tensors(seed).items()})
    report = parity_of(tmp_path / "primary", tmp_path / "secondary")
    found = only(report, "resolved")
    told = [taken if wrapped in (role, "both") else "none" for role in ("primary", "secondary")]
    assert (found.subject, found.primary, found.secondary) == ("wrappers", *told)
    assert {pair.name for pair in report.pairs} == llama_tensors(0).keys()
    assert all(pair.name == pair.primary.name == pair.secondary.name for pair in report.pairs)


@pytest.mark.parametrize("split", [(0,), (1,), (0, 1)])
def test_a_name_that_a_save_has_split_is_made_whole(tmp_path, split):
    """As transformers 4.57 saves a Gemma 3n, which no version can then load."""
    whole, apart = "model.per_layer_model_projection.weight", "model.per_layer_model.language_model_projection.weight"
    folders = [tmp_path / "primary", tmp_path / "secondary"]
    for number, folder in enumerate(folders):
        tensors = {**llama_tensors(number), apart if number in split else whole: torch.ones(4, 4)}
        make_checkpoint(folder, tensors)
    report = parity_of(*folders)
    assert {pair.name for pair in report.pairs} == {*llama_tensors(0), whole}
    told = ["_model.language_model_" if number in split else "none" for number in (0, 1)]
    assert [only(report, "resolved").primary, only(report, "resolved").secondary] == told


@pytest.mark.parametrize(
    ("prefix", "more"),
    [
        ("module.", {"auto_map": {"AutoModel": "modeling.Made"}}),  # a class that nobody here knows
        ("model.", {"auto_map": {"AutoModel": "modeling.Made"}}),
        ("module.inner.", {}),
    ],
)
def test_names_that_may_be_the_models_own_stay_and_are_told(tmp_path, prefix, more):
    sides = [{prefix + name: tensor for name, tensor in llama_tensors(seed).items()} for seed in (1, 2)]
    for role, tensors in zip(("primary", "secondary"), sides):
        make_checkpoint(tmp_path / role, tensors, {**LLAMA_CONFIG, **more})
    report = parity_of(tmp_path / "primary", tmp_path / "secondary")
    found = only(report, "notice")
    assert (found.subject, found.primary) == ("prefix of names", re.match(r"\w+\.", prefix)[0])
    assert {pair.name for pair in report.pairs} == sides[0].keys()


def test_names_stay_where_two_would_become_one(tmp_path):
    twice = {f"_orig_mod.{EMBEDDING}": torch.ones(VOCABULARY, HIDDEN)}
    assert compare_tensors(tmp_path, twice, twice).mismatches == ()


@pytest.mark.parametrize("wrong", ["primary", "secondary"])
def test_a_vocab_size_that_its_rows_belie_is_told(tmp_path, wrong):
    primary, secondary = make_pair(tmp_path)
    edit_json(tmp_path / wrong / "config.json", vocab_size=VOCABULARY + 16)
    found = only(parity_of(primary, secondary), "resolved")
    told = [f"{VOCABULARY} rows", f"{VOCABULARY} rows"]
    told[wrong == "secondary"] = f"{VOCABULARY + 16} stated, {VOCABULARY} rows"
    assert (found.subject, found.primary, found.secondary) == ("vocab_size", *told)


@pytest.mark.parametrize("tied", [True, ...], ids=["stated", "not stated"])
@pytest.mark.parametrize("scope", ["top", "text_config"])
def test_a_secondary_without_a_head_lends_its_embedding(tmp_path, tied, scope):
    changes = {"tie_word_embeddings": tied}
    if scope == "text_config":
        inner = {"vocab_size": VOCABULARY, "tie_word_embeddings": tied}
        changes = dict.fromkeys(inner, ...)
        changes[scope] = {key: value for key, value in inner.items() if value is not ...}
    changes["model_type"] = "granite"  # what its silence means is not known
    config = {key: value for key, value in {**LLAMA_CONFIG, **changes}.items() if value is not ...}
    left, right = llama_tensors(1), llama_tensors(2)
    del right[HEAD]
    primary = make_checkpoint(tmp_path / "primary", left, config)
    report = parity_of(primary, make_checkpoint(tmp_path / "secondary", right, config))
    found = report.of_severity("resolved")[-1]
    assert (found.subject, found.primary, found.secondary) == (HEAD, "stored", "tied")
    assert EMBEDDING in found.consequence
    said = [(m.subject, m.primary) for m in report.mismatches[:-1]]
    assert said == ([(HEAD, "stored although tied")] if tied is True else [])
    (pair,) = (pair for pair in report.pairs if pair.name == HEAD)
    assert (pair.primary.name, pair.secondary.name) == (HEAD, EMBEDDING)
    assert pair.secondary.file.parent.name == "secondary"


def test_a_primary_without_a_head_leaves_the_secondarys_out(tmp_path):
    report = compare_tensors(tmp_path, {HEAD: ...}, {}, {**LLAMA_CONFIG, "tie_word_embeddings": True})
    found = only(report, "resolved")
    assert (found.subject, found.primary, found.secondary) == (HEAD, "tied", "stored")
    assert HEAD not in {pair.name for pair in report.pairs}
    assert len(report.pairs) == len(llama_tensors(1)) - 1


BUFFERS = {
    "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
    "model.rotary_emb.inv_freq": torch.ones(2),
    "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8).tril().bool(),
    "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8).tril().bool(),
    "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
    "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
    "embeddings.position_ids": torch.arange(4),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_only_the_primary_saved_is_kept(tmp_path, name):
    report = compare_tensors(tmp_path, {name: BUFFERS[name]}, {})
    found = only(report, "resolved")
    assert (found.subject, found.primary, found.secondary) == (name, "saved", "not saved")
    assert [pair.secondary for pair in report.pairs if pair.name == name] == [None]


@pytest.mark.parametrize("name", BUFFERS)
def test_a_buffer_that_only_the_secondary_saved_is_left_out(tmp_path, name):
    report = compare_tensors(tmp_path, {}, {name: BUFFERS[name]})
    assert (only(report, "resolved").subject, only(report, "resolved").primary) == (name, "not saved")
    assert name not in {pair.name for pair in report.pairs}


POOLER, NEXT_SENTENCE = "roberta.pooler.dense.weight", "cls.seq_relationship.bias"
RELATIVE_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.mark.parametrize(
    ("architecture", "name"),
    [
        ("RobertaForMaskedLM", POOLER),
        ("ErnieForMaskedLM", NEXT_SENTENCE),
        ("MT5ForConditionalGeneration", RELATIVE_BIAS),
    ],
)
def test_what_a_pre_training_leaves_is_the_primarys_or_left_out(tmp_path, architecture, name):
    """The originals have it, and no fine-tune that their class saved."""
    config = {**LLAMA_CONFIG, "architectures": [architecture]}
    for holder, kept in (("primary", 1), ("secondary", 0)):
        changes = [{name: torch.ones(4, 4)} if holder == role else {} for role in ("primary", "secondary")]
        found = only(compare_tensors(tmp_path / holder, *changes, config), "resolved")
        assert (found.subject, found.consequence.startswith("Not read by its class")) == (name, True)
        plan = plan_of(tmp_path / holder / "primary", tmp_path / holder / "secondary", tmp_path / "child")
        assert sum(tensor.name == name for tensor in plan.tensors) == kept


def test_what_another_class_reads_is_no_leftover(tmp_path):
    config = {**LLAMA_CONFIG, "architectures": ["RobertaModel"]}
    assert only(compare_tensors(tmp_path, {POOLER: torch.ones(4, 4)}, {}, config), "blocking").subject == POOLER


def test_the_bias_of_a_tied_head_is_that_beside_it(tmp_path):
    """Older versions saved it twice."""
    config = {**LLAMA_CONFIG, "tie_word_embeddings": True}
    once = {"lm_head.weight": ..., "lm_head.bias": torch.ones(VOCABULARY)}
    twice = {**once, "lm_head.decoder.bias": torch.ones(VOCABULARY)}
    for number, pair in enumerate([(once, twice), (twice, once)]):
        assert (
            only(compare_tensors(tmp_path / str(number), *pair, config), "resolved").subject == "lm_head.decoder.bias"
        )


@pytest.mark.parametrize(
    ("name", "left", "right"),
    [
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8).bool(), torch.ones(1, 1, 8, 8).byte()),
        ("transformer.h.0.attn.bias", torch.ones(1, 1, 8, 8), torch.ones(1, 1, 8, 8).bool()),
        ("gpt_neox.layers.0.attention.bias", torch.ones(1, 1, 8, 8).bool(), torch.ones(1, 1, 4, 4).bool()),
        ("embeddings.position_ids", torch.arange(4), torch.arange(4).int()),
    ],
    ids=["bool and byte", "float and bool", "longer", "long and int"],
)
def test_a_buffer_that_both_saved_in_their_own_way_does_not_block(tmp_path, name, left, right):
    """Versions of one library saved masks as bytes, booleans and floats; the child has the primary's."""
    report = compare_tensors(tmp_path, {name: left}, {name: right})
    assert subjects(report, "blocking") == []
    assert all("Blended" not in mismatch.consequence for mismatch in report.mismatches)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 1, 8, 4)], ids=str)
def test_a_bias_that_is_no_mask_is_a_weight(tmp_path, shape):
    report = compare_tensors(tmp_path, {"transformer.h.0.attn.bias": torch.ones(shape)}, {})
    assert subjects(report, "blocking") == ["transformer.h.0.attn.bias"]


def test_dtypes_that_differ_are_mended_in_one_line_a_combination(tmp_path):
    left, right = llama_tensors(1, torch.bfloat16), llama_tensors(2, torch.float16)
    right[HEAD] = right[HEAD].float()
    primary, secondary = make_checkpoint(tmp_path / "primary", left), make_checkpoint(tmp_path / "secondary", right)
    report = parity_of(primary, secondary)
    found = {(m.subject, m.primary, m.secondary) for m in report.of_severity("resolved")}
    assert found == {("dtype of 20 tensors", "bfloat16", "float16"), ("dtype of 1 tensor", "bfloat16", "float32")}
    assert report.of_severity("blocking") == report.of_severity("notice") == ()
    assert "saved in the primary's" in report.mismatches[0].consequence
    assert "saved in float32" in parity_of(primary, secondary, "float32").mismatches[0].consequence


@pytest.mark.parametrize("right", [{"dtype": "bfloat16"}, {"dtype": "float32"}, {}], ids=str)
def test_a_stated_dtype_is_no_obstacle_under_either_spelling(tmp_path, right):
    report = compare_configs(tmp_path, {"torch_dtype": "bfloat16"}, right)
    assert subjects(report, "blocking") == subjects(report, "notice") == []


# ── Notices ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions", "max_seq_len"])
def test_lengths_that_differ_are_noted(tmp_path, key):
    found = only(compare_configs(tmp_path, {key: 2048}, {key: 4096}), "notice")
    assert (found.subject, found.primary, found.secondary) == (key, "2048", "4096")
    assert "primary" in found.consequence


def test_any_other_key_that_differs_is_noted(tmp_path):
    found = only(compare_configs(tmp_path, {"eos_token_id": 2}, {"eos_token_id": [2, 5]}), "notice")
    assert (found.subject, found.primary, found.secondary) == ("eos_token_id", "2", "[2, 5]")


@pytest.mark.parametrize(
    "places", [("file", "file"), ("config", "config"), ("file", "config"), ("file", "nowhere")], ids="-".join
)
def test_chat_templates_that_differ_are_noted(tmp_path, places):
    for folder, place in zip(make_pair(tmp_path), places):
        add_tokenizer(folder)
        if place == "file":
            (folder / "chat_template.jinja").write_text(f"{{{{ {folder.name} }}}}")
        elif place == "config":
            edit_json(folder / "tokenizer_config.json", chat_template=f"{{{{ {folder.name} }}}}")
    found = only(parity_of(tmp_path / "primary", tmp_path / "secondary"), "notice")
    assert found.subject == "chat template"
    assert found.primary != found.secondary
    assert "that the tokenizer is from" in found.consequence


def test_one_chat_template_in_two_places_is_no_difference(tmp_path):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        add_tokenizer(folder)
    (primary / "chat_template.jinja").write_text("{{ messages }}")
    edit_json(secondary / "tokenizer_config.json", chat_template="{{ messages }}")
    assert parity_of(primary, secondary).mismatches == ()


def test_special_tokens_that_differ_are_noted_by_name(tmp_path):
    primary, secondary = make_pair(tmp_path)
    for folder in (primary, secondary):
        add_tokenizer(folder)
    edit_json(primary / "tokenizer_config.json", eos_token="</s>", bos_token={"content": "<s>"}, pad_token=None)
    edit_json(secondary / "tokenizer_config.json", bos_token="<s>")
    edit_json(secondary / "special_tokens_map.json", eos_token={"content": "<|im_end|>", "lstrip": False})
    found = only(parity_of(primary, secondary), "notice")
    assert (found.subject, found.primary, found.secondary) == ("eos_token", "</s>", "<|im_end|>")


def test_generation_configs_that_differ_are_noted(tmp_path):
    primary, secondary = make_pair(tmp_path)
    edit_json(primary / "generation_config.json", temperature=0.6, transformers_version="4.45.0")
    edit_json(secondary / "generation_config.json", temperature=0.7, transformers_version="5.0.0")
    found = only(parity_of(primary, secondary), "notice")
    assert found.subject == "generation_config.json"
    assert ("0.6" in found.primary, "0.7" in found.secondary) == (True, True)
    edit_json(secondary / "generation_config.json", temperature=0.6)
    assert parity_of(primary, secondary).mismatches == ()


@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["unix", "windows"])
def test_licences_that_differ_are_noted(tmp_path, newline):
    primary, secondary = make_pair(tmp_path)
    for folder, licence in ((primary, "apache-2.0"), (secondary, '"llama3.1"')):
        card = newline.join(["---", "language: en", f"license: {licence}", "---", "# A model", ""])
        (folder / "README.md").write_bytes(card.encode())
    found = only(parity_of(primary, secondary), "notice")
    assert (found.subject, found.primary, found.secondary) == ("licence", "apache-2.0", "llama3.1")


@pytest.mark.parametrize("lines", [["license:", "- mit"], ["license:", "tags:"]], ids=["list", "empty"])
def test_a_licence_is_not_read_from_the_line_below(tmp_path, lines):
    primary, secondary = make_pair(tmp_path)
    (primary / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    (secondary / "README.md").write_text("---\nlicense: mit\n---\n")
    assert all(found.primary in ("none", "mit") for found in parity_of(primary, secondary).mismatches)


def test_one_model_given_twice_is_noted(tmp_path):
    model = make_checkpoint(tmp_path / "model", llama_tensors(1))
    assert only(parity_of(model, model / ".." / "model"), "notice").subject == "the same model twice"


# ── Silence ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("left", "right"),
    [
        ({}, {"rope_theta": ..., "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
        ({"rope_theta": 10000}, {"rope_theta": 10000.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_theta": ..., "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        ),
        ({"rope_scaling": None}, {}),
        ({"num_key_value_heads": ...}, {"num_key_value_heads": 4}),
        ({"num_key_value_heads": None}, {"num_key_value_heads": 4}),
        ({"head_dim": 4}, {}),
        ({"head_dim": None}, {"head_dim": 4}),
        ({"pad_token_id": None, "sliding_window": None}, {}),
        ({"transformers_version": "4.30.0", "_name_or_path": "a/b"}, {"transformers_version": "5.0.0"}),
        ({"use_cache": True, "attention_dropout": 0.1}, {"use_cache": False, "attention_dropout": 0.0}),
        ({"architectures": ...}, {}),
        ({"time_step_limit": [0.0, math.inf]}, {"time_step_limit": [0.0, {"__float__": "Infinity"}]}),
        ({"layer_types": ["mamba", "attention"]}, {"layer_types": ["linear_attention", "full_attention"]}),
        *(
            (
                {"rope_scaling": {"type": first, "short_factor": [1.0]}},
                {"rope_scaling": {"rope_type": second, "short_factor": [1.0]}},
            )
            for first, second in (("su", "longrope"), ("default", "axial"), ("mrope", "default"))
        ),
        (
            {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
            {
                "rope_theta": ...,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                },
            },
        ),
        ({"text_config": {"rope_theta": 1e4}}, {"text_config": {"rope_parameters": {"rope_theta": 1e4}}}),
        (
            {"original_max_position_embeddings": 32, "rope_scaling": {"type": "su", "long_factor": [2.0, 2.0]}},
            {"rope_parameters": {"rope_type": "longrope", "long_factor": [2.0, 2.0], "rope_theta": 1e4, **TRAINED}},
        ),
        (
            {"text_config": {"num_attention_heads": 4, "hidden_size": 16}},
            {"text_config": {"num_attention_heads": 4, "hidden_size": 16, "head_dim": 4, "num_key_value_heads": 4}},
        ),
    ],
)
def test_one_meaning_under_two_spellings_is_no_difference(tmp_path, left, right):
    assert compare_configs(tmp_path, left, right).mismatches == ()


@pytest.mark.parametrize(
    "scaling", [{"rope_type": "default"}, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0}], ids=str
)
@pytest.mark.parametrize("place", ["top", "text_config"])
def test_rotary_settings_stand_apart_for_an_older_class(scaling, place):
    together = {"rope_parameters": {**scaling, "rope_theta": 5e5, "partial_rotary_factor": 0.5}, "hidden_size": 16}
    config = together if place == "top" else {place: together}
    read = readable_config(config, OLDER[0])
    inner = read if place == "top" else read[place]
    assert "rope_parameters" not in inner
    assert (inner["rope_theta"], inner["partial_rotary_factor"]) == (5e5, 0.5)
    assert inner["rope_scaling"] == (scaling if scaling["rope_type"] == "yarn" else None)
    assert flatten_config(read) == flatten_config(config)
    assert readable_config(config) == config


def test_an_older_class_is_given_the_names_that_it_takes():
    """Version 5 names kinds of layers anew, and some older classes refuse what they do not know."""
    today = {
        "layer_types": ["linear_attention", "full_attention"],
        "inner": {"layers_block_type": ["linear_attention"]},
    }
    together = {"rope_parameters": {"rope_type": "longrope", "long_factor": [2.0], **TRAINED}, **TRAINED}
    assert readable_config(today, OLDER[0]) == today
    older = {"layer_types": ["mamba", "attention"], "inner": {"layers_block_type": ["mamba"]}}
    assert readable_config(today, OLDER[1]) == older
    assert readable_config(together, OLDER[2])["rope_scaling"] == {"type": "longrope", "long_factor": [2.0]}
    assert flatten_config(readable_config(together, OLDER[2])) == flatten_config(together)


class OfVersion4:
    """A config class that takes older names alone, as many do."""

    def __init__(self, **settings: Any) -> None:
        self.settings = {"layer_types": ["mamba"], "width": 8, **settings}

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> OfVersion4:
        if set(settings["layer_types"]) - {"mamba", "attention"} or "type" in (settings.get("rope_scaling") or {}):
            raise ValueError("not among those known")
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        return self.settings


def test_the_spelling_that_an_older_class_takes_is_found(monkeypatch):
    quiet = SimpleNamespace(CRITICAL=50, get_verbosity=lambda: 30, set_verbosity=lambda _: None)
    library = SimpleNamespace(__version__="4.49.0", CONFIG_MAPPING={"seer": OfVersion4}, logging=quiet)
    monkeypatch.setattr("slerpkit.parity.config_meaning.transformers", library)
    today = {"model_type": "seer", "layer_types": ["linear_attention", "full_attention"]}
    assert read_meaning(today) == {"model_type": "seer", "layer_types": ["mamba", "attention"], "width": 8}
    assert read_meaning({**today, "layer_types": ["unheard_of"]}) is None


@pytest.mark.parametrize(
    ("stated", "known", "given"),
    [
        ({"num_local_experts": 4}, {"num_experts": 8}, {"num_experts": 4}),
        ({"num_local_experts": 4}, {"num_local_experts": 8}, {"num_local_experts": 4}),
        ({"text_config": {"model_type": "seer_text", "a": 1}, "a": 2}, {"a": 0}, {"a": 2}),
        ({"text_config": {"model_type": "seer_text", "a": 1}}, {"a": 0}, {"a": 1}),
        ({"text_config": {"model_type": "other", "a": 1}}, {"a": 0}, {"text_config": {"model_type": "other", "a": 1}}),
        ({"text_config": {"a": 1}}, {"text_config": {}}, {"text_config": {"a": 1}}),
    ],
)
def test_a_class_is_given_settings_where_it_looks_for_them(stated, known, given):
    assert as_class_of({"model_type": "seer", **stated}, known) == {"model_type": "seer", **given}


def test_models_saved_by_transformers_have_nothing_to_report(tmp_path):
    primary, secondary = (make_real_model(tmp_path / role, seed) for seed, role in enumerate(("primary", "secondary")))
    report = parity_of(primary, secondary)
    assert report.mismatches == ()
    assert [pair.name for pair in report.pairs] == list(open_checkpoint(primary).tensors)
    report.raise_if_blocking()


def test_a_model_saved_by_an_older_transformers_has_nothing_to_report(tmp_path):
    newer = make_real_model(tmp_path / "newer", 1)
    older = copy_model(newer, tmp_path / "older")
    edit_json(
        older / "config.json", rope_parameters=..., rope_theta=10000.0, rope_scaling=None, dtype=...,
        torch_dtype="bfloat16", head_dim=..., transformers_version="4.30.0",
    )  # fmt: skip
    assert parity_of(newer, older).mismatches == parity_of(older, newer).mismatches == ()


def test_nothing_is_written_to_the_parents(tmp_path, parents):
    parents.watch(*make_pair(tmp_path, shards=2))
    parity_of(tmp_path / "primary", tmp_path / "secondary")
