"""What is typed behind a flag: sizes, numbers, blends and files, read or refused in words.

Knows nothing of which flag takes what (flags.py). Read schedule.py before this.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slerpkit.files import given_path
from slerpkit.messages import SlerpMergeError, is_utf8
from slerpkit.schedule import ScheduleRule, parse_rules


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or plain bytes. Raises SlerpMergeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SlerpMergeError(f"{text!r} is not a size.", "Write it like 5GB, 500MB or 2GiB.")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise SlerpMergeError(f"{text!r} is not a size.", "It is less than a byte.")
    number = text.strip()
    if size < 1_000_000 and number.replace(".", "").isdigit():
        raise SlerpMergeError(f"{number} would be {size} bytes.", f"Did you mean {number}GB? Bytes are {size}B.")
    return size


def format_size(size: int) -> str:
    """A size in the fewest characters that parse_size reads it from."""
    unit = next((unit for unit in "TGMK" if size % 1000 ** " KMGT".index(unit) == 0), "")
    return f"{size // 1000 ** ' KMGT'.index(unit or ' ')}{unit}B"


def parse_within(kind: Callable[[str], Any], lowest: float, highest: float, what: str) -> Callable[[str], Any]:
    """A flag's type: a number from `lowest` to `highest`, or wrong usage that says `what` it should be."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not lowest <= value <= highest:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


def usage_type(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Lets argparse show a SlerpMergeError of a value's parser as wrong usage of its flag."""

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except SlerpMergeError as error:
            raise argparse.ArgumentTypeError(f"{error.message} {error.hint}") from error

    return convert


# What the prompt `Blend` takes beside a blend, and the flags that say it.
BLENDS_OF_FLAGS = {"task vectors": "--base MODEL", "find a good blend": "--sweep --perplexity FILE"}


def parse_t(text: str) -> list[ScheduleRule]:
    """What is typed for `--t`: what the prompt `Blend` takes. Raises SlerpMergeError where another flag says that."""
    typed = " ".join(text.lower().split())
    flags = [flag for name, flag in BLENDS_OF_FLAGS.items() if len(typed) > 1 and name.startswith(typed)]
    flags += ["--recipe FILE"] if typed.endswith((".yaml", ".yml")) else []
    if flags:
        raise SlerpMergeError(f"{text!r} is no t.", f"That is {flags[0]}.")
    return parse_rules(text)


def parse_prompt(text: str) -> str:
    """A prompt. Raises SlerpMergeError where it is empty, or no text."""
    if not text.strip() or not is_utf8(text):
        raise SlerpMergeError("The prompt is empty, or not UTF-8.", "Give a question, or the beginning of a sentence.")
    return text


def parse_tasks(text: str) -> tuple[str, ...]:
    """Names of tasks, separated by commas."""
    return tuple(filter(None, map(str.strip, text.split(","))))


def parse_map_path(text: str) -> Path:
    """A file for a map. Raises SlerpMergeError where its ending names no format."""
    path = given_path(text)
    if path.suffix.lower() not in (".svg", ".json"):
        raise SlerpMergeError(f"{text!r} ends neither in .svg nor in .json.", "The ending says what is saved.")
    return path
