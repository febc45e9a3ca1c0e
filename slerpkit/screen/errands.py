"""What can be asked for instead of a merge: how the parents differ, and what a child that stands is worth.

Read session.py and afterwards.py before this.
"""

from __future__ import annotations

from slerpkit import recipe_file, story
from slerpkit.messages import SlerpMergeError
from slerpkit.screen import afterwards, fetching, figures, flags, terminal
from slerpkit.screen.session import Session


def inspect_parents(session: Session) -> None:
    """--inspect: how the parents differ. Two questions, no child and no save directory."""
    given = flags.settle(session.arguments, session.interactive)
    answers = session.ask(given, ("primary", "secondary"))
    recipe = fetching.with_parents_here(session, answers.recipe)
    afterwards.check_maps(session, answers.recipe)
    terminal.collect_garbage_again()
    with session.view:
        found = story.inspect_parents(recipe, answers.options, session.observe)
    session.show(figures.render_map(session.console, found))
    afterwards.save_maps(session, found)
    session.print_json(found.as_dict())


def evaluate_standing_child(session: Session) -> None:
    """--child: a child that stands already is held against the parents that its recipe names."""
    child = session.arguments.child
    path = child / recipe_file.RECIPE_NAME
    if not path.is_file():
        what = f"{child} has no {path.name}, so its parents are not known."
        raise SlerpMergeError(what, "Give the folder of a child that slerpmerge made.")
    recipe = fetching.with_parents_here(session, recipe_file.read_recipe(path))
    compared = afterwards.models_to_compare(recipe, child, session.arguments.device or "auto")
    afterwards.check_evaluation(session, [compared.checkpoints[role] for role in ("primary", "secondary")], None)
    afterwards.evaluate_as_flags_ask(session, compared)
    session.print_json({"findings": session.findings})
