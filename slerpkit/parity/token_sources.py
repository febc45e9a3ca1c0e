"""Rows as a recipe wants them, where that is more than a row for the same token: given rows, and padding.

Works on the rows of each parent that vocabulary.py has found for the child's tokens. Read report.py and recipe.py
before this.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from slerpkit.lazy import numpy
from slerpkit.messages import SlerpMergeError
from slerpkit.parity.report import NO_ROW, ZEROS
from slerpkit.recipe import PARENTS

if TYPE_CHECKING:
    from slerpkit.recipe import TokenSource


def place_given_rows(
    maps: Sequence[numpy.ndarray],
    child_tokens: Mapping[str, int],
    tokens: Sequence[Mapping[str, int]],
    limits: Sequence[int],
    wanted: Sequence[TokenSource],
) -> None:
    """Puts the rows that a recipe gives to tokens by name into the map of rows.

    maps: as RowMap.sources. child_tokens: the child's ids. tokens, limits: of each parent, its ids, and how many rows
    it has. Raises SlerpMergeError where a token or a row is not there, or where one parent's own row would be blended
    with another row of the same parent.
    """
    for want in wanted:
        place = child_tokens.get(want.token, len(maps[0]))
        if place >= len(maps[0]):
            raise SlerpMergeError(
                f"The recipe gives a row to {want.token!r}, which the child's tokenizer does not have.",
                "Correct the token, or take it out of the recipe's tokenizer.",
            )
        own = [row_of(tokens[number].get(want.token), limits[number]) for number in (0, 1)]
        has_own = [row != NO_ROW for row in own]
        given = given_row(tokens, limits, want)
        if all(has_own) and not want.force:
            continue
        for rows in maps:
            rows[place] = NO_ROW
        donor = None if want.role is None else PARENTS.index(want.role)
        if want.force or not any(has_own):
            for number in range(len(maps)) if donor is None else (donor,):
                maps[number][place] = given
            continue
        owner = has_own.index(True)
        maps[owner][place] = own[owner]
        if donor != owner:
            maps[1 - owner][place] = given
            for rows in maps[2:]:
                rows[place] = ZEROS  # a base without the token; what stands in for it was learned from nothing
        elif given != own[owner]:
            raise SlerpMergeError(
                f"The recipe blends the row of {want.token!r} with another row of the {want.role}, which has both.",
                "Write `force: true` there, and the token has the row that is given; or leave the token out.",
            )


def row_of(token_id: int | None, limit: int) -> int:
    """The row of a token's id; NO_ROW where there is none."""
    return token_id if token_id is not None and 0 <= token_id < limit else NO_ROW


def given_row(tokens: Sequence[Mapping[str, int]], limits: Sequence[int], want: TokenSource) -> int:
    """The row that a recipe gives a token. Raises SlerpMergeError where it is not there."""
    if want.role is None:
        return ZEROS
    number = PARENTS.index(want.role)
    named = want.token if want.row_of is None else want.row_of
    row = row_of(tokens[number].get(named) if isinstance(named, str) else named, limits[number])
    if row == NO_ROW:
        what = f"The recipe gives {want.token!r} the {want.role}'s row of {named!r}, which that does not have."
        raise SlerpMergeError(what, "Name a token, or an id, that has a row there.")
    return row


def pad_rows(
    maps: Sequence[numpy.ndarray], ids: Collection[int], added: Collection[int], multiple: int
) -> list[numpy.ndarray]:
    """The map of rows, rounded up to a multiple.

    ids: of all the child's tokens. added: those among them that its settings add, which a model may well say. The new
    rows, which no token has, are copies of one that no token has either, or else of the last word's, usually the
    rarest: zeros would be likelier than any token in a model whose logits are all negative.
    """
    length = len(maps[0])
    stands = numpy.logical_or.reduce([rows != NO_ROW for rows in maps])
    free = set(numpy.flatnonzero(stands).tolist()) - set(ids)
    words = {token_id for token_id in ids if token_id < length} - set(added)
    copied = max(free or words, default=length - 1)
    return [numpy.append(rows, numpy.full(-length % multiple, rows[copied])) for rows in maps]
