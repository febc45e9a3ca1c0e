"""Every question as a flag, what flags answer, and the command that says the same without questions.

Functions of the arguments and of whether somebody can be asked; nothing here asks or shows. `--help` and `--version`
end here, so that no library and as little of the house as can be is loaded. Read answers.py before this.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from slerpkit import __version__
from slerpkit.files import given_path
from slerpkit.lazy import LazyModule, lazy_modules
from slerpkit.maths import COLINEAR_DOT, TINY_NORM
from slerpkit.messages import SlerpMergeError, shortest_number
from slerpkit.recipe import (
    CHILD_DTYPES,
    DEVICES,
    MAX_THREADS,
    METHODS,
    OPTION_FIELDS,
    RECIPE_FIELDS,
    TEMPLATE_CHOICES,
    TOKENIZER_CHOICES,
    VECTORS,
    MergeRecipe,
    RunOptions,
    check_recipe,
    granularity_of,
)
from slerpkit.schedule import BLEND_NAMES, name_of_blend, order_rules
from slerpkit.screen.answers import QUESTIONS, Answers, Blend
from slerpkit.screen.flag_values import (
    format_size,
    parse_map_path,
    parse_prompt,
    parse_size,
    parse_t,
    parse_tasks,
    parse_within,
    usage_type,
)

if TYPE_CHECKING:
    from slerpkit import demo, recipe_file
    from slerpkit.evaluation import objectives
    from slerpkit.parents import adapters, resolver
else:  # what only some flags need
    demo, recipe_file = LazyModule("slerpkit.demo"), LazyModule("slerpkit.recipe_file")
    objectives = LazyModule("slerpkit.evaluation.objectives")
    adapters, resolver = lazy_modules("slerpkit.parents", "adapters", "resolver")


class WrongUsage(SlerpMergeError):
    """Flags that ask for what can never be, or that say too little where nobody can be asked."""


class KeepModel(argparse.Action):
    """Keeps a model's folder under its flag, and the base that an adapter was given under `adapter_bases`."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        folder, base = values
        setattr(namespace, self.dest, folder)
        if base is not None:
            namespace.adapter_bases = {**getattr(namespace, "adapter_bases", {}), folder: base}


class FlagParser(argparse.ArgumentParser):
    """argparse, whose refusals are one message like all others."""

    def error(self, message: str) -> NoReturn:
        """Raises WrongUsage in place of argparse's own end, which lists every flag before what is wrong."""
        raise WrongUsage(f"{message[:1].upper()}{message[1:].rstrip('.')}.", "--help lists every flag.")


@contextlib.contextmanager
def refusals_are_wrong_usage() -> Iterator[None]:
    """What is refused in here was said by flags alone."""
    try:
        yield
    except SlerpMergeError as error:
        raise WrongUsage(error.message, error.hint) from error


EXAMPLES = """examples:
  python slerpmerge.py --primary A --secondary B --yes
  python slerpmerge.py --primary A --secondary B --t ramp --taste "The sea"
  python slerpmerge.py --primary A --secondary B --sweep --perplexity text.txt

Exit status: 0 done, 1 refused or failed, 2 wrong usage,
130 interrupted."""


def find_given(text: str) -> tuple[Path, Path | None]:
    """(a model's folder, an adapter's base where it is named too), what is there being meant as it is written."""
    return adapters.find_with_base(text, lambda part: resolver.find_model(part, read=given_path))


