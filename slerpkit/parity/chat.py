"""How the child talks and stops: chat templates, special tokens, generation settings; licences.

Small files are read and held against each other, and what the child's generation_config.json will be is said here; it
is written by child/companions.py. No weight is looked at. Read vocabulary.py before this.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from slerpkit.chat_templates import CHAT_TEMPLATES, TURN_ENDS, TURN_MARK
from slerpkit.files import (
    MAX_CONFIG_BYTES,
    read_json_if_there,
    read_text_if_there,
)
from slerpkit.messages import SlerpMergeError, format_names, shorten
from slerpkit.parents.checkpoint import (
    CARD_NAME,
    GENERATION_NAME,
)
from slerpkit.parity.configs import TOKEN_ID_KEY, stated_ids
from slerpkit.parity.report import ChildTemplate, Mismatch
from slerpkit.parity.tokenizer_source import chat_template, code_of_tokenizer
from slerpkit.parity.vocabulary import (
    added_tokens,
    all_added_tokens,
    have_same_tokens,
    read_tokens,
)
from slerpkit.recipe import TEMPLATE_CHOICES

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity.report import Vocabulary


def declared_licence(checkpoint: Checkpoint) -> str | None:
    """The licence named in the front matter of a parent's model card."""
    card = read_text_if_there(checkpoint.folder / CARD_NAME) or ""
    front = re.match(r"---\n(.*?)\n---", card.replace("\r\n", "\n"), re.DOTALL)
    licence = re.search(r"^license:[ \t]*[\"']?([\w.-]+)", front.group(1), re.MULTILINE) if front else None
    return licence.group(1) if licence else None


