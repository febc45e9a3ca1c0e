"""One run: console, view, memory, and what stands where if something goes wrong."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slerpkit import __version__
from slerpkit.child.report import amend_report
from slerpkit.demo import DEMO_PROMPT, generate_text, make_demo_parents
from slerpkit.evaluation.harness import find_tasks, score
from slerpkit.evaluation.models import ComparedModels, check_generates_text, verify_with_transformers
from slerpkit.evaluation.perplexity import compare_perplexity, read_judged_text
from slerpkit.evaluation.sweep import MAX_TRIALS, Objective, find_t, forget_sweep
from slerpkit.evaluation.taste import taste
from slerpkit.files import is_inside, write_text
from slerpkit.merge.difference_map import map_of_merge, save_map
from slerpkit.merge.events import ChildPublished, MergeStopped, Noted
from slerpkit.merge.save_directory import check_save_directory
from slerpkit.merge.stream import measure_differences
from slerpkit.messages import SlerpMergeError, format_names, printable
from slerpkit.parents.checkpoint import open_checkpoint
from slerpkit.recipe import OPTION_FIELDS, RECIPE_FIELDS, VECTORS, MergeRecipe, RunOptions
from slerpkit.recipe_file import RECIPE_NAME, read_recipe, recipe_text
from slerpkit.schedule import Schedule, order_rules
from slerpkit.screen.console import mark_of, render_error
from slerpkit.screen.figures import render_map, render_perplexities, render_scores, render_sweep, render_tastes
from slerpkit.screen.finder import History
from slerpkit.screen.flags import ANSWER_FLAGS, CLASHING_FLAGS, JUDGEMENT_FLAGS, equivalent_command, recipe_of
from slerpkit.screen.panels import next_commands, render_curves, render_parity, render_plan, render_report
from slerpkit.screen.progress import MergeView
from slerpkit.screen.terminal import load_in_background, wait_for_torch
from slerpkit.screen.wizard import ANSWER_NAMES, Wizard, ask_answers, without_answer
from slerpkit.story import execute_merge, inspect_parents, prepare_merge

if TYPE_CHECKING:
    from rich.console import RenderableType

    from slerpkit.child.report import MergeReport
    from slerpkit.merge.difference_map import DifferenceMap
    from slerpkit.merge.events import Event, Observer
    from slerpkit.merge.plan import MergePlan
    from slerpkit.parents.checkpoint import Checkpoint

EXIT_DONE, EXIT_REFUSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
NOTHING_WRITTEN = "Nothing was written."
CLEANED_UP = "The unfinished child was removed; both parents are as they were."


class CommandLine:
    """One run: flags and answers in, a child or one clear message out."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        from rich.console import Console

        self.arguments = arguments
        if arguments.no_color:
            os.environ["NO_COLOR"] = "1"
            os.environ["PROMPT_TOOLKIT_COLOR_DEPTH"] = "DEPTH_1_BIT"
        # With --json the report alone goes to stdout; what people read goes beside it.
        # Bound to its stream, so that a bar goes on where a library's own prints are held back.
        self.console = Console(file=sys.stderr if arguments.json else sys.stdout, highlight=False)
        self.interactive = sys.stdin.isatty() and self.console.is_terminal and not arguments.json
        self.view = MergeView(self.console, quiet=arguments.quiet or arguments.json)
        self.memory = History()
        self.wizard = Wizard(self.console, self.memory, load_in_background)
        self.recipe_file = arguments.recipe
        self.wrote = NOTHING_WRITTEN
        self.deferred_error: SlerpMergeError | None = None  # of something that did not keep the run from its end

    def finish(self) -> int:
        """The status of a run that came to its end; raises what went wrong beside it."""
        if self.deferred_error is not None:
            raise self.deferred_error
        return EXIT_DONE

    def show(self, picture: RenderableType) -> None:
        if not (self.arguments.quiet or self.arguments.json):
            self.console.print(picture)

    def run(self) -> int:
        if self.arguments.forget:
            self.show("Forgotten." if self.memory.forget() else "There was nothing to forget.")
            return EXIT_DONE
        self.check_flags()
        if self.arguments.demo:
            return self.run_demo()
        if self.arguments.child is not None:
            return self.run_judgement()
        if self.arguments.inspect:
            return self.run_inspection()
        preset = self.preset()
        if self.lacks_answers(preset):
            return EXIT_USAGE
        if self.interactive and any(name not in preset for name in ("primary", "secondary", "save_directory")):
            self.show(f"[bold]slerpmerge {__version__}[/]  two parents, one child. Tab completes, Ctrl-C leaves.")
        preset = self.with_defaults(preset)
        remembered = {name: self.memory.folder(name) for name in ("primary", "secondary")}
        answers = ask_answers(preset, self.wizard, remembered)
        changeable = [name for name in ANSWER_NAMES if name not in preset] if self.interactive else []
        while True:
            try:
                plan = self.prepare(answers)
            except SlerpMergeError as error:
                if not changeable or self.arguments.dry_run:
                    raise
                self.show(render_error(self.console, error))
                decision = "change"
            else:
                if self.arguments.dry_run:
                    if self.arguments.json:
                        print(json.dumps(plan.as_dict()))
                    return EXIT_DONE
                plan = self.offer_template(plan)
                self.announce_sweep(self.yardstick(answers))
                decision = self.decide(plan)
            if decision != "change":
                break
            name = self.wizard.which_answer(changeable or list(ANSWER_NAMES))
            kept = without_answer(answers, name)
            if name in ("primary", "secondary") and answers["save_directory"] == self.wizard.proposed:
                kept = without_answer(kept, "save_directory")  # its name was made of the parents' names
                answers.pop("save_directory")
            answers = ask_answers(kept, self.wizard, answers)
        return self.act(decision, plan, self.yardstick(answers))

    def prepare(self, answers: Mapping[str, Any]) -> MergePlan:
        """The plan that answers and flags make. Raises SlerpMergeError where it, or what is to follow it, cannot be."""
        plan = prepare_merge(*recipe_of(answers))
        self.show_plan(plan)
        self.check_judgement((plan.parents.primary, plan.parents.secondary), answers)
        self.check_maps(plan.parents.by_role.values(), [plan.options.save_directory])
        return plan

    def announce_sweep(self, yardstick: Objective | None) -> None:
        """Says what a sweep will do, before it is begun."""
        if yardstick is not None:
            names = [path.name for path in yardstick.texts] or list(yardstick.tasks)
            made = f"up to {MAX_TRIALS - 2} children are made one after the other, and the best again"
            self.show(f"t will be found on {format_names(names)}: {made}.")

    def act(self, decision: str, plan: MergePlan, yardstick: Objective | None) -> int:
        """Starts the merge, saves it as a recipe, or leaves."""
        if decision == "start":
            return self.merge(plan, yardstick)
        if decision != "save":
            self.show(NOTHING_WRITTEN)
            return EXIT_DONE
        self.save_recipe(plan)
        if yardstick is not None:
            self.show("It has t = 0.5, where a search begins. The command that searches:")
            self.show_command(plan.recipe, plan.options, yardstick)
        return EXIT_DONE

    def preset(self) -> dict[str, Any]:
        """The fields of MergeRecipe that flags and a recipe file give. A flag goes before the file."""
        names = RECIPE_FIELDS + OPTION_FIELDS
        given = {name: value for name in names if (value := getattr(self.arguments, name, None)) is not None}
        if self.arguments.granularity is not None:
            given["vectors"] = VECTORS[self.arguments.granularity]
        if self.arguments.rules:
            given["schedule"] = order_rules(self.arguments.rules)
        if self.arguments.sweep:
            given["schedule"] = Schedule.constant(0.5)  # where it begins
        if self.arguments.recipe is None:
            return given
        decided = ("primary", "secondary", "base", "schedule", "method", "vectors")
        if clashing := [name for name in decided if name in given]:
            words = {"schedule": "t", "vectors": "granularity"}
            flags = ", ".join(f"--{words.get(name, name)}" for name in clashing)
            raise SlerpMergeError(f"The recipe already says what {flags} would.", "Leave out the one or the other.")
        return {**vars(read_recipe(self.arguments.recipe)), **given, "recipe_file": self.arguments.recipe}

    def lacks_answers(self, preset: Mapping[str, Any]) -> bool:
        """Whether answers are missing that nobody is there to give; says whose flags would give them."""
        missing = self.missing_flags(preset)
        if missing:
            text = f"slerpmerge: no terminal to ask at; give {', '.join(missing)}"
            print(text + " (--yes takes every default that is left)." * ("--yes" in missing), file=sys.stderr)
        return bool(missing)

    def missing_flags(self, preset: Mapping[str, Any]) -> list[str]:
        """Flags for the answers that nobody is there to give."""
        if self.interactive:
            return []
        missing = [flag for name, flag in ANSWER_FLAGS.items() if name not in preset]
        settled = self.arguments.yes or self.arguments.dry_run or self.arguments.inspect
        if settled and "--t" in missing:
            missing.remove("--t")
        return missing if settled else [*missing, "--yes"]

    def with_defaults(self, preset: dict[str, Any]) -> dict[str, Any]:
        """What --yes and --dry-run take without asking."""
        settled = self.arguments.yes or (self.arguments.dry_run and not self.interactive)
        return {"schedule": Schedule.constant(0.5), **preset} if settled else preset

    def decide(self, plan: MergePlan) -> str:
        """What to do with a plan: "start", "leave", "change" an answer, or "save" a recipe."""
        if plan.kinship.warning:
            self.show(f"[yellow]{plan.kinship.warning}[/]")
        loses = plan.leftover is not None and plan.leftover.reason != ""
        if loses and not self.arguments.yes:
            self.show("[yellow]The finished files of the merge that stands there are of another; they would go.[/]")
        if self.arguments.yes:
            return "start"
        while True:
            decision = self.wizard.decide(plan.kinship.warning is None and not loses)
            if decision != "inspect":
                return decision
            with self.view:
                found = measure_differences(plan.parity.pairs, plan.recipe, plan.options, self.observe)
            self.show(render_map(self.console, found))

    def save_recipe(self, plan: MergePlan) -> None:
        """Writes the merge as a recipe, and says how to make the child of it."""
        path = self.wizard.ask_recipe_file().resolve()
        write_text(path, recipe_text(plan.recipe, plan.parents.by_role, path.parent))
        self.wrote = f"The recipe stands in {path}."
        self.show(self.wrote)
        self.show_command(plan.recipe, plan.options, recipe_file=path)

    def show_command(
        self,
        recipe: MergeRecipe,
        options: RunOptions,
        yardstick: Objective | None = None,
        recipe_file: Path | None = None,
    ) -> None:
        """The command for scripts that does what was answered."""
        more = ["--verify", self.arguments.verify] if self.arguments.verify else []
        more += ["--sweep"] if yardstick is not None else []
        texts = {*self.arguments.texts, *(yardstick.texts if yardstick is not None else ())}
        for flag, values in (("--taste", self.arguments.prompts), ("--perplexity", sorted(texts))):
            more += [word for value in values for word in (flag, str(value))]
        more += ["--score", self.arguments.tasks] if self.arguments.tasks else []
        more += ["--include-path", str(self.arguments.include_path)] if self.arguments.include_path else []
        self.console.print("The same without questions:", style="dim")
        self.console.print(
            printable(equivalent_command(recipe, options, more, recipe_file or self.recipe_file)),
            soft_wrap=True,
            markup=False,
        )

    def merge(self, plan: MergePlan, yardstick: Objective | None = None) -> int:
        if self.interactive and not self.arguments.yes:
            self.show_command(plan.recipe, plan.options, yardstick)
        if self.interactive:
            self.memory.remember(plan.recipe, plan.options, self.wizard.blend_text)
        sweep = None
        if yardstick is not None:
            plan, sweep = self.sweep(plan, yardstick)
        self.wrote = CLEANED_UP
        started = time.perf_counter()
        wait_for_torch()
        with self.view:
            report = execute_merge(plan, self.observe)
        report = dataclasses.replace(report, total_seconds=time.perf_counter() - started)
        self.show(render_report(self.console, report))
        found: dict[str, Any] = {}
        if sweep is not None:
            found |= self.keep(report.child, {"sweep": sweep})
            if self.deferred_error is None:
                forget_sweep(plan.options.save_directory)
        for path in self.arguments.maps:
            self.save_map(map_of_merge(report.merged, plan.recipe.compared_vectors), path)
        report = self.verify_fully(report)
        parents = ("primary", plan.parents.primary.folder), ("secondary", plan.parents.secondary.folder)
        lineup = ComparedModels((*parents, ("child", report.child)), plan.options.device)
        found |= self.judge(lineup, judged_by_sweep=sweep is not None)
        if self.interactive and not self.arguments.yes and self.can_speak(plan):
            self.judge_as_asked(lineup)
        if self.arguments.json:
            print(json.dumps({**report.as_dict(), **found}))
        elif not self.arguments.quiet:
            self.console.print("Try it, convert it, share it:", style="bold")
            for command in next_commands(report):
                self.console.print(printable(command), soft_wrap=True, markup=False)
        return self.finish()

    def check_flags(self) -> None:
        """Raises SlerpMergeError where flags ask for what cannot be had together."""
        arguments = self.arguments
        given = {flag for flag in ("inspect", "child", "demo", "sweep", "dry_run") if getattr(arguments, flag)}
        given |= {flag for flag, name in JUDGEMENT_FLAGS.items() if getattr(arguments, name)}
        for flag, others in CLASHING_FLAGS.items():
            if flag in given and (clashing := sorted(given & others)):
                names = ", ".join(f"--{name.replace('_', '-')}" for name in clashing)
                raise SlerpMergeError(f"--{flag.replace('_', '-')} does not go with {names}.", "Leave out one of them.")
        for path in arguments.maps:
            if not path.resolve().parent.is_dir():
                raise SlerpMergeError(f"The folder of {path} is not there.", "Save the map into one that is.")
            if path.exists() and not arguments.overwrite:
                raise SlerpMergeError(f"{path} exists already.", "Give another name, or --overwrite.")
        if arguments.sweep and (arguments.rules or arguments.recipe):
            raise SlerpMergeError("A sweep finds t itself.", "Leave out --t and --recipe, or --sweep.")
        if arguments.sweep and not (arguments.texts or arguments.tasks):
            what = "A sweep needs something to measure children by."
            raise SlerpMergeError(what, "Give --perplexity FILE, or --score TASK.")
        if arguments.include_path and not arguments.tasks:
            raise SlerpMergeError("--include-path goes with --score.", "Name the tasks too.")

    def yardstick(self, answers: Mapping[str, Any]) -> Objective | None:
        """What t is to be found by, where it is to be found."""
        if texts := answers.get("sweep_texts"):
            return Objective(texts)
        if not self.arguments.sweep:
            return None
        texts = tuple(self.arguments.texts)
        return Objective(texts, () if texts else self.tasks, self.arguments.include_path)

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(filter(None, map(str.strip, (self.arguments.tasks or "").split(","))))

    def check_judgement(self, parents: Sequence[Checkpoint], answers: Mapping[str, Any]) -> None:
        """Raises SlerpMergeError, before anything is made, where what was asked for afterwards cannot be done."""
        arguments, texts = self.arguments, [*self.arguments.texts, *answers.get("sweep_texts", ())]
        for path in texts:
            read_judged_text(path)
        if texts or arguments.prompts or self.tasks:
            for parent in parents:
                check_generates_text(parent, reads_on=bool(texts))
            ComparedModels(
                tuple((str(number), parent.folder) for number, parent in enumerate(parents))
            ).tokenizer_folder("0")
        if self.tasks:
            find_tasks(self.tasks, arguments.include_path)

    def check_maps(self, models: Iterable[Checkpoint | None], folders: Iterable[Path] = ()) -> None:
        """Raises SlerpMergeError where a map would be written among a model's files."""
        places = [model.folder for model in models if model is not None] + list(folders)
        for path in self.arguments.maps:
            if any(is_inside(path.resolve(), place.resolve()) for place in places):
                raise SlerpMergeError(f"{path} lies in a model's folder.", "Save the map somewhere else.")

    @staticmethod
    def can_speak(plan: MergePlan) -> bool:
        """Whether it is worth offering a taste, by what the config calls itself; transformers need not load for it."""
        kinds = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
        return plan.tokenizer_role is not None and plan.parents.primary.architecture.endswith(kinds)

    def sweep(self, plan: MergePlan, yardstick: Objective) -> tuple[MergePlan, dict[str, Any]]:
        """(the plan for the best t, what the sweep found)."""

        def observe(event: Event) -> None:
            if isinstance(event, Noted):
                self.wrote = "The child was not made. What the sweep measured is kept; the same command carries on."
            self.observe(event)

        with self.view:
            entry = find_t(plan, yardstick, observe)
        self.show(render_sweep(self.console, entry))
        schedule = Schedule.constant(entry["best_t"])
        return prepare_merge(dataclasses.replace(plan.recipe, schedule=schedule), plan.options), entry

    def judge(self, lineup: ComparedModels, judged_by_sweep: bool = False) -> dict[str, Any]:
        """What flags ask of parents and child; it joins the child's report and card."""
        arguments = self.arguments
        found: dict[str, Any] = {}
        if arguments.prompts:
            found |= self.find(lineup, "tastes", functools.partial(taste, lineup, arguments.prompts))
        if arguments.texts and not judged_by_sweep:
            found |= self.find(lineup, "perplexities", functools.partial(compare_perplexity, lineup, arguments.texts))
        if self.tasks and not (judged_by_sweep and not arguments.texts):
            scored = functools.partial(score, lineup, self.tasks, arguments.include_path)
            found |= self.find(lineup, "scores", scored)
        return found

    def find(self, lineup: ComparedModels, kind: str, work: Callable[[Observer], list[Any]]) -> dict[str, list[Any]]:
        """One kind of judgement: found, shown, and added to the child's report."""
        renderers = {"tastes": render_tastes, "perplexities": render_perplexities, "scores": render_scores}
        with self.view:
            entries = work(self.observe)
        self.show(renderers[kind](self.console, entries))
        return self.keep(dict(lineup.folders)["child"], {kind: entries})

    def keep(self, child: Path, found: dict[str, Any]) -> dict[str, Any]:
        """Adds what was found to a child's report, and returns it. Where that cannot be, it is told at the end."""
        try:
            amend_report(child, found)
        except SlerpMergeError as error:
            self.deferred_error = error
        return found

    def judge_as_asked(self, lineup: ComparedModels) -> None:
        """Tastes and perplexities until the person has had enough. What goes wrong is told, and the child stands."""
        while (wanted := self.wizard.ask_next()) != "leave":
            try:
                if wanted == "perplexity":
                    path = self.wizard.ask_text_file("Text file")
                    self.find(lineup, "perplexities", functools.partial(compare_perplexity, lineup, [path]))
                elif prompts := self.wizard.ask_prompts():
                    self.find(lineup, "tastes", functools.partial(taste, lineup, prompts))
            except SlerpMergeError as error:
                self.show(render_error(self.console, error))

    def run_judgement(self) -> int:
        """--child: a child that stands already, and the parents that its recipe names."""
        child = self.arguments.child
        if not (self.arguments.prompts or self.arguments.texts or self.tasks):
            raise SlerpMergeError("There is nothing to ask the child.", "Give --taste, --perplexity or --score.")
        if not (child / RECIPE_NAME).is_file():
            what = f"{child} has no {RECIPE_NAME}, so its parents are not known."
            raise SlerpMergeError(what, "Give the folder of a child that slerpmerge made.")
        recipe = read_recipe(child / RECIPE_NAME)
        parents = ("primary", recipe.primary), ("secondary", recipe.secondary)
        self.check_judgement([open_checkpoint(folder) for _, folder in parents], {})
        found = self.judge(ComparedModels((*parents, ("child", child)), self.arguments.device or "auto"))
        if self.arguments.json:
            print(json.dumps(found))
        return self.finish()

    def run_inspection(self) -> int:
        """--inspect: how the parents differ. No child, and no save directory."""
        preset = {**self.preset(), "save_directory": Path()}
        preset.setdefault("schedule", Schedule.constant(0.5))
        if self.lacks_answers(preset):
            return EXIT_USAGE
        remembered = {name: self.memory.folder(name) for name in ("primary", "secondary")}
        answers = ask_answers(preset, self.wizard, remembered)
        folders = [answers[name] for name in ("primary", "secondary", "base") if answers.get(name) is not None]
        self.check_maps([], folders)
        wait_for_torch()
        with self.view:
            found = inspect_parents(*recipe_of(answers), self.observe)
        self.show(render_map(self.console, found))
        for path in self.arguments.maps:
            self.save_map(found, path)
        if self.arguments.json:
            print(json.dumps(found.as_dict()))
        return EXIT_DONE

    def save_map(self, found: DifferenceMap, path: Path) -> None:
        save_map(found, path, "How the parents differ")
        self.wrote = f"The map stands in {path}."
        self.show(self.wrote)

    def offer_template(self, plan: MergePlan) -> MergePlan:
        """Asks whether a child without a chat template shall have the other parent's, where that fits its tokens."""
        role = plan.parity.offered_template
        if role is None or self.arguments.yes:
            return plan
        if not self.wizard.confirm(f"The child has no chat template; take the {role}'s?", default=True):
            return plan
        return prepare_merge(dataclasses.replace(plan.recipe, chat_template=role), plan.options)

    def observe(self, event: Event) -> None:
        if isinstance(event, MergeStopped):
            files = f"{event.kept} of {event.total} weight files are finished and kept"
            self.wrote = f"{files}; the same command carries on."
        elif isinstance(event, ChildPublished):
            self.wrote = f"The child stands in {event.child}."
        self.view.observe(event)

    def show_plan(self, plan: MergePlan) -> None:
        self.show(render_parity(self.console, plan.parity))
        self.show(render_plan(self.console, plan))
        if self.arguments.dry_run or len({tensor.t for tensor in plan.tensors}) > 1:
            self.show(render_curves(self.console, plan))

    def verify_fully(self, report: MergeReport) -> MergeReport:
        """--verify full, or the wizard's offer of it."""
        wanted = self.arguments.verify == "full"
        if self.arguments.verify is None and self.interactive and not self.arguments.yes:
            wanted = self.wizard.confirm("Load the child with transformers, to be sure?", default=True)
        if not wanted:
            return report
        checks = verify_with_transformers(report.child)
        for check in checks:
            self.show(f"{mark_of(self.console, 'resolved')} {check}")
        verified = dataclasses.replace(report.verified, checks=report.verified.checks + checks)
        content = {**report.content, "checks": [*report.content["checks"], *checks]}
        return dataclasses.replace(report, verified=verified, content=content)

    def run_demo(self) -> int:
        folder = self.arguments.save_directory or Path(tempfile.mkdtemp(prefix="slerpmerge-demo-"))
        check_save_directory(folder / "demo-child", (), overwrite=True)
        self.show("Teaching two tiny models, one to sail and one to garden (some seconds) ...")
        primary, secondary = make_demo_parents(folder)
        recipe, options = MergeRecipe(primary, secondary), RunOptions(folder / "demo-child", overwrite=True)
        self.arguments.yes = True
        self.arguments.verify = "full"
        plan = prepare_merge(recipe, options)
        self.show_plan(plan)
        status = self.merge(plan)
        for name in (primary, secondary, options.save_directory):
            self.show(f"[bold]{name.name}[/]: {generate_text(name, DEMO_PROMPT)}")
        return status


def show_fault(fault: SlerpMergeError, wrote: str) -> None:
    """The one message that an error ends in, and what stands where if something does."""
    from rich.console import Console

    errors = Console(stderr=True, highlight=False)
    hint = fault.hint if wrote in (NOTHING_WRITTEN, CLEANED_UP) else f"{fault.hint} {wrote}"
    with contextlib.suppress(OSError):
        errors.print(render_error(errors, SlerpMergeError(fault.message, hint)), soft_wrap=not errors.is_terminal)
