"""A directory that appears whole or not at all, wherever its user wants it: the target of a merge or an export.

    <parent>/<name>                                        published, by a rename
    <parent>/.<name>.llmtailor-<random>/                   locked while its writer lives
    <parent>/.<name>.llmtailor-<random>/attempt/<name>/    in flight

A run has a lock and a place for what is in flight; any other directory has not, so each attempt brings both along.
What a killed writer left is swept by the next one of the same name: the lock is on the directory itself, so whoever
holds it may remove it, and nobody else can come to hold it by making it anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path

from ..errors import AlreadyExistsError, IntegrityError, LinkFallbackWarning, NotFoundError, WriteError
from .filesystem import LocalFileSystem
from .staging import _NO_LINK, StagedCheckpoint, translate_os_errors

__all__ = ["OutputDirectory"]

_ATTEMPT_NAME = "attempt"
_MARK = ".llmtailor-"
_RANDOM = re.compile(r"[0-9a-f]{16}")
# Directories and the last file, beyond what the caller says it will write.
_SPARE_NBYTES = 2**20
_SPARE_INODES = 32
# Files wait open for one batch of fsyncs; this bounds how many.
_MAX_FINISHED_FILES = 128
_ANY_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
# What rename says when somebody else published in the meantime.
_TAKEN = frozenset({errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR})


class OutputDirectory(StagedCheckpoint):
    """An attempt at a new directory, invisible until ``publish``. Not thread-safe.

    Args:
        target: Where it will be; must not exist. Directories above it are made.
        nbytes: Bytes that will be written.
        num_files: Files and links that will be made.
        filesystem: What carries out the changes.

    Raises:
        AlreadyExistsError: Something is there.
        WriteError: There is not enough room, or the directory cannot be made.
    """

    def __init__(self, target: Path, *, nbytes: int, num_files: int, filesystem: LocalFileSystem | None = None) -> None:
        self._filesystem = filesystem or LocalFileSystem()
        self._target = Path(os.path.abspath(target))
        self._new_parents: list[Path] = []
        self._place = self._target.parent
        self._lock: int | None = None
        self._unlinked: dict[str, list[tuple[Path, int]]] = {}
        """Why files could not be linked -> them, and their sizes."""
        with translate_os_errors("look at the target", target):
            if os.path.lexists(self._target):
                raise _taken(self._target)
        try:
            with translate_os_errors("make the directories above the target", target):
                self._make_parents(self._target.parent)
            _sweep(self._target, self._filesystem)
            self._check_room(nbytes, num_files)
            with translate_os_errors("start a checkpoint", self._target):
                self._claim()
            super().__init__(self._filesystem, self._place / _ATTEMPT_NAME, self._target)
        except BaseException:
            self._remove_claim()
            raise

    def _make_parents(self, parent: Path) -> None:
        if parent.is_dir():
            return
        self._make_parents(parent.parent)
        self._new_parents.append(parent)
        try:
            self._filesystem.make_directory(parent)
        except FileExistsError:  # somebody else was faster; if it is a file, the next step says so
            self._new_parents.remove(parent)
        self._filesystem.fsync_directory(parent.parent)

    def _check_room(self, nbytes: int, num_files: int) -> None:
        with translate_os_errors("look for room", self._target.parent):
            free = self._filesystem.free_space(self._target.parent)
        for unit, needed, found in (
            ("bytes", nbytes + _SPARE_NBYTES, free.nbytes),
            ("inodes", num_files + _SPARE_INODES, free.inodes),
        ):
            if found is not None and found < needed:
                raise WriteError(
                    "not enough room for the new checkpoint",
                    kind="no-space",
                    path=self._target.parent,
                    expected=f"{needed} {unit} free",
                    found=f"{found} {unit} free",
                    hint="free space, or write somewhere else; nothing was written",
                )

    def _claim(self) -> None:
        """Make a directory that nobody else sweeps."""
        while self._lock is None:
            self._place = self._target.with_name(f".{self._target.name}{_MARK}{secrets.token_hex(8)}")
            self._filesystem.make_directory(self._place)
            # Somebody who sweeps may take it for dead before it is locked. Then it is theirs.
            self._lock = _lock_directory(self._place)

    def create(self, name: str, mode: int) -> int:
        """Create a file; the caller writes it, and then hands it back to ``finish``.

        Args:
            name: Relative, with forward slashes.
            mode: Its permissions; the umask takes its share.

        Raises:
            WriteError: It cannot be made.
        """
        path = self._prepare(name)
        with translate_os_errors("make a file of a checkpoint", path):
            descriptor = self._filesystem.create(path, mode)
        self._unfinished.add(descriptor)
        return descriptor

    def finish(self, descriptor: int) -> None:
        """Take a file back that is written but not durable.

        Raises:
            WriteError: Others that were waiting could not be made durable.
        """
        self._unfinished.discard(descriptor)
        self._open_files.append(descriptor)
        if len(self._open_files) >= _MAX_FINISHED_FILES:
            self._fsync_files()

    def link(self, name: str, source: Path, nbytes: int) -> bool:
        """Give a file that never changes a second name here.

        Returns:
            False if that cannot be: the caller has to copy it, and ``publish`` warns.

        Raises:
            NotFoundError: It is gone.
            IntegrityError: It is no regular file of that size.
            WriteError: The disk failed.
        """
        with translate_os_errors("link a file", source):
            status = _check_link(source, nbytes)
            if status.st_mode & _ANY_WRITE:
                return self._refuse_link(source, nbytes, "it can be changed in place, through either name")
        path = self._prepare(name)
        with translate_os_errors("link a file", path):
            try:
                self._filesystem.link(source, path)
            except OSError as err:
                if err.errno not in _NO_LINK:
                    raise
                self._names.discard(name)
                return self._refuse_link(source, nbytes, str(err.strerror))
        return True

    def _refuse_link(self, source: Path, nbytes: int, why: str) -> bool:
        self._unlinked.setdefault(why, []).append((source, nbytes))
        return False

    def path_of(self, name: str) -> Path:
        """Where a file lies while the attempt is in flight."""
        return self.path / name

    def sync(self) -> None:
        """Make all finished files durable.

        Raises:
            WriteError: One could not be made durable.
        """
        assert not self._unfinished
        self._fsync_files()

    def publish(self) -> Path:
        """Make all names durable and give the directory its own. Warns once of files that could not be linked.

        Returns:
            The target.

        Raises:
            AlreadyExistsError: Somebody else published there in the meantime.
            WriteError: Nothing was published.
        """
        self.sync()
        for why, files in self._unlinked.items():
            _warn_of_copies(why, files)
        with translate_os_errors("make a checkpoint durable", self.path):
            for directory in sorted(self._directories, key=lambda path: len(path.parts), reverse=True):
                self._filesystem.fsync_directory(directory)
            self._filesystem.fsync_directory(self.path)
        try:
            with translate_os_errors("publish a checkpoint", self._target):
                self._rename()
                self._filesystem.fsync_directory(self._target.parent)
        except BaseException:
            # Whatever failed may have come after the rename. If not, this one is refused, since its own is taken.
            with contextlib.suppress(OSError):
                self._filesystem.rename(self._target, self.path)
            raise
        self._new_parents.clear()
        self._remove_claim()
        return self._target

    def _rename(self) -> None:
        try:
            self._filesystem.rename(self.path, self._target)
        except OSError as err:
            if err.errno in _TAKEN:
                raise _taken(self._target) from err
            raise

    def abandon(self) -> None:
        """Give up: close and remove everything. Never raises; what cannot be removed is swept by the next writer."""
        try:
            super().abandon()
        finally:
            self._remove_claim()

    def _remove_claim(self) -> None:
        """Remove what was made beside and above the target. Never raises."""
        try:
            if self._place != self._target.parent:
                with contextlib.suppress(OSError):
                    self._filesystem.remove_tree(self._place)
            for parent in reversed(self._new_parents):
                with contextlib.suppress(OSError):  # not ours alone any more, or never made
                    self._filesystem.remove_empty_directory(parent)
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None


def _lock_directory(path: Path) -> int | None:
    """Hold a directory until the descriptor is closed or the process ends.

    Returns:
        None if somebody else holds it, or has removed it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        # No locks on directories (NFS). Whoever sweeps cannot lock it either, and leaves it alone.
        return descriptor
    if not os.fstat(descriptor).st_nlink:
        os.close(descriptor)
        return None
    return descriptor


