"""How the child talks and stops: chat templates, special tokens, generation settings; licences."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slerpkit.files import read_json_if_there, read_text_if_there
from slerpkit.messages import SlerpMergeError, format_names, shorten
from slerpkit.parents.checkpoint import CARD_NAME, GENERATION_NAME
from slerpkit.parity.configs import TOKEN_ID_KEY, stated_ids
from slerpkit.parity.report import Mismatch
from slerpkit.parity.vocabulary import added_tokens, have_same_tokens, open_tokenizer, read_tokens

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity.report import Vocabulary


def chat_template(checkpoint: Checkpoint) -> str | None:
    """The chat template of a parent, from its own file, its tokenizer's config or its processor's."""
    template = read_text_if_there(checkpoint.folder / "chat_template.jinja")
    if template is not None:
        return template
    settings = (
        read_json_if_there(checkpoint.folder / name) for name in ("tokenizer_config.json", "chat_template.json")
    )
    value = next((found for part in settings if (found := part.get("chat_template"))), None)
    return value if isinstance(value, str) or value is None else json.dumps(value)


def declared_licence(checkpoint: Checkpoint) -> str | None:
    """The licence named in the front matter of a parent's model card."""
    card = read_text_if_there(checkpoint.folder / CARD_NAME) or ""
    front = re.match(r"---\n(.*?)\n---", card.replace("\r\n", "\n"), re.DOTALL)
    found = re.search(r"^license:[ \t]*[\"']?([\w.-]+)", front.group(1), re.MULTILINE) if front else None
    return found.group(1) if found else None


def compare_companions(primary: Checkpoint, secondary: Checkpoint) -> list[Mismatch]:
    """Differences outside the weights that the person may want to know of."""
    found = []

    def note(subject: str, left: str | None, right: str | None, why: str) -> None:
        if left != right:
            shown = [value if value is not None else "none" for value in (left, right)]
            found.append(Mismatch("notice", subject, *map(shorten, shown), why))

    tokens = [special_tokens(parent) for parent in (primary, secondary)]
    for name in sorted(tokens[0].keys() | tokens[1].keys()):
        note(name, tokens[0].get(name), tokens[1].get(name), "The child has those of the tokenizer's donor.")
    settings = [read_json_if_there(parent.folder / GENERATION_NAME) for parent in (primary, secondary)]
    for stated in settings:
        stated.pop("transformers_version", None)
    if settings[0] != settings[1]:
        shown = [json.dumps(stated, sort_keys=True) if stated else None for stated in settings]
        why = "The child generates as the primary does, and stops where the tokenizer's donor does."
        note(GENERATION_NAME, *shown, why)
    why = "A child is bound by both; read them before you share it."
    note("licence", declared_licence(primary), declared_licence(secondary), why)
    return found


def special_tokens(checkpoint: Checkpoint) -> dict[str, str]:
    """bos_token, eos_token, ... of a parent's tokenizer, by name."""
    settings = read_json_if_there(checkpoint.folder / "tokenizer_config.json")
    settings.update(read_json_if_there(checkpoint.folder / "special_tokens_map.json"))
    names = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    contents = {
        name: settings[name].get("content") if isinstance(settings[name], dict) else settings[name]
        for name in names
        if settings.get(name) is not None
    }
    return {name: str(content) for name, content in contents.items()}


def check_chat_template(
    primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary, asked: str
) -> tuple[list[Mismatch], str | None]:
    """(what is to know of the chat templates, the role whose template is on offer for a child without one).

    asked: as MergeRecipe.chat_template.
    """
    parents = {"primary": primary, "secondary": secondary}
    templates = {role: chat_template(parent) for role, parent in parents.items()}
    if asked == "auto" and len(set(templates.values())) == 1:
        return [], None
    sizes = [f"{len(template)} characters" if template else "none" for template in templates.values()]
    shown = sizes if sizes[0] != sizes[1] else ["one", "another"]
    line = functools.partial(Mismatch, subject="chat template", primary=shown[0], secondary=shown[1])
    if vocabulary.role is None:
        severity = "notice" if asked == "auto" else "blocking"
        return [line(severity, consequence="Without a tokenizer, which neither parent has, it is of no use.")], None
    donor = parents[vocabulary.role]
    role = {"primary": "secondary", "secondary": "primary"}[vocabulary.role] if asked == "auto" else asked
    if asked == "auto" and templates[vocabulary.role]:
        return [line("notice", consequence="The child talks as the tokenizer's donor does.")], None
    if not templates[role]:
        return [line("blocking", consequence=f"The {role} has none to take.")], None
    unknown = [] if role == vocabulary.role else unknown_marks(templates[role], parents[role], donor, vocabulary)
    if unknown:
        why = f"The {role}'s speaks of {format_names(unknown)}, which the child's tokenizer does not know."
        severity = "notice" if asked == "auto" else "blocking"
        return [line(severity, consequence=f"{why} --tokenizer {role} takes both.")], None
    if asked == "auto":
        why = f"The child has none; --chat-template {role} takes the {role}'s, which fits its tokens."
        return [line("notice", consequence=why)], role
    return [
        line("resolved", consequence=f"The child has the {role}'s, as asked, and also stops where that does.")
    ], None


