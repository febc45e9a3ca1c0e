"""Real, tiny models of many architectures: every child is right against float64, loads whole and runs.

slerpmerge names none of these families; what differs between them it finds in names, shapes and configs.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from slerpkit.evaluation.loading import load_without_weights
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import Checkpoint, open_checkpoint
from slerpkit.parity.configs import compare_configs
from tests.builders import distance, edit_json, load_tensors, merge, reference_slerp, replace_tensors

TOKENS, WIDTH, SEEN = 96, 32, 8
ROLES = ("primary", "secondary")
VISION = {
    "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**TEXT, "num_key_value_heads": 2}
OLD = {"vocab_size": TOKENS, "n_layer": 2, "n_head": 4}
DEEPSEEK = {
    **TEXT, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
WHISPER = {
    "vocab_size": TOKENS, "d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "num_mel_bins": 8,
    "max_source_positions": 16, "max_target_positions": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None,
}  # fmt: skip

STATES = {"mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}

# architecture -> its configuration's class and values
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", {**GROUPED, "sliding_window": 4}),
    "Qwen2ForCausalLM": ("Qwen2Config", {**GROUPED, "tie_word_embeddings": True}),
    "Qwen3ForCausalLM": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "Gemma2ForCausalLM": ("Gemma2Config", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**GROUPED, "head_dim": 8, "sliding_window": 4}),
    "Phi3ForCausalLM": ("Phi3Config", {**GROUPED, "sliding_window": 4}),
    "GPT2LMHeadModel": ("GPT2Config", {**OLD, "n_embd": WIDTH, "n_positions": 64}),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", TEXT),
    "FalconForCausalLM": (
        "FalconConfig",
        {"vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "BloomForCausalLM": ("BloomConfig", {**OLD, "hidden_size": WIDTH}),
    "OPTForCausalLM": ("OPTConfig", {**TEXT, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "StableLmForCausalLM": ("StableLmConfig", GROUPED),
    "Olmo2ForCausalLM": ("Olmo2Config", GROUPED),
    "CohereForCausalLM": ("CohereConfig", GROUPED),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {**GROUPED, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "DeepseekV3ForCausalLM": ("DeepseekV3Config", DEEPSEEK),
    "MambaForCausalLM": (
        "MambaConfig",
        {"vocab_size": TOKENS, "hidden_size": WIDTH, "num_hidden_layers": 2, "state_size": 4},
    ),
    "GptOssForCausalLM": (
        "GptOssConfig",
        {**GROUPED, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    "PhimoeForCausalLM": ("PhimoeConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "Llama4ForCausalLM": (
        "Llama4TextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "num_hidden_layers": 4,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "attention_chunk_size": 4,
        },
    ),
    "Gemma3nForCausalLM": (
        "Gemma3nTextConfig",
        {
            **GROUPED,
            "head_dim": 8,
            "vocab_size_per_layer_input": TOKENS,
            "hidden_size_per_layer_input": 8,
            "intermediate_size": [48] * 2,
            "laurel_rank": 4,
            "num_kv_shared_layers": 0,
            "altup_num_inputs": 2,
            "activation_sparsity_pattern": [0.5] * 2,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "Cohere2ForCausalLM": ("Cohere2Config", {**GROUPED, "num_hidden_layers": 4, "sliding_window": 4}),
    "Exaone4ForCausalLM": ("Exaone4Config", {**GROUPED, "num_hidden_layers": 4, "sliding_window": 4}),
    "SmolLM3ForCausalLM": ("SmolLM3Config", {**GROUPED, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "GraniteForCausalLM": ("GraniteConfig", GROUPED),
    "NemotronForCausalLM": ("NemotronConfig", GROUPED),
    "Ernie4_5ForCausalLM": ("Ernie4_5Config", {**GROUPED, "head_dim": 8}),
    "Mamba2ForCausalLM": (
        "Mamba2Config",
        {
            "vocab_size": TOKENS,
            "hidden_size": WIDTH,
            "num_hidden_layers": 2,
            "state_size": 8,
            "num_heads": 8,
            "head_dim": 8,
            "n_groups": 1,
            "chunk_size": 4,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
    ),
    "BambaForCausalLM": ("BambaConfig", {**GROUPED, **STATES, "mamba_n_heads": 8, "attn_layer_indices": [1]}),
    "FalconH1ForCausalLM": ("FalconH1Config", {**GROUPED, **STATES, "mamba_n_heads": 4, "mamba_d_ssm": 32}),
    "BertForMaskedLM": ("BertConfig", TEXT),
    "ModernBertForMaskedLM": (
        "ModernBertConfig",
        {**TEXT, "num_hidden_layers": 3, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "DebertaV2ForMaskedLM": (
        "DebertaV2Config",
        {
            **TEXT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 4,
            "position_biased_input": False,
        },
    ),
    "EsmForMaskedLM": (
        "EsmConfig",
        {**TEXT, "position_embedding_type": "rotary", "mask_token_id": 4, "token_dropout": True},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": TOKENS, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
    ),
    "WhisperForConditionalGeneration": ("WhisperConfig", WHISPER),
    "ViTForImageClassification": ("ViTConfig", VISION),
    "CLIPModel": ("CLIPConfig", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}),
    "LlavaForConditionalGeneration": (
        "LlavaConfig",
        {
            "text_config": {**GROUPED, "model_type": "llama"},
            "vision_config": {**VISION, "model_type": "clip_vision_model"},
            "image_token_index": 5,
        },
    ),
}


def class_of(architecture: str) -> Any:
    """The model's class; the test is skipped where the installed transformers does not have it yet."""
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} does not have it yet")
    return getattr(transformers, architecture)


