"""Source files, open for reading while chunks are filled: few at a time, never for writing, and watched for changes.

Nothing here trusts a plan's word about a file: each is looked at before the first byte is written, read by descriptors
of one and the same regular file, and looked at again at the end.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from ..errors import IntegrityError, TailorError, WriteError
from ..formats.source_files import open_source

__all__ = ["OpenSource", "SourceFiles", "changed"]

# Each has up to two descriptors; the usual limit of a process is 1024.
_MAX_OPEN = 128


@dataclass(frozen=True, slots=True)
class _Identity:
    """What tells a file from another one, and from itself after a write."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, status: os.stat_result) -> _Identity:
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(slots=True, kw_only=True)
class OpenSource:
    """A file that is open for reading."""

    path: Path
    descriptor: int
    """Through the page cache."""
    direct: int | None
    """Around the page cache; None where the file system cannot."""
    users: int = 0

    def close(self) -> None:
        for descriptor in (self.descriptor, self.direct):
            if descriptor is not None:
                os.close(descriptor)


class SourceFiles:
    """All sources of a merge. Safe to use from many threads."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, OpenSource] = OrderedDict()
        self._seen: dict[Path, _Identity] = {}
        self._mutex = threading.Lock()

    def __enter__(self) -> SourceFiles:
        return self

    def __exit__(self, *exc_info: type[BaseException] | BaseException | TracebackType | None) -> None:
        for source in self._open.values():
            source.close()
        self._open.clear()

    def inspect(self, path: Path, nbytes: int) -> None:
        """See to it that a file can be read as far as it will be.

        Args:
            path: The file.
            nbytes: Bytes that it must have at least.

        Raises:
            NotFoundError: It is gone.
            FormatError: It is no regular file.
            IntegrityError: It is shorter.
            WriteError: It cannot be read.
        """
        with self.using(path):
            found = self._seen[path].nbytes
        if found < nbytes:
            raise IntegrityError(
                "a source is shorter than its own header says",
                kind="truncated",
                path=path,
                expected=f"at least {nbytes} bytes",
                found=f"{found} bytes",
                hint="it is damaged or was changed since the merge was planned; copy the source again",
            )

    def nbytes_of(self, path: Path) -> int:
        """Size of a file that was inspected."""
        return self._seen[path].nbytes

    @contextlib.contextmanager
    def using(self, path: Path) -> Iterator[OpenSource]:
        """A file, open until the end of the block at least."""
        with self._mutex:
            source = self._open.get(path) or self._add(path)
            self._open.move_to_end(path)
            source.users += 1
        try:
            with translate_read_errors(path):
                yield source
        finally:
            with self._mutex:
                source.users -= 1

    def _add(self, path: Path) -> OpenSource:
        if len(self._open) >= _MAX_OPEN:
            idle = next((old for old in self._open.values() if not old.users), None)
            if idle is not None:
                del self._open[idle.path]
                idle.close()
        with translate_read_errors(path):
            source = OpenSource(path=path, descriptor=open_source(path), direct=None)
            try:
                identity = _Identity.of(os.fstat(source.descriptor))
                if self._seen.setdefault(path, identity) != identity:
                    raise changed(path)
                source.direct = _open_direct(path, identity)
            except BaseException:
                source.close()
                raise
        self._open[path] = source
        return source

    def check_unchanged(self) -> None:
        """See to it that all files are what they were when they were inspected.

        Raises:
            IntegrityError: One was written to, replaced or removed.
        """
        for path, identity in self._seen.items():
            with translate_read_errors(path):
                try:
                    now = _Identity.of(os.stat(path, follow_symlinks=False))
                except (FileNotFoundError, NotADirectoryError) as err:
                    raise changed(path) from err
            if now != identity:
                raise changed(path)


def _open_direct(path: Path, identity: _Identity) -> int | None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    if _Identity.of(os.fstat(descriptor)) != identity:
        os.close(descriptor)
        raise changed(path)
    return descriptor


def changed(path: Path) -> IntegrityError:
    """The error for a source that is not what it was."""
    return IntegrityError(
        "a source changed while it was read",
        kind="changed",
        path=path,
        expected="a checkpoint that nobody writes",
        found="another file, size or time of change than before",
        hint="try again when whoever writes it is done; nothing was published",
    )


@contextlib.contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Turn what the kernel says of a source into a typed error.

    Raises:
        WriteError: kind ``unreadable``; the device, a permission or a limit, no evidence against the checkpoint.
    """
    try:
        yield
    except TailorError:
        raise
    except OSError as err:
        raise WriteError(
            f"cannot read a source: {err.strerror or err}",
            kind="unreadable",
            path=path,
            hint="make it readable, or look at the system's log; nothing was published",
        ) from err
