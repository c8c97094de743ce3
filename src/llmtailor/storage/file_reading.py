"""Whole files at the speed of the disk: front to back in large aligned pieces, several files at a time.

    claim a file (largest first) -> read a piece -> digest it -> hand it on -> ... -> outcome to the caller's thread

A piece comes out of the page cache where that has it, and else around it. A thread has one buffer, which is used again
for every piece of every file, so that reading costs the memory of a few pieces, however large the files are. Nothing
is mapped: a failing device is an ``OSError``, not a signal.
"""

from __future__ import annotations

import errno
import mmap
import os
import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, TypeVar

import xxhash

from ..errors import IntegrityError
from .direct_file import ALIGNMENT, pad
from .filesystem import LocalFileSystem

__all__ = ["PIECE_NBYTES", "FileReader", "aligned_buffer", "read_buffered", "read_cached", "read_direct", "read_files"]

PIECE_NBYTES = 8 * 2**20
# Enough to keep a disk busy while some of them digest and copy.
_NUM_THREADS = 4
# Below this the page cache's read-ahead is worth more than the detour.
_MIN_DIRECT_NBYTES = 128 * 2**10
# Files of about the same size stay in order; the large ones go first, so that none of them is left for the end.
_SMALL_NBYTES = 64 * 2**20
# What RWF_NOWAIT says where the page cache does not hold the bytes, or the file system does not know the flag.
_NOT_CACHED = frozenset({errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS})

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def aligned_buffer(nbytes: int) -> memoryview:
    """Fresh memory that starts at a page; costs nothing until it is touched."""
    return memoryview(mmap.mmap(-1, nbytes))


def read_cached(descriptor: int, offset: int, view: memoryview) -> int:
    """Read what the page cache holds from here on, as far as it goes without a gap.

    Asking for a page that is not there makes the kernel read ahead as much as was asked for, and the page that was
    asked for stays in the cache. So it is asked for one page first, at a place that nobody has asked for before.

    Returns:
        How many bytes were read.

    Source: Linux 6.18, mm/filemap.c (filemap_get_pages): with IOCB_NOWAIT the read-ahead is started, not waited for.
    """
    done = 0
    try:
        if os.preadv(descriptor, [view[:1]], offset + random.randrange(view.nbytes), os.RWF_NOWAIT) != 1:
            return 0
        while done < view.nbytes and (got := os.preadv(descriptor, [view[done:]], offset + done, os.RWF_NOWAIT)):
            done += got
    except OSError as err:
        if err.errno not in _NOT_CACHED:
            raise
    return done


def read_direct(descriptor: int, offset: int, view: memoryview, needed: int) -> int | None:
    """Fill memory around the page cache.

    Args:
        descriptor: Open with ``O_DIRECT``.
        offset: A multiple of ``ALIGNMENT``.
        view: Starts at a page, and is a multiple of ``ALIGNMENT`` long.
        needed: All after these bytes may lie behind the file's end.

    Returns:
        How many bytes were read: fewer than ``needed`` if the file ends before. None if the file system cannot,
        after all.
    """
    done = 0
    while done < needed:
        try:
            got = os.preadv(descriptor, [view[done:]], offset + done)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            return None
        # What ends inside a block ends at the end of the file, or has to be asked for again from the block's start.
        if done + got < needed and got < ALIGNMENT:
            return done + got
        done = done + got if done + got >= needed else (done + got) // ALIGNMENT * ALIGNMENT
    return done


def read_buffered(descriptor: int, offset: int, view: memoryview) -> int:
    """Read through the page cache.

    Returns:
        How many bytes were read: fewer than the view has if the file ends before.
    """
    done = 0
    while done < view.nbytes and (got := os.preadv(descriptor, [view[done:]], offset + done)):
        done += got
    return done


class _Stopped(Exception):  # noqa: N818
    """Another thread failed; what this one was doing does not matter any more."""


