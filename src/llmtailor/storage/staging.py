"""One attempt at a checkpoint: new files and links in a private directory, made durable, then published by a rename.

    open -- create_file | link_file | adopt_rest --> filled -- seal --> durable -- publish --> published
      \\______________________________ abandon ________________________________/--> gone

Whatever goes wrong ends the attempt: nothing is retried, no file is fsynced twice, nothing older was touched.
The order of ``seal`` and ``publish`` is the protocol of the specification, section 5; do not reorder it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import xxhash

from ..errors import IntegrityError, LinkFallbackWarning, NotFoundError, TailorError, TailorWarning, WriteError
from ..manifest import MANIFEST_NAME, FileRecord
from .direct_file import DirectFile
from .filesystem import LocalFileSystem

__all__ = ["StagedCheckpoint", "StagedFile", "translate_os_errors"]

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


# Not weak: the callback of a weak reference would swallow a Ctrl-C that comes while it runs.
_STAGED: set[StagedCheckpoint] = set()


def warn(warning: TailorWarning) -> None:
    """Tell the user at once; for threads of the user's alone."""
    warnings.warn(warning, stacklevel=4)


class StagedFile:
    """A file of an attempt, filled piece by piece; made by ``StagedCheckpoint.create_file``.

    ``write`` may be called by any thread, in any order; ``finish`` once, when all is written.
    """

    def __init__(self, staged: StagedCheckpoint, name: str, direct: DirectFile, nbytes: int) -> None:
        self._staged = staged
        self._direct = direct
        self._name = name
        self._nbytes = nbytes

    def write(self, buffer: memoryview, offset: int, nbytes: int) -> None:
        """Write a piece; buffer, offset and size as ``DirectFile.write`` takes them.

        Raises:
            WriteError: The attempt must be abandoned.
        """
        with translate_os_errors("write a file of a checkpoint", self._staged.path / self._name):
            self._direct.write(buffer, offset, nbytes)

    def finish(self, digest: str) -> FileRecord:
        """Hand the file back, to be made durable with the others.

        Args:
            digest: Of its bytes as they were handed over, not of what a page cache says later.

        Raises:
            WriteError: The attempt must be abandoned.
        """
        with translate_os_errors("write a file of a checkpoint", self._staged.path / self._name):
            self._direct.finish()
        self._staged._take_back(self._direct.descriptor)
        return FileRecord(path=self._name, bytes=self._nbytes, digest=digest)