def unknown_marks(template: str, owner: Checkpoint, donor: Checkpoint, vocabulary: Vocabulary) -> list[str]:
    """Marks that a chat template puts around a conversation and that would be no tokens in the child."""
    if have_same_tokens(owner.folder, donor.folder):
        return []
    marks = set(added_tokens(owner.folder))
    try:
        if (owner.folder / "tokenizer.json").is_file():
            added = open_tokenizer(owner.folder / "tokenizer.json").get_added_tokens_decoder()
            marks |= {token.content for token in added.values()}
        known = read_tokens(donor.folder).keys() | {token.content for token in vocabulary.appended}
    except SlerpMergeError:  # it stays unknown what they are
        known = set()
    return sorted(mark for mark in marks if mark and mark in template and mark not in known)


def child_generation_config(
    primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary, template_role: str | None = None
) -> tuple[dict[str, Any], list[Mismatch]]:
    """generation_config.json of the child, empty where neither parent has one; what was resolved in it.

    It is the primary's, or else the secondary's, with the ids of the tokenizer's donor, and none that has no row.
    template_role: a parent other than the donor whose chat template the child has; it also stops where that does.
    """
    parents = {"primary": primary, "secondary": secondary}
    stated = {role: read_json_if_there(parent.folder / GENERATION_NAME) for role, parent in parents.items()}
    source = "primary" if stated["primary"] else "secondary"
    donor = vocabulary.role or source
    settings = stated[source]
    if settings and source != donor:
        settings = follow_tokens(settings, stated[donor] or stated_ids(parents[donor].config), vocabulary, source)
    if template_role not in (None, donor):
        ends = [
            number
            for role in (donor, template_role)
            for number in ids_of(
                {**stated_ids(parents[role].config), **stated[role]}.get("eos_token_id"), vocabulary, role
            )
        ]
        settings |= {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    kept, found = {}, []
    for key, value in settings.items():
        ids = value if isinstance(value, list) else [value]
        is_id = TOKEN_ID_KEY.search(key) is not None
        astray = [n for n in ids if is_id and type(n) is int and not has_row(n, vocabulary)]
        rest = [n for n in ids if n not in astray]
        if astray:
            why = f"The child's vocabulary has no {format_names(list(map(str, astray)))}; left out."
            name = f"{GENERATION_NAME}: {key}"
            found.append(Mismatch("resolved", name, *(shorten(stated[role].get(key)) for role in parents), why))
        if not astray or rest:
            kept[key] = value if not astray else rest if len(rest) > 1 else rest[0]
    return kept, found


def has_row(number: int, vocabulary: Vocabulary) -> bool:
    """Whether a token's id can be one of the child's."""
    return vocabulary.rows is None or 0 <= number < vocabulary.rows


def ids_of(value: Any, vocabulary: Vocabulary, role: str) -> list[int]:
    """A parent's token id, or list of ids, as the child's ids; those that the child has no token for are left out."""
    ids = value if isinstance(value, list) else [value]
    places = [vocabulary.child_id_of(number, int(role == "secondary")) for number in ids if type(number) is int]
    return [place for place in places if place is not None]


def follow_tokens(
    settings: Mapping[str, Any], donor: Mapping[str, Any], vocabulary: Vocabulary, role: str
) -> dict[str, Any]:
    """Settings of the parent `role` with the token ids of the donor's settings, whole.

    Of ids that the donor does not state, the child has those of the same tokens.
    """
    result: dict[str, Any] = {key: value for key, value in donor.items() if TOKEN_ID_KEY.search(key)}
    for key, value in settings.items():
        if isinstance(value, dict):
            inner = donor.get(key)
            result[key] = follow_tokens(value, inner if isinstance(inner, dict) else {}, vocabulary, role)
        elif not TOKEN_ID_KEY.search(key) or value is None:
            result.setdefault(key, value)
        elif key not in result and (ids := ids_of(value, vocabulary, role)):
            result[key] = ids if isinstance(value, list) else ids[0]
    return {key: result[key] for key in (*settings, *donor) if key in result}  # in the settings' own order