def inputs_of(architecture: str) -> dict[str, torch.Tensor]:
    """A small batch that the architecture takes."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(6, TOKENS, (2, SEEN), generator=generator)
    picture = torch.randn(2, 3, 16, 16, generator=generator)
    if architecture.startswith("ViT"):
        return {"pixel_values": picture}
    if architecture.startswith("CLIP"):
        return {"input_ids": tokens, "pixel_values": picture}
    if architecture.startswith("Whisper"):
        return {"input_features": torch.randn(2, 8, 32, generator=generator), "decoder_input_ids": tokens}
    if architecture.startswith("T5"):
        return {"input_ids": tokens, "decoder_input_ids": tokens}
    return {"input_ids": tokens}


def make_family_parent(folder: Path, architecture: str, seed: int) -> Path:
    """A model as transformers saves it; no tensor is left at the ones or zeros that it begins with."""
    config_name, values = FAMILIES[architecture]
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(getattr(transformers, config_name)(**values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_child_of_every_family_is_right_loads_and_runs(tmp_path, parents, architecture):
    load: Callable[..., Any] = class_of(architecture).from_pretrained
    primary, secondary = (make_family_parent(tmp_path / str(seed), architecture, seed) for seed in (1, 2))
    parents.watch(primary, secondary)
    child = merge(primary, secondary, tmp_path / "child", 0.3).child

    left, right, merged = (load_tensors(folder) for folder in (primary, secondary, child))
    assert merged.keys() == left.keys() == right.keys()
    for name, found in merged.items():
        if found.is_floating_point():
            exact = reference_slerp(left[name], right[name], 0.3)
            assert distance(found, left[name], right[name], exact) <= 0.51, name
        else:
            assert torch.equal(found, left[name]), name

    model, report = load(child, output_loading_info=True, torch_dtype=torch.float32)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        output = model.eval()(**inputs_of(architecture))
    shown = output.logits if hasattr(output, "logits") else output.logits_per_text
    assert torch.isfinite(shown).all()
    assert shown.std() > 0


@pytest.mark.parametrize("architecture", FAMILIES)
def test_the_class_misses_nothing_of_a_sound_model_and_whatever_is_taken_away(tmp_path, architecture):
    if not hasattr(transformers, architecture):
        pytest.skip(f"transformers {transformers.__version__} does not have it yet")
    sound = open_checkpoint(make_family_parent(tmp_path / "model", architecture, 1))
    found = load_without_weights(sound)
    assert (found.architecture, found.faults, found.unchecked) == (architecture, {}, None)
    for name in list(sound.tensors)[:: max(1, len(sound.tensors) // 5)]:
        left = {other: info for other, info in sound.tensors.items() if other != name}
        missing = load_without_weights(dataclasses.replace(sound, tensors=left)).missing
        assert len(missing) == 1 or (name in missing), name


# ── Settings that change what the weights mean ──────────────────────────────────────────────────

# What follows the tokenizer is told and not refused; whether a head is tied, its weights tell; what is
# put out beside the logits chooses among implementations of one meaning.
TOLD = re.compile(
    r"token_(id|index)|vocab_size|id2label|label2id|dtype|architectures|model_type|^tie_|^output_(att|hidden|router)"
)


def other_values(value: Any) -> list[Any]:
    """Values of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, value + 1, value - 1]
    if isinstance(value, float):
        return [value * 3 + 0.1, value / 2]
    if value in ("silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu"):
        return ["tanh", "relu"]
    if isinstance(value, list) and value and all(isinstance(item, float) for item in value):
        return [[item * 2 + 0.1 for item in value]]
    if isinstance(value, list) and len(set(map(str, value))) > 1:
        return [value[::-1], [value[0]] * len(value)]
    return [2, 0.5, True] if value is None else []


