"""Everything beside the weights: config, tokenizer, template, generation settings, recipe, index.

Each file comes from the one parent that it belongs to, or is made from a parent's. What they say of the tensors is
known from the plan; no weight is read here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import (
    copy_files,
    copy_matching,
    json_fault,
    read_bytes,
    read_json,
    read_json_if_there,
    write_json,
    write_text,
)
from slerpkit.parents.checkpoint import GENERATION_NAME, WEIGHTS_INDEX
from slerpkit.parity.chat import child_generation_config, follow_tokens
from slerpkit.parity.configs import DEPTH_KEY, DTYPE_KEYS, LANGUAGE_CONFIGS, language_scopes, stated_depth
from slerpkit.parity.embeddings import PER_LAYER_KEY, PER_LAYER_NAME, belied_sizes, head_is_tied, is_tied
from slerpkit.parity.vocabulary import add_configured_tokens, extend_tokenizer, open_tokenizer
from slerpkit.recipe_file import RECIPE_NAME
from slerpkit.recipe_writer import recipe_text

if TYPE_CHECKING:
    from slerpkit.merge.plan import MergePlan
    from slerpkit.merge.staging import StagedChild
    from slerpkit.recipe import LayerSlice


def copy_companions(plan: MergePlan, child: StagedChild) -> None:
    """Everything a model folder holds beside its weights, each file from the one parent it belongs to."""
    write_index(plan, child.folder)
    write_child_config(plan, child.folder)
    for group in plan.copied_files:
        copy_matching(group.folder, child.folder, group.patterns)
        copy_files(group.folder, child.folder, group.nested)
    adapt_tokenizer(plan, child.folder)
    write_generation_config(plan, child.folder)
    write_text(child.folder / RECIPE_NAME, recipe_text(plan.settled_recipe, plan.parents.by_role, child.target))


def write_index(plan: MergePlan, folder: Path) -> None:
    """model.safetensors.index.json, where the child has more than one file."""
    shards = [shard for shard in plan.shards if not shard.prefix]
    if len(shards) == 1:
        return
    tensors = [tensor for shard in shards for tensor in shard.tensors]
    index = {
        "metadata": {
            "total_parameters": sum(tensor.element_count for tensor in tensors),
            "total_size": sum(tensor.byte_count for tensor in tensors),
        },
        "weight_map": {tensor.name: shard.file_name for shard in shards for tensor in shard.tensors},
    }
    write_json(folder / WEIGHTS_INDEX, index)


def write_generation_config(plan: MergePlan, folder: Path) -> None:
    """generation_config.json: a parent's own file, or one made where ids follow the other parent's tokenizer."""
    parents = plan.parents
    settings, _ = child_generation_config(
        parents.primary, parents.secondary, plan.parity.vocabulary, plan.parity.template
    )
    if not settings:
        return
    for parent in (parents.primary, parents.secondary):
        path = parent.companion_folder / GENERATION_NAME
        if read_json_if_there(path) == settings and json_fault(read_bytes(path)) is None:
            copy_matching(parent.companion_folder, folder, [GENERATION_NAME])
            return
    write_json(folder / GENERATION_NAME, settings)


def adapt_tokenizer(plan: MergePlan, folder: Path) -> None:
    """Puts a chat template that is not the tokenizer's, and the other parent's tokens, into its copied files."""
    settings_path, more_path = folder / "tokenizer_config.json", folder / "added_tokens.json"
    settings = read_json_if_there(settings_path)
    before = dict(settings)
    chosen = plan.parity.template
    if chosen.role != plan.tokenizer_role:
        template = chosen.text
        if template is None:
            template_parent = plan.parents.by_role[chosen.role]
            template = read_json_if_there(template_parent.tokenizer_folder / settings_path.name).get("chat_template")
        settings = {key: value for key, value in settings.items() if key != "chat_template"}
        settings |= {} if template is None else {"chat_template": template}
    appended = plan.parity.vocabulary.appended
    if appended:
        tokenizer = open_tokenizer(folder / "tokenizer.json")
        add_configured_tokens(tokenizer, folder)
        extend_tokenizer(tokenizer, [(token.content, token.flags) for token in appended])
        write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
        if isinstance(settings.get("added_tokens_decoder"), dict):
            entries = {str(token.token_id): {"content": token.content, **dict(token.flags)} for token in appended}
            settings = {**settings, "added_tokens_decoder": {**settings["added_tokens_decoder"], **entries}}
        if more_path.is_file():
            write_json(more_path, {**read_json(more_path), **{token.content: token.token_id for token in appended}})
    if settings != before:
        write_json(settings_path, settings)


def write_child_config(plan: MergePlan, folder: Path) -> None:
    """config.json: the primary's, key by key, with what is another in the child."""
    config = dict(plan.parents.primary.config)
    if not config.get("architectures") and plan.parents.secondary.config.get("architectures"):
        config["architectures"] = plan.parents.secondary.config["architectures"]  # some versions leave them out
    vocabulary = plan.parity.vocabulary
    if vocabulary.tokenizer_source == "secondary":
        config = follow_tokens(config, plan.parents.secondary.config, vocabulary, "primary")
    if plan.recipe.dtype != "auto":
        stated = [key for key in DTYPE_KEYS if key in config] or ["torch_dtype"]
        config.update(dict.fromkeys(stated, plan.recipe.dtype))
        for key, part in config.items():
            if isinstance(part, dict):  # a model inside a model states its own
                config[key] = {k: plan.recipe.dtype if k in DTYPE_KEYS else v for k, v in part.items()}
    rows = vocabulary.parent_rows[0]
    if rows != vocabulary.rows and not any("vocab_size" in scope for scope in language_scopes(config)):
        place = next((key for key in LANGUAGE_CONFIGS if isinstance(config.get(key), dict)), None)
        config |= {"vocab_size": rows} if place is None else {place: {**config[place], "vocab_size": rows}}
    for stated in (rows, *belied_sizes(plan.parents.primary)):
        config = with_value(config, "vocab_size", stated, vocabulary.rows)
    for pair in plan.parity.pairs:
        if PER_LAYER_NAME.search(pair.name):
            config = with_value(config, PER_LAYER_KEY, pair.primary.shape[0], pair.shape[0])
    stated_tie, tie = is_tied(config), head_is_tied(plan.parents.primary)
    if stated_tie is None and tie is not None:
        config["tie_word_embeddings"] = tie
    config = with_value(config, "tie_word_embeddings", stated_tie, tie)
    if plan.recipe.slices:
        layers = [(role, layer) for part in plan.recipe.slices for role, layer in config_layers(part)]
        config = with_depth(config, plan.parents.secondary.config, layers)
    write_json(folder / "config.json", config)


