from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.boxes import Box, box_runs, do_tile, num_runs


def box(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Box:
    return Box(offsets=offsets, sizes=sizes)


@st.composite
def boxes_in_tensors(draw: st.DrawFn) -> tuple[tuple[int, ...], Box]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return shape, box(offsets, sizes)


@given(boxes_in_tensors())
def test_runs_of_a_box_are_its_elements_in_order(case: tuple[tuple[int, ...], Box]) -> None:
    shape, piece = case
    numbers = np.arange(math.prod(shape)).reshape(shape)
    cut = tuple(slice(offset, offset + size) for offset, size in zip(piece.offsets, piece.sizes, strict=True))
    runs = [*box_runs(shape, piece)]
    assert [i for start, numel in runs for i in range(start, start + numel)] == numbers[cut].reshape(-1).tolist()
    assert len(runs) == num_runs(shape, piece)


def test_whole_rows_are_one_run() -> None:
    assert [*box_runs((6, 3, 4), box((2, 0, 0), (3, 3, 4)))] == [(24, 36)]


def grid(shape: tuple[int, ...], cuts: list[list[int]]) -> list[Box]:
    """The boxes between cuts along each dim."""
    spans = [[*itertools.pairwise([0, *sorted(own), size])] for size, own in zip(shape, cuts, strict=True)]
    return [
        box(tuple(start for start, _ in pieces), tuple(end - start for start, end in pieces))
        for pieces in itertools.product(*spans)
    ]


@given(st.data())
def test_boxes_of_a_mesh_tile_and_no_others(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    boxes = grid(shape, [data.draw(st.lists(st.integers(0, size), max_size=3)) for size in shape])
    boxes = data.draw(st.permutations(boxes))
    assert do_tile(shape, boxes)
    filled = [piece for piece in boxes if piece.numel]
    if len(filled) > 1:
        assert not do_tile(shape, filled[1:])
        assert not do_tile(shape, [*filled[1:], filled[1]])


def test_each_piece_may_be_cut_by_itself() -> None:
    # Tensor parallel by columns, each half sharded by rows in its own way.
    boxes = [box((0, 0), (2, 4)), box((2, 0), (4, 4)), box((0, 4), (5, 4)), box((5, 4), (1, 4))]
    assert do_tile((6, 8), boxes)


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((4,), []),
        ((4,), [box((0,), (3,))]),
        ((4,), [box((0,), (5,))]),
        ((4,), [box((0,), (3,)), box((2,), (2,))]),
        ((4,), [box((0,), (2,)), box((1,), (2,))]),
        ((4,), [box((0, 0), (4, 1))]),
        ((4,), [box((5,), (0,)), box((0,), (4,))]),
        ((2, 2), [box((0, 0), (1, 2)), box((0, 0), (2, 1))]),
        ((), [box((), ()), box((), ())]),
        ((0, 4), [box((0, 0), (1, 4))]),
    ],
)
def test_holes_overlaps_and_pieces_outside_do_not_tile(shape: tuple[int, ...], boxes: list[Box]) -> None:
    assert not do_tile(shape, boxes)


def test_empty_boxes_do_not_count() -> None:
    assert do_tile((4, 8), [box((0, 0), (4, 8)), box((4, 0), (0, 8))])
    assert do_tile((0, 4), [])
    assert do_tile((), [box((), ())])


def test_a_staircase_of_cuts_ends_soon() -> None:
    """Each cut takes one row off: no sharding gives that, and following it would take one call for each."""
    size = 2000
    stairs = [box((i, i), (1, size - i)) for i in range(size)] + [
        box((i + 1, i), (size - i - 1, 1)) for i in range(size)
    ]
    assert not do_tile((size, size), stairs)