class StagedCheckpoint:
    """An attempt at ``checkpoint-<step>``, invisible to readers until ``publish``.

    Made by ``RunDirectory.stage``. Files may be created and finished by several threads; everything else is for one.
    ``path`` is where a trainer may put small files of its own; ``adopt_rest`` takes them in.
    """

    def __init__(
        self,
        filesystem: LocalFileSystem,
        attempt: Path,
        target: Path,
        on_warning: Callable[[TailorWarning], None] = warn,
    ) -> None:
        self._filesystem = filesystem
        self._on_warning = on_warning
        self.attempt = attempt
        self._target = target
        self._mutex = threading.Lock()
        self._open_files: list[int] = []
        """Finished, to be made durable."""
        self._unfinished: set[int] = set()
        self._syncing: set[int] = set()
        self._fallbacks: Counter[tuple[str, bool]] = Counter()
        """Links that were refused: why, and whether that cost a copy -> bytes of these files."""
        self.told_fallbacks: set[tuple[str, bool]] = set()
        """What the user was told of; one set for all attempts of a run, whose every save would else say it again."""
        self._directories: set[Path] = set()
        self._names: set[str] = set()
        self.path = attempt / target.name
        """Where a trainer puts its small files."""
        try:
            with translate_os_errors("start a checkpoint", self.path):
                filesystem.make_directory(attempt)
                filesystem.make_directory(self.path)
        except WriteError:
            self._discard_own()
            raise
        _STAGED.add(self)

    @property
    def claim(self) -> Path:
        """What in the staging directory belongs to the attempt."""
        return self.attempt

    def create_file(self, name: str, nbytes: int) -> StagedFile:
        """Make a new file and reserve its room.

        Args:
            name: Relative to the checkpoint, with forward slashes.
            nbytes: What it will hold.

        Raises:
            WriteError: The attempt must be abandoned.
        """
        path = self._prepare(name)
        with translate_os_errors("write a file of a checkpoint", path):
            descriptor = self._filesystem.create(path)
            with self._mutex:
                self._unfinished.add(descriptor)
            direct = DirectFile(self._filesystem, descriptor, nbytes)
        return StagedFile(self, name, direct, nbytes)

    def _take_back(self, descriptor: int) -> None:
        with self._mutex:
            self._unfinished.remove(descriptor)
            self._open_files.append(descriptor)
            is_batch = len(self._open_files) >= _MAX_OPEN_FILES
        if is_batch:
            self._fsync_files()

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
            is_copy = False
        except OSError:
            self._filesystem.copy(source, path)
            is_copy = True
        self._fallbacks[str(refusal.strerror), is_copy] += record.bytes

    def _tell_fallbacks(self) -> None:
        """Of links that were refused, once for each reason."""
        for (reason, is_copy), nbytes in self._fallbacks.items():
            if (reason, is_copy) not in self.told_fallbacks:
                self.told_fallbacks.add((reason, is_copy))
                cost = f"copies were made, which cost {nbytes} bytes and their time" if is_copy else "they are reflinks"
                text = f"no hard links into {self._target.parent}: {reason}; {cost}, and so it goes on at every save"
                self._on_warning(LinkFallbackWarning(text))

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
            with self._mutex:
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
        self._tell_fallbacks()
        self._fsync_files()
        path = self._prepare(MANIFEST_NAME)
        with translate_os_errors("write the manifest", path):
            descriptor = self._filesystem.create(path)
            with self._mutex:
                self._open_files.append(descriptor)
            self._filesystem.write(descriptor, memoryview(manifest))
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
        _STAGED.discard(self)
        # Published: what is left is an empty directory, and the next sweep takes it if this does not.
        with contextlib.suppress(OSError):
            self._filesystem.remove_empty_directory(self.attempt)
        return self._target

    def abandon(self) -> None:
        """Give up: close and remove everything. Never raises; what cannot be removed is swept by the next writer.

        No thread may be writing any more.
        """
        self._discard_own()

    def _discard_own(self) -> None:
        descriptors = [*self._open_files, *self._unfinished]
        # First: what is noted down is closed in a forked child, where the number may be another file's by then.
        self._open_files.clear()
        self._unfinished.clear()
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                self._filesystem.close(descriptor)
        _STAGED.discard(self)
        with contextlib.suppress(OSError):
            self._filesystem.remove_tree(self.attempt)

    def _prepare(self, name: str) -> Path:
        """Note a file, and make the directories above it."""
        with self._mutex:
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
        """fsync and close all finished files, each once, whatever happens to the others."""
        waiting = deque(self._open_files)
        faults: list[BaseException] = []

        def work() -> None:
            with contextlib.suppress(IndexError):  # nothing is left
                while True:
                    descriptor = waiting.popleft()
                    try:
                        self._fsync_and_close(descriptor)
                    except BaseException as err:
                        faults.append(err)

        with translate_os_errors("make a checkpoint durable", self.path):
            _run_in_threads(work, min(_FSYNC_THREADS, len(waiting)))
            if faults:
                raise faults[0]

    def _fsync_and_close(self, descriptor: int) -> None:
        with self._mutex:
            if descriptor not in self._open_files:
                return  # another batch has it
            self._open_files.remove(descriptor)
            self._syncing.add(descriptor)
        try:
            self._filesystem.fsync(descriptor)
        finally:
            self._syncing.discard(descriptor)
            self._filesystem.close(descriptor)

    def _forget(self) -> None:
        """Close this process's copies of the files. Takes no lock: in a child nobody is there to let go of it."""
        descriptors = {*self._open_files, *self._unfinished, *self._syncing}
        self._open_files, self._unfinished, self._syncing = [], set(), set()
        for descriptor in descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)


def _run_in_threads(work: Callable[[], None], count: int) -> None:
    """Run something in several threads, until all are done.

    By hand, for an executor takes no work once the interpreter is ending, and that is when the last save of a script
    which closes nothing is written. Source: CPython 3.11, Lib/concurrent/futures/thread.py (_python_exit).
    """
    threads = [threading.Thread(target=work, name="llmtailor-fsync", daemon=True) for _ in range(count)]
    started = []
    try:
        for thread in threads:
            thread.start()
            started.append(thread)
    except RuntimeError as err:  # threading says so of a limit on processes; ``abandon`` closes what is left
        raise OSError(errno.EAGAIN, "no thread can be started") from err
    finally:
        for thread in started:
            thread.join()


def _raise(err: OSError) -> NoReturn:
    raise err


def _forget_in_child() -> None:
    # A forked child (a DataLoader worker) would keep the space of a checkpoint that is removed while it lives.
    for staged in _STAGED:
        staged._forget()


os.register_at_fork(after_in_child=_forget_in_child)
