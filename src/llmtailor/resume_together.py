"""One answer of many ranks to the question which checkpoint to resume from.

    coordinator   look at checkpoint-400 -- agree --> bad on rank 3: set aside; look at checkpoint-300 -- agree -->
    others        wait, look ------------- agree -->                            wait, look ---------- agree -->

Every rank looks at the same candidates in the same order. What one finds damaged is damaged for all; any other error of
one ends the search on all.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .checkpoint import Checkpoint, open_checkpoint
from .meeting import Meeting, Outcome

__all__ = ["follow_search", "lead_search"]


def lead_search(
    meeting: Meeting,
    take: Callable[[Callable[[Checkpoint], str | None]], Checkpoint | None],
    examine: Callable[[Checkpoint], str | None],
) -> Checkpoint | None:
    """Search on the coordinator, or on a process alone.

    Args:
        meeting: The ranks.
        take: Gives candidates to what it is given, until that finds no damage; returns that one.
        examine: Looks at a candidate on this rank; returns what is damaged.

    Raises:
        BaseException: What ``take`` raises; what ``examine`` raised on any rank.
    """
    have_all_failed = False

    def examine_together(found: Checkpoint) -> str | None:
        nonlocal have_all_failed
        meeting.tell({"look": str(found.path.resolve())})
        outcome = _look(found, examine)
        have_all_failed = True
        damage = meeting.agree(outcome)
        have_all_failed = False
        return damage

    try:
        found = take(examine_together)
    except BaseException as err:
        if not have_all_failed:
            meeting.tell({"look": None})
            meeting.agree(Outcome(error=err))
        raise
    meeting.tell({"look": None})
    meeting.agree(Outcome())
    return found


def follow_search(meeting: Meeting, examine: Callable[[Checkpoint], str | None]) -> Checkpoint | None:
    """The same on every other rank.

    Returns:
        The checkpoint that all ranks found good; None if the coordinator found no candidate.
    """
    found: Checkpoint | None = None
    while (path := meeting.tell({})["look"]) is not None:
        try:
            found = open_checkpoint(Path(path))
            outcome = _look(found, examine)
        except BaseException as err:
            outcome = Outcome(error=err)
        if meeting.agree(outcome) is not None:
            found = None
    meeting.agree(Outcome())
    return found


def _look(found: Checkpoint, examine: Callable[[Checkpoint], str | None]) -> Outcome:
    try:
        return Outcome(damage=examine(found))
    except BaseException as err:
        return Outcome(error=err)
