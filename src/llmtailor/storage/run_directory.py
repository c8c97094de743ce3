"""A run on a local file system: which checkpoints it has, and every change of that list.

    checkpoint-<step>                     published: the only names resume looks at
    _checkpoint-<step>.bad[-<n>]          quarantined
    _checkpoint-<step>.superseded[-<n>]   of an abandoned branch
    _checkpoint-<step>.thinning           being replaced by one without optimizer state
    _staging/lock, _staging/<attempt>/    in flight

Reading needs no lock; ``open_for_writing`` takes it. Nothing is deleted but by ``remove``, and that is a rename first.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import stat
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import NotFoundError, SupersededWarning, TailorWarning, WriteError
from ..manifest import MANIFEST_NAME, FileRecord
from .filesystem import LocalFileSystem
from .lock import RunLock
from .shared_staging import SharedCheckpoint, StagingSeat
from .staging import StagedCheckpoint, translate_os_errors, warn
from .thinning import aside_name, find_asides, replace_published, settle

__all__ = [
    "STAGING_NAME",
    "CheckpointEntry",
    "RunDirectory",
    "SetAsideEntry",
    "checkpoint_name",
    "list_attempts",
    "list_checkpoints",
    "list_set_aside",
    "newest_step_seen",
]

STAGING_NAME = "_staging"
_LOCK_NAME = "lock"
_REASON_NAME = "tailor-reason.txt"
# Not \d, which takes the digits of every script.
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9][0-9]*)")
_SET_ASIDE = re.compile(r"_checkpoint-(0|[1-9][0-9]*)\.bad(-[0-9]+)?")
_ANY_SET_ASIDE = re.compile(r"_checkpoint-(0|[1-9][0-9]*)\.(bad|superseded)(?:-([0-9]+))?")
_MAX_REASON_NBYTES = 4096
# Directories, index, manifest and the trainer's small files, beyond what the caller says it will write.
_SPARE_NBYTES = 2**20
_SPARE_INODES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointEntry:
    """A directory that has the name of a checkpoint."""

    path: Path
    step: int
    has_manifest: bool
    """False for a checkpoint of another tool, or the remains of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SetAsideEntry:
    """A directory that was a checkpoint and is none any more."""

    path: Path
    step: int
    kind: Literal["bad", "superseded"]
    reason: str | None
    """What the quarantine noted down, its beginning; None if it left no note."""


def checkpoint_name(step: int) -> str:
    """``checkpoint-<step>``."""
    return f"checkpoint-{step}"


def list_checkpoints(run: Path, *, first_step: int = 0) -> list[CheckpointEntry]:
    """Checkpoints of a run, oldest step first. Opens none of them.

    Args:
        run: Its directory.
        first_step: Those of earlier steps are left out, and not looked at.

    Raises:
        NotFoundError: The run is not a directory.
        OSError: The device failed.
    """
    try:
        names = os.listdir(run)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError(
            "no such run",
            kind="missing-run",
            path=run,
            expected="a directory that holds checkpoint-<step>",
            found="a file" if run.exists() else "nothing",
            hint="check the path; llmtailor ls <run> lists the checkpoints of a run",
        ) from err
    entries = [
        CheckpointEntry(
            path=run / name, step=int(match.group(1)), has_manifest=_is(stat.S_ISREG, run / name / MANIFEST_NAME)
        )
        for name in names
        if (match := _CHECKPOINT.fullmatch(name))
        and int(match.group(1)) >= first_step
        and _is(stat.S_ISDIR, run / name)
    ]
    return sorted(entries, key=lambda entry: entry.step)


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    """``Path.is_file`` and ``is_dir``, but a failing device is not "no": it says nothing about what is there."""
    try:
        return kind(os.stat(path).st_mode)
    except OSError as err:
        if err.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return False
        raise


def list_set_aside(run: Path) -> list[SetAsideEntry]:
    """Quarantined and superseded checkpoints of a run, oldest step first."""
    matches = ((_ANY_SET_ASIDE.fullmatch(name), run / name) for name in os.listdir(run))
    found = [(int(match[1]), match[2], int(match[3] or 1), path) for match, path in matches if match and path.is_dir()]
    return [
        SetAsideEntry(path=path, step=step, kind="bad" if kind == "bad" else "superseded", reason=_read_reason(path))
        for step, kind, _, path in sorted(found)
    ]


