"""Host memory that is allocated once and used again for every save: a ring of pieces.

    |  free  | piece | piece (given back) | piece |   free   | set aside |
             ^ oldest                             ^ head

A piece is a stretch of pages that becomes a stretch of a file. Pieces are taken in order by one thread and given back
by others in any order; room is won when the oldest is given back. An empty ring starts over at its first page, so that
small saves touch little memory.

Fresh pages are what copying to host memory costs most (0.7 s per GB against 0.1), so they are kept.
"""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from ..errors import InvalidInputError, WriteError
from ..storage import ALIGNMENT, pad
from .free_memory import free_nbytes
from .host_memory import HostMemory

__all__ = ["MIN_POOL_NBYTES", "HostPool", "Piece", "default_pool_nbytes"]

# What one write brings to the disk: more is not faster, less is slower.
_MAX_PIECE_NBYTES = 8 * 2**20
# What is touched before somebody may interrupt.
_TOUCHED_NBYTES = 64 * 2**20
# So that copying and writing overlap however small the pool is.
_MIN_PIECES = 4
MIN_POOL_NBYTES = _MIN_PIECES * ALIGNMENT
# Of the memory that is free when the first save begins; the rest is for the data loader and the page cache.
_DEFAULT_SHARE = 4
_MIN_DEFAULT_NBYTES = 64 * 2**20


@dataclass(slots=True, kw_only=True, eq=False)
class Piece:
    """A stretch of the ring."""

    start: int
    nbytes: int
    """A multiple of ``ALIGNMENT``."""
    bytes: npt.NDArray[np.uint8]
    tensor: torch.Tensor
    """The same memory, uint8."""
    is_given_back: bool = field(default=False)

    @property
    def buffer(self) -> memoryview:
        """The same memory, page-aligned."""
        return memoryview(self.bytes.data)