def _sweep(target: Path, filesystem: LocalFileSystem) -> None:
    """Remove what dead writers of this name left beside it."""
    prefix = f".{target.name}{_MARK}"
    with translate_os_errors("look for what dead writers left", target.parent):
        names = os.listdir(target.parent)
    for name in names:
        left = target.with_name(name)
        if not name.startswith(prefix) or not _RANDOM.fullmatch(name.removeprefix(prefix)):
            continue
        # What cannot be removed costs space, not correctness.
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # its writer holds it while it lives
                filesystem.remove_tree(left)
            finally:
                os.close(descriptor)


def _check_link(source: Path, nbytes: int) -> os.stat_result:
    try:
        status = os.stat(source, follow_symlinks=False)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError("a file of the checkpoint is missing", kind="missing-file", path=source) from err
    if not stat.S_ISREG(status.st_mode) or status.st_size != nbytes:
        raise IntegrityError(
            "a file to link is not the file that was published",
            kind="file-size" if stat.S_ISREG(status.st_mode) else "not-regular",
            path=source,
            expected=f"{nbytes} bytes",
            found=f"{status.st_size} bytes, {stat.filemode(status.st_mode)}",
            hint="llmtailor verify says what else is damaged; take the layer from another checkpoint",
        )
    return status


def _warn_of_copies(why: str, files: Sequence[tuple[Path, int]]) -> None:
    first, nbytes = files[0][0], sum(each for _, each in files)
    told = f"{first}: {why}; it is" if len(files) == 1 else f"{len(files)} files, such as {first}: {why}; they are"
    warnings.warn(f"no hard link to {told} copied, which costs up to {nbytes} bytes", LinkFallbackWarning, stacklevel=3)


def _taken(target: Path) -> AlreadyExistsError:
    return AlreadyExistsError(
        "will not overwrite what is there",
        kind="exists",
        path=target,
        expected="a name that is free",
        found="a directory" if target.is_dir() else "a file",
        hint="remove it, or choose another target",
    )
