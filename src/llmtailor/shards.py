"""Which elements of a tensor a rank holds, and what two ranks of different worlds have in common. No bytes, no torch.

A shard is a box of the tensor (FSDP2, tensor parallelism), or a run of its elements in row-major order (ZeRO, which
cuts where a partition ends, be that in the middle of a row). A run of elements is a few boxes one after the other, so
one rule serves both.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .boxes import Box, box_runs, do_tile

__all__ = ["Overlap", "Shard", "Shards", "View", "do_shards_tile", "find_overlaps", "whole_shard"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Elements of a tensor that one rank holds, contiguous in its memory."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """The first element: by dim of the tensor; of a run its number in row-major order, alone."""
    sizes: tuple[int, ...]
    """What the rank's own tensor has as its shape."""
    is_run: bool = False
    """Offsets and sizes are of the tensor flattened to one dim."""

    def __post_init__(self) -> None:
        space = (math.prod(self.shape),) if self.is_run else self.shape
        if not len(space) == len(self.offsets) == len(self.sizes):
            raise ValueError(f"{len(self.offsets)} offsets and {len(self.sizes)} sizes for {len(space)} dims")
        for size, offset, length in zip(space, self.offsets, self.sizes, strict=True):
            if offset < 0 or length < 0 or offset + length > size:
                raise ValueError(f"elements {offset} to {offset + length} of {size}")

    @property
    def numel(self) -> int:
        return math.prod(self.sizes)

    @property
    def is_whole(self) -> bool:
        """True if it is the tensor."""
        return self.numel == math.prod(self.shape)

    def boxes(self) -> Iterator[tuple[int, Box]]:
        """Its elements as boxes of the whole tensor: where each starts in the shard's memory, and the box."""
        if not self.is_run:
            yield 0, Box(offsets=self.offsets, sizes=self.sizes)
            return
        first, at = self.offsets[0], 0
        for box in _boxes_of_run(self.shape, first, self.numel):
            yield at, box
            at += box.numel

    def runs(self) -> Iterator[tuple[int, int]]:
        """Its elements, in the order of its memory, as runs: the first one's number in the whole tensor, how many."""
        if self.is_run:
            yield from [(self.offsets[0], self.numel)] if self.numel else ()
        else:
            yield from box_runs(self.shape, Box(offsets=self.offsets, sizes=self.sizes))


Shards: TypeAlias = Mapping[str, Shard]
"""By name; a tensor that is not there is held whole."""


def whole_shard(shape: Sequence[int]) -> Shard:
    """A tensor that is held whole."""
    return Shard(shape=tuple(shape), offsets=(0,) * len(shape), sizes=tuple(shape))


def _boxes_of_run(shape: Sequence[int], first: int, numel: int) -> Iterator[Box]:
    """Elements ``first`` to ``first + numel`` as boxes, in order: at most two for each dim, less one."""
    if not numel:
        return
    if len(shape) <= 1:
        yield Box(offsets=(first,) * len(shape), sizes=(numel,) * len(shape))
        return
    row = math.prod(shape[1:])
    index, start = divmod(first, row)
    if start or numel < row:  # the rest of a row, or a part of it
        count = min(numel, row - start)
        for box in _boxes_of_run(shape[1:], start, count):
            yield Box(offsets=(index, *box.offsets), sizes=(1, *box.sizes))
        yield from _boxes_of_run(shape, first + count, numel - count)
        return
    rows = numel // row
    yield Box(offsets=(index, *(0 for _ in shape[1:])), sizes=(rows, *shape[1:]))
    yield from _boxes_of_run(shape, first + rows * row, numel - rows * row)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """A box in the memory of a shard: ``memory.flatten()[start : start + prod(sizes)].view(sizes)[slices]``."""

    start: int
    sizes: tuple[int, ...]
    slices: tuple[slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Elements that two shards of a tensor both hold; the views have one shape."""

    source: View
    target: View
    numel: int


def find_overlaps(source: Shard, target: Shard) -> list[Overlap]:
    """What a shard that was saved has for one that is wanted.

    Args:
        source: As it was saved.
        target: Of the same tensor.
    """
    assert source.shape == target.shape, (source, target)
    pairs = itertools.product(source.boxes(), target.boxes())
    return [found for (at, box), (to, other) in pairs if (found := _overlap(at, box, to, other)) is not None]


def _overlap(at: int, source: Box, to: int, target: Box) -> Overlap | None:
    starts = [max(pair) for pair in zip(source.offsets, target.offsets, strict=True)]
    sizes = [
        min(one + m, other + n) - start
        for one, m, other, n, start in zip(
            source.offsets, source.sizes, target.offsets, target.sizes, starts, strict=True
        )
    ]
    if any(size <= 0 for size in sizes):
        return None
    return Overlap(
        source=_view(at, source, starts, sizes), target=_view(to, target, starts, sizes), numel=math.prod(sizes)
    )


def _view(at: int, box: Box, starts: Sequence[int], sizes: Sequence[int]) -> View:
    firsts = [start - offset for start, offset in zip(starts, box.offsets, strict=True)]
    slices = tuple(slice(first, first + size) for first, size in zip(firsts, sizes, strict=True))
    return View(start=at, sizes=box.sizes, slices=slices)


def do_shards_tile(shards: Sequence[Shard]) -> bool:
    """Whether each element of a tensor lies in exactly one of its shards; see ``do_tile``.

    Args:
        shards: At least one; of one tensor.
    """
    shape = shards[0].shape
    if any(shard.shape != shape for shard in shards):
        return False
    if all(shard.is_run for shard in shards):
        boxes = [Box(offsets=shard.offsets, sizes=shard.sizes) for shard in shards]
        return do_tile((math.prod(shape),), boxes)
    return do_tile(shape, [box for shard in shards for _, box in shard.boxes()])
