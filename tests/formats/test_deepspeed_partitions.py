from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.formats.deepspeed.partitions import (
    FlatLayout,
    Piece,
    align_parameters,
    cut_each,
    cut_evenly,
    deal,
    keep_whole,
    split_sub_groups,
    undeal,
)

PARAMETERS = st.lists(st.integers(1, 50), min_size=1, max_size=12).map(
    lambda numels: [(f"p{index}", numel) for index, numel in enumerate(numels)]
)
RANKS = st.integers(1, 7)


def piece(fqn: str, start: int, numel: int, at: int) -> Piece:
    return Piece(fqn=fqn, start=start, numel=numel, at=at)


def test_even_cut_keeps_a_parameter_that_crosses_ranks() -> None:
    layout = cut_evenly([("q", 5), ("k", 3), ("v", 4)], [0, 0, 0], 2)
    assert layout.partition == 6
    assert layout.pieces == (
        (piece("q", 0, 5, 0), piece("k", 0, 1, 5)),
        (piece("k", 1, 2, 0), piece("v", 0, 4, 2)),
    )
    assert layout.filled == (6, 6)


def test_even_cut_pads_to_two_elements_for_each_rank() -> None:
    layout = cut_evenly([("q", 5)], [0], 3)
    assert layout.partition == 2
    assert layout.filled == (2, 2, 1)
    assert [layout.padding(rank) for rank in range(3)] == [0, 0, 1]


def test_even_cut_of_less_than_the_ranks_leaves_ranks_empty() -> None:
    layout = cut_evenly([("norm", 3)], [0], 4)
    assert layout.filled == (2, 1, 0, 0)
    assert [layout.padding(rank) for rank in range(4)] == [0, 1, 2, 2]
    assert layout.pieces[2:] == ((), ())


def test_even_cut_leaves_the_alignment_of_parameters_out() -> None:
    layout = cut_evenly([("q", 3), ("k", 4)], [5, 0], 2)
    assert layout.pieces == ((piece("q", 0, 3, 0),), (piece("k", 0, 4, 2),))


def test_cut_of_each_gives_every_rank_its_share() -> None:
    layout = cut_each([("q", 5), ("n", 1)], 2)
    assert layout.pieces == ((piece("q", 0, 3, 0), piece("n", 0, 1, 3)), (piece("q", 3, 2, 0),))
    assert layout.partition == 4
    assert layout.filled == (4, 4)


def covered(layout: FlatLayout) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for pieces in layout.pieces:
        for each in pieces:
            found.setdefault(each.fqn, []).extend(range(each.start, each.start + each.numel))
    return found


@pytest.mark.parametrize("cut", [cut_each, lambda p, r: cut_evenly(p, [1] * len(p), r)], ids=["each", "evenly"])
@given(parameters=PARAMETERS, ranks=RANKS)
def test_every_element_lies_on_one_rank_and_none_on_another(
    cut: Callable[[Sequence[tuple[str, int]], int], FlatLayout], parameters: list[tuple[str, int]], ranks: int
) -> None:
    layout = cut(parameters, ranks)
    found = covered(layout)
    assert {fqn: sorted(elements) for fqn, elements in found.items()} == {
        fqn: list(range(numel)) for fqn, numel in parameters
    }
    for rank, pieces in enumerate(layout.pieces):
        ends = [0, *(each.at + each.numel for each in pieces)]
        assert all(each.at >= end for each, end in zip(pieces, ends, strict=False))
        assert ends[-1] <= layout.filled[rank] <= layout.partition


def test_muon_keeps_whole_what_a_rank_has_a_part_of() -> None:
    parameters = [("q", 5), ("k", 3), ("v", 4)]
    layout = keep_whole(parameters, cut_evenly(parameters, [0, 0, 0], 2))
    assert layout.filled == (8, 7)
    assert layout.pieces == (
        (piece("q", 0, 5, 0), piece("k", 0, 3, 5)),
        (piece("k", 0, 3, 0), piece("v", 0, 4, 3)),
    )


def test_round_robin_deals_out_like_cards() -> None:
    assert deal("abcdefg", 3) == ["a", "d", "g", "b", "e", "c", "f"]


@given(count=st.integers(0, 20), ranks=RANKS)
def test_dealing_can_be_undone(count: int, ranks: int) -> None:
    assert undeal(deal(range(count), ranks), ranks) == list(range(count))


def test_aligned_parameters_start_at_16_bytes_and_the_last_has_no_padding() -> None:
    assert align_parameters([3, 8, 9, 1], 2) == [5, 0, 7, 0]
    assert align_parameters([3, 8], 4) == [1, 0]


def test_sub_group_is_closed_by_the_parameter_that_fills_it() -> None:
    cut = list(split_sub_groups([("a", 3), ("b", 3), ("c", 9), ("d", 1)], 2, 4))
    assert cut == [[("a", 3), ("b", 3)], [("c", 9)], [("d", 1)]]
    assert list(split_sub_groups([("a", 3)], 1, 10**9)) == [[("a", 3)]]
