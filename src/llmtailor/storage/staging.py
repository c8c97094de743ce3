"""One attempt at a checkpoint: new files and links in a private directory, made durable, then published by a rename.

    open -- write_file | link_file | adopt_rest --> filled -- seal --> durable -- publish --> published
      \\______________________________ abandon ________________________________/--> gone

Whatever goes wrong ends the attempt: nothing is retried, no file is fsynced twice, nothing older was touched.
The order of ``seal`` and ``publish`` is the protocol of the specification, section 5; do not reorder it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import xxhash

from ..errors import IntegrityError, LinkFallbackWarning, NotFoundError, TailorError, WriteError
from ..manifest import MANIFEST_NAME, FileRecord
from .filesystem import LocalFileSystem

__all__ = ["StagedCheckpoint", "translate_os_errors"]

# Files wait open for one batch of fsyncs; this bounds how many.
_MAX_OPEN_FILES = 256
# Threads that wait in fsync together share one journal commit: 70 files in 8 threads cost a quarter of 70 in turn.
_FSYNC_THREADS = 8
_READ_CHUNK_NBYTES = 2**20
# A link can be refused because of where the file is, how many names it has, or what the file system can do.
_NO_LINK = frozenset({errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


@contextlib.contextmanager
def translate_os_errors(what: str, path: Path) -> Iterator[None]:
    """Turn the kernel's word into ours.

    Raises:
        WriteError: kind ``no-space``, ``read-only`` or ``io``.
    """
    try:
        yield
    except TailorError:
        raise
    except OSError as err:
        kind, hint = "io", "look at the system's log; older checkpoints were not touched"
        if err.errno in _NO_SPACE:
            kind, hint = "no-space", "free space or quota, or keep fewer checkpoints; older ones were not touched"
        elif err.errno in _READ_ONLY:
            kind, hint = "read-only", "make the run's directory writable; older checkpoints were not touched"
        where = err.filename or path
        raise WriteError(f"cannot {what}: {err.strerror or err}", kind=kind, path=where, hint=hint) from err


def _check_source(record: FileRecord, source: Path) -> None:
    """A file may be linked if it is the file that was recorded, as far as can be told without reading it."""
    with translate_os_errors("link a file of a checkpoint", source):
        try:
            status = os.stat(source, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError) as err:
            raise NotFoundError(
                "a file to link is gone",
                kind="missing-file",
                path=source,
                expected=f"a file of {record.bytes} bytes",
                found="nothing",
                hint="the next save writes the layer in full",
            ) from err
    if not stat.S_ISREG(status.st_mode) or status.st_size != record.bytes:
        raise IntegrityError(
            "a file to link is not the file that was published",
            kind="file-size" if stat.S_ISREG(status.st_mode) else "not-regular",
            path=source,
            expected=f"{record.bytes} bytes",
            found=f"{status.st_size} bytes, {stat.filemode(status.st_mode)}",
            hint="the next save writes the layer in full",
        )


class StagedCheckpoint:
    """An attempt at ``checkpoint-<step>``, invisible to readers until ``publish``.

    Made by ``RunDirectory.stage``. Not thread-safe. ``path`` is where a trainer may put small files of its own;
    ``adopt_rest`` takes them in.
    """

    def __init__(self, filesystem: LocalFileSystem, attempt: Path, target: Path) -> None:
        self._filesystem = filesystem
        self._attempt = attempt
        self._target = target
        self._open_files: list[int] = []
        self._directories: set[Path] = set()
        self._names: set[str] = set()
        self.path = attempt / target.name
        try:
            with translate_os_errors("start a checkpoint", self.path):
                filesystem.make_directory(attempt)
                filesystem.make_directory(self.path)
        except WriteError:
            self.abandon()
            raise

    def write_file(self, name: str, chunks: Iterable[memoryview], nbytes: int) -> FileRecord:
        """Write a new file.

        Args:
            name: Relative to the checkpoint, with forward slashes.
            chunks: Its bytes in order; each is used before the next is asked for.
            nbytes: How many they are.

        Returns:
            Its record; the digest is that of the bytes handed over, not of what a page cache says later.

        Raises:
            WriteError: Nothing was published.
        """
        return FileRecord(path=name, bytes=nbytes, digest=self._write(name, chunks, nbytes))

    def _write(self, name: str, chunks: Iterable[memoryview], nbytes: int) -> str:
        path = self._prepare(name)
        with translate_os_errors("write a file of a checkpoint", path):
            descriptor = self._filesystem.create(path)
            self._open_files.append(descriptor)
            if nbytes:
                self._filesystem.allocate(descriptor, nbytes)
            digest, written = xxhash.xxh3_128(), 0
            for chunk in chunks:
                self._filesystem.write(descriptor, chunk)
                digest.update(chunk)
                written += chunk.nbytes
            assert written == nbytes, (name, written, nbytes)
            if len(self._open_files) >= _MAX_OPEN_FILES:
                self._fsync_files()
        return f"xxh3_128:{digest.hexdigest()}"

    def link_file(self, record: FileRecord, source: Path) -> FileRecord:
        """Take a file of an earlier checkpoint into this one without writing it again.

        Args:
            record: What it is called there and here, and what it must be.
            source: Where it is.

        Raises:
            NotFoundError: The earlier file is gone.
            IntegrityError: It has another size than recorded, or is no regular file.
            WriteError: It can be neither linked nor copied.
        """
        path = self._prepare(record.path)
        _check_source(record, source)
        with translate_os_errors("link a file of a checkpoint", path):
            try:
                self._filesystem.link(source, path)
            except OSError as err:
                if err.errno not in _NO_LINK:
                    raise
                self._clone(source, path, record, err)
        return record

    def _clone(self, source: Path, path: Path, record: FileRecord, refusal: OSError) -> None:
        try:
            self._filesystem.reflink(source, path)
            cost = "a reflink was made, which costs no space"
        except OSError:
            self._filesystem.copy(source, path)
            cost = f"a copy was made, which costs {record.bytes} bytes and their time at every save"
        warnings.warn(f"no hard link from {source}: {refusal.strerror}; {cost}", LinkFallbackWarning, stacklevel=4)

    def adopt_rest(self) -> tuple[FileRecord, ...]:
        """Take in every file somebody else put under ``path``: digest, make read-only, and sync with the others.

        Raises:
            WriteError: One cannot be read, has a name a manifest may not hold, or is not a regular file with a single
                name.
        """
        records = []
        with translate_os_errors("take in the files of a checkpoint", self.path):
            for directory, directories, files in os.walk(self.path, onerror=_raise):
                # A link to a directory is listed as a directory and not entered; what it names would be left out.
                links = [name for name in directories if os.path.islink(os.path.join(directory, name))]
                for file in sorted([*files, *links]):
                    name = (Path(directory) / file).relative_to(self.path).as_posix()
                    if name not in self._names:
                        records.append(self._adopt(name))
        return tuple(sorted(records, key=lambda record: record.path))

    def _adopt(self, name: str) -> FileRecord:
        path = self._prepare(name)
        with translate_os_errors("take in a file of a checkpoint", path):
            descriptor = self._filesystem.open_for_reading(path)
            self._open_files.append(descriptor)
            if os.fstat(descriptor).st_nlink != 1:
                raise OSError(errno.EINVAL, "the file has a second name outside the checkpoint", str(path))
            digest, nbytes = xxhash.xxh3_128(), 0
            while chunk := self._filesystem.read(descriptor, _READ_CHUNK_NBYTES):
                digest.update(chunk)
                nbytes += len(chunk)
            self._filesystem.make_read_only(descriptor)
        try:
            return FileRecord(path=name, bytes=nbytes, digest=f"xxh3_128:{digest.hexdigest()}")
        except ValueError as err:
            raise WriteError(
                "cannot take in a file of a checkpoint: a manifest cannot hold its name",
                kind="file-name",
                path=self.path,
                expected="no leading dot, no backslash, no control character, UTF-8, at most 1024 characters",
                found=ascii(name),
                hint="whoever writes the small files must name it otherwise or leave it out",
            ) from err

    def seal(self, manifest: bytes) -> None:
        """Write the manifest and make everything durable; all that can fail for want of space is done then.

        Raises:
            WriteError: Nothing was published.
        """
        self._fsync_files()
        chunk = memoryview(manifest)
        self._write(MANIFEST_NAME, [chunk], chunk.nbytes)
        self._fsync_files()
        with translate_os_errors("make a checkpoint durable", self.path):
            for directory in sorted(self._directories, key=lambda path: len(path.parts), reverse=True):
                self._filesystem.fsync_directory(directory)
            self._filesystem.fsync_directory(self.path)

    def publish(self) -> Path:
        """Give a sealed checkpoint its name.

        Returns:
            The directory of the published checkpoint. The caller still has to fsync the run.

        Raises:
            WriteError: Nothing was published.
        """
        with translate_os_errors("publish a checkpoint", self._target):
            self._filesystem.rename(self.path, self._target)
        # Published: what is left is an empty directory, and the next sweep takes it if this does not.
        with contextlib.suppress(OSError):
            self._filesystem.remove_empty_directory(self._attempt)
        return self._target

    def abandon(self) -> None:
        """Give up: close and remove everything. Never raises; what cannot be removed is swept by the next writer."""
        for descriptor in self._open_files:
            with contextlib.suppress(OSError):
                self._filesystem.close(descriptor)
        self._open_files.clear()
        with contextlib.suppress(OSError):
            self._filesystem.remove_tree(self._attempt)

    def _prepare(self, name: str) -> Path:
        """Note a file, and make the directories above it."""
        assert name not in self._names, name
        self._names.add(name)
        path = self.path / name
        for parent in reversed(path.relative_to(self.path).parents[:-1]):
            directory = self.path / parent
            if directory not in self._directories:
                self._directories.add(directory)
                if not directory.is_dir():
                    with translate_os_errors("make a directory of a checkpoint", directory):
                        self._filesystem.make_directory(directory)
        return path

    def _fsync_files(self) -> None:
        """fsync and close all open files, each once, whatever happens to the others."""
        with translate_os_errors("make a checkpoint durable", self.path):
            try:
                with ThreadPoolExecutor(_FSYNC_THREADS) as pool:
                    outcomes = pool.map(self._fsync_and_close, list(self._open_files))
                    faults = [fault for fault in outcomes if fault is not None]
            except RuntimeError as err:  # threading says so of a limit on processes; ``abandon`` closes what is left
                raise OSError(errno.EAGAIN, "no thread can be started") from err
            if faults:
                raise faults[0]

    def _fsync_and_close(self, descriptor: int) -> OSError | None:
        self._open_files.remove(descriptor)
        fault: OSError | None = None
        for call in (self._filesystem.fsync, self._filesystem.close):
            try:
                call(descriptor)
            except OSError as err:
                fault = fault or err
        return fault


def _raise(err: OSError) -> NoReturn:
    raise err
