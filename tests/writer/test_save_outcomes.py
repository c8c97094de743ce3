"""Failed saves are told to the training, whenever their failures come to be known."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmtailor.errors import SaveFailedWarning, WriteError
from llmtailor.save_outcomes import SaveOutcomes
from llmtailor.writer import SaveHandle, SaveState


def make_outcomes() -> SaveOutcomes:
    run: Any = SimpleNamespace(uncollected=[], failures=[])
    return SaveOutcomes(run)


def fail(outcomes: SaveOutcomes, *steps: int) -> None:
    """Saves that fail, and are all collected at once."""
    for step in steps:
        handle = SaveHandle(step)
        handle.fail(WriteError("cannot write", kind="io", path="somewhere"))
        outcomes.note_begun(handle)
    with pytest.warns(SaveFailedWarning) as warned:
        outcomes.collect()
    assert len(warned) == len(steps)


def count_raised(outcomes: SaveOutcomes, num_saves: int) -> int:
    """How many of so many saves say that others failed before."""
    raised = 0
    for _ in range(num_saves):
        try:
            outcomes.raise_repeated()
        except WriteError:
            raised += 1
    return raised


def test_the_first_failure_is_warned_of_alone() -> None:
    outcomes = make_outcomes()
    fail(outcomes, 1)
    assert count_raised(outcomes, 3) == 0


@pytest.mark.parametrize("at_once", [1, 2, 4])
def test_each_further_one_is_raised_once_however_many_came_to_be_known_together(at_once: int) -> None:
    outcomes = make_outcomes()
    fail(outcomes, 1)
    for first in range(2, 6, at_once):
        fail(outcomes, *range(first, first + at_once))
    assert count_raised(outcomes, 10) == 4


def test_a_good_save_ends_the_row() -> None:
    outcomes = make_outcomes()
    fail(outcomes, 1, 2, 3)
    good, nothing = SaveHandle(4), cast(Any, None)
    for state in (SaveState.CAPTURED, SaveState.WRITTEN, SaveState.COMMITTED):
        good.advance(state)
    good.publish(Path("checkpoint-4"), nothing, nothing)
    outcomes.note_begun(good)
    outcomes.collect()
    assert count_raised(outcomes, 3) == 0
    assert outcomes.last_good is good
