"""Two config.json files held against each other; what a config says of layers and tokens.

Settings are judged by their names, whatever the architecture; none has code of its own here. Read report.py before
this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slerpkit.messages import shorten
from slerpkit.parity.report import Mismatch

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint

LANGUAGE_CONFIGS = ("text_config", "llm_config", "language_config")  # of a language model inside a larger one
# Keys whose value is the id of a token: they follow the tokenizer.
TOKEN_ID_KEY = re.compile(r"token_(id|index)s?$|suppress_tokens$|forced_decoder_ids$")
# Keys that change what the weights mean while every shape stays equal. Matched against the last part of a key.
BEHAVIOUR_KEY = re.compile(
    r"(^|_)n?_?(num_)?(attention_|key_value_|kv_|linear_\w+_|mamba_)?heads?(_kv)?$|head_dim|head_size|d_kv|d_head"
    r"|rope|rotary|(norm|layernorm)_eps|eps$|epsilon$|hidden_act|activation|act_fn|sliding|window|max_window_layers"
    r"|experts_per_tok|moe_k$|moe_topk|num_selected_experts|topk|scoring_func|routed_scaling"
    r"|layer_types|layers_block_type|softcap|alibi|parallel_attn|multi_query|parallel_residual|qk_norm|qk_layernorm"
    r"|scale_attn|query_pre_attn|attention_multiplier|residual_multiplier|embedding_multiplier|logit_scale"
    r"|logits_scaling|position_embedding_type|relative_attention|state_size|time_step|do_layer_norm_before|patch_size"
    r"|image_token|is_decoder|is_encoder_decoder|scale_embedding"
)
# Keys that say how a model was made or run, not what it is.
SILENT_KEY = re.compile(
    r"dropout|drop_rate|pdrop$|^_|transformers_version|use_cache|initializer|init_std|gradient_checkpointing"
    r"|^output_|return_dict|torchscript|pretraining_tp|task_specific_params|finetuning_task|auto_map|unsloth"
    r"|router_aux_loss|^use_bfloat16$|^bad_words|^prefix$|problem_type"
)
CAPACITY_KEY = re.compile(r"max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|model_max_length")
DEPTH_KEY = re.compile(r"(num_hidden_layers|n_layers?|num_layers)$")
VOCABULARY_KEY = re.compile(r"vocab_size$|padded_vocab_size")
DTYPE_KEYS = ("dtype", "torch_dtype")
# Rotary settings that stood by themselves, and their names among the others.
ROPE_KEYS = {
    "rope_theta": "rope_theta",
    "rotary_emb_base": "rope_theta",
    "partial_rotary_factor": "partial_rotary_factor",
    "rotary_pct": "partial_rotary_factor",
}


def language_scopes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a config speaks of its language model: the part that is one inside a larger model, then the whole."""
    inner_configs = [config.get(key) for key in LANGUAGE_CONFIGS]
    return [*(inner for inner in inner_configs if isinstance(inner, dict)), config]


def stated_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every token id that a config states, its language model's too."""
    scopes = reversed(language_scopes(config))
    return {key: value for scope in scopes for key, value in scope.items() if TOKEN_ID_KEY.search(key)}


def canonical_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings under one spelling: transformers 5 keeps them together, earlier versions apart."""
    canonical = dict(config)
    if "rope_type" in canonical:
        return canonical  # these are the rotary settings themselves
    together = canonical.pop("rope_parameters", None)
    scaling = canonical.pop("rope_scaling", None)
    rope = dict(together) if isinstance(together, dict) else {}
    rope.update(scaling if isinstance(scaling, dict) else {})
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    for key, name in ROPE_KEYS.items():
        if key in canonical:
            rope.setdefault(name, canonical.pop(key))
    if rope or "num_attention_heads" in canonical:
        canonical["rope_parameters"] = {"rope_type": "default", **rope}  # unscaled, where nothing is said
    return canonical


def canonical_window(config: Mapping[str, Any]) -> dict[str, Any]:
    """A sliding window that is switched off is none, however wide it would be; a null says so too."""
    canonical = dict(config)
    window = canonical.get("sliding_window") and canonical.get("use_sliding_window", True)
    if "sliding_window" in canonical and not window:
        canonical["sliding_window"] = False
    if canonical.get("use_sliding_window") is False:
        canonical.pop("max_window_layers", None)
    return canonical


def canonical_heads(config: Mapping[str, Any]) -> dict[str, Any]:
    """Head counts that are implied, written out, so that saying less is not a difference."""
    canonical = dict(config)
    heads, hidden = canonical.get("num_attention_heads"), canonical.get("hidden_size")
    if isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        if canonical.get("head_dim") is None:
            canonical["head_dim"] = hidden // heads
        if canonical.get("num_key_value_heads") is None:
            canonical["num_key_value_heads"] = heads
    return canonical


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as dotted keys; a null says the same as silence and is left out."""
    flat: dict[str, Any] = {}
    for key, value in canonical_window(canonical_heads(canonical_rope(config))).items():
        if isinstance(value, dict) and key not in ("id2label", "label2id", "quantization_config"):
            flat.update(flatten_config(value, f"{prefix}{key}."))
        elif value is not None:
            flat[prefix + key] = value
    return flat


