from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.retention import Kept, choose_removals


def kept(text: str) -> list[Kept]:
    """``10c 20``: step 10 is consistent, step 20 is not."""
    return [Kept(step=int(word.rstrip("c")), is_consistent=word.endswith("c")) for word in text.split()]


TABLE = [
    # checkpoints          limit pinned  removed
    ("", 1, (), ()),
    ("10", 1, (), ()),
    ("10 20 30", None, (), ()),
    ("10 20 30", 0, (), ()),
    ("10 20 30", -1, (), ()),
    ("10 20 30", 3, (), ()),
    ("10 20 30", 4, (), ()),
    ("10 20 30", 2, (), (10,)),
    ("10 20 30", 1, (), (10, 20)),
    ("30 10 20", 2, (), (10,)),
    ("10c 20 30", 2, (), (20,)),
    ("10c 20 30", 1, (), (20,)),
    ("10c 20c 30", 1, (), (10,)),
    ("10c 20c 30c", 1, (), (10, 20)),
    ("10c 20 30 40", 3, (), (20,)),
    ("10 20 30 40", 2, (10,), (20, 30)),
    ("10 20 30 40", 1, (10, 20), (30,)),
    ("10 20 30 40", 2, (40,), (10, 20)),
    ("10c 20 30 40", 2, (20,), (30,)),
    ("10 20 30", 1, (99,), (10, 20)),
    ("0c 5 10", 2, (), (5,)),
]


@pytest.mark.parametrize(("checkpoints", "limit", "pinned", "removed"), TABLE)
def test_choose_removals(
    checkpoints: str, limit: int | None, pinned: tuple[int, ...], removed: tuple[int, ...]
) -> None:
    assert choose_removals(kept(checkpoints), limit=limit, pinned=pinned) == removed


def test_choose_removals_need_not_keep_a_consistent_one() -> None:
    assert choose_removals(kept("10c 20 30"), limit=2, keep_consistent=False) == (10,)


@given(
    st.dictionaries(st.integers(0, 50), st.booleans(), min_size=1),
    st.integers(1, 8),
    st.sets(st.integers(0, 50), max_size=3),
    st.booleans(),
)
def test_what_must_stay_stays(
    consistency: dict[int, bool], limit: int, pinned: set[int], keep_consistent: bool
) -> None:
    checkpoints = [Kept(step=step, is_consistent=flag) for step, flag in consistency.items()]
    removed = choose_removals(checkpoints, limit=limit, pinned=pinned, keep_consistent=keep_consistent)
    left = set(consistency) - set(removed)
    consistent = {step for step, flag in consistency.items() if flag}
    assert max(consistency) in left
    assert pinned & set(consistency) <= left
    assert not (keep_consistent and consistent) or max(consistent) in left
    assert list(removed) == sorted(removed)
    must_stay = (
        {max(consistency)}
        | (pinned & set(consistency))
        | ({max(consistent)} if keep_consistent and consistent else set())
    )
    assert len(left) == min(len(consistency), max(limit, len(must_stay)))
