"""Two config.json files held against each other; what a config says of layers and tokens.

Settings are judged by their names, whatever the architecture; none has code of its own here. Read report.py before
this.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slerpkit.messages import format_names, shorten
from slerpkit.parity.config_meaning import ROPE_DEFAULTS, TRAINED_LENGTH_KEY, flatten_config, read_meanings
from slerpkit.parity.report import Mismatch

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint

LANGUAGE_CONFIGS = ("text_config", "llm_config", "language_config")  # of a language model inside a larger one
# Keys whose value is the id of a token: they follow the tokenizer.
TOKEN_ID_KEY = re.compile(r"token_(id|index)s?$|suppress_tokens$|forced_decoder_ids$")
# Keys that say how a model was made or run, not what it is. What only looks like one is not among them: some models
# put tokens to nothing, or noise into their routing, when they answer too, and scale what they put out.
SILENT_KEY = re.compile(
    r"(?<!token_)dropout|layerdrop|drop_path|drop_rate|pdrop$|^name_or_path$|transformers_version|^use_cache$|initializer"
    r"|^_(name_or_path|commit_hash|num_labels|auto_class|from_model_config|diffusers_version)$"
    r"|^_(flash_attn|attn_implementation|experts_implementation)"
    r"|^output_(attentions|hidden_states|scores|logits|past|router_logits|auxiliary_logits)$"
    r"|init_std|^init_device$|gradient_checkpointing|return_dict|torchscript|pretraining_tp|^ep_size$"
    r"|task_specific_params|finetuning_task|auto_map|unsloth|aux_loss|z_loss|^seq_aux$"
    r"|^use_bfloat16$|^prefix$|^chunk_size_feed_forward$|^num_logits_to_keep$|^use_mamba_kernels$"
    r"|^use_flash_attn$|^attn_implementation$|^tf_legacy_loss$|^ignore_index$|^apply_spec_augment$"
    r"|^mask_(time|feature)_(prob|length|min_masks)$"
    r"|^(deterministic_flash_attn|reference_compile|repad_logits_with_grad|sparse_prediction|sparse_pred_ignore_index)$"
)
# How a model was made to speak, which configs held before generation_config.json did.
GENERATION_KEY = re.compile(
    r"^((max|min)_(new_)?length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_k"
    r"|top_p|typical_p|repetition_penalty|length_penalty|(encoder_)?no_repeat_ngram_size|bad_words_ids"
    r"|num_return_sequences|remove_invalid_values|exponential_decay_length_penalty|max_new_tokens)$"
)
LABEL_KEY = re.compile(r"^(id2label|label2id|num_labels)$")
CAPACITY_KEY = re.compile(
    r"(?<!original_)max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|model_max_length"
)
# Of layers that predict further tokens (multi-token prediction), which stand apart from a model's own.
PREDICTION_KEY = re.compile(r"nextn|(^|_)mtp(_|$)|multi_token_pred")
RATIO_ROPE_TYPES = ("yarn", "longrope", "llama3")  # scaled by how far a text reaches beyond those of the training
DEPTH_KEY = re.compile(r"^(?!.*(nextn|mtp)).*(num_hidden_layers|n_layers?|num_layers)$")
VOCABULARY_KEY = re.compile(r"vocab_size(_per_layer_input)?$")
OTHER_USE = "The child would use all its weights in the primary's way."
UNKNOWN_SILENCE = "No class here reads both configs, so what the silent one means is not known."
FOLLOWED_LIMIT = "Positions are computed from it."
DTYPE_KEYS = ("dtype", "torch_dtype")
HEAD_OF_CLASS = re.compile(r"(For[A-Z]\w+|LMHeadModel|Model)$")
DIFFERENT_KINDS = "Different architectures give their weights different meanings."


def language_scopes(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Where a config speaks of its language model: the part that is one inside a larger model, then the whole."""
    inner_configs = [config.get(key) for key in LANGUAGE_CONFIGS]
    return [*(inner for inner in inner_configs if isinstance(inner, dict)), config]


