"""Whose tokenizer the child has, the chat templates that decide with it, and the code that it is made of.

Files are looked for and read, templates and code too; no token is, and nothing is run. Read parents/checkpoint.py
before this.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slerpkit.files import matching_files, read_json_if_there, read_text_if_there
from slerpkit.messages import SlerpMergeError
from slerpkit.parents.checkpoint import has_tokenizer

CLASS_NAME = re.compile(r"(\w+)\.\w+")  # of a file beside; one of another repository begins with that and `--`
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)
# Where models name the code that they bring.
AUTO_MAP_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")


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
    more = matching_files(folder / "additional_chat_templates", ["*.jinja"])
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


def code_files(folder: Path) -> tuple[set[str], set[str]]:
    """(files of the code that a model's tokenizer is made of, those of all else) as its settings name them."""
    tokenizer, rest = [], []
    for name in AUTO_MAP_FILES:
        stated = read_json_if_there(folder / name).get("auto_map")
        for key, value in stated.items() if isinstance(stated, dict) else ():
            (tokenizer if key == "AutoTokenizer" else rest).extend(value if isinstance(value, list) else [value])
    return with_imports(folder, tokenizer), with_imports(folder, rest)


def with_imports(folder: Path, classes: Iterable[Any]) -> set[str]:
    """The files in a folder that these classes stand in, with those that they import from beside them."""
    matches = (CLASS_NAME.fullmatch(stated) for stated in classes if isinstance(stated, str))
    waiting = {f"{match[1]}.py" for match in matches if match}
    found: set[str] = set()
    while waiting:
        name = waiting.pop()
        text = read_text_if_there(folder / name)
        if text is not None:
            found.add(name)
            waiting |= {f"{module}.py" for module in RELATIVE_IMPORT.findall(text)} - found
    return found


def code_of_tokenizer(primary: Path, secondary: Path) -> tuple[set[str], set[str]]:
    """(files of code that the secondary's tokenizer brings to a child, those that the primary keeps its own of).

    The child's model is read by the primary's code, so a file that this needs stays the primary's.
    """
    needed, of_model = code_files(secondary)[0], code_files(primary)[1]
    return needed - of_model, needed & of_model
