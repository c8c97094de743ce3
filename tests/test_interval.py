"""How often to save, from what it costs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.errors import InvalidInputError
from llmtailor.interval import Interval, SaveCosts, choose_interval, parse_interval


def costs(**changes: Any) -> SaveCosts:
    usual: dict[str, Any] = {
        "step_secs": 1.0,
        "stall_secs": 1.0,
        "busy_secs": 5.0,
        "growth_nbytes": 0,
        "free_nbytes": None,
    }
    return SaveCosts(**{**usual, **changes})


def test_least_is_lost_where_saves_and_failures_cost_the_same() -> None:
    # Young: sqrt(2 * 1 s * 24 h); Daly's correction is below a percent of it.
    assert choose_interval(Interval(mtbf_hours=24, max_overhead=1.0), costs()) == pytest.approx(416, abs=2)


def test_the_choice_is_near_the_minimum_of_what_is_lost() -> None:
    interval, cost, failure = Interval(mtbf_hours=2, max_overhead=1.0), 20.0, 7200.0

    def lost(secs: float) -> float:  # per second of work: Daly, equation 20, for a restart that takes no time
        return failure * (math.exp((secs + cost) / failure) - 1) / secs

    chosen = choose_interval(interval, costs(stall_secs=cost))
    assert lost(chosen) <= 1.0001 * min(lost(secs) for secs in range(100, 3000))


def test_overhead_is_bounded() -> None:
    frequent = Interval(mtbf_hours=0.1, max_overhead=0.01)
    assert choose_interval(frequent, costs(stall_secs=3.0)) == 300


def test_a_save_ends_before_the_next_begins() -> None:
    assert choose_interval(Interval(mtbf_hours=0.001, max_overhead=1.0), costs(stall_secs=0.001, busy_secs=70.0)) == 70


def test_the_disk_lasts() -> None:
    interval = Interval(disk_hours=10)
    full = costs(growth_nbytes=100, free_nbytes=1000)  # ten saves fit
    assert choose_interval(interval, full) == 3600
    assert choose_interval(interval, costs(growth_nbytes=0, free_nbytes=1000)) < 3600


def test_steps_take_their_time() -> None:
    fast, slow = (choose_interval(Interval(), costs(step_secs=secs)) for secs in (0.5, 2.0))
    assert fast == pytest.approx(4 * slow, abs=4)


@given(
    st.builds(
        SaveCosts,
        step_secs=st.floats(0, 1e4),
        stall_secs=st.floats(0, 1e6),
        busy_secs=st.floats(0, 1e6),
        growth_nbytes=st.integers(0, 10**15),
        free_nbytes=st.none() | st.integers(0, 10**15),
    ),
    st.floats(1e-3, 1e5),
)
def test_any_cost_has_an_interval(found: SaveCosts, mtbf_hours: float) -> None:
    assert choose_interval(Interval(mtbf_hours=mtbf_hours), found) >= 1


@pytest.mark.parametrize(
    "arguments", [{"mtbf_hours": 0}, {"max_overhead": 1.5}, {"disk_hours": math.inf}, {"mtbf_hours": "1"}]
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=f"{next(iter(arguments))} makes no sense"):
        Interval(**arguments)


def test_interval_is_read() -> None:
    assert parse_interval("auto") == Interval()
    assert parse_interval(None) is None
    assert parse_interval(Interval(mtbf_hours=3)) == Interval(mtbf_hours=3)
    with pytest.raises(InvalidInputError, match="save_steps"):
        parse_interval(100)