def same_value(first: Any, second: Any) -> bool:
    """Equal as numbers: 10000 and 10000.0 are one value, true and 1 are not."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    return first == second


def compare_configs(primary: Checkpoint, secondary: Checkpoint, any_depth: bool = False) -> list[Mismatch]:
    """Every config key on which the parents differ, judged by what it does to the child.

    any_depth: the recipe says which layers go together, so depth and settings per layer may differ.
    """
    configs = flatten_config(primary.config), flatten_config(secondary.config)
    mismatches = []
    for key in sorted(configs[0].keys() | configs[1].keys()):
        name = key.rpartition(".")[2]
        if name in DTYPE_KEYS or SILENT_KEY.search(name) or key.startswith("quantization_config"):
            continue
        if name in ("tie_word_embeddings", "tie_encoder_decoder") or VOCABULARY_KEY.search(name):
            continue  # judged by the weights themselves
        primary_value, secondary_value = (config.get(key) for config in configs)  # None: not stated
        if any_depth and (DEPTH_KEY.search(name) or isinstance(primary_value, list)):
            continue
        if same_value(primary_value, secondary_value):
            continue
        if name == "sliding_window" and not primary_value and not secondary_value:
            continue  # none, and not spoken of
        mismatches.append(judge_config_key(key, primary_value, secondary_value))
    return mismatches


def judge_config_key(key: str, primary_value: Any, secondary_value: Any) -> Mismatch:
    """What follows from one config key on which the parents differ. None: that parent does not state it."""
    name = key.rpartition(".")[2]
    values = [shorten(value) if value is not None else "not stated" for value in (primary_value, secondary_value)]
    both_state_it = primary_value is not None and secondary_value is not None
    if key in ("model_type", "architectures"):
        return Mismatch("blocking", key, *values, "Different architectures give their weights different meanings.")
    if both_state_it and DEPTH_KEY.search(name):
        return Mismatch("blocking", key, *values, "Models of different depth have no layer for layer match.")
    changes_meaning = BEHAVIOUR_KEY.search(name) or ".rope_parameters." in f".{key}"
    changes_meaning = changes_meaning and not TOKEN_ID_KEY.search(name)
    if both_state_it and changes_meaning:
        return Mismatch("blocking", key, *values, "Equal shapes hide this: the weights would be used in another way.")
    if CAPACITY_KEY.search(name):
        why = "The child keeps the primary's limit."
    elif TOKEN_ID_KEY.search(name):
        why = "The child has that of the parent that the tokenizer is from."
    elif changes_meaning:
        why = "One config is silent; make sure that both mean the same."
    else:
        why = "The child keeps the primary's value."
    return Mismatch("notice", key, *values, why)


def stated_depth(config: Mapping[str, Any]) -> int | None:
    """The number of layers a config states, its own or its language model's; None where it states none."""
    for scope in (config, config.get("text_config")):
        for key, value in (scope or {}).items():
            if DEPTH_KEY.search(key) and isinstance(value, int):
                return value
    return None


def is_encoder_decoder(checkpoint: Checkpoint) -> bool:
    """Whether a model reads a whole text before it writes one, as its config or its kind tells."""
    stated = checkpoint.config.get("is_encoder_decoder")
    return stated if isinstance(stated, bool) else checkpoint.config.get("model_type") in ("t5", "bart", "whisper")


def context_limit(checkpoint: Checkpoint) -> int | None:
    """Tokens that a model can look back on, as its config states it."""
    for scope in language_scopes(checkpoint.config):
        for key, value in scope.items():
            if CAPACITY_KEY.search(key) and type(value) is int and value > 1:
                return value
    return None
