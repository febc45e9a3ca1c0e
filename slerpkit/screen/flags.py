"""Every question as a flag, and the command that says the same without questions."""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slerpkit import __version__
from slerpkit.files import clean_path
from slerpkit.maths import COLINEAR_DOT, TINY_NORM
from slerpkit.messages import SlerpMergeError, is_utf8, shortest_number
from slerpkit.parents.checkpoint import find_model, short_name
from slerpkit.recipe import (
    CHILD_DTYPES,
    DEVICES,
    MAX_THREADS,
    METHODS,
    TEMPLATE_CHOICES,
    TOKENIZER_CHOICES,
    VECTORS,
    MergeRecipe,
    RunOptions,
    granularity_of,
    recipe_and_options,
)
from slerpkit.recipe_file import read_recipe
from slerpkit.schedule import parse_rule


def parse_size(text: str) -> int:
    """`5GB`, `500MB`, `2GiB` or plain bytes. Raises SlerpMergeError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise SlerpMergeError(f"{text!r} is not a size.", "Write it like 5GB, 500MB or 2GiB.")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise SlerpMergeError(f"{text!r} is not a size.", "It is less than a byte.")
    return size


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


def parse_prompt(text: str) -> str:
    """A prompt. Raises SlerpMergeError where it is empty, or no text."""
    if not text.strip() or not is_utf8(text):
        raise SlerpMergeError("The prompt is empty, or not UTF-8.", "Give a question, or the beginning of a sentence.")
    return text


def parse_map_path(text: str) -> Path:
    """A file for a map. Raises SlerpMergeError where its ending names no format."""
    path = clean_path(text)
    if path.suffix.lower() not in (".svg", ".json"):
        raise SlerpMergeError(f"{text!r} ends neither in .svg nor in .json.", "The ending says what is saved.")
    return path


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its help."""
    parser = argparse.ArgumentParser(
        prog="slerpmerge.py",
        description="Merge two language-model checkpoints by spherical linear interpolation (SLERP). "
        "What no flag gives is asked for.",
        epilog="Exit status: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted.",
    )
    add = parser.add_argument
    folder, model = usage_type(clean_path), usage_type(find_model)
    add("--primary", type=model, metavar="FOLDER", help="the primary model (t = 0)")
    add("--secondary", type=model, metavar="FOLDER", help="the secondary model (t = 1)")
    add("--save-dir", dest="save_directory", type=folder, metavar="FOLDER", help="where the child goes")
    add("--recipe", type=folder, metavar="FILE", help="a mergekit recipe: slerp, nuslerp or linear of two models")
    add("--base", type=model, metavar="FOLDER", help="blend what both parents learned since this model")
    add("--t", dest="rules", type=usage_type(parse_rule), action="append", metavar="[FILTER=]T",
        help="0 to 1, or a comma list: a gradient over the layers; again with a filter for tensors whose name "
        "holds it (default 0.5)")  # fmt: skip
    add("--extrapolate", action="store_true", default=None, help="allow t outside 0 to 1")
    add("--method", choices=METHODS, help="default slerp; slerp-norm also interpolates the norms")
    add("--granularity", choices=VECTORS, help="what nuslerp takes as one vector (default tensor)")
    cosine = parse_within(float, sys.float_info.min, 1, "a cosine above 0, up to 1")
    norm = parse_within(float, 0, sys.float_info.max, "a norm from 0 on")
    add("--dot-threshold", type=cosine, metavar="COSINE", help=f"straight line above this (default {COLINEAR_DOT})")
    add("--epsilon", type=norm, metavar="NORM", help=f"a smaller norm counts as zero (default {TINY_NORM:g})")
    add("--dtype", choices=CHILD_DTYPES, help="of the child (default auto: the primary's)")
    add("--max-shard-size", dest="max_shard_bytes", type=usage_type(parse_size), metavar="SIZE", help="default 5GB")
    add("--tokenizer", choices=TOKENIZER_CHOICES, help="whose tokenizer the child gets; union: with the other's tokens")
    add("--chat-template", choices=TEMPLATE_CHOICES[1:], help="whose it gets (default: the tokenizer's)")
    add("--device", choices=DEVICES, help="where the arithmetic runs (default auto)")
    count = parse_within(int, 1, 1024, "a number of threads from 1 on")
    add("--threads", type=count, metavar="N", help=f"default: the cores, up to {MAX_THREADS}")
    add("--inspect", action="store_true", help="measure how the parents differ, layer by component; write no child")
    add("--map", dest="maps", type=usage_type(parse_map_path), action="append", default=[], metavar="FILE",
        help="save that map as FILE, .svg or .json")  # fmt: skip
    add("--taste", dest="prompts", type=usage_type(parse_prompt), action="append", default=[], metavar="PROMPT",
        help="let parents and child answer it side by side; may be given again")  # fmt: skip
    add("--perplexity", dest="texts", type=folder, action="append", default=[], metavar="FILE",
        help="compare how well parents and child predict a text; may be given again")  # fmt: skip
    add("--score", dest="tasks", metavar="TASKS", help="evaluate all three on tasks of lm-eval, separated by commas")
    add("--include-path", type=folder, metavar="FOLDER", help="where YAML tasks of your own for --score are")
    add("--sweep", action="store_true", help="find t by the --perplexity texts, or else the --score tasks, and make it")
    add("--child", type=folder, metavar="FOLDER", help="taste, measure or score a child that stands already")
    add("--dry-run", action="store_true", help="check and plan, write nothing")
    add("--yes", action="store_true", help="take every default and start without asking")
    add("--overwrite", action="store_true", default=None, help="replace a model that stands in the save directory")
    add("--restart", action="store_true", default=None, help="discard what an earlier run left unfinished")
    add("--verify", choices=("quick", "full"), help="full: also load the child with transformers")
    add("--json", action="store_true", help="print the report as one JSON object, alone on stdout")
    add("--quiet", action="store_true", help="say nothing but errors")
    add("--no-color", action="store_true", help="no colours; the environment's NO_COLOR does the same")
    add("--forget", action="store_true", help="forget the folders and answers of earlier runs")
    add("--demo", action="store_true", help="make two tiny models, merge them and let the child speak")
    add("--version", action="version", version=f"slerpmerge {__version__}")
    return parser


