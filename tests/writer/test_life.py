"""The life of a save, as a table: every pair of states, and every way to be admitted."""

from __future__ import annotations

import itertools

import pytest

from llmtailor.writer.life import SaveState, admit, advance

S = SaveState
STEPS = {
    (S.CAPTURING, S.CAPTURED), (S.CAPTURED, S.WRITTEN), (S.WRITTEN, S.COMMITTED), (S.COMMITTED, S.PUBLISHED),
    (S.PUBLISHED, S.MIRRORED),
    (S.CAPTURING, S.FAILED), (S.CAPTURED, S.FAILED), (S.WRITTEN, S.FAILED), (S.COMMITTED, S.FAILED),
}  # fmt: skip
STAYS = {(S.FAILED, S.FAILED)}


@pytest.mark.parametrize(("state", "to"), list(itertools.product(SaveState, SaveState)), ids=str)
def test_a_save_goes_one_step_at_a_time_or_fails_before_it_is_published(state: SaveState, to: SaveState) -> None:
    if (state, to) in STEPS | STAYS:
        assert advance(state, to) is to
    else:
        with pytest.raises(ValueError, match=f"a save that is {state} cannot become {to}"):
            advance(state, to)


@pytest.mark.parametrize("state", SaveState)
def test_what_a_state_means(state: SaveState) -> None:
    assert state.is_captured == (state is not S.CAPTURING)
    assert state.is_published == (state in {S.PUBLISHED, S.MIRRORED})
    assert state.is_in_flight == (state in {S.CAPTURING, S.CAPTURED, S.WRITTEN, S.COMMITTED})


def test_from_every_state_a_save_comes_to_an_end() -> None:
    ends = {state for state in SaveState if all(before is not state for before, _ in STEPS)}
    assert ends == {S.MIRRORED, S.FAILED, S.SKIPPED}
    # In flight it may fail, and whatever is in flight may still be published.
    assert {before for before, to in STEPS if to is S.FAILED} == {state for state in SaveState if state.is_in_flight}


@pytest.mark.parametrize("when_busy", ["wait", "skip"])
@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("num_in_flight", range(5))
def test_a_save_starts_below_the_limit_and_else_does_as_told(num_in_flight: int, limit: int, when_busy: str) -> None:
    admission = admit(num_in_flight, limit=limit, when_busy=when_busy)  # type: ignore[arg-type]
    assert admission == ("start" if num_in_flight + 1 <= limit else when_busy)
