"""slerpmerge: two language models of one architecture become one, by spherical linear interpolation.

The house, from the roof down. A module imports from its own floor or lower ones; nothing below the screen knows it.

    slerpmerge.py    the wizard's story: ask, show, decide, merge, ask again
    screen/          prompts, panels, progress, flags: what a person sees and types
    evaluation/      taste, perplexity, lm-eval's tasks, the search for a good t        demo.py
    story.py         prepare_merge, execute_merge: read this first
    child/           what stands beside the weights, the check of the child, its report and card
    merge/           the plan, the workers, the staging folder that becomes the child by one rename
    parity/          what the parents have in common, what differs, and what follows
    recipe_file.py   recipes read, and written (recipe_writer.py)
    parents/         model folders opened by their headers; the one reader of tensors
    ground           messages, files, maths, schedule, recipe; lazy.py loads what is heavy, devices.py finds devices

A byte of a parent goes parents → merge (measured, blended, written) → child; a decision goes screen → recipe → plan.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.3.0"


def __getattr__(name: str) -> Any:
    """`from slerpkit import merge_models`: loaded when it is asked for, so that a module costs what it needs itself."""
    if name == "merge_models":
        from slerpkit.story import merge_models

        return merge_models
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
