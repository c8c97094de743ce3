"""A new file that is filled at any offset, by any thread, around the page cache where the file system can."""

from __future__ import annotations

import contextlib
import errno

from .filesystem import LocalFileSystem

__all__ = ["ALIGNMENT", "DirectFile", "pad"]

# Memory, offset and size of what goes around the page cache: the block size of every usual device divides it.
ALIGNMENT = 4096
# One page of the cache or one block of the disk more or less makes no difference below this.
_MIN_DIRECT_NBYTES = 64 * 2**10


def pad(nbytes: int) -> int:
    """The next multiple of ``ALIGNMENT``."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class DirectFile:
    """The bytes of a file that was just created.

    Raises plain ``OSError`` everywhere. Whoever created the file closes it.

    Args:
        filesystem: What carries out the changes.
        descriptor: Open for writing; the file is empty.
        nbytes: What it will hold; its room is reserved at once, so a full disk is found before anything is written.
    """

    def __init__(self, filesystem: LocalFileSystem, descriptor: int, nbytes: int) -> None:
        self._filesystem = filesystem
        self._nbytes = nbytes
        self.descriptor = descriptor
        self._is_direct = nbytes >= _MIN_DIRECT_NBYTES and self._set_direct()
        if nbytes:
            filesystem.allocate(descriptor, pad(nbytes) if self._is_direct else nbytes)

    def _set_direct(self) -> bool:
        try:
            self._filesystem.set_direct(self.descriptor, True)
        except OSError as err:
            if err.errno != errno.EINVAL:
                raise
            return False
        return True

    def write(self, buffer: memoryview, offset: int, nbytes: int) -> None:
        """Write a piece.

        Args:
            buffer: Starts at a page; at least ``pad(nbytes)`` long, for the last piece of a file is written with what
                is in memory after its end, and cut off by ``finish``.
            offset: A multiple of ``ALIGNMENT``.
            nbytes: How much of the buffer belongs to the file; a multiple of ``ALIGNMENT`` but at the file's end.
        """
        if self._is_direct:
            try:
                self._filesystem.write_at(self.descriptor, buffer[: pad(nbytes)], offset)
            except OSError as err:
                if err.errno != errno.EINVAL:
                    raise
            else:
                return
            # The file system takes the flag and refuses the write. Several threads may find out at once.
            self._filesystem.set_direct(self.descriptor, False)
        if nbytes:
            self._filesystem.write_at(self.descriptor, buffer[:nbytes], offset)
            with contextlib.suppress(OSError):  # only a hint
                self._filesystem.start_writeback(self.descriptor, offset, nbytes)

    def patch(self, buffer: memoryview, offset: int) -> None:
        """Overwrite a few bytes at any offset, when all pieces were written."""
        if self._is_direct:
            self._filesystem.set_direct(self.descriptor, False)
        self._filesystem.write_at(self.descriptor, buffer, offset)

    def finish(self) -> None:
        """Cut the padding off, when all is written."""
        if self._is_direct and self._nbytes % ALIGNMENT:
            self._filesystem.truncate(self.descriptor, self._nbytes)
