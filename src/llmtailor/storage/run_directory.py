"""A run on a local file system: which checkpoints it has, and every change of that list.

    checkpoint-<step>                     published: the only names resume looks at
    checkpoint-<step>.bad[-<n>]           quarantined
    checkpoint-<step>.superseded[-<n>]    of an abandoned branch
    .staging/lock, .staging/<attempt>/    in flight

Reading needs no lock; ``open_for_writing`` takes it. Nothing is deleted but by ``remove``, and that is a rename first.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import warnings
from dataclasses import dataclass
from pathlib import Path

from ..errors import NotFoundError, SupersededWarning, WriteError
from ..manifest import MANIFEST_NAME
from .filesystem import LocalFileSystem
from .lock import RunLock
from .staging import StagedCheckpoint, translate_os_errors

__all__ = ["CheckpointEntry", "RunDirectory", "checkpoint_name", "list_checkpoints", "newest_step_seen"]

_STAGING_NAME = ".staging"
_LOCK_NAME = "lock"
_REASON_NAME = "tailor-reason.txt"
_CHECKPOINT = re.compile(r"checkpoint-(0|[1-9]\d*)")
_SET_ASIDE = re.compile(r"checkpoint-(0|[1-9]\d*)\.bad(-\d+)?")
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


def checkpoint_name(step: int) -> str:
    """``checkpoint-<step>``."""
    return f"checkpoint-{step}"


def list_checkpoints(run: Path) -> list[CheckpointEntry]:
    """Checkpoints of a run, oldest step first. Opens none of them.

    Raises:
        NotFoundError: The run is not a directory.
    """
    try:
        names = os.listdir(run)
    except (FileNotFoundError, NotADirectoryError) as err:
        raise NotFoundError(
            "no such run", kind="missing-run", path=run, hint="give the directory that holds checkpoint-<step>"
        ) from err
    entries = [
        CheckpointEntry(path=run / name, step=int(match.group(1)), has_manifest=(run / name / MANIFEST_NAME).is_file())
        for name in names
        if (match := _CHECKPOINT.fullmatch(name)) and (run / name).is_dir()
    ]
    return sorted(entries, key=lambda entry: entry.step)


def newest_step_seen(run: Path) -> int | None:
    """The largest step that was ever published and not superseded, quarantined ones included; None if there is none."""
    matches = (_CHECKPOINT.fullmatch(name) or _SET_ASIDE.fullmatch(name) for name in os.listdir(run))
    return max((int(match.group(1)) for match in matches if match), default=None)


class RunDirectory:
    """The one writer of a run. Holds the run's lock until ``close``.

    Raises:
        LockedError: Another process writes this run.
        WriteError: The directory cannot be made or written.
    """

    def __init__(self, path: Path, filesystem: LocalFileSystem | None = None) -> None:
        self.path = path
        self._filesystem = filesystem or LocalFileSystem()
        self._staging = path / _STAGING_NAME
        with translate_os_errors("make the run's directory", path):
            self._staging.mkdir(parents=True, exist_ok=True)
        self._lock = RunLock(self._staging / _LOCK_NAME)
        self._sweep()

    def _sweep(self) -> None:
        """Remove what dead writers left; we hold the lock, so nobody live owns any of it."""
        for name in os.listdir(self._staging):
            if name != _LOCK_NAME:
                with contextlib.suppress(OSError):
                    self._filesystem.remove_tree(self._staging / name)

    def stage(self, step: int, nbytes: int, num_files: int) -> StagedCheckpoint:
        """Start an attempt at a checkpoint.

        Args:
            step: Its step.
            nbytes: Bytes that will be written.
            num_files: Files and links that will be made.

        Raises:
            WriteError: There is not enough room, or the directory cannot be made.
        """
        with translate_os_errors("start a checkpoint", self.path):
            free = self._filesystem.free_space(self._staging)
        if free.nbytes < nbytes + _SPARE_NBYTES:
            raise self._no_room(step, f"{nbytes + _SPARE_NBYTES} bytes free", f"{free.nbytes} bytes free")
        if free.inodes is not None and free.inodes < num_files + _SPARE_INODES:
            raise self._no_room(step, f"{num_files + _SPARE_INODES} inodes free", f"{free.inodes} inodes free")
        attempt = self._staging / f"{step}-{secrets.token_hex(8)}"
        return StagedCheckpoint(self._filesystem, attempt, self.path / checkpoint_name(step))

    def _no_room(self, step: int, expected: str, found: str) -> WriteError:
        return WriteError(
            f"not enough room for {checkpoint_name(step)}",
            kind="no-space",
            path=self.path,
            expected=expected,
            found=found,
            hint="free space, or keep fewer checkpoints; older ones were not touched",
        )

    def publish(self, staged: StagedCheckpoint, manifest: bytes, step: int, *, is_first: bool) -> Path:
        """Publish an attempt and make its name durable; when this returns, the checkpoint is acknowledged.

        Args:
            staged: The attempt, filled.
            manifest: The content of its manifest.
            step: Its step.
            is_first: It follows no checkpoint of this directory, so all that are there are of other runs.

        Raises:
            WriteError: It is not acknowledged; older checkpoints are as they were.
        """
        self._supersede(step, is_first=is_first)
        published = staged.publish(manifest)
        with translate_os_errors("make a checkpoint's name durable", published):
            self._filesystem.fsync_directory(self.path)
        return published

    def _supersede(self, step: int, *, is_first: bool) -> None:
        """Set checkpoints aside that resume must not find any more.

        Those of this or a later step: whoever writes this step went back behind them. And, before the first of a new
        run, all of the run before it: falling back must never cross from one run into another.
        """
        for entry in list_checkpoints(self.path):
            if entry.step >= step or (is_first and entry.has_manifest):
                target = self._set_aside(entry.path, "superseded")
                warnings.warn(
                    f"{entry.path.name} is of another run or branch; kept as {target.name}, remove it if not needed",
                    SupersededWarning,
                    stacklevel=3,
                )

    def quarantine(self, path: Path, reason: str) -> Path:
        """Rename a checkpoint that does not verify to ``*.bad`` and say why inside; never deletes.

        Raises:
            WriteError: It cannot be renamed.
        """
        target = self._set_aside(path, "bad")
        # Only a note for people: a full or read-only disk must not stop the recovery.
        with contextlib.suppress(OSError):
            (target / _REASON_NAME).write_text(reason + "\n", encoding="utf-8")
        return target

    def _set_aside(self, path: Path, suffix: str) -> Path:
        names = (f"{path.name}.{suffix}{'' if number == 1 else f'-{number}'}" for number in range(1, 10_000))
        target = next(path.with_name(name) for name in names if not os.path.lexists(path.with_name(name)))
        with translate_os_errors(f"rename {path.name} to {target.name}", path):
            self._filesystem.rename(path, target)
            self._filesystem.fsync_directory(self.path)
        return target

    def remove(self, path: Path) -> None:
        """Remove a checkpoint: first its name, at once, then its files. Other checkpoints keep theirs.

        Raises:
            WriteError: Its name could not be taken away, or not all of its files (then the next writer sweeps them).
        """
        doomed = self._staging / f"remove-{path.name}-{secrets.token_hex(8)}"
        with translate_os_errors(f"remove {path.name}", path):
            self._filesystem.rename(path, doomed)
            self._filesystem.fsync_directory(self.path)
            self._filesystem.remove_tree(doomed)

    def close(self) -> None:
        """Let other writers in; more than once is fine."""
        self._lock.release()
