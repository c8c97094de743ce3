"""Which bytes go where in a new file, in pieces of one buffer each. Pure; reads nothing.

A planned file is a list of parts, some of them gigabytes long and some of them eight bytes. Here they become segments
(bytes that are known, zeros, bytes of one file, results of arithmetic), and segments become chunks of equal size that
threads fill independently. Both are made one after the other, as they are asked for: a plan may have a million parts.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from ..file_plan import FileRange, Part, Zeros
from ..tensor_refs import CastTensor, FileTensor, InlineTensor, ScaledTensor, TensorRef, TensorSlice
from ..tensors import DTYPE_BITS

__all__ = [
    "Chunk",
    "Computed",
    "Copy",
    "Literal",
    "Padding",
    "Read",
    "Segment",
    "cut_chunks",
    "plan_reads",
    "segments_of",
    "slice_segments",
]

# Reading on over a gap is cheaper than another call: a disk delivers this much in the time of one request.
_MAX_GAP_NBYTES = 64 * 2**10


# Nobody changes a segment. They are not frozen because there may be a million, and freezing makes each cost thrice.
@dataclass(slots=True, kw_only=True)
class Literal:
    """Bytes that are known."""

    at: int
    """First byte, in the new file."""
    data: bytes | memoryview

    @property
    def nbytes(self) -> int:
        return len(self.data)


@dataclass(slots=True, kw_only=True)
class Padding:
    """Zeros."""

    at: int
    nbytes: int


@dataclass(slots=True, kw_only=True)
class Copy:
    """Bytes of an existing file."""

    at: int
    nbytes: int
    path: Path
    offset: int
    """First byte in that file."""


@dataclass(slots=True, kw_only=True)
class Computed:
    """Bytes of a tensor that is in no file as it is."""

    at: int
    nbytes: int
    tensor: TensorRef
    first: int
    """First byte of the tensor's own bytes; need not be the first of an element."""


Segment: TypeAlias = Literal | Padding | Copy | Computed


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a file that one thread fills and writes."""

    start: int
    """First byte in the file."""
    nbytes: int
    segments: tuple[Segment, ...]
    """End to end, from ``start``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """One read of a file that serves some copies."""

    path: Path
    offset: int
    nbytes: int
    copies: tuple[Copy, ...]
    """In order of their offset in that file."""


def segments_of(parts: Iterable[Part]) -> Iterator[Segment]:
    """The segments of a file, end to end; copies that continue each other are one."""
    pending: Copy | None = None
    for segment in _segments(parts):
        if not segment.nbytes:
            continue
        if pending is not None:
            if (
                isinstance(segment, Copy)
                and segment.offset == pending.offset + pending.nbytes
                and segment.path == pending.path
            ):
                nbytes = pending.nbytes + segment.nbytes
                pending = Copy(at=pending.at, nbytes=nbytes, path=pending.path, offset=pending.offset)
                continue
            yield pending
            pending = None
        if isinstance(segment, Copy):
            pending = segment
        else:
            yield segment
    if pending is not None:
        yield pending


def _segments(parts: Iterable[Part]) -> Iterator[Segment]:
    at = 0
    for part in parts:
        match part:
            case bytes():
                yield Literal(at=at, data=part)
                at += len(part)
            case Zeros():
                yield Padding(at=at, nbytes=part.nbytes)
                at += part.nbytes
            case FileRange():
                yield Copy(at=at, nbytes=part.nbytes, path=part.path, offset=part.byte_range.start)
                at += part.nbytes
            case TensorSlice():
                yield from slice_segments(part.tensor, part.start, part.stop, at)
                at += part.nbytes


def slice_segments(tensor: TensorRef, start: int, stop: int, at: int) -> Iterator[Segment]:
    """The segments of the elements ``start`` to ``stop`` of a tensor, the first of them at byte ``at``."""
    size = DTYPE_BITS[tensor.meta.dtype] // 8
    match tensor:
        case FileTensor():
            yield from _copies(tensor, start, stop, at, size)
        case InlineTensor():
            yield Literal(at=at, data=tensor.data[start * size : stop * size])
        case CastTensor() if tensor.source.meta.dtype == tensor.meta.dtype:
            yield from slice_segments(tensor.source, start, stop, at)
        case ScaledTensor() if tensor.factor == 1.0:
            yield from slice_segments(tensor.source, start, stop, at)
        case _:
            yield Computed(at=at, nbytes=(stop - start) * size, tensor=tensor, first=start * size)