def compare_companions(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """Differences outside the weights that the person may want to know of."""
    parents = primary, secondary
    tokens = [special_tokens(parent) for parent in parents]
    why = "The child has those of the parent that the tokenizer is from."
    differences = [
        (name, [parent_tokens.get(name) for parent_tokens in tokens], why)
        for name in sorted(tokens[0].keys() | tokens[1].keys())
    ]
    settings = [read_json_if_there(parent.companion_folder / GENERATION_NAME, MAX_CONFIG_BYTES) for parent in parents]
    for parent_settings in settings:
        parent_settings.pop("transformers_version", None)
    texts = [json.dumps(parent_settings, sort_keys=True) if parent_settings else None for parent_settings in settings]
    if settings[0] != settings[1]:
        why = "The child generates as the primary does, and stops like the parent that the tokenizer is from."
        differences.append((GENERATION_NAME, texts, why))
    why = "A child is bound by both; read them before you share it."
    differences.append(("licence", [declared_licence(parent) for parent in parents], why))
    return [
        Mismatch("notice", subject, *(shorten(value if value is not None else "none") for value in values), why)
        for subject, values, why in differences
        if values[0] != values[1]
    ]


def compare_code(primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary) -> list[Mismatch]:
    """A notice of each file of code that the secondary's tokenizer brings and that is another in the primary."""
    if vocabulary.tokenizer_source != "secondary":
        return []
    brought, kept = code_of_tokenizer(primary.companion_folder, secondary.companion_folder)
    mismatches = []
    for name in sorted(brought | kept):
        texts = [read_text_if_there(parent.companion_folder / name) for parent in (primary, secondary)]
        if texts[0] is None or texts[0] == texts[1]:
            continue
        why = "The child has the secondary's, which its tokenizer is made of."
        if name in kept:
            why = (
                "The child has the primary's, which its model is made of; the secondary's tokenizer may not load by it."
            )
        mismatches.append(Mismatch("notice", name, "one", "another", why))
    return mismatches


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """bos_token, eos_token, ... of a parent's tokenizer, by name."""
    settings = read_json_if_there(checkpoint.tokenizer_folder / "tokenizer_config.json")
    settings.update(read_json_if_there(checkpoint.tokenizer_folder / "special_tokens_map.json"))
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    contents = {
        name: settings[name].get("content") if isinstance(settings[name], dict) else settings[name]
        for name in names
        if settings.get(name) is not None
    }
    return {name: str(content) for name, content in contents.items()}


def check_chat_template(
    primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary, asked: str
) -> tuple[list[Mismatch], ChildTemplate]:
    """(what is to know of the chat templates, the child's). asked: as MergeRecipe.chat_template."""
    parents = {"primary": primary, "secondary": secondary}
    templates = {role: chat_template(parent.tokenizer_folder) for role, parent in parents.items()}
    tokenizer_source = vocabulary.tokenizer_source
    of_tokenizer = ChildTemplate(tokenizer_source)
    lenient = asked in ("auto", "either")
    if lenient and len(set(templates.values())) == 1:
        return [], of_tokenizer
    sizes = [f"{len(template)} characters" if template else "none" for template in templates.values()]
    if sizes[0] == sizes[1] and templates["primary"] != templates["secondary"]:
        sizes = ["one", "another"]
    line = functools.partial(Mismatch, subject="chat template", primary=sizes[0], secondary=sizes[1])
    unless_asked = "notice" if lenient else "blocking"
    if tokenizer_source is None:
        why = "Without a tokenizer, which neither parent has, it is of no use."
        return [line(unless_asked, consequence=why)], of_tokenizer
    if asked not in TEMPLATE_CHOICES or asked in CHAT_TEMPLATES:
        return take_own_template(asked, parents[tokenizer_source], vocabulary, line)
    if lenient and templates[tokenizer_source]:
        return [line("notice", consequence="The child talks like the parent that the tokenizer is from.")], of_tokenizer
    role = {"primary": "secondary", "secondary": "primary"}[tokenizer_source] if lenient else asked
    if not templates[role]:
        return [line("blocking", consequence=f"The {role} has none to take.")], of_tokenizer
    unknown = []
    if role != tokenizer_source:
        unknown = unknown_marks(templates[role], parents[role], parents[tokenizer_source], vocabulary)
    if unknown:
        why = f"The {role}'s speaks of {format_names(unknown)}, which the child's tokenizer does not know."
        return [line(unless_asked, consequence=f"{why} --tokenizer {role} takes both.")], of_tokenizer
    if asked == "auto":
        why = f"The child has none; --chat-template {role} takes the {role}'s, which fits its tokens."
        return [line("notice", consequence=why)], ChildTemplate(tokenizer_source, offered=role)
    why = f"The child has the {role}'s, as asked, and also stops where that does."
    return [line("resolved", consequence=why)], ChildTemplate(role)


def take_own_template(
    asked: str, tokenizer_source: Checkpoint, vocabulary: Vocabulary, line: Callable[..., Mismatch]
) -> tuple[list[Mismatch], ChildTemplate]:
    """(the line about a template of neither parent's, that template). asked: its name, or Jinja of the recipe's.

    line: a Mismatch but for its severity and consequence.
    """
    name, text = (asked, CHAT_TEMPLATES[asked]) if asked in CHAT_TEMPLATES else ("the recipe", asked)
    try:
        tokens = child_tokens(tokenizer_source, vocabulary)
    except SlerpMergeError as error:
        why = f"It is {name}'s, as asked. Whether its marks are tokens is not known: {error.message.rstrip('.')}."
        return [line("resolved", consequence=why)], ChildTemplate(None, name, text)
    ends = tuple(tokens[mark] for mark in TURN_ENDS if mark in text and mark in tokens)
    lines = [
        line("resolved", consequence=f"It is {name}'s, as asked{'; the child stops where its turns end' * bool(ends)}.")
    ]
    unknown = sorted({mark for mark in TURN_MARK.findall(text) if mark not in tokens})
    if unknown:
        why = f"It speaks of {format_names(unknown)}, which the child's tokenizer does not know and cuts into pieces."
        lines.append(line("notice", consequence=why))
    return lines, ChildTemplate(None, name, text, ends)


def unknown_marks(template: str, owner: Checkpoint, tokenizer_source: Checkpoint, vocabulary: Vocabulary) -> list[str]:
    """Marks that the owner's chat template puts around a conversation and that would be no tokens in the child."""
    if have_same_tokens(owner.tokenizer_folder, tokenizer_source.tokenizer_folder):
        return []
    marks = set(added_tokens(owner.tokenizer_folder))
    tokens: dict[str, int] = {}
    with contextlib.suppress(SlerpMergeError):  # it stays unknown what they are
        marks |= all_added_tokens(owner.tokenizer_folder)
        tokens = child_tokens(tokenizer_source, vocabulary)
    return sorted(mark for mark in marks if mark and mark in template and mark not in tokens)


def child_tokens(tokenizer_source: Checkpoint, vocabulary: Vocabulary) -> dict[str, int]:
    """The child's tokens with their ids. Raises SlerpMergeError where its tokenizer's source cannot be read."""
    return vocabulary.with_appended(read_tokens(tokenizer_source.tokenizer_folder, vocabulary.tokenizer_source))


def child_generation_config(
    primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary, template: ChildTemplate
) -> tuple[dict[str, Any], list[Mismatch]]:
    """(generation_config.json of the child, empty where neither parent has one; what was resolved in it).

    It is the primary's, or else the secondary's, with the ids of the parent that the tokenizer is from, and none that
    has no row. Where its chat template is another's, it also stops where that does.
    """
    parents = {"primary": primary, "secondary": secondary}
    stated = {
        role: read_json_if_there(parent.companion_folder / GENERATION_NAME, MAX_CONFIG_BYTES)
        for role, parent in parents.items()
    }
    settings_source = "primary" if stated["primary"] else "secondary"
    tokenizer_source = vocabulary.tokenizer_source or settings_source
    settings = stated[settings_source]
    if settings and settings_source != tokenizer_source:
        ids = stated[tokenizer_source] or stated_ids(parents[tokenizer_source].config)
        settings = follow_tokens(settings, ids, vocabulary, settings_source)
    talking = {tokenizer_source, template.role or tokenizer_source}
    if len(talking) > 1 or template.turn_ends:
        ends: list[int] = []
        for role in sorted(talking, key=lambda role: role != tokenizer_source):
            stated_ends = {**stated_ids(parents[role].config), **stated[role]}.get("eos_token_id")
            ends += child_ids(stated_ends, vocabulary, role)
        ends = list(dict.fromkeys([*ends, *template.turn_ends]))
        settings = {**settings, "eos_token_id": ends} if ends else settings
    kept, mismatches = {}, []
    for key, value in settings.items():
        values = value if isinstance(value, list) else [value]
        is_id = TOKEN_ID_KEY.search(key) is not None
        lost = [n for n in values if is_id and type(n) is int and not has_row(n, vocabulary)]
        if not lost:
            kept[key] = value
            continue
        why = f"The child's vocabulary has no {format_names(list(map(str, lost)))}; left out."
        stated_values = (shorten(stated[role].get(key)) for role in parents)
        mismatches.append(Mismatch("resolved", f"{GENERATION_NAME}: {key}", *stated_values, why))
        remaining = [n for n in values if n not in lost]
        if remaining:
            kept[key] = remaining if len(remaining) > 1 else remaining[0]
    return kept, mismatches


def has_row(token_id: int, vocabulary: Vocabulary) -> bool:
    """Whether a token's id can be one of the child's."""
    return vocabulary.id_count is None or 0 <= token_id < vocabulary.id_count


def child_ids(stated: Any, vocabulary: Vocabulary, role: str) -> list[int]:
    """A parent's token id, or list of ids, as the child's ids; those that the child has no token for are left out."""
    ids = stated if isinstance(stated, list) else [stated]
    translated = (vocabulary.child_id_of(token_id, role) for token_id in ids if type(token_id) is int)
    return [token_id for token_id in translated if token_id is not None]


def follow_tokens(
    settings: Mapping[str, Any], source_ids: Mapping[str, Any], vocabulary: Vocabulary, role: str
) -> dict[str, Any]:
    """Settings of the parent `role` with the token ids of `source_ids`, settings of the parent the tokenizer is from.

    Of ids that those do not state, the child has the ids of the same tokens. Nested settings follow likewise.
    """
    result: dict[str, Any] = {key: value for key, value in source_ids.items() if TOKEN_ID_KEY.search(key)}
    for key, value in settings.items():
        if isinstance(value, dict):
            inner_ids = source_ids.get(key)
            result[key] = follow_tokens(value, inner_ids if isinstance(inner_ids, dict) else {}, vocabulary, role)
        elif not TOKEN_ID_KEY.search(key) or value is None:
            result.setdefault(key, value)
        elif key not in result and (ids := child_ids(value, vocabulary, role)):
            result[key] = ids if isinstance(value, list) else ids[0]
    return {key: result[key] for key in (*settings, *source_ids) if key in result}  # in the settings' own order