def _read_reason(path: Path) -> str | None:
    # Only a note: whatever stands there instead of it must not stop a listing, nor hang it.
    try:
        descriptor = os.open(path / _REASON_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            return file.read(_MAX_REASON_NBYTES).decode("utf-8", "replace").strip() or None
    except OSError:
        return None


def list_attempts(run: Path) -> list[Path]:
    """Directories of saves, removals and thinnings that are under way, or were when their process died."""
    staging = run / STAGING_NAME
    names = sorted(os.listdir(staging)) if staging.is_dir() else []
    return [*(staging / name for name in names if name != _LOCK_NAME), *find_asides(run)]


def newest_step_seen(run: Path) -> int | None:
    """The largest step that was ever published and not superseded, quarantined ones included; None if there is none."""
    matches = (_CHECKPOINT.fullmatch(name) or _SET_ASIDE.fullmatch(name) for name in os.listdir(run))
    return max((int(match.group(1)) for match in matches if match), default=None)


def _free_name(path: Path, suffix: str) -> Path:
    # The leading _ keeps it from stock code: transformers removes what is called checkpoint-*, and its hub push leaves
    # out what is called _*. Source: transformers 5.23, trainer_utils.py (sort_checkpoints), trainer.py.
    names = (f"_{path.name}.{suffix}{'' if number == 1 else f'-{number}'}" for number in range(1, 10_000))
    return next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))


