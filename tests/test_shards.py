"""Shards: boxes and runs of a tensor, and what two of them have in common."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.shards import Shard, View, do_shards_tile, find_overlaps, whole_shard

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def shards(draw: st.DrawFn, shape: tuple[int, ...]) -> Shard:
    is_run = draw(st.booleans())
    space = (math.prod(shape),) if is_run else shape
    offsets = tuple(draw(st.integers(0, size)) for size in space)
    sizes = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(space, offsets, strict=True))
    return Shard(shape=shape, offsets=offsets, sizes=sizes, is_run=is_run)


def take(whole: np.ndarray, shard: Shard) -> np.ndarray:
    space = whole.reshape(-1) if shard.is_run else whole
    slices = tuple(slice(at, at + size) for at, size in zip(shard.offsets, shard.sizes, strict=True))
    return space[slices].copy()


def look(memory: np.ndarray, view: View) -> np.ndarray:
    return memory.reshape(-1)[view.start : view.start + math.prod(view.sizes)].reshape(view.sizes)[(*view.slices, ...)]


@given(st.data())
def test_overlaps_bring_over_what_both_hold(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    source, target = data.draw(shards(shape)), data.draw(shards(shape))
    whole = np.arange(math.prod(shape)).reshape(shape)
    held, wanted = take(whole, source), np.full(target.sizes, -1)
    overlaps = find_overlaps(source, target)
    for each in overlaps:
        look(wanted, each.target)[...] = look(held, each.source)
        assert look(wanted, each.target).size == each.numel
    expected = take(whole, target)
    common = np.isin(expected, held)
    assert (wanted[common] == expected[common]).all()
    assert (wanted[~common] == -1).all()
    assert sum(each.numel for each in overlaps) == common.sum()


@given(st.data())
def test_runs_are_the_elements_in_order(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    shard = data.draw(shards(shape))
    whole = np.arange(math.prod(shape)).reshape(shape)
    runs = [number for first, count in shard.runs() for number in range(first, first + count)]
    assert runs == take(whole, shard).reshape(-1).tolist()


@given(SHAPES.filter(lambda shape: math.prod(shape) > 0), st.integers(1, 7), st.booleans())
def test_a_tensor_dealt_out_is_tiled_and_not_without_one_of_its_shards(
    shape: tuple[int, ...], world: int, is_run: bool
) -> None:
    space = (math.prod(shape),) if is_run or not shape else shape
    share = -(-space[0] // world)
    cuts = [(rank * share, min((rank + 1) * share, space[0])) for rank in range(world)]
    pieces = [
        Shard(
            shape=shape,
            offsets=(first, *(0 for _ in space[1:])),
            sizes=(last - first, *space[1:]),
            is_run=is_run or not shape,
        )
        for first, last in cuts
        if first < last
    ]
    assert do_shards_tile(pieces)
    assert not do_shards_tile([*pieces, pieces[0]])
    if len(pieces) > 1:
        assert not do_shards_tile(pieces[1:])


def test_a_whole_tensor_is_a_shard() -> None:
    assert whole_shard((3, 4)).is_whole
    assert whole_shard(()).numel == 1
    assert not Shard(shape=(3, 4), offsets=(1, 0), sizes=(2, 4)).is_whole


@pytest.mark.parametrize(
    ("offsets", "sizes", "is_run"),
    [
        ((0,), (2, 2), False),
        ((0, 3), (1, 2), False),
        ((-1, 0), (1, 1), False),
        ((0, 0), (1, 1), True),
        ((12,), (1,), True),
    ],
)
def test_what_is_outside_of_the_tensor_is_refused(
    offsets: tuple[int, ...], sizes: tuple[int, ...], is_run: bool
) -> None:
    with pytest.raises(ValueError):
        Shard(shape=(3, 4), offsets=offsets, sizes=sizes, is_run=is_run)
