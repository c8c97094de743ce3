"""The second tier: published checkpoints, copied in the background into a directory on another file system.

    submit --> waiting --> copying --> mirrored | failed
                  \\__ a newer one was submitted: superseded

The first tier never waits for the second. Each checkpoint is whole, so when copies fall behind the newest is enough:
at most one is being copied and one waits. The mirror is a run directory like any other, with its own lock, commits and
retention; its manifests are those of the first tier byte for byte, so a checkpoint has the same digest in both.

A third tier, an object store, has its place behind the same members: ``submit`` (in the background, newest wins),
``pending_steps`` (what the tier before must keep), ``drain``, ``close``, and a way to list and verify what it holds for
``resume.find_resumable``. Its commit is its own too: the manifest, uploaded last.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import InvalidInputError, SaveFailedWarning, TailorWarning, WriteError
from ..pruning import apply_retention
from ..retention import Keep
from ..storage import LocalFileSystem, RunDirectory
from .mirror_copy import CopiedCheckpoint, copy_checkpoint

__all__ = ["Mirror", "MirrorHandle", "MirrorState", "MirrorStats"]

logger = logging.getLogger(__name__)

MirrorState = Literal["waiting", "copying", "mirrored", "superseded", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MirrorStats:
    """What a copy cost."""

    copied_nbytes: int
    """Bytes read from the first tier and written to the mirror."""
    linked_nbytes: int
    """Bytes of files that the mirror had already."""
    secs: float
    """Time from the copy's start to its acknowledgement; the wait before it is not in it."""


class MirrorHandle:
    """One checkpoint on its way into the mirror. Made by ``Mirror.submit``; any thread may ask it."""

    def __init__(
        self,
        mirror: Mirror,
        checkpoint: Path,
        step: int,
        pinned: Collection[int],
        on_done: Callable[[MirrorHandle], None],
    ) -> None:
        self._mirror = mirror
        self._checkpoint = checkpoint
        self._pinned = pinned
        self._on_done = on_done
        self._successor: MirrorHandle | None = None
        self._predecessor: MirrorHandle | None = None
        self.step = step
        self.state: MirrorState = "waiting"
        self.path: Path | None = None
        """The copy, or the newer checkpoint that the mirror had instead; None while there is none."""
        self.superseded_by: int | None = None
        """Step of the newer checkpoint that is mirrored instead of this one."""
        self.stats: MirrorStats | None = None
        self.error: BaseException | None = None
        """What stopped the copy: a ``TailorError``, or anything else if it is a mistake of ours."""

    def wait(self, timeout_secs: float | None = None) -> bool:
        """Wait until this checkpoint, or the newer one that took its place, is mirrored or failed.

        Returns:
            False if it is not yet: the time is over, or this process is a fork of the one that mirrors.
        """
        return self._mirror._wait_for(self._is_settled, timeout_secs)

    def result(self) -> Path:
        """Wait until training can be resumed from the mirror at this step or later.

        Returns:
            The directory in the mirror: the copy, or that of the newer checkpoint that took its place.

        Raises:
            WriteError: The mirror could not be written; or this process is a fork of the one that mirrors (``closed``).
            NotFoundError, FormatError: The first tier's checkpoint was gone or damaged.
        """
        if not self.wait():
            raise _closed(self._mirror.path)
        last = self._last()
        if last.error is not None:
            raise last.error
        assert last.path is not None
        return last.path

    def _last(self) -> MirrorHandle:
        handle = self
        while handle._successor is not None:
            handle = handle._successor
        return handle

    def _is_settled(self) -> bool:
        return self._last().state not in ("waiting", "copying")

    def __repr__(self) -> str:
        by = "" if self.superseded_by is None else f" by checkpoint-{self.superseded_by}"
        return f"MirrorHandle(step={self.step}, {self.state}{by})"