def build_parser() -> argparse.ArgumentParser:
    """Every flag, with its help, in groups."""
    parser = FlagParser(
        prog="slerpmerge.py",
        usage="python slerpmerge.py [flags]",
        description="Merge two language models by SLERP.\nWhat no flag gives is asked for.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    for title, add_flags in FLAG_GROUPS.items():
        add_flags(parser.add_argument_group(title).add_argument)
    return parser


def add_what_to_merge(add: Callable[..., object]) -> None:
    """Flags for the models."""
    model = {"type": usage_type(find_given), "action": KeepModel, "metavar": "MODEL"}
    add("--primary", **model, help="the primary (t = 0): a folder, or org/name[@revision]; BASE+ADAPTER for an adapter")
    add("--secondary", **model, help="the secondary (t = 1)")
    add("--base", **model, help="blend what both parents learned since this model")
    add("--recipe", type=usage_type(given_path), metavar="FILE",
        help="a mergekit recipe: slerp, nuslerp, linear or passthrough")  # fmt: skip


def add_how_to_blend(add: Callable[..., object]) -> None:
    """Flags for t, and for what is done with it."""
    add("--t", dest="rules", type=usage_type(parse_t), action="extend", metavar="[FILTER=]T",
        help=f"{BLEND_NAMES}; or 0 to 1, or a comma list: a gradient over the layers; again with a filter for tensors "
        "whose name holds it (default even)")  # fmt: skip
    add("--sweep", action="store_true", help="find t by the --perplexity texts, or else the --score tasks, and make it")
    add("--method", choices=METHODS, help="default slerp; slerp-norm also interpolates the norms")
    add("--granularity", dest="vectors", choices=VECTORS, help="what nuslerp takes as one vector (default tensor)")
    add("--extrapolate", action="store_true", default=None, help="allow t outside 0 to 1")
    cosine = parse_within(float, sys.float_info.min, 1, "a cosine above 0, up to 1")
    norm = parse_within(float, 0, sys.float_info.max, "a norm from 0 on")
    add("--dot-threshold", type=cosine, metavar="COSINE", help=f"straight line above this (default {COLINEAR_DOT})")
    add("--epsilon", type=norm, metavar="NORM", help=f"a smaller norm counts as zero (default {TINY_NORM:g})")


def add_the_child(add: Callable[..., object]) -> None:
    """Flags for where the child goes, and what it is like."""
    add("--save-dir", dest="save_directory", type=usage_type(given_path), metavar="FOLDER",
        help="where the child goes (default with --yes, --dry-run or --sweep: a new folder here)")  # fmt: skip
    add("--overwrite", action="store_true", default=None, help="replace a model that stands in the save directory")
    add("--dtype", choices=CHILD_DTYPES, help="default auto: the primary's")
    add("--max-shard-size", dest="max_shard_bytes", type=usage_type(parse_size), metavar="SIZE", help="default 5GB")
    add("--tokenizer", choices=TOKENIZER_CHOICES, help="whose tokenizer the child gets; union: with the other's tokens")
    add("--chat-template", choices=TEMPLATE_CHOICES[1:], help="whose, or which, it gets (default: the tokenizer's)")
    add("--accept", action="append", metavar="KEY", help="let a setting differ; refusals name it; may be given again")


def add_before_and_after(add: Callable[..., object]) -> None:
    """Flags for what is known before a merge, and of a child."""
    add("--dry-run", action="store_true", help="check and plan, write nothing")
    add("--inspect", action="store_true", help="measure how the parents differ, layer by component; write no child")
    add("--map", dest="maps", type=usage_type(parse_map_path), action="append", default=[], metavar="FILE",
        help="save that map as FILE, .svg or .json")  # fmt: skip
    add("--verify", choices=("quick", "full"), help="full: transformers must load the child, or it is not kept")
    add("--taste", dest="prompts", type=usage_type(parse_prompt), action="append", default=[], metavar="PROMPT",
        help="let parents and child answer it side by side; may be given again")  # fmt: skip
    add("--perplexity", dest="texts", type=usage_type(given_path), action="append", default=[], metavar="FILE",
        help="compare how well parents and child predict a text; may be given again")  # fmt: skip
    add("--score", dest="tasks", type=parse_tasks, default=(), metavar="TASKS",
        help="evaluate all three on tasks of lm-eval, separated by commas")  # fmt: skip
    add("--include-path", type=usage_type(given_path), metavar="FOLDER",
        help="where YAML tasks of your own for --score are")  # fmt: skip
    add("--upload", metavar="NAME", help="upload the child to the Hugging Face Hub, for you alone to see")
    add("--public", action="store_true", help="let everybody see what is uploaded")
    add("--child", type=usage_type(given_path), metavar="FOLDER",
        help="taste, measure or score a child that stands already")  # fmt: skip


def add_how_it_runs(add: Callable[..., object]) -> None:
    """Flags that make no difference to the child, or need none."""
    add("--yes", action="store_true", help="take every default and start without asking")
    add("--restart", action="store_true", default=None, help="discard what an earlier run left unfinished")
    add("--device", choices=DEVICES, help="where the arithmetic runs (default auto)")
    count = parse_within(int, 1, 1024, "a number of threads from 1 on")
    add("--threads", type=count, metavar="N", help=f"default: the cores, up to {MAX_THREADS}")
    add("--json", action="store_true", help="print the report as one JSON object, alone on stdout")
    add("--quiet", action="store_true", help="say nothing but errors")
    add("--no-color", action="store_true", help="no colours; the environment's NO_COLOR does the same")
    add("--forget", action="store_true", help="forget the folders and answers of earlier runs")
    add("--demo", action="store_true", help="make two tiny models, merge them and let the child speak")
    add("--version", action="version", version=f"slerpmerge {__version__}", help="print the version")
    add("-h", "--help", action="help", help="print this")


def add_hub_flags(add: Callable[..., object]) -> None:
    """The flags for parents that are not on this machine, or not in one place."""
    add("--download", action="store_true", help="fetch parents that are only on the Hugging Face Hub, without asking")
    add("--stream-parents", action="store_true", default=None,
        help="fetch each of their files when the merge comes to it, and drop it afterwards (small disks)")  # fmt: skip
    add("--follow-links", action="store_true", default=None, help="copy what links in a parent's folder lead to, too")


FLAG_GROUPS = {
    "what to merge": add_what_to_merge,
    "parents that are not here": add_hub_flags,
    "how to blend": add_how_to_blend,
    "the child": add_the_child,
    "before and after": add_before_and_after,
    "how it runs": add_how_it_runs,
}

EVALUATION_FLAGS = {"taste": "prompts", "perplexity": "texts", "score": "tasks", "map": "maps"}
EVALUATED = {"taste", "perplexity", "score"}
CLASHING_FLAGS = {
    "inspect": {"child", "demo", "sweep", "dry_run", "taste", "perplexity", "score", "upload"},
    "child": {"demo", "sweep", "dry_run", "map", "upload"},
    "demo": {"sweep", "dry_run", "taste", "perplexity", "score", "map", "upload"},
    "dry_run": {"map", "upload"},
}
ANSWER_FLAGS = {"primary": "--primary", "secondary": "--secondary", "save_directory": "--save-dir", "blend": "--t"}


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The flags, checked against each other; `--demo` answers more of them than it was given.

    Raises WrongUsage where they mean nothing, or ask for what cannot be had together, and SlerpMergeError where a map
    cannot be saved. `--help` and `--version` end the process, as argparse has it.
    """
    arguments = build_parser().parse_args(argv)
    check_flags(arguments)
    if arguments.demo:
        answers = {"yes": True, "overwrite": True, "verify": "full", "prompts": [demo.DEMO_PROMPT]}
        return argparse.Namespace(**{**vars(arguments), **answers})
    return arguments


def check_flags(arguments: argparse.Namespace) -> None:
    """Raises WrongUsage where flags ask for what cannot be had together, SlerpMergeError where no map can be saved."""
    given = {flag for flag in ("inspect", "child", "demo", "sweep", "dry_run") if getattr(arguments, flag)}
    given |= {"upload"} if arguments.upload is not None else set()
    given |= {flag for flag, name in EVALUATION_FLAGS.items() if getattr(arguments, name)}
    for flag, others in CLASHING_FLAGS.items():
        if flag in given and (clashing := sorted(given & others)):
            names = ", ".join(f"--{name.replace('_', '-')}" for name in clashing)
            raise WrongUsage(f"--{flag.replace('_', '-')} does not go with {names}.", "Leave out one of them.")
    for path in arguments.maps:
        if not path.resolve().parent.is_dir():
            raise SlerpMergeError(f"The folder of {path} is not there.", "Save the map into one that is.")
        if path.exists() and not arguments.overwrite:
            raise SlerpMergeError(f"{path} exists already.", "Give another name, or --overwrite.")
    if arguments.sweep and (arguments.rules or arguments.recipe):
        raise WrongUsage("A sweep finds t itself.", "Leave out --t and --recipe, or --sweep.")
    if arguments.sweep and not (arguments.texts or arguments.tasks):
        what = "A sweep needs something to measure children by."
        raise WrongUsage(what, "Give --perplexity FILE, or --score TASK.")
    if arguments.include_path and not arguments.tasks:
        raise WrongUsage("--include-path goes with --score.", "Name the tasks too.")
    if arguments.stream_parents and (arguments.sweep or arguments.inspect or EVALUATED & given):
        what = "Streamed parents are gone when their child stands: nothing can be held against them, or made anew."
        raise WrongUsage(what, "Leave out --stream-parents, or --sweep, --inspect, --taste, --perplexity and --score.")
    if arguments.public and arguments.upload is None:
        raise WrongUsage("--public goes with --upload.", "Name the repository too: --upload NAME.")
    if arguments.child is not None and not (arguments.prompts or arguments.texts or arguments.tasks):
        raise WrongUsage("There is nothing to ask the child.", "Give --taste, --perplexity or --score.")


def wants_evaluation(arguments: argparse.Namespace) -> bool:
    """Whether flags ask for a map, or for something of the finished child that must be checked before it is made."""
    return any(getattr(arguments, name) for name in EVALUATION_FLAGS.values())


def answers_given(arguments: argparse.Namespace) -> Answers:
    """What flags and a recipe file answer. A flag goes before the file.

    Raises WrongUsage where flags ask for what cannot be, or say what the file says; SlerpMergeError where the file
    cannot be read.
    """
    asked = {*QUESTIONS, "schedule", "overwrite", "restart"}
    given = {name: getattr(arguments, name, None) for name in (*RECIPE_FIELDS, *OPTION_FIELDS) if name not in asked}
    settings = {name: value for name, value in given.items() if value is not None}
    if "vectors" in settings:
        settings["vectors"] = VECTORS[settings["vectors"]]
    if "accept" in settings:
        settings["accept"] = tuple(settings["accept"])
    with refusals_are_wrong_usage():
        blend = Blend(order_rules(arguments.rules)) if arguments.rules else None
    if arguments.sweep:
        texts = tuple(arguments.texts)
        blend = Blend(objective=objectives.Objective(texts, () if texts else arguments.tasks, arguments.include_path))
    answers = Answers(
        arguments.primary,
        arguments.secondary,
        arguments.save_directory,
        blend,
        arguments.overwrite,
        arguments.restart,
        settings,
    )
    if arguments.recipe is not None:
        return answers_of_recipe(arguments.recipe, answers)
    with refusals_are_wrong_usage():
        check_recipe(answers.recipe)
    return answers


def answers_of_recipe(path: Path, given: Answers) -> Answers:
    """A recipe file's answers, and those that flags give beside it. Raises WrongUsage where both say the same."""
    decided = {"primary": given.primary, "secondary": given.secondary, "t": given.blend}
    clashing = [word for word, value in decided.items() if value is not None] + given.words_of_recipes()
    if clashing:
        what = f"The recipe already says what {', '.join(f'--{word}' for word in clashing)} would."
        raise WrongUsage(what, "Leave out the one or the other.")
    recipe = recipe_file.read_recipe(path)
    blend = Blend(recipe.schedule, recipe=recipe, recipe_file=path)
    return dataclasses.replace(given, primary=recipe.primary, secondary=recipe.secondary, blend=blend)


def proposes_save_directory(arguments: argparse.Namespace) -> bool:
    """Whether the proposed save directory is taken without asking, where no flag gives one."""
    return arguments.yes or arguments.dry_run or arguments.sweep


def settle(arguments: argparse.Namespace, interactive: bool) -> Answers:
    """What flags answer, with what --yes and --dry-run take without asking, but for the save directory.

    Raises WrongUsage where more must be known and nobody can be asked, and as answers_given does.
    """
    given = answers_given(arguments)
    if not interactive:
        check_nothing_is_missing(arguments, given)
    takes_defaults = arguments.yes or arguments.inspect or (arguments.dry_run and not interactive)
    return dataclasses.replace(given, blend=Blend()) if takes_defaults and given.blend is None else given


def check_nothing_is_missing(arguments: argparse.Namespace, given: Answers) -> None:
    """Raises WrongUsage where flags leave a question open, or whether to start."""
    takes_defaults = arguments.yes or arguments.dry_run or arguments.inspect
    unneeded = {"blend"} if takes_defaults else set()
    unneeded |= {"save_directory"} if arguments.inspect or proposes_save_directory(arguments) else set()
    missing = [ANSWER_FLAGS[name] for name in given.unanswered() if name not in unneeded]
    missing += [] if takes_defaults else ["--yes"]
    if missing:
        defaults = "--yes takes every default that is left." if "--yes" in missing else "--help lists every flag."
        raise WrongUsage(f"There is no terminal to ask at; give {', '.join(missing)}.", defaults)


def equivalent_command(
    recipe: MergeRecipe, options: RunOptions, more: Sequence[str] = (), recipe_path: Path | None = None
) -> str:
    """The command line that does the same without asking, ready to paste. more: words for what else is asked for."""
    if recipe_path is not None:
        defaults = recipe_file.read_recipe(recipe_path)
        words = ["--save-dir", str(options.save_directory), "--recipe", str(recipe_path)]
    else:
        defaults = MergeRecipe(recipe.primary, recipe.secondary)
        words = list(model_words(recipe, options, is_swept="--sweep" in more))
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
            said = shortest_number(value) if isinstance(value, float) else str(value)
            words += [f"--{flag}", format_size(value) if name == "max_shard_bytes" else said]
    words += [word for key in recipe.accept if recipe.accept != defaults.accept for word in ("--accept", key)]
    words += [
        f"--{name.replace('_', '-')}"
        for name in ("extrapolate", "overwrite", "restart", "follow_links", "stream_parents")
        if chosen[name]
    ]
    quote = shlex.quote if os.name != "nt" else lambda word: f'"{word}"' if " " in word else word
    return " ".join(["python", *map(quote, [sys.argv[0] or "slerpmerge.py", *words, *more, "--yes"])])


def model_words(recipe: MergeRecipe, options: RunOptions, is_swept: bool) -> Iterator[str]:
    """The flags for models and t, where no recipe file says them."""
    yield from ("--primary", model_word(recipe.primary, recipe))
    yield from ("--secondary", model_word(recipe.secondary, recipe))
    yield from ("--save-dir", str(options.save_directory))
    name = name_of_blend(recipe.schedule)
    if name is not None and not is_swept:
        yield from ("--t", name)
    for rule in () if is_swept or name is not None else recipe.schedule.rules:
        values = ",".join(map(shortest_number, rule.gradient))
        yield f"--t={values}" if rule.name_filter == "*" else f"--t={rule.name_filter}={values}"
    if recipe.base is not None:
        yield from ("--base", model_word(recipe.base, recipe))


def model_word(folder: Path, recipe: MergeRecipe) -> str:
    """What finds a model again, with the base that an adapter was given."""
    base, name = recipe.adapter_bases.get(folder), resolver.short_name(folder)
    return name if base is None else f"{resolver.short_name(base)}+{name}"


def evaluation_words(arguments: argparse.Namespace, objective: objectives.Objective | None) -> Iterator[str]:
    """The flags for what follows a merge, or comes before it: a sweep, verification, tastes and figures."""
    if arguments.verify:
        yield from ("--verify", arguments.verify)
    if arguments.upload is not None:
        yield from ("--upload", arguments.upload, *(["--public"] if arguments.public else []))
    if objective is not None:
        yield "--sweep"
    for prompt in arguments.prompts:
        yield from ("--taste", prompt)
    for path in dict.fromkeys((*arguments.texts, *(objective.texts if objective is not None else ()))):
        yield from ("--perplexity", str(path))
    if arguments.tasks:
        yield from ("--score", ",".join(arguments.tasks))
    if arguments.include_path:
        yield from ("--include-path", str(arguments.include_path))
