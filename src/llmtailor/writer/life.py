"""The life of one save, as a pure machine.

    capturing -- captured --> captured -- written --> written -- committed --> committed -- published --> published
        |                        |                       |                         |                          |
        +------------------------+---- failed -----------+-------------------------+--> failed             mirrored
    skipped (never began)     (and stays it, if it fails again)                                               |
                                                                                                           mirrored

captured    every byte is in host memory: training may change the state
written     every byte was handed to the disk
committed   files, links and manifest are durable, under a private name
published   it has its name, durably: resume will find it
mirrored    the second directory holds it, too, durably
"""

from __future__ import annotations

from enum import StrEnum
from typing import Literal

__all__ = ["Admission", "SaveState", "WhenBusy", "admit", "advance"]

WhenBusy = Literal["wait", "skip"]
Admission = Literal["start", "wait", "skip"]


class SaveState(StrEnum):
    """How far a save has come."""

    CAPTURING = "capturing"
    CAPTURED = "captured"
    WRITTEN = "written"
    COMMITTED = "committed"
    PUBLISHED = "published"
    MIRRORED = "mirrored"
    FAILED = "failed"
    SKIPPED = "skipped"

    @property
    def is_captured(self) -> bool:
        """True once training may change the state; a save that failed or was skipped looks at it no more."""
        return self is not SaveState.CAPTURING

    @property
    def is_published(self) -> bool:
        """True once resume will find it."""
        return self in (SaveState.PUBLISHED, SaveState.MIRRORED)

    @property
    def is_in_flight(self) -> bool:
        """True while the writer still works on it; a mirror does not count."""
        return self in _ORDER[:4]


_ORDER = (
    SaveState.CAPTURING,
    SaveState.CAPTURED,
    SaveState.WRITTEN,
    SaveState.COMMITTED,
    SaveState.PUBLISHED,
    SaveState.MIRRORED,
)


def advance(state: SaveState, to: SaveState) -> SaveState:
    """The next state.

    Args:
        state: Where the save is.
        to: Where it is to go: one step further, or to ``FAILED`` while it is not published. What has failed may fail
            again, and nothing else.

    Raises:
        ValueError: There is no such step; a fault of the writer, not of the world.
    """
    is_next = state in _ORDER[:-1] and to is _ORDER[_ORDER.index(state) + 1]
    may_fail = state.is_in_flight or state is SaveState.FAILED
    if not is_next and not (to is SaveState.FAILED and may_fail):
        raise ValueError(f"a save that is {state} cannot become {to}")
    return to


def admit(num_in_flight: int, *, limit: int, when_busy: WhenBusy) -> Admission:
    """May another save begin?

    Args:
        num_in_flight: Saves that are neither published nor failed.
        limit: How many there may be, this one included; at least 1.
        when_busy: What to do at the limit.
    """
    return "start" if num_in_flight < limit else when_busy