def stated_ids(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every token id that a config states, its language model's too."""
    scopes = reversed(language_scopes(config))
    return {key: value for scope in scopes for key, value in scope.items() if TOKEN_ID_KEY.search(key)}


def same_value(first: Any, second: Any) -> bool:
    """Equal as numbers: 10000 and 10000.0 are one value, true and 1 are not."""
    if isinstance(first, bool) or isinstance(second, bool):
        return first is second
    return first == second


def compare_configs(primary: Checkpoint, secondary: Checkpoint, any_depth: bool = False) -> list[Mismatch]:
    """Every config key on which the parents differ, judged by what it does to the child.

    Where what the files say would forbid a merge, or need not mean the same, what their class makes of it is compared
    instead, if there is one.
    any_depth: the recipe says which layers go together, so depth and settings per layer may differ.
    """
    stated = flatten_config(primary.config), flatten_config(secondary.config)
    mismatches = judge_differences(stated, stated, any_depth)
    if any(mismatch.severity == "blocking" for mismatch in mismatches) or is_none_or_silent(primary, secondary):
        meanings = read_meanings(primary.config, secondary.config)
        if meanings is not None:
            meant = tuple(flatten_config(meaning, with_nulls=True) for meaning in meanings)
            return judge_differences(meant, stated, any_depth)
    return mismatches


def is_none_or_silent(primary: Checkpoint, secondary: Checkpoint) -> bool:
    """Whether one config says none where the other is silent: the class may have something for the silent one."""
    configs = [flatten_config(parent.config, with_nulls=True) for parent in (primary, secondary)]
    alone = [(key, config[key]) for config in configs for key in config if any(key not in other for other in configs)]
    return any(
        (value is None or (value is False and key.rpartition(".")[2] == "sliding_window"))
        and not is_judged_elsewhere(key)
        and not TOKEN_ID_KEY.search(key)
        for key, value in alone
    )


def judge_differences(
    configs: Sequence[Mapping[str, Any]], stated: Sequence[Mapping[str, Any]], any_depth: bool
) -> list[Mismatch]:
    """What follows from each key on which two flat configs differ. stated: what of them the files say."""
    is_read = configs is not stated  # by a class, which fills in all that it knows
    one_type = configs[0].get("model_type") == configs[1].get("model_type")
    names_stated = [{key.rpartition(".")[2] for key in config} for config in stated]
    mismatches: list[Mismatch] = []
    unread: list[tuple[str, Sequence[str]]] = []
    for key in sorted(configs[0].keys() | configs[1].keys()):
        name = key.rpartition(".")[2]
        is_rope = "rope_parameters." in key
        silence = ROPE_DEFAULTS.get(name) if is_rope and is_read else None
        values = [config.get(key, silence) for config in configs]
        if is_judged_elsewhere(key) or same_value(*values) or (any_depth and is_per_layer(name, values[0])):
            continue
        if None in values and (name in ("architectures", "problem_type") or not one_type):
            continue  # model_type and labels tell as much; another architecture has other keys
        if name == "model_type" and have_other_classes(*stated):
            continue  # their classes tell more
        if name == "sliding_window" and not any(values):
            continue  # none, and not spoken of
        shown = []
        for value, names, config in zip(values, names_stated, configs):
            is_filled_in = name not in names and (value is not None or key in config)
            shown.append(("not stated" if value is None else shorten(value)) + " by default" * is_filled_in)
        # Of rotary settings a class keeps those alone that are stated; each is read where there is a kind of them.
        known_by = f"{key.rpartition('.')[0]}.rope_type" if is_rope else key
        if is_read and not all(known_by in config for config in configs):
            unread.append((key, shown))
        elif name == "architectures" and have_other_classes(*stated):
            mismatches.append(Mismatch("blocking", key, *shown, describe_classes(*stated)))
        elif CAPACITY_KEY.search(name) and any(computes_with_limit(config, key) for config in configs):
            mismatches.append(Mismatch("blocking", key, *shown, FOLLOWED_LIMIT, accepted_as=key))
        else:
            silent = None in values and not is_read
            mismatches.append(judge_config_key(key, *shown, UNKNOWN_SILENCE if silent else OTHER_USE))
    return mismatches + note_unread(unread, configs)


def note_unread(unread: Sequence[tuple[str, Sequence[str]]], configs: Sequence[Mapping[str, Any]]) -> list[Mismatch]:
    """One line for all settings that the class of the models passes over. unread: each with what to show of it."""
    if not unread:
        return []
    if len(unread) == 1:
        key, shown = unread[0]
        return [Mismatch("notice", key, *shown, "The class of these models does not read it.")]
    keys = [key for key, _ in unread]
    shown = [f"{sum(key in config for key in keys)} stated" for config in configs]
    return [Mismatch("notice", format_names(keys, 3), *shown, "The class of these models reads none of them.")]


def have_other_classes(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two configs name classes, and not the same."""
    classes = [config.get("architectures") for config in (first, second)]
    return all(isinstance(names, list) and names for names in classes) and classes[0] != classes[1]


def describe_classes(*configs: Mapping[str, Any]) -> str:
    """Why models of two classes cannot be blended, and which could, from their flat configs."""
    kinds = [config.get("model_type") for config in configs]
    heads = [HEAD_OF_CLASS.search(shorten(config["architectures"][0])) for config in configs]
    if kinds[0] == kinds[1] and all(heads) and heads[0][0] != heads[1][0]:
        return "Their heads answer different questions, or one has none: choose two models of one class."
    inner = [[config.get(f"{key}.model_type") for key in LANGUAGE_CONFIGS] for config in configs]
    for whole, part in ((0, 1), (1, 0)):
        if kinds[part] is not None and kinds[part] in inner[whole]:
            return (
                "One is a language model, the other holds one among other parts. Take it out: build the class of the "
                "one from the text_config of the other, give it the other's language_model and lm_head, save that, "
                "and merge the two language models."
            )
    return DIFFERENT_KINDS


def computes_with_limit(config: Mapping[str, Any], limit: str) -> bool:
    """Whether the model of a flat config computes positions from this limit of length, and does not only end there."""
    scope = limit.rpartition(".")[0] + "." * ("." in limit)
    for key, kind in config.items():
        if key.startswith(f"{scope}rope_parameters.") and key.endswith("rope_type"):
            needed = (key.removesuffix("rope_type") + name for name in ("factor", TRAINED_LENGTH_KEY))
            if kind == "dynamic" or (kind in RATIO_ROPE_TYPES and any(config.get(name) is None for name in needed)):
                return True
    distance = config.get(f"{scope}max_relative_positions")
    return isinstance(distance, int) and distance < 1  # then it is the limit


def is_judged_elsewhere(key: str) -> bool:
    """Whether a key says nothing of the child's values, or what it says is judged by the weights themselves."""
    name = key.rpartition(".")[2]
    if name in DTYPE_KEYS or LABEL_KEY.search(name) or SILENT_KEY.search(name) or GENERATION_KEY.search(name):
        return True
    tied = name in ("tie_word_embeddings", "tie_encoder_decoder") or VOCABULARY_KEY.search(name)
    return bool(tied) or key.startswith("quantization_config")


def is_per_layer(name: str, value: Any) -> bool:
    """Whether a key follows the number of layers."""
    return bool(DEPTH_KEY.search(name)) or isinstance(value, list)


def judge_config_key(key: str, primary_value: str, secondary_value: str, harm: str) -> Mismatch:
    """What follows from one config key on which the parents differ: it blocks, unless it is known to do no harm."""
    name, values = key.rpartition(".")[2], (primary_value, secondary_value)
    if name in ("model_type", "architectures"):
        return Mismatch("blocking", key, *values, DIFFERENT_KINDS)
    if DEPTH_KEY.search(name):
        return Mismatch("blocking", key, *values, "Models of different depth have no layer for layer match.")
    if CAPACITY_KEY.search(name) and "rope_parameters." not in key:
        return Mismatch("notice", key, *values, "The child keeps the primary's limit.")
    if TOKEN_ID_KEY.search(name) or name == "tokenizer_class":
        why = "The child has that of the parent that the tokenizer is from."
        return Mismatch("notice", key, *values, why)
    if name == "problem_type":
        why = "Their heads learned to answer in different ways; the child keeps the primary's value."
        return Mismatch("notice", key, *values, why)
    if PREDICTION_KEY.search(name):
        why = "It is of layers that predict further tokens; the child keeps the primary's value."
        return Mismatch("notice", key, *values, why)
    return Mismatch("blocking", key, *values, harm, accepted_as=key)


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
