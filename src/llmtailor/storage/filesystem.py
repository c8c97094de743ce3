"""Every operation on a file system that changes something, or that must be seen to fail, in one place.

Nothing here decides. Tests stand a faulty one of the same shape in front of it and make the n-th operation fail,
stop the world there, or lie; so the publish protocol calls nothing of ``os`` directly.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["FreeSpace", "LocalFileSystem"]

# Source: Linux include/uapi/linux/fs.h, FICLONE = _IOW(0x94, 9, int).
_FICLONE = 0x40049409
_COPY_CHUNK_NBYTES = 8 * 2**20
# Source: Linux include/uapi/linux/fcntl.h and fs.h.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeSpace:
    """Room on a file system for an unprivileged writer."""

    nbytes: int | None
    """None where the file system does not say (ramfs, some in user space)."""
    inodes: int | None
    """None where the file system does not count inodes."""


class LocalFileSystem:
    """Thin, stateless calls to the kernel. Every method raises plain ``OSError``."""

    def make_directory(self, path: Path) -> None:
        """Create a directory; its parent must exist, it must not. Who may enter it is for the umask to say."""
        os.mkdir(path)

    def create(self, path: Path, mode: int = 0o444) -> int:
        """Create a file that does not exist, for writing; by default read-only for everybody else from the start."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)

    def open_for_reading(self, path: Path) -> int:
        """Open a regular file that is no link; ``OSError(EINVAL)`` for anything else."""
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return descriptor

    def allocate(self, descriptor: int, nbytes: int) -> None:
        """Reserve blocks, so that a full disk is found before anything is written; nothing where that is not possible.

        Not by ``posix_fallocate``: where a file system cannot, as NFS before 4.2, the C library writes a byte to every
        page. Source: glibc 2.36, sysdeps/posix/posix_fallocate.c.
        """
        fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
        if fallocate is None:
            return
        while fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
            number = ctypes.get_errno()
            if number in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                return
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    def write(self, descriptor: int, buffer: memoryview) -> None:
        """Write all of the buffer at the file's position."""
        while buffer.nbytes:
            buffer = buffer[os.write(descriptor, buffer) :]

    def write_at(self, descriptor: int, buffer: memoryview, offset: int) -> None:
        """Write all of the buffer at an offset; threads may do so side by side."""
        while buffer.nbytes:
            nbytes = os.pwrite(descriptor, buffer, offset)
            buffer, offset = buffer[nbytes:], offset + nbytes

    def set_direct(self, descriptor: int, is_direct: bool) -> None:
        """Go around the page cache, or through it; ``OSError(EINVAL)`` where the file system cannot.

        Around it, memory, offset and size of each write must be multiples of the device's block.
        """
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_DIRECT if is_direct else flags & ~os.O_DIRECT)

    def start_writeback(self, descriptor: int, offset: int, nbytes: int) -> None:
        """Let the kernel begin to write what lies in the page cache, so that fsync finds little to do.

        Source: Linux 6.18, mm/fadvise.c: POSIX_FADV_DONTNEED starts the write of dirty pages and waits for none.
        """
        os.posix_fadvise(descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)

    def truncate(self, descriptor: int, nbytes: int) -> None:
        """Cut a file off."""
        os.ftruncate(descriptor, nbytes)

    def read(self, descriptor: int, nbytes: int) -> bytes:
        """Read up to that many bytes; empty at the end."""
        return os.read(descriptor, nbytes)

    def fsync(self, descriptor: int) -> None:
        """Make a file durable. Never call it again on a file for which it failed."""
        os.fsync(descriptor)

    def close(self, descriptor: int) -> None:
        """Close a descriptor; network file systems report late errors here."""
        os.close(descriptor)

    def make_read_only(self, descriptor: int) -> None:
        """Take away everybody's right to write."""
        os.fchmod(descriptor, 0o444)

    def link(self, source: Path, target: Path) -> None:
        """Give a file a second name; fails if the target exists."""
        os.link(source, target, follow_symlinks=False)

    def reflink(self, source: Path, target: Path) -> None:
        """Make a new file that shares the blocks of another."""
        self._fill(source, target, LocalFileSystem.clone)

    @staticmethod
    def clone(reader: int, writer: int) -> None:
        """Make an open, empty file share all blocks of another."""
        fcntl.ioctl(writer, _FICLONE, reader)

    def copy(self, source: Path, target: Path) -> None:
        """Make a new file with the same bytes."""

        def copy_bytes(reader: int, writer: int) -> None:
            while chunk := os.read(reader, _COPY_CHUNK_NBYTES):
                self.write(writer, memoryview(chunk))

        self._fill(source, target, copy_bytes)

    def _fill(self, source: Path, target: Path, fill: Callable[[int, int], object]) -> None:
        reader = self.open_for_reading(source)
        try:
            writer = self.create(target)
            try:
                fill(reader, writer)
                self.fsync(writer)
            except BaseException:
                self.remove_file(target)
                raise
            finally:
                self.close(writer)
        finally:
            self.close(reader)

    def rename(self, source: Path, target: Path) -> None:
        """Move a directory to a name that is free; ``OSError(EEXIST)`` if it is taken.

        The check and the rename are two calls; the run's lock keeps other writers out between them, and the kernel
        itself refuses a directory that is not empty.
        """
        if os.path.lexists(target):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(source, target)

    def exchange(self, one: Path, other: Path) -> None:
        """Let two directories swap names, seen as one change.

        ``OSError(EINVAL)`` where the file system cannot, ``OSError(ENOSYS)`` where the kernel or the C library cannot.
        """
        try:
            renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        except AttributeError as err:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(one)) from err
        if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(one), None, str(other))

    def replace(self, source: Path, target: Path) -> None:
        """Give a file a name that may be taken: whoever opens that sees the old file or the new one."""
        os.replace(source, target)

    def fsync_directory(self, path: Path) -> None:
        """Make the names in a directory durable."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def remove_file(self, path: Path) -> None:
        """Remove one name of a file."""
        os.unlink(path)

    def remove_tree(self, path: Path) -> None:
        """Remove a directory and everything in it."""
        shutil.rmtree(path)

    def remove_empty_directory(self, path: Path) -> None:
        """Remove a directory that must be empty."""
        os.rmdir(path)

    def free_space(self, path: Path) -> FreeSpace:
        """Room left on the file system of a path."""
        status = os.statvfs(path)
        return FreeSpace(
            nbytes=status.f_bavail * status.f_frsize if status.f_blocks else None,
            inodes=status.f_favail if status.f_files else None,
        )