def _copies(tensor: FileTensor, start: int, stop: int, at: int, size: int) -> Iterator[Copy]:
    extents = tensor.extents
    for index in range(max(bisect.bisect_right(extents, start, key=lambda extent: extent.start) - 1, 0), len(extents)):
        extent = extents[index]
        low, high = max(start, extent.start), min(stop, extent.start + extent.numel)
        if extent.start >= stop:
            return
        if low < high:
            offset = extent.offset + (low - extent.start) * size
            yield Copy(at=at + (low - start) * size, nbytes=(high - low) * size, path=extent.path, offset=offset)


def cut_chunks(segments: Iterable[Segment], nbytes: int, chunk_nbytes: int) -> Iterator[Chunk]:
    """Cut the segments of a file at the multiples of ``chunk_nbytes``.

    Args:
        segments: End to end, from 0.
        nbytes: Of the file; an empty one is one empty chunk.
        chunk_nbytes: Of every chunk but the last.
    """
    start, at = 0, 0
    held: list[Segment] = []
    for segment in segments:
        rest = segment
        while (room := start + chunk_nbytes - at) < rest.nbytes:
            head, rest = _cut(rest, room)
            yield Chunk(start=start, nbytes=chunk_nbytes, segments=(*held, head))
            start, at, held = rest.at, rest.at, []
        if rest.at + rest.nbytes == start + chunk_nbytes < nbytes:
            yield Chunk(start=start, nbytes=chunk_nbytes, segments=(*held, rest))
            start, held = start + chunk_nbytes, []
        else:
            held.append(rest)
        at = rest.at + rest.nbytes
    assert at == nbytes, (at, nbytes)
    yield Chunk(start=start, nbytes=nbytes - start, segments=tuple(held))


def _cut(segment: Segment, nbytes: int) -> tuple[Segment, Segment]:
    """The first bytes of a segment, and what is left of it."""
    at, middle, rest = segment.at, segment.at + nbytes, segment.nbytes - nbytes
    match segment:
        case Literal():
            data = memoryview(segment.data)
            return Literal(at=at, data=data[:nbytes]), Literal(at=middle, data=data[nbytes:])
        case Padding():
            return Padding(at=at, nbytes=nbytes), Padding(at=middle, nbytes=rest)
        case Copy():
            tail = replace(segment, at=middle, nbytes=rest, offset=segment.offset + nbytes)
            return replace(segment, nbytes=nbytes), tail
        case Computed():
            later = replace(segment, at=middle, nbytes=rest, first=segment.first + nbytes)
            return replace(segment, nbytes=nbytes), later


def plan_reads(copies: Sequence[Copy], max_nbytes: int) -> list[Read]:
    """Serve copies with as few reads as possible, each byte read once.

    Args:
        copies: In any order; none longer than ``max_nbytes``.
        max_nbytes: What one read may bring.
    """
    ordered = sorted(copies, key=lambda copy: (str(copy.path), copy.offset)) if len(copies) > 1 else copies
    reads: list[Read] = []
    held: list[Copy] = []
    end = 0
    for copy in ordered:
        copy_end = copy.offset + copy.nbytes
        if held and (
            copy.path != held[0].path
            or copy.offset > end + _MAX_GAP_NBYTES
            or max(end, copy_end) - held[0].offset > max_nbytes
        ):
            reads.append(_read(held, end))
            held, end = [], 0
        held.append(copy)
        end = max(end, copy_end)
    if held:
        reads.append(_read(held, end))
    return reads


def _read(copies: Sequence[Copy], end: int) -> Read:
    first = copies[0]
    return Read(path=first.path, offset=first.offset, nbytes=end - first.offset, copies=tuple(copies))