def changed_configs(config: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """(a key's name, the config with another value there) for every key at every depth."""
    for key, value in config.items():
        if isinstance(value, dict) and not TOLD.search(key):
            for name, changed in changed_configs(value, (*path, key)):
                yield name, {**config, key: changed}
        elif not TOLD.search(key) and key != "transformers_version":
            for other in other_values(value):
                yield ".".join((*path, key)), {**config, key: other}


def logits_of(model: torch.nn.Module, architecture: str) -> torch.Tensor:
    with torch.no_grad():
        output = model.eval()(**inputs_of(architecture))
    return output.logits if hasattr(output, "logits") else output.logits_per_text


def logits_under(config: dict[str, Any], model: torch.nn.Module, architecture: str) -> torch.Tensor | None:
    """What a model's weights say under another config; None where that cannot be, or has other shapes."""
    try:
        other = type(model)(type(model.config).from_dict(copy.deepcopy(config)))
        other.load_state_dict(model.state_dict())
        return logits_of(other, architecture)
    except Exception:  # whatever a library makes of a value that makes no sense
        return None


QUICK = ("Gemma2ForCausalLM", "FalconForCausalLM", "MixtralForCausalLM", "BertForMaskedLM")


@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_every_setting_that_moves_the_logits_blocks(tmp_path, architecture):
    model_class, (config_name, values) = class_of(architecture), FAMILIES[architecture]
    torch.manual_seed(1)
    model = model_class(getattr(transformers, config_name)(**copy.deepcopy(values)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    config = {**model.config.to_dict(), "architectures": [architecture]}
    expected, moving, unsaid = logits_of(model, architecture), set(), set()
    for key, changed in changed_configs(config):
        found = logits_under(changed, model, architecture)
        if found is None or found.shape != expected.shape or torch.allclose(found, expected, atol=1e-4):
            continue
        moving.add(key)
        sides = [Checkpoint(tmp_path, role, side, {}, "safetensors") for role, side in zip(ROLES, (config, changed))]
        for left, right in (sides, sides[::-1]):
            if not any(mismatch.severity == "blocking" for mismatch in compare_configs(left, right)):
                unsaid.add(key)
    assert moving, "nothing moves the logits"
    assert unsaid == set()


# ── A language model beside one that holds one ──────────────────────────────────────────────────


def test_a_language_model_is_refused_beside_a_larger_one_and_merges_with_what_is_taken_out_of_it(tmp_path):
    """The remedy that the refusal gives, done."""
    whole = make_family_parent(tmp_path / "whole", "LlavaForConditionalGeneration", 1)
    text = make_family_parent(tmp_path / "text", "LlamaForCausalLM", 2)
    for primary, secondary in ((whole, text), (text, whole)):
        with pytest.raises(SlerpMergeError) as caught:
            merge(primary, secondary, tmp_path / "child")
        first, line = caught.value.message.split("\n")
        assert all(word in line for word in ("LlavaForConditionalGeneration", "LlamaForCausalLM", "language_model"))
    model = transformers.LlavaForConditionalGeneration.from_pretrained(whole)
    part = getattr(model, "model", model).language_model
    taken = part
    if not hasattr(part, "lm_head"):  # versions before 4.52 keep the head inside
        taken = transformers.LlamaForCausalLM(model.config.text_config)
        taken.model, taken.lm_head = part, model.lm_head
    taken.save_pretrained(tmp_path / "taken")
    stored = load_tensors(whole)
    for name, tensor in load_tensors(tmp_path / "taken").items():
        (own,) = (t for other, t in stored.items() if other.replace("language_model.", "") in (name, f"model.{name}"))
        assert torch.equal(tensor, own), name
    merge(tmp_path / "taken", text, tmp_path / "child", 0.3)


# ── Checkpoints that older versions saved ───────────────────────────────────────────────────────


def rename(folder: Path, exchange: Callable[[str], str], **more: torch.Tensor) -> None:
    """A copy of a parent's weights under other names, with more tensors beside them."""
    tensors = {exchange(name): tensor for name, tensor in load_tensors(folder).items()}
    replace_tensors(folder, {**tensors, **more})


def without_prefix(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def llava_of_2024(name: str) -> str:
    """Names of a vision-language model before its parts were put below `model`, or those themselves."""
    for today, then in (("model.language_model.", "language_model.model."), ("lm_head.", "language_model.lm_head.")):
        if name.startswith(today):
            return then + name[len(today) :]
    return name.removeprefix("model.")


def llava_of_today(name: str) -> str:
    for then, today in (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head.")):
        if name.startswith(then):
            return today + name[len(then) :]
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def norms_of_2019(name: str) -> str:
    if "LayerNorm" not in name:
        return name
    return name.replace(".weight", ".gamma").replace(".bias", ".beta")


MASKS = {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril().bool(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
FREQUENCIES = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
OLDER = {
    "names without the model's own prefix, and masks": ("GPT2LMHeadModel", without_prefix("transformer."), MASKS),
    "norms with gamma and beta": ("BertForMaskedLM", norms_of_2019, {}),
    "no prefix, and gamma and beta": ("BertForMaskedLM", lambda n: norms_of_2019(n.removeprefix("bert.")), {}),
    "a language model inside": ("LlavaForConditionalGeneration", llava_of_2024, {}),
    "the same names and rotary frequencies": ("LlamaForCausalLM", lambda name: name, FREQUENCIES),
}


@pytest.mark.parametrize("older", ["primary", "secondary"])
@pytest.mark.parametrize("what", OLDER)
def test_a_checkpoint_of_an_older_version_merges_with_one_of_todays(tmp_path, parents, what, older):
    architecture, exchange, more = OLDER[what]
    folders = {role: make_family_parent(tmp_path / role, architecture, seed) for seed, role in enumerate(ROLES)}
    if architecture.startswith("Llava"):
        for folder in folders.values():
            rename(folder, llava_of_today)
    today = {name: load_tensors(folder) for name, folder in folders.items()}
    rename(folders[older], exchange, **more)
    if architecture.startswith("Llama"):
        edit_json(
            folders[older] / "config.json", dtype=..., torch_dtype="bfloat16", rope_parameters=..., rope_theta=1e4
        )
    parents.watch(*folders.values())
    report = merge(*folders.values(), tmp_path / "child", 0.3)
    child = load_tensors(report.child)
    kept = load_tensors(folders["primary"])
    assert child.keys() == kept.keys()
    named = exchange if older == "primary" else lambda name: name
    for name, left in today["primary"].items():
        exact = reference_slerp(left, today["secondary"][name], 0.3)
        assert distance(child[named(name)], left, today["secondary"][name], exact) <= 0.51, name
    assert not report.plan.parity.of_severity("blocking")
    if (what, older) == ("no prefix, and gamma and beta", "primary"):
        return  # not every version of transformers loads that, be it a parent or a child
    load = getattr(transformers, architecture).from_pretrained
    loaded = [
        load(folder, output_loading_info=True)[1]["missing_keys"] for folder in (report.child, folders["primary"])
    ]
    assert loaded[0] == loaded[1]


WRAPPED = {
    "GPTNeoXForCausalLM": "module.",
    "GPT2LMHeadModel": "_orig_mod.",
    "T5ForConditionalGeneration": "base_model.model.",
    "Gemma2ForCausalLM": "model.",
    "BertForMaskedLM": "_forward_module.module.",
}


@pytest.mark.parametrize("wrapped", [*ROLES, "both"])
@pytest.mark.parametrize("architecture", WRAPPED)
def test_a_child_of_a_wrapped_model_has_the_names_of_its_class(tmp_path, parents, architecture, wrapped):
    folders = {role: make_family_parent(tmp_path / role, architecture, seed) for seed, role in enumerate(ROLES)}
    plain = {role: load_tensors(folder) for role, folder in folders.items()}
    for role, folder in folders.items():
        if wrapped in (role, "both"):
            rename(folder, lambda name: WRAPPED[architecture] + name)
    parents.watch(*folders.values())
    child = merge(*folders.values(), tmp_path / "child", 0.3).child
    found = load_tensors(child)
    assert found.keys() == plain["primary"].keys()
    for name, left in plain["primary"].items():
        right = plain["secondary"][name]
        assert distance(found[name], left, right, reference_slerp(left, right, 0.3)) <= 0.51, name
    _, report = getattr(transformers, architecture).from_pretrained(child, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report


def test_names_are_exchanged_only_where_nothing_is_in_doubt(tmp_path):
    """A projector and a resampler of one shape are not each other's, whatever else pairs."""
    primary, secondary = (make_family_parent(tmp_path / role, "LlamaForCausalLM", n) for n, role in enumerate(ROLES))
    rename(primary, lambda name: name, **{"projector.weight": torch.ones(4, 4)})
    rename(secondary, lambda name: name, **{"resampler.weight": torch.ones(4, 4)})
    with pytest.raises(SlerpMergeError, match=r"projector\.weight: primary present, secondary missing"):
        merge(primary, secondary, tmp_path / "child")


@pytest.mark.parametrize("fused", ROLES)
def test_the_same_experts_fused_and_apart_are_recognised(tmp_path, fused):
    folders = {role: make_family_parent(tmp_path / role, "MixtralForCausalLM", n) for n, role in enumerate(ROLES)}
    for role, folder in folders.items():
        tensors = {name: tensor for name, tensor in load_tensors(folder).items() if ".experts" not in name}
        for layer in range(2):
            prefix = f"model.layers.{layer}.mlp.experts"
            if role == fused:
                tensors[f"{prefix}.gate_up_proj"] = torch.zeros(4, 96, WIDTH)
                tensors[f"{prefix}.down_proj"] = torch.zeros(4, WIDTH, 48)
            else:
                for expert in range(4):
                    for name, shape in (("gate", (48, WIDTH)), ("up", (48, WIDTH)), ("down", (WIDTH, 48))):
                        tensors[f"{prefix}.{expert}.{name}_proj.weight"] = torch.zeros(shape)
        replace_tensors(folder, tensors)
    with pytest.raises(SlerpMergeError, match="fused in one parent and apart in the other") as caught:
        merge(*folders.values(), tmp_path / "child")
    assert "save_pretrained" in caught.value.message
    assert "layout of 2 layers" in caught.value.message