def default_pool_nbytes() -> int:
    """How much host memory a run may take for its saves if nobody says: a quarter of what is free now."""
    return max(_MIN_DEFAULT_NBYTES, free_nbytes() // _DEFAULT_SHARE)


class HostPool:
    """The ring.

    Args:
        limit_nbytes: It never takes more memory than this; rounded down to pages.
        beside_nbytes: Of the limit, what is needed beside the ring; a quarter of it at most.

    Raises:
        InvalidInputError: That is too little to work with.
    """

    def __init__(self, limit_nbytes: int, *, beside_nbytes: int = 0) -> None:
        if limit_nbytes < MIN_POOL_NBYTES:
            raise InvalidInputError(
                "the pool of host memory is too small",
                kind="pool-size",
                expected=f"at least {MIN_POOL_NBYTES} bytes",
                found=f"{limit_nbytes} bytes",
                hint="leave pool_nbytes out to let a quarter of the free memory be used at most",
            )
        self.limit_nbytes = (limit_nbytes - min(beside_nbytes, limit_nbytes // 4)) // ALIGNMENT * ALIGNMENT
        self._condition = threading.Condition()
        self._pieces: deque[Piece] = deque()
        self._head = 0
        self._in_use = 0
        self._high_water = 0
        self._memory = HostMemory()
        self._aside_nbytes = 0
        """Of the memory's end: no part of the ring for now."""

    @property
    def nbytes(self) -> int:
        """Memory it holds now."""
        return self._memory.nbytes

    @property
    def high_water_nbytes(self) -> int:
        """The most that was in use at a time since ``reserve``."""
        return self._high_water

    @property
    def _ring_nbytes(self) -> int:
        return self.nbytes - self._aside_nbytes

    def reserve(self, nbytes: int, *, is_pinned: bool) -> None:
        """Get ready for a save: allocate, if this is the first or it is larger than those before.

        Called by the thread that takes pieces. Memory is only replaced while no piece is in use; else what is there
        must do.

        Args:
            nbytes: What the save needs at most, padding included.
            is_pinned: Some of it comes from a CUDA device.

        Raises:
            WriteError: There is not so much memory.
        """
        wanted = min(self.limit_nbytes, max(pad(nbytes), MIN_POOL_NBYTES))
        with self._condition:
            self._high_water = self._in_use
            if not self._pieces and wanted > self.nbytes:
                self._allocate(wanted)
            if not self._pieces and is_pinned:
                self._memory.pin()

    def touch(self) -> None:
        """Have every page there before the first save needs it; for the thread that takes pieces."""
        with self._condition:
            if self._pieces:
                return
        for start in range(0, self.nbytes, _TOUCHED_NBYTES):
            # numpy lets other threads run meanwhile; madvise(MADV_POPULATE_WRITE) from Python does not.
            self._memory.bytes[start : start + _TOUCHED_NBYTES : ALIGNMENT] = 0

    def _allocate(self, nbytes: int) -> None:
        self._memory.close()  # the old memory goes before the new one comes
        try:
            self._memory = HostMemory(nbytes)
        except (OSError, MemoryError) as err:
            raise WriteError(
                "cannot get host memory to save from",
                kind="host-memory",
                expected=f"{nbytes} bytes",
                found=str(err),
                hint="pass a smaller pool_nbytes, or raise the limit (ulimit -v); older checkpoints were not touched",
            ) from err

    @contextlib.contextmanager
    def set_aside(self, nbytes: int) -> Iterator[memoryview]:
        """Memory for something else than pieces, until the end of the ``with`` block. No piece may be in use before it.

        Args:
            nbytes: What is wanted; rounded up to pages.

        Returns:
            So much of it as leaves a half for pieces; page-aligned.
        """
        with self._condition:
            assert not self._pieces
            self._aside_nbytes = min(pad(nbytes), self.nbytes // 2 // ALIGNMENT * ALIGNMENT)
            self._use(self._aside_nbytes)
        try:
            yield memoryview(self._memory.bytes[self._ring_nbytes :].data)
        finally:
            # What is in use stays where it is: the ring only becomes longer.
            with self._condition:
                self._use(-self._aside_nbytes)
                self._aside_nbytes = 0
                self._condition.notify_all()

    def take(self, nbytes: int, is_cancelled: Callable[[], bool]) -> Piece | None:
        """Take the next piece; waits until there is room.

        Args:
            nbytes: How much is wanted.
            is_cancelled: Asked whenever something changed; ``wake`` makes it so.

        Returns:
            A piece of at most that many bytes, rounded up to ``ALIGNMENT``; None if it was cancelled.
        """
        share = max(self._ring_nbytes // _MIN_PIECES // ALIGNMENT * ALIGNMENT, ALIGNMENT)
        wanted = min(pad(nbytes), _MAX_PIECE_NBYTES, share)
        with self._condition:
            while not is_cancelled():
                if not self._pieces:
                    self._head = 0
                # A piece does not go round the end: the rest of the ring becomes a smaller one.
                granted = min(wanted, self._ring_nbytes - self._head)
                if self._has_room(granted):
                    return self._grant(granted)
                self._condition.wait()
        return None

    def _has_room(self, nbytes: int) -> bool:
        if not self._pieces:
            return True
        oldest = self._pieces[0].start
        # At the same place, the ring is full: it is not empty.
        return self._head > oldest or self._head + nbytes <= oldest if self._head != oldest else False

    def _grant(self, nbytes: int) -> Piece:
        start, end = self._head, self._head + nbytes
        memory = self._memory
        piece = Piece(start=start, nbytes=nbytes, bytes=memory.bytes[start:end], tensor=memory.tensor[start:end])
        self._pieces.append(piece)
        self._head = end % self._ring_nbytes
        self._use(nbytes)
        return piece

    def _use(self, nbytes: int) -> None:
        self._in_use += nbytes
        self._high_water = max(self._high_water, self._in_use)

    def give_back(self, piece: Piece) -> None:
        """Let the memory be used again; any thread, once per piece."""
        with self._condition:
            assert not piece.is_given_back
            piece.is_given_back = True
            self._in_use -= piece.nbytes
            while self._pieces and self._pieces[0].is_given_back:
                self._pieces.popleft()
            self._condition.notify_all()

    def wake(self) -> None:
        """Have whoever waits in ``take`` ask whether it is cancelled."""
        with self._condition:
            self._condition.notify_all()

    def close(self) -> None:
        """Let go of the memory; nothing may be in use."""
        with self._condition:
            self._memory.close()