def recipe_of(answers: Mapping[str, Any]) -> tuple[MergeRecipe, RunOptions]:
    """The recipe that answers and flags make; what only a sweep asks for is left out."""
    return recipe_and_options({k: v for k, v in answers.items() if k not in ("sweep_texts", "recipe_file")})


JUDGEMENT_FLAGS = {"taste": "prompts", "perplexity": "texts", "score": "tasks", "map": "maps"}
CLASHING_FLAGS = {
    "inspect": {"child", "demo", "sweep", "dry_run", "taste", "perplexity", "score"},
    "child": {"demo", "sweep", "dry_run", "map"},
    "demo": {"sweep", "dry_run", "taste", "perplexity", "score", "map"},
    "dry_run": {"map"},
}
ANSWER_FLAGS = {"primary": "--primary", "secondary": "--secondary", "save_directory": "--save-dir", "schedule": "--t"}


def equivalent_command(
    recipe: MergeRecipe, options: RunOptions, more: Sequence[str] = (), recipe_file: Path | None = None
) -> str:
    """The command line that does the same without asking, ready to paste."""
    defaults = MergeRecipe(recipe.primary, recipe.secondary)
    words = ["--save-dir", str(options.save_directory)]
    if recipe_file is not None:
        words += ["--recipe", str(recipe_file)]
        defaults = read_recipe(recipe_file)
    else:
        words = ["--primary", short_name(recipe.primary), "--secondary", short_name(recipe.secondary), *words]
        for rule in () if "--sweep" in more else recipe.schedule.rules:
            values = ",".join(map(shortest_number, rule.gradient))
            words.append(f"--t={values}" if rule.name_filter == "*" else f"--t={rule.name_filter}={values}")
        words += ["--base", short_name(recipe.base)] if recipe.base is not None else []
    if recipe.vectors != defaults.vectors:
        words += ["--granularity", granularity_of(recipe.vectors)]
    usual = {**vars(defaults), **vars(RunOptions(options.save_directory))}
    chosen = {**vars(recipe), **vars(options)}
    flags = ("method", "dtype", "dot_threshold", "epsilon", "max_shard_bytes", "tokenizer", "chat_template", "device",
             "threads")  # fmt: skip
    for name in flags:
        value = chosen[name]
        if value != usual[name]:
            flag = "max-shard-size" if name == "max_shard_bytes" else name.replace("_", "-")
            words += [f"--{flag}", shortest_number(value) if isinstance(value, float) else str(value)]
    words += [f"--{name}" for name in ("extrapolate", "overwrite", "restart") if chosen[name]]
    quote = shlex.quote if os.name != "nt" else lambda word: f'"{word}"' if " " in word else word
    return " ".join(["python", *map(quote, [sys.argv[0] or "slerpmerge.py", *words, *more, "--yes"])])
