"""Which step a save may have: a whole number that does not go back behind the newest checkpoint."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from .errors import InvalidInputError

__all__ = ["check_step"]


def check_step(step: SupportsIndex, newest: int | None = None) -> int:
    """The step of a save as a plain int; numpy's and torch's whole numbers are taken as what they are.

    Args:
        step: What the caller says.
        newest: Step of the newest save of the run, in flight or published; None if that does not matter.

    Raises:
        InvalidInputError: It is no whole number, is negative, or goes backwards.
    """
    try:
        plain = None if isinstance(step, bool) else operator.index(step)
    except TypeError:
        plain = None
    if plain is None or plain < 0:
        raise InvalidInputError(
            "the step is not a whole number of optimizer steps",
            kind="step-type",
            expected="an int >= 0",
            found=f"{step!r}, of type {type(step).__name__}",
            hint="count optimizer steps with an int; int(step) if it is a whole number",
        )
    if newest is not None and plain < newest:
        raise InvalidInputError(
            "the step goes backwards",
            kind="step-order",
            expected=f"a step after {newest}, the newest checkpoint of this run",
            found=plain,
            hint="resume from an older checkpoint to go back; the newer ones are then set aside",
        )
    return plain
