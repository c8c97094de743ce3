"""Boxes in a tensor: whether they tile it, and which runs of elements each is. No bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

__all__ = ["Box", "box_runs", "do_tile", "num_runs"]

# A mesh cuts a tensor once along each of its axes; more cuts than that inside each other are no sharding.
_MAX_CUTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangular piece of a tensor."""

    offsets: tuple[int, ...]
    """Its first element, by dim."""
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)


def do_tile(shape: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether each element of a tensor lies in exactly one box; empty boxes do not count.

    Only boxes that straight cuts through the whole tensor (and then through the pieces) make are understood; that
    is what sharding over any mesh gives. Others are said not to tile.
    """
    if not all(_is_inside(box, shape) for box in boxes):
        return False
    filled = [box for box in boxes if box.numel]
    whole = Box(offsets=(0,) * len(shape), sizes=tuple(shape))
    if not whole.numel:
        return not filled
    return sum(box.numel for box in filled) == whole.numel and _do_fill(whole, filled, _MAX_CUTS)


def _is_inside(box: Box, shape: Sequence[int]) -> bool:
    if not len(shape) == len(box.offsets) == len(box.sizes):
        return False
    pieces = zip(shape, box.offsets, box.sizes, strict=True)
    return all(0 <= offset <= size and 0 <= length <= size - offset for size, offset, length in pieces)


def _do_fill(whole: Box, boxes: Sequence[Box], cuts_left: int) -> bool:
    if len(boxes) <= 1:
        return [whole] == [*boxes]
    if not cuts_left:
        return False
    for dim in range(len(whole.sizes)):
        slabs = _cut(boxes, dim)
        if len(slabs) > 1:
            return _do_slabs_fill(whole, slabs, dim, cuts_left)
    return False


def _cut(boxes: Sequence[Box], dim: int) -> list[list[Box]]:
    """The boxes between straight cuts across a dim, in order."""
    slabs: list[list[Box]] = []
    end = -1
    for box in sorted(boxes, key=lambda box: box.offsets[dim]):
        if not slabs or box.offsets[dim] >= end:
            slabs.append([])
        slabs[-1].append(box)
        end = max(end, box.offsets[dim] + box.sizes[dim])
    return slabs


def _do_slabs_fill(whole: Box, slabs: Sequence[Sequence[Box]], dim: int, cuts_left: int) -> bool:
    start = whole.offsets[dim]
    for slab in slabs:
        end = max(box.offsets[dim] + box.sizes[dim] for box in slab)
        offsets, sizes = [*whole.offsets], [*whole.sizes]
        offsets[dim], sizes[dim] = start, end - start
        if not _do_fill(Box(offsets=tuple(offsets), sizes=tuple(sizes)), slab, cuts_left - 1):
            return False
        start = end
    return start == whole.offsets[dim] + whole.sizes[dim]


def num_runs(shape: Sequence[int], box: Box) -> int:
    """How many runs ``box_runs`` gives."""
    return math.prod(box.sizes[: _first_whole_dim(shape, box)]) if box.numel else 0


def box_runs(shape: Sequence[int], box: Box) -> Iterator[tuple[int, int]]:
    """The elements of a box as runs (first element in the tensor, number of elements), row-major.

    A box of whole rows is a single run; a box of columns is one for each row.

    >>> list(box_runs((4, 6), Box(offsets=(1, 2), sizes=(2, 3))))
    [(8, 3), (14, 3)]
    """
    if not box.numel:
        return
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    cut = _first_whole_dim(shape, box)
    # The dim before the cut may be a part of the tensor's; the runs lie along it and all after it.
    base = sum(offset * stride for offset, stride in zip(box.offsets[cut:], strides[cut:], strict=True))
    numel = math.prod(box.sizes[cut:])
    ranges = (range(offset, offset + size) for offset, size in zip(box.offsets[:cut], box.sizes[:cut], strict=True))
    for index in itertools.product(*ranges):
        yield base + sum(i * stride for i, stride in zip(index, strides[:cut], strict=True)), numel


def _first_whole_dim(shape: Sequence[int], box: Box) -> int:
    """The first dim of a run: all dims after it are taken whole."""
    dim = len(shape) - 1
    while dim > 0 and box.sizes[dim] == shape[dim]:
        dim -= 1
    return max(dim, 0)