class FileReader:
    """One thread's way to read whole files.

    Args:
        is_stopped: Asked before each piece; reading ends where it says yes.
        buffer: Starts at a page, and is whole pages long; nobody else's meanwhile. None takes memory of its own.
    """

    def __init__(self, is_stopped: Callable[[], bool] = lambda: False, *, buffer: memoryview | None = None) -> None:
        self._is_stopped = is_stopped
        self._buffer = aligned_buffer(PIECE_NBYTES) if buffer is None else buffer
        self._filesystem = LocalFileSystem()

    @property
    def piece_nbytes(self) -> int:
        """The most that is read at a time."""
        return self._buffer.nbytes

    def digest(
        self,
        descriptor: int,
        nbytes: int,
        path: Path,
        on_piece: Callable[[int, memoryview], None] = lambda offset, piece: None,
    ) -> str:
        """Read a file and digest it.

        Args:
            descriptor: Open for reading, through the page cache; used by nobody else meanwhile.
            nbytes: Size of the file.
            path: For the error.
            on_piece: Told of each piece, in order: its offset and its bytes, which are there until it returns.

        Returns:
            ``xxh3_128:<32 hex>``.

        Raises:
            IntegrityError: The file ends before ``nbytes``.
            OSError: The device failed.
        """
        digest = xxhash.xxh3_128()
        for offset in range(0, nbytes, self.piece_nbytes):
            if self._is_stopped():
                raise _Stopped
            wanted = min(self.piece_nbytes, nbytes - offset)
            found = self._read(descriptor, offset, wanted)
            if found < wanted:
                raise IntegrityError(
                    "the file became shorter while it was read",
                    kind="file-size",
                    path=path,
                    expected=f"{nbytes} bytes",
                    found=f"{offset + found} bytes",
                )
            piece = self._buffer[:wanted]
            digest.update(piece)
            on_piece(offset, piece)
        return f"xxh3_128:{digest.hexdigest()}"

    def read_piece(self, descriptor: int, offset: int, nbytes: int) -> memoryview:
        """Read a stretch of a file.

        Args:
            descriptor: As for ``digest``.
            offset: A multiple of ``ALIGNMENT``.
            nbytes: At most ``piece_nbytes``.

        Returns:
            Its bytes, fewer if the file ends before; there until the next call.

        Raises:
            OSError: The device failed.
        """
        return self._buffer[: self._read(descriptor, offset, nbytes)]

    def _read(self, descriptor: int, offset: int, nbytes: int) -> int:
        view, done = self._buffer[:nbytes], 0
        if nbytes >= _MIN_DIRECT_NBYTES:
            done = read_cached(descriptor, offset, view)
            if done < nbytes and self._set_direct(descriptor, True):
                done = done // ALIGNMENT * ALIGNMENT
                got = read_direct(descriptor, offset + done, self._buffer[done : pad(nbytes)], nbytes - done)
                self._set_direct(descriptor, False)
                if got is not None:
                    return min(nbytes, done + got)
        return done + read_buffered(descriptor, offset + done, view[done:])

    def _set_direct(self, descriptor: int, is_direct: bool) -> bool:
        try:
            self._filesystem.set_direct(descriptor, is_direct)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            return False
        return True


def read_files(
    items: Sequence[_Item],
    nbytes_of: Callable[[_Item], int],
    work: Callable[[_Item, FileReader], _Result],
    *,
    on_begin: Callable[[_Item], None] = lambda item: None,
    on_done: Callable[[_Item, _Result], None] = lambda item, result: None,
) -> list[_Result]:
    """Work on several files at a time, each read by one thread.

    Args:
        items: One for each file.
        nbytes_of: What there is to read for an item.
        work: Called for each item in some thread; must not use what other items change.
        on_begin: Called before ``work``, by one thread at a time.
        on_done: Called in the caller's thread when an item is done, in any order.

    Returns:
        What ``work`` returned, in the order of the items.

    Raises:
        BaseException: What ``work`` or a callback raised first in the order of the items; the other threads were
            stopped, and have ended.
    """
    total = sum(map(nbytes_of, items))
    pool = _Pool(items, nbytes_of, work, on_begin)
    return pool.run(min(_NUM_THREADS, len(items), 1 + total // PIECE_NBYTES), on_done)


class _Pool(Generic[_Item, _Result]):
    """Threads that take items one after the other; see ``read_files``."""

    def __init__(
        self,
        items: Sequence[_Item],
        nbytes_of: Callable[[_Item], int],
        work: Callable[[_Item, FileReader], _Result],
        on_begin: Callable[[_Item], None],
    ) -> None:
        order = sorted(range(len(items)), key=lambda index: -max(nbytes_of(items[index]), _SMALL_NBYTES))
        self._items = items
        self._order: Iterator[int] = iter(order)
        self._work = work
        self._on_begin = on_begin
        self._claiming = threading.Lock()
        self._stop = threading.Event()
        # Index and result or error of an item; None when a thread ends.
        self._outcomes: queue.SimpleQueue[tuple[int, _Result | BaseException] | None] = queue.SimpleQueue()

    def run(self, num_threads: int, on_done: Callable[[_Item, _Result], None]) -> list[_Result]:
        threads = self._start(num_threads) if num_threads > 1 else []
        results: dict[int, _Result] = {}
        errors: dict[int, BaseException] = {}
        try:
            if not threads:
                self._work_off()
            num_running = max(1, len(threads))
            while num_running:
                outcome = self._outcomes.get()
                if outcome is None:
                    num_running -= 1
                    continue
                index, value = outcome
                if isinstance(value, BaseException):
                    errors[index] = value
                else:
                    results[index] = value
                    on_done(self._items[index], value)
        finally:
            self._stop.set()
            for thread in threads:
                thread.join()
        if errors:
            raise errors[min(errors)]
        return [results[index] for index in range(len(self._items))]

    def _start(self, num_threads: int) -> list[threading.Thread]:
        threads = []
        for number in range(num_threads):
            thread = threading.Thread(target=self._work_off, name=f"llmtailor-read-{number}")
            try:
                thread.start()
            except RuntimeError:  # a limit on threads: fewer do as well, and none leaves the caller's own
                break
            threads.append(thread)
        return threads

    def _work_off(self) -> None:
        index = -1
        try:
            reader = FileReader(self._stop.is_set)
            while not self._stop.is_set():
                with self._claiming:
                    index = next(self._order, -1)
                    if index < 0:
                        return
                    self._on_begin(self._items[index])
                self._outcomes.put((index, self._work(self._items[index], reader)))
        except _Stopped:
            pass
        except BaseException as err:
            self._stop.set()
            self._outcomes.put((index, err))
        finally:
            self._outcomes.put(None)