class RunDirectory:
    """The one writer of a run. Holds the run's lock until ``close``.

    One thread may stage while another fills, publishes and removes.

    Args:
        path: The run; made if it is not there.
        filesystem: What carries out the changes.
        seat: Which of many ranks this is, if many write the run. Rank 0 holds the lock for all, sweeps and publishes;
            the others stage.
        on_warning: Told of what a user should know; warns at once by default, which a thread of ours must not do: where
            warnings are errors, it would raise in the middle of a publish.

    Raises:
        LockedError: Another process writes this run.
        WriteError: The directory cannot be made or written.
    """

    def __init__(
        self,
        path: Path,
        filesystem: LocalFileSystem | None = None,
        *,
        seat: StagingSeat | None = None,
        on_warning: Callable[[TailorWarning], None] = warn,
    ) -> None:
        self.path = path = path.absolute()  # what trains may go elsewhere
        self._on_warning = on_warning
        self._told_fallbacks: set[tuple[str, bool]] = set()
        self._filesystem = filesystem or LocalFileSystem()
        self._staging = path / STAGING_NAME
        self._mutex = threading.Lock()
        self._live: set[str] = set()
        """What in the staging directory is in use by this object."""
        self._seat = seat
        self._lock: RunLock | None = None
        self._is_closed = False
        if seat is not None and not seat.is_coordinator:
            return
        with translate_os_errors("make the run's directory", path):
            self._make_directories(self._staging)
        self._lock = RunLock(self._staging / _LOCK_NAME)
        try:
            self._sweep()
        except BaseException:
            self.close()
            raise

    def _make_directories(self, path: Path) -> None:
        """``mkdir -p``, durable: a checkpoint is no safer than the names of the directories above it."""
        if path.is_dir():
            # Whoever made it may have been killed before the next line; and may have let nobody read what is above.
            with contextlib.suppress(OSError):
                self._filesystem.fsync_directory(path.parent)
            return
        if path.parent != path:
            self._make_directories(path.parent)
        try:
            self._filesystem.make_directory(path)
        except FileExistsError:
            if not path.is_dir():
                raise
        self._filesystem.fsync_directory(path.parent)

    def _sweep(self) -> None:
        """Put right and remove what dead writers left, and attempts of ours that could not clean up.

        We hold the lock, so nobody live owns any of it but what is noted in ``_live``.
        """
        with self._mutex, translate_os_errors("sweep what dead writers left", self._staging):
            settle(self._filesystem, self.path, self._staging, self._is_live)
            names = [name for name in os.listdir(self._staging) if name != _LOCK_NAME and not self._is_live(name)]
        if not names:
            return
        try:
            # Whoever was removing a checkpoint may have died before its name was gone for good.
            self._filesystem.fsync_directory(self.path)
        except OSError:
            return
        for name in names:
            with contextlib.suppress(OSError):
                self._filesystem.remove_tree(self._staging / name)

    def _is_live(self, name: str) -> bool:
        # Another rank may have begun an attempt of ours before this one.
        return name in self._live or (self._seat is not None and f"-{self._seat.session}-" in name)

    def stage(self, step: int, nbytes: int, num_files: int, *, attempt: int = 0) -> StagedCheckpoint:
        """Start an attempt at a checkpoint; ``publish`` or ``abandon`` ends it.

        Args:
            step: Its step.
            nbytes: Bytes that will be written.
            num_files: Files and links that will be made.
            attempt: Of many ranks: how often this step was tried before, which all ranks know by themselves.

        Raises:
            WriteError: There is not enough room, or the directory cannot be made.
        """
        self._check_held()
        if self._lock is not None:
            self._sweep()
        with translate_os_errors("start a checkpoint", self.path):
            free = self._filesystem.free_space(self._staging)
        if free.nbytes is not None and free.nbytes < nbytes + _SPARE_NBYTES:
            raise self._no_room(step, f"{nbytes + _SPARE_NBYTES} bytes free", f"{free.nbytes} bytes free")
        if free.inodes is not None and free.inodes < num_files + _SPARE_INODES:
            raise self._no_room(step, f"{num_files + _SPARE_INODES} inodes free", f"{free.inodes} inodes free")
        seat, target = self._seat, self.path / checkpoint_name(step)
        claim = self._claim(f"{step}-{secrets.token_hex(8) if seat is None else f'{seat.session}-{attempt}'}")
        try:
            if seat is not None:
                staged: StagedCheckpoint = SharedCheckpoint(self._filesystem, claim, target, seat, self._on_warning)
            else:
                staged = StagedCheckpoint(self._filesystem, claim, target, self._on_warning)
            staged.told_fallbacks = self._told_fallbacks
            return staged
        except BaseException:
            self._release(claim)
            raise

    def _claim(self, name: str) -> Path:
        """A name in the staging directory that no sweep takes away."""
        with self._mutex:
            self._live.add(name)
        return self._staging / name

    def _release(self, path: Path) -> None:
        with self._mutex:
            self._live.discard(path.name)

    def abandon(self, staged: StagedCheckpoint) -> None:
        """Give an attempt up. Never raises; what cannot be removed is swept by the next attempt or writer."""
        try:
            staged.abandon()
        finally:
            self._release(staged.claim)

    def _check_held(self) -> None:
        if self._is_closed or (self._lock is not None and not self._lock.is_held):
            raise WriteError(
                "the run is not open for writing",
                kind="closed",
                path=self.path,
                expected="the process that opened it, before it closed it",
                found="a run that was closed, or a fork of its process",
                hint="open the run again; save from the process that trains",
            )

    def _no_room(self, step: int, expected: str, found: str) -> WriteError:
        return WriteError(
            f"not enough room for {checkpoint_name(step)}",
            kind="no-space",
            path=self.path,
            expected=expected,
            found=found,
            hint="free space, or keep fewer checkpoints; older ones were not touched",
        )

    def publish(self, staged: StagedCheckpoint, step: int, *, is_first: bool) -> Path:
        """Publish a sealed attempt and make its name durable; when this returns, the checkpoint is acknowledged.

        Args:
            staged: The attempt, sealed.
            step: Its step.
            is_first: It follows no checkpoint of this directory, so all that are there are of other runs.

        Raises:
            WriteError: It is not acknowledged; older checkpoints are as they were.
        """
        superseded = self._choose_superseded(step, is_first=is_first)
        try:
            self._move(superseded)
            published = staged.publish()
        except BaseException:
            self._move_back(superseded)
            raise
        self._release(staged.claim)
        with translate_os_errors("make a checkpoint's name durable", published):
            self._filesystem.fsync_directory(self.path)
        self._tell_superseded(superseded)
        return published

    def supersede(self, step: int, *, is_first: bool) -> None:
        """Set aside what a checkpoint of this step will supersede, before it comes; arguments as of ``publish``.

        Raises:
            WriteError: Something could not be renamed.
        """
        self._check_held()
        superseded = self._choose_superseded(step, is_first=is_first)
        try:
            self._move(superseded)
        except BaseException:
            self._move_back(superseded)
            raise
        self._tell_superseded(superseded)

    def _tell_superseded(self, superseded: Mapping[Path, Path]) -> None:
        for path, target in superseded.items():
            self._on_warning(
                SupersededWarning(
                    f"{path.name} is of another run or branch; kept as {target.name}, remove it if not needed"
                )
            )

    def _choose_superseded(self, step: int, *, is_first: bool) -> dict[Path, Path]:
        """Checkpoints that resume must not find any more, and the names they get.

        Those of this or a later step: whoever writes this step went back behind them. And, before the first of a new
        run, all of the run before it: falling back must never cross from one run into another.
        """
        with translate_os_errors("list the checkpoints of the run", self.path):
            # A run may keep thousands, and this happens at every save.
            entries = list_checkpoints(self.path, first_step=0 if is_first else step)
        return {
            entry.path: _free_name(entry.path, "superseded")
            for entry in entries
            if entry.step >= step or (is_first and entry.has_manifest)
        }

    def quarantine(self, path: Path, reason: str) -> Path:
        """Rename a checkpoint that does not verify to ``*.bad`` and say why inside; never deletes.

        Raises:
            WriteError: It cannot be renamed.
        """
        self._check_held()
        target = _free_name(path, "bad")
        self._move({path: target})
        # Only a note for people: a full or read-only disk must not stop the recovery.
        with contextlib.suppress(OSError):
            (target / _REASON_NAME).write_text(reason + "\n", encoding="utf-8")
        return target

    def _move(self, targets: Mapping[Path, Path]) -> None:
        with translate_os_errors("set a checkpoint aside", self.path):
            for path, target in targets.items():
                self._filesystem.rename(path, target)
            if targets:
                self._filesystem.fsync_directory(self.path)

    def _move_back(self, targets: Mapping[Path, Path]) -> None:
        """Undo ``_move``, however far it came; what cannot be undone is still there under its new name."""
        for path, target in targets.items():
            with contextlib.suppress(OSError):
                self._filesystem.rename(target, path)
        with contextlib.suppress(OSError):
            self._filesystem.fsync_directory(self.path)

    @property
    def free_nbytes(self) -> int | None:
        """Room left on its file system; None if that does not say."""
        try:
            return self._filesystem.free_space(self.path).nbytes
        except OSError:
            return None

    def write_pointer(self, name: str, text: str) -> None:
        """Put a small file for other tools beside the checkpoints, durably; the one before is there until this is.

        Raises:
            WriteError: It could not be written; the one before is intact.
        """
        self._check_held()
        path = self._claim(f"pointer-{secrets.token_hex(8)}")
        try:
            with translate_os_errors(f"write {name}", self.path / name):
                descriptor = self._filesystem.create(path, 0o644)
                try:
                    self._filesystem.write(descriptor, memoryview(text.encode()))
                    self._filesystem.fsync(descriptor)
                finally:
                    self._filesystem.close(descriptor)
                self._filesystem.replace(path, self.path / name)
                self._filesystem.fsync_directory(self.path)
        finally:
            self._release(path)

    def remove(self, path: Path) -> None:
        """Remove a checkpoint: first its name, at once, then its files. Other checkpoints keep theirs.

        Raises:
            WriteError: Its name could not be taken away, or not all of its files (then the next writer sweeps them).
        """
        self._check_held()
        doomed = self._claim(f"remove-{path.name}-{secrets.token_hex(8)}")
        try:
            with translate_os_errors(f"remove {path.name}", path):
                self._filesystem.rename(path, doomed)
                self._filesystem.fsync_directory(self.path)
                self._filesystem.remove_tree(doomed)
        finally:
            self._release(doomed)

    def thin(self, path: Path, files: Iterable[FileRecord], manifest: bytes) -> None:
        """Let a checkpoint that lacks some files of a published one take its place, under the same name.

        Args:
            path: The published one.
            files: What stays of it.
            manifest: What the new one says about itself.

        Raises:
            NotFoundError, IntegrityError: A file that stays is not as it was published; nothing was changed.
            WriteError: One of the two is there, whole.
        """
        self._check_held()
        attempt = self._claim(f"thin-{path.name}-{secrets.token_hex(8)}")
        aside = self._claim(aside_name(path).name)
        try:
            staged = StagedCheckpoint(self._filesystem, attempt, path, self._on_warning)
            staged.told_fallbacks = self._told_fallbacks
            replace_published(self._filesystem, staged, path, files, manifest)
        finally:
            self._release(aside)
            self._release(attempt)

    def close(self) -> None:
        """Let other writers in; more than once is fine."""
        self._is_closed = True
        if self._lock is not None:
            self._lock.release()
