"""How two tokenizers of the same tokens cut a text into them: normalizer, pre-tokenizer, merges.

The child's rows do not depend on it, but it is told: each parent learned on text that was cut in its own way. Read
vocabulary.py before this.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit.files import parse_json_object, read_bytes
from slerpkit.messages import SlerpMergeError, shorten
from slerpkit.parity.report import Mismatch
from slerpkit.parity.sentencepiece_file import find_sentencepiece, read_cutting
from slerpkit.parity.vocabulary import MAX_TOKENIZER_BYTES, have_same_tokens, read_tokenizer, read_tokens

if TYPE_CHECKING:
    from slerpkit.parents.checkpoint import Checkpoint
    from slerpkit.parity.report import Vocabulary


def compare_segmentation(primary: Checkpoint, secondary: Checkpoint, vocabulary: Vocabulary) -> list[Mismatch]:
    """A notice where both parents have the same tokens, and cut a text into them in other ways."""
    folders = {"primary": primary.tokenizer_folder, "secondary": secondary.tokenizer_folder}
    if have_same_tokens(*folders.values()) or dict(vocabulary.counts).get("left_out") or vocabulary.appended:
        return []  # one tokenizer, or tokens that are known to differ
    try:
        rules = [read_rules(folder) for folder in folders.values()]
        differing = [name for name in rules[0] if name in rules[1] and rules[0][name] != rules[1][name]]
        if not differing:
            return []
        tokens = [read_tokens(folder, role).keys() for role, folder in folders.items()]
    except SlerpMergeError:  # a file that cannot be read; it is told with the rows
        return []
    if tokens[0] != tokens[1]:
        return []
    shown = (", ".join(f"{name} {describe_rule(own[name])}" for name in differing) for own in rules)
    source = vocabulary.tokenizer_source
    why = f"The same tokens, but text is cut into them in another way; the child cuts it as the {source} does."
    return [Mismatch("notice", "tokenizer", *shown, why)]


def read_rules(folder: Path) -> dict[str, Any]:
    """What decides how a folder's tokenizer cuts, by the names of its parts; nothing of older kinds.

    The tokenizers library spells each rule in one way, however old the file is; it is given the rules alone, as it
    takes long over a vocabulary. Raises SlerpMergeError where a file cannot be read.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        model = find_sentencepiece(folder)
        return {} if model is None else read_cutting(model)
    content = parse_json_object(read_bytes(path, MAX_TOKENIZER_BYTES), path)
    model = dict(content["model"]) if isinstance(content.get("model"), dict) else {}
    vocabulary, merges = (model.get(key) if isinstance(model.get(key), list) else [] for key in ("vocab", "merges"))
    model.pop("unk_id", None)  # follows the tokens
    model |= {key: type(model[key])() for key in ("vocab", "merges") if isinstance(model.get(key), (dict, list))}
    kept = {key: content.get(key) for key in ("version", "normalizer", "pre_tokenizer")}
    rules = json.loads(read_tokenizer(json.dumps({**kept, "model": model}).encode(), path).to_str())
    return {
        "normalizer": rules["normalizer"],
        "pre-tokenizer": rules["pre_tokenizer"],
        "merges": [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in merges],
        "scores": sorted(vocabulary, key=str),
        "model": rules["model"],
    }


def describe_rule(rule: Any) -> str:
    """A rule in a few words, of a long list its length."""
    return f"({len(rule)})" if isinstance(rule, list) else shorten(rule)
