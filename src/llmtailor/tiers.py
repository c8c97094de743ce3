"""Where the checkpoints of a run are kept: its own directory, and a mirror of it if there is one."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from pathlib import Path

from .errors import SaveFailedWarning, TailorError, TailorWarning, WriteError
from .pruning import apply_retention
from .retention import Keep, parse_keep
from .storage import LocalFileSystem, RunDirectory, StagingSeat
from .writer import Mirror, MirrorHandle, SaveHandle

__all__ = ["Tiers"]


class Tiers:
    """The run's directory and its mirror, both held for writing until ``close``.

    Knows nothing of the training, so that the engine's thread may hold on to it.

    Args:
        directory: The run.
        keep: Which checkpoints to keep there, or how many; None keeps all. See ``parse_keep``.
        keep_consistent: Never remove the newest checkpoint whose layers are all of one step; in both.
        mirror: The second directory, or None.
        mirror_keep: How many checkpoints to keep there, or which.
        keep_optimizer: How many checkpoints in the run's directory keep their optimizer state, the newest first; None:
            all that stay.
        filesystem: What carries out the changes.
        seat: Which of many ranks this is. The coordinator alone mirrors and removes.

    Raises:
        InvalidInputError: The mirror is not apart from the run, or what to keep cannot be understood.
        LockedError: Another process writes one of the two.
        WriteError: One of them cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        keep: Keep | int | str | None,
        keep_consistent: bool,
        mirror: Path | str | None,
        mirror_keep: Keep | int | str | None,
        keep_optimizer: int | None = None,
        filesystem: LocalFileSystem | None,
        seat: StagingSeat | None = None,
    ) -> None:
        self._keep = parse_keep(keep, consistent=keep_consistent, optimizer=keep_optimizer)
        self.notices: deque[TailorWarning] = deque()
        """What a user should know; our threads must not warn, for where warnings are errors they would die of it."""
        self.run = RunDirectory(directory, filesystem, seat=seat, on_warning=self.notices.append)
        self.mirror: Mirror | None = None
        self._is_follower = seat is not None and not seat.is_coordinator
        if mirror is None or self._is_follower:
            return
        try:
            self.mirror = Mirror(
                mirror,
                first=directory,
                keep=mirror_keep,
                keep_consistent=keep_consistent,
                filesystem=filesystem,
                on_warning=self.notices.append,
            )
        except BaseException:
            self.run.close()
            raise

    @property
    def all(self) -> list[RunDirectory]:
        """The directories, the run's own first."""
        return [self.run] if self.mirror is None else [self.run, self.mirror.run]

    def leave_branch(self, step: int, *, is_first: bool) -> None:
        """Set aside what the mirror holds of a branch that the run has left. Called before the first publish after it.

        Not later: if the process died between the publish and the copy, resume would find the newer checkpoint of the
        branch that was left.
        """
        if self.mirror is None:
            return
        try:
            self.mirror.run.supersede(step, is_first=is_first)
        except TailorError as err:
            self.notices.append(SaveFailedWarning(f"the mirror could not be brought to this branch\n{err}"))

    def follow_up(self, checkpoint: Path, handle: SaveHandle, pinned: Collection[int]) -> None:
        """Have a checkpoint mirrored that was just published, and remove what may go. Called by the engine's thread.

        Args:
            checkpoint: Its directory.
            handle: Its save's.
            pinned: Steps that must stay.
        """
        if self._is_follower:
            if handle.durable == "mirror":  # the coordinator's handle waits for it
                handle.note_mirrored()
            return
        pending: Collection[int] = ()
        if self.mirror is not None:
            try:
                self.mirror.submit(checkpoint, pinned=pinned, on_done=lambda copy: self._note_copy(handle, copy))
            except WriteError as err:
                self._note_failed_copy(handle, err)
            pending = self.mirror.pending_steps
        error = apply_retention(self.run, keep=self._keep, pinned={*pinned, *pending})
        if error is not None:
            self.notices.append(SaveFailedWarning(f"an old checkpoint, or its state, could not be removed: {error}"))

    def _note_copy(self, handle: SaveHandle, copy: MirrorHandle) -> None:
        try:
            copy.result()
        except BaseException as err:  # of the mirror's thread; whoever waits for the handle gets it
            self._note_failed_copy(handle, err)
        else:
            handle.note_mirrored()

    def _note_failed_copy(self, handle: SaveHandle, error: BaseException) -> None:
        handle.fail_mirror(error)
        if handle.durable == "local":
            self.notices.append(
                SaveFailedWarning(f"checkpoint-{handle.step} was saved, and could not be mirrored\n{error}")
            )

    def drain_mirror(self, timeout_secs: float | None) -> bool:
        """Wait until nothing is on its way to the mirror; False if something still is after the timeout."""
        return self.mirror is None or self.mirror.drain(timeout_secs)

    def close(self) -> None:
        """Wait for the mirror, and let other writers in; more than once is fine."""
        try:
            if self.mirror is not None:
                self.mirror.close()
        finally:
            self.run.close()
