"""The bytes of one torch file, read where they are asked for and nowhere else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...errors import FormatError, UnsupportedError
from ...tensors import ByteRange
from ..source_files import open_source

__all__ = ["Source", "open_bytes"]


@dataclass(frozen=True, slots=True)
class Source:
    """An open file, or a part of one that is a file of its own; offsets are relative to its start."""

    path: Path
    descriptor: int
    start: int
    """In the file on disk."""
    nbytes: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes.

        Raises:
            FormatError: The file ends before them.
        """
        data = b""
        if offset >= 0 and 0 <= nbytes <= self.nbytes - offset:
            data = os.pread(self.descriptor, nbytes, self.start + offset)
            # The kernel gives at most 2 GiB at once and may be interrupted.
            while data and len(data) < nbytes:
                more = os.pread(self.descriptor, nbytes - len(data), self.start + offset + len(data))
                if not more:
                    break
                data += more
        if len(data) != nbytes:
            raise self.refuse("truncated", "it is cut off", f"{nbytes} bytes at {offset}", f"{self.nbytes} bytes")
        return data

    def refuse(self, kind: str, what: str, expected: object, found: object) -> FormatError:
        """The error for a file that is not what it claims to be; the caller raises it."""
        hint = "it was not copied or written to its end; take another copy" if kind == "truncated" else None
        what = f"not a valid torch file: {what}"
        return FormatError(what, kind=f"torch-{kind}", path=self.path, expected=expected, found=found, hint=hint)

    def unsupported(self, expected: str, found: str) -> UnsupportedError:
        """The error for a file of a kind that is not read; the caller raises it."""
        return UnsupportedError(
            "cannot read this torch file", kind="torch-format", path=self.path, expected=expected, found=found
        )


@contextmanager
def open_bytes(path: Path, byte_range: ByteRange | None = None) -> Iterator[Source]:
    """Open a file for reading.

    Args:
        path: A regular file.
        byte_range: The part to read; None for all of it.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It is no regular file, or ends before the part.
    """
    descriptor = open_source(path)
    try:
        size = os.fstat(descriptor).st_size
        part = ByteRange(start=0, end=size) if byte_range is None else byte_range
        if part.end > size:
            whole = Source(path, descriptor, 0, size)
            raise whole.refuse("truncated", "it is cut off", f"{part.end} bytes or more", f"{size} bytes")
        yield Source(path, descriptor, part.start, part.nbytes)
    finally:
        os.close(descriptor)