def with_value(config: Mapping[str, Any], key: str, before: Any, after: Any) -> dict[str, Any]:
    """A config with a value exchanged wherever it is stated, in models inside the model too."""
    changed = {
        k: with_value(part, key, before, after) if isinstance(part, dict) else part for k, part in config.items()
    }
    if key in changed and changed[key] == before and before is not None:
        changed[key] = after
    return changed


def config_layers(part: LayerSlice) -> list[tuple[str, int]]:
    """(role, layer) of the parent whose config speaks for each layer of a slice: the primary, unless it is left out."""
    role = "secondary" if part.alone == "secondary" else "primary"
    return [(role, layer) for layer in part.range_of(role)]


def with_depth(
    config: Mapping[str, Any], other: Mapping[str, Any], layers: Sequence[tuple[str, int]]
) -> dict[str, Any]:
    """The config of a child of other layers: their number, and lists with an entry for each.

    config: the primary's. other: the secondary's, which speaks for the layers that are copied from it.
    """
    depth = stated_depth(config)
    changed = dict(config)

    def entry(key: str, role: str, layer: int) -> Any:
        """What a list says of a parent's layer."""
        values = other.get(key) if role == "secondary" else config[key]
        values = values if isinstance(values, list) and layer < len(values) else config[key]
        return values[min(layer, len(values) - 1)]

    for key, value in config.items():
        if DEPTH_KEY.search(key) and value == depth:
            changed[key] = len(layers)
        elif isinstance(value, list) and key.endswith("_only_layers"):  # numbers of layers, not an entry for each
            listed = {"primary": value, "secondary": other.get(key) or []}
            changed[key] = [number for number, (role, layer) in enumerate(layers) if layer in listed[role]]
        elif isinstance(value, list) and len(value) == depth and "layer" in key:
            changed[key] = [entry(key, role, layer) for role, layer in layers]
        elif isinstance(value, dict) and key == "text_config":
            changed[key] = with_depth(value, other.get(key) or {}, layers)
    return changed
