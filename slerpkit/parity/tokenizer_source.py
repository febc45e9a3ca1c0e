"""Whose tokenizer the child has, and the chat templates that decide with it.

Files are looked for and templates are read; no token is. Read parents/checkpoint.py before this.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slerpkit.files import read_json_if_there, read_text_if_there
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import has_tokenizer


def choose_tokenizer(asked: str, primary: Path, secondary: Path) -> tuple[str | None, str]:
    """(role, reason) of the parent whose tokenizer the child gets; `asked` is auto, primary or secondary.

    Raises SlerpMergeError where the one that was asked for has none.
    """
    folders = {"primary": primary, "secondary": secondary}
    holders = [role for role, folder in folders.items() if has_tokenizer(folder)]
    if asked != "auto":
        if asked not in holders:
            raise SlerpMergeError(
                f"The {asked} model has no tokenizer to copy.", "Choose the other, or leave it to auto."
            )
        return asked, "as asked"
    if len(holders) < 2:
        return (holders[0], "only it has a tokenizer") if holders else (None, "neither parent has a tokenizer")
    mapped = [role for role in holders if (folders[role] / "special_tokens_map.json").is_file()]
    if len(mapped) == 1:
        # Newer transformers write no such file, so it may tell of age alone; a voice tells more.
        talking = [role for role in holders if chat_template(folders[role])]
        if len(talking) == 1 and talking != mapped:
            return talking[0], "it alone has a chat template"
        return mapped[0], "it alone has special_tokens_map.json"
    return "primary", f"{'both have' if mapped else 'neither has'} special_tokens_map.json"


def chat_template(folder: Path) -> str | None:
    """The chat template of a model, as transformers finds it: files of their own go before settings.

    Several, by their names, come as one JSON object.
    """
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    texts = {path.stem: read_text_if_there(path) for path in more}
    texts = {"default": read_text_if_there(folder / "chat_template.jinja"), **texts}
    templates = {name: text for name, text in texts.items() if text is not None}
    for name in ("tokenizer_config.json", "chat_template.json"):
        templates = templates or stated_templates(read_json_if_there(folder / name))
    return templates.get("default") if templates.keys() <= {"default"} else json.dumps(templates, sort_keys=True)


def stated_templates(settings: Mapping[str, Any]) -> dict[str, str]:
    """The chat templates that settings state, by name: one text, or a list of named ones."""
    stated = settings.get("chat_template")
    if isinstance(stated, str):
        return {"default": stated} if stated else {}
    entries = [entry for entry in stated if isinstance(entry, dict)] if isinstance(stated, list) else []
    return {str(entry.get("name")): entry["template"] for entry in entries if isinstance(entry.get("template"), str)}