class Mirror:
    """The second tier of a run. Holds that directory's lock until ``close``.

    One thread copies; the others only talk to it. In a forked child nothing is copied and nothing waits.

    Args:
        path: The second directory; made if it is not there.
        first: The run's directory, which the mirror must be apart from.
        keep: How many checkpoints to keep in the mirror, or which; None keeps all.
        keep_consistent: Never remove the mirror's newest checkpoint whose layers are all of one step.
        filesystem: For tests.
        on_warning: Told, on the mirror's thread, of what a user should know and what stops nothing.

    Raises:
        InvalidInputError: ``path`` is the run's directory, or inside or above it.
        LockedError: Another process writes the mirror.
        WriteError: The mirror cannot be made or written, or no thread can be started.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        first: Path | str,
        keep: Keep | int | str | None = None,
        keep_consistent: bool = True,
        filesystem: LocalFileSystem | None = None,
        on_warning: Callable[[TailorWarning], None] = lambda warning: logger.warning("%s", warning),
    ) -> None:
        self.path = Path(path).absolute()
        _check_apart(self.path, Path(first).absolute())
        self._keep = keep
        self._keep_consistent = keep_consistent
        self._on_warning = on_warning
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._waiting: MirrorHandle | None = None
        self._copying: MirrorHandle | None = None
        self._is_closing = False
        self._is_stopped = False
        self.num_superseded = 0
        """Checkpoints that were not copied because a newer one came."""
        self.run = RunDirectory(self.path, filesystem, on_warning=on_warning)
        """The mirror, to resume from; while nothing is pending only."""
        try:
            threading.Thread(target=self._work, name="llmtailor-mirror", daemon=True).start()
        except RuntimeError as err:
            self.run.close()
            raise WriteError(f"cannot start the mirror's thread: {err}", kind="no-thread", path=self.path) from err

    @property
    def pending_steps(self) -> frozenset[int]:
        """Steps that wait or are being copied; the first tier must keep them."""
        if self._is_forked():
            return frozenset()
        with self._changed:
            return frozenset(handle.step for handle in (self._waiting, self._copying) if handle is not None)

    def submit(
        self,
        checkpoint: Path,
        *,
        pinned: Collection[int] = (),
        on_done: Callable[[MirrorHandle], None] = lambda handle: None,
    ) -> MirrorHandle:
        """Have a checkpoint copied; returns at once.

        One that was still waiting is dropped in favour of this one. Call it in the order of publishing, before the
        first tier's retention, which must keep ``pending_steps``.

        Args:
            checkpoint: A published checkpoint of the first tier.
            pinned: Steps that the mirror's retention must keep afterwards.
            on_done: Called once, on the mirror's thread, when ``result`` no longer waits.

        Raises:
            WriteError: The mirror was closed, or this process is a fork of the one that opened it.
        """
        if self._is_forked():
            raise _closed(self.path)
        step = int(checkpoint.name.removeprefix("checkpoint-"))
        handle = MirrorHandle(self, checkpoint.absolute(), step, frozenset(pinned), on_done)
        with self._changed:
            if self._is_closing:
                raise _closed(self.path)
            dropped, self._waiting = self._waiting, handle
            if dropped is not None:
                dropped._successor, handle._predecessor = handle, dropped
                self._note_superseded(dropped, handle.step)
            self._changed.notify_all()
        return handle

    def drain(self, timeout_secs: float | None = None) -> bool:
        """Wait until nothing is pending.

        Returns:
            False if something still is: the time is over, or this process is a fork of the one that mirrors.
        """
        return self._wait_for(lambda: self._waiting is None and self._copying is None, timeout_secs)

    def close(self) -> None:
        """Wait for what is pending and let other writers in; more than once is fine.

        Does not raise what stopped a copy; its handle does. Interrupted by the keyboard, it can be called again.
        """
        if self._is_forked():
            return
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        self._wait_for(lambda: self._is_stopped, None)
        self.run.close()

    def _is_forked(self) -> bool:
        # A child has none of our threads, and whatever lock was held at the fork stays held there for ever.
        return os.getpid() != self._pid

    def _wait_for(self, is_so: Callable[[], bool], timeout_secs: float | None) -> bool:
        if self._is_forked():
            return is_so()
        with self._changed:
            return self._changed.wait_for(is_so, timeout_secs)

    def _work(self) -> None:
        while (handle := self._take()) is not None:
            self._copy(handle)
            self._tell(handle)
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def _take(self) -> MirrorHandle | None:
        """The next checkpoint to copy; None when the mirror is closed and nothing is left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting is not None or self._is_closing)
            handle, self._waiting = self._waiting, None
            self._copying = handle
            if handle is not None:
                handle.state = "copying"
            return handle

    def _copy(self, handle: MirrorHandle) -> None:
        started = time.perf_counter()
        copied: CopiedCheckpoint | None = None
        error: BaseException | None = None
        try:
            copied = copy_checkpoint(handle._checkpoint, self.run)
            self._apply_retention(handle._pinned)
        except BaseException as err:  # whatever it is, somebody waits for it, and the next copy may work
            error = err
        secs = time.perf_counter() - started
        with self._changed:
            self._copying = None
            if error is not None or copied is None:
                handle.error, handle.state = error, "failed"
            else:
                handle.path = copied.path
                handle.stats = MirrorStats(
                    copied_nbytes=copied.copied_nbytes, linked_nbytes=copied.linked_nbytes, secs=secs
                )
                handle.state = "mirrored"
                if copied.step != handle.step:
                    self._note_superseded(handle, copied.step)
            self._changed.notify_all()

    def _tell(self, handle: MirrorHandle) -> None:
        """Call back for a checkpoint and all that it took the place of, the oldest last."""
        told: MirrorHandle | None = handle
        while told is not None:
            try:
                told._on_done(told)
            except Exception:
                logger.exception("whoever waited for the mirror's copy of checkpoint-%d failed", told.step)
            earlier, told._predecessor = told._predecessor, None
            told = earlier

    def _note_superseded(self, handle: MirrorHandle, step: int) -> None:
        handle.superseded_by = step
        handle.state = "superseded"
        self.num_superseded += 1

    def _apply_retention(self, pinned: Collection[int]) -> None:
        error = apply_retention(self.run, keep=self._keep, pinned=pinned, keep_consistent=self._keep_consistent)
        if error is not None:
            self._on_warning(SaveFailedWarning(f"an old checkpoint could not be removed from the mirror: {error}"))


def _closed(path: Path) -> WriteError:
    return WriteError(
        "the mirror is not open",
        kind="closed",
        path=path,
        expected="the process that opened it, before it closed it",
        found="a mirror that was closed, or a fork of its process",
        hint="save from the process that trains",
    )


def _check_apart(mirror: Path, first: Path) -> None:
    if _is_within(mirror, first) or _is_within(first, mirror):
        raise InvalidInputError(
            "a mirror must be apart from the run that it mirrors",
            kind="nested-mirror",
            path=mirror,
            expected=f"a directory that is neither {first}, nor inside it, nor above it",
            found=str(mirror.resolve()),
            hint="name a directory on another file system; on the same disk a mirror is of little use",
        )


def _is_within(inner: Path, outer: Path) -> bool:
    """True if a path is another one or lies inside it, however the two are spelled, linked or mounted."""
    inner, outer = inner.resolve(), outer.resolve()
    identity = _identity(outer)
    return any(
        place == outer or (identity is not None and _identity(place) == identity) for place in (inner, *inner.parents)
    )


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
