"""Bytes of source files into memory: around the page cache, except for what lies in it already.

A direct read needs aligned memory, offset and size. So what does not happen to fit is read with its surroundings into
an aligned bounce buffer and copied from there, which costs a tenth of what the page cache costs.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..storage import ALIGNMENT, aligned_buffer, pad, read_buffered, read_cached, read_direct
from .segments import Copy, Read, plan_reads
from .sources import OpenSource, SourceFiles, changed

__all__ = ["ALIGNMENT", "Reader", "aligned_buffer"]

# Below this the page cache's read-ahead is worth more than the detour.
_MIN_DIRECT_NBYTES = 128 * 2**10


class Reader:
    """One thread's way to the sources.

    Args:
        sources: Where the files are open.
        max_nbytes: What one read may bring; the bounce buffer is as large.
    """

    def __init__(self, sources: SourceFiles, max_nbytes: int) -> None:
        self._sources = sources
        self._max_nbytes = max_nbytes
        self._bounce = aligned_buffer(max_nbytes + 2 * ALIGNMENT)

    def fetch(self, copies: Sequence[Copy], target: memoryview, start: int = 0, *, is_aligned: bool = False) -> None:
        """Fill in copies, each at its place.

        Args:
            copies: None longer than ``max_nbytes``.
            target: Where they go.
            start: The ``at`` that is its first byte.
            is_aligned: Whether it starts at a page.

        Raises:
            IntegrityError: A file ended too soon.
            NotFoundError, FormatError, WriteError: A file cannot be opened or read.
        """
        for read in plan_reads(copies, self._max_nbytes):
            with self._sources.using(read.path) as source:
                if len(read.copies) == 1:
                    copy = read.copies[0]
                    at = copy.at - start
                    view = target[at : at + copy.nbytes]
                    self._fetch_one(source, copy, view, is_aligned=is_aligned and not at % ALIGNMENT)
                else:
                    self._fetch_many(source, read, target, start)

    def _fetch_one(self, source: OpenSource, copy: Copy, view: memoryview, *, is_aligned: bool) -> None:
        done = _read_cached(source, copy.offset, view)
        if done == copy.nbytes:
            return
        offset = copy.offset + done
        if is_aligned and not done and not offset % ALIGNMENT and source.direct is not None:
            done = copy.nbytes - copy.nbytes % ALIGNMENT
            if not _read_direct(source, offset, view[:done], done):
                done = 0
            offset = copy.offset + done
        if done < copy.nbytes:
            view[done:] = self._load(source, offset, copy.nbytes - done)

    def _fetch_many(self, source: OpenSource, read: Read, target: memoryview, start: int) -> None:
        view = self._bounce[: read.nbytes]
        if _read_cached(source, read.offset, view) < read.nbytes:
            view = self._load(source, read.offset, read.nbytes)
        for copy in read.copies:
            at, offset = copy.at - start, copy.offset - read.offset
            target[at : at + copy.nbytes] = view[offset : offset + copy.nbytes]

    def _load(self, source: OpenSource, offset: int, nbytes: int) -> memoryview:
        """Bytes of a file, in the bounce buffer."""
        lead = offset % ALIGNMENT
        if nbytes >= _MIN_DIRECT_NBYTES and source.direct is not None:
            padded = pad(lead + nbytes)
            if _read_direct(source, offset - lead, self._bounce[:padded], lead + nbytes):
                return self._bounce[lead : lead + nbytes]
        view = self._bounce[:nbytes]
        _read_buffered(source, offset, view)
        return view


def _read_cached(source: OpenSource, offset: int, view: memoryview) -> int:
    """Read what the page cache holds from here on; all of it where that is no detour."""
    if view.nbytes < _MIN_DIRECT_NBYTES or source.direct is None:
        _read_buffered(source, offset, view)
        return view.nbytes
    return read_cached(source.descriptor, offset, view)


def _read_direct(source: OpenSource, offset: int, view: memoryview, needed: int) -> bool:
    """Fill aligned memory from an aligned offset; False if the file system cannot, after all."""
    assert source.direct is not None
    done = read_direct(source.direct, offset, view, needed)
    if done is not None and done < needed:
        raise changed(source.path)
    return done is not None


def _read_buffered(source: OpenSource, offset: int, view: memoryview) -> None:
    if read_buffered(source.descriptor, offset, view) < view.nbytes:
        raise changed(source.path)
