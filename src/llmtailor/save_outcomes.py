"""What became of a run's saves, told to the thread that trains: a warning first, an error if it happens again."""

from __future__ import annotations

import contextlib
import errno
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import FormatError, NotFoundError, SaveFailedWarning, TailorError, WriteError
from .open_runs import OpenRun
from .storage import LocalFileSystem
from .writer import SaveHandle

__all__ = ["SOFT_ERRORS", "SaveOutcomes", "translate_small_file_errors"]

logger = logging.getLogger(__name__)

SOFT_ERRORS = (WriteError, FormatError, NotFoundError)
"""What stops a save and not the training: faults of storage, and state that was changed while it was captured."""


class SaveOutcomes:
    """Called by the training thread.

    Args:
        run: Keeps the saves that nobody was told the end of, and the newest failure since the last good one.
    """

    def __init__(self, run: OpenRun) -> None:
        self._run = run
        self._num_failed = 0
        """In a row."""
        self._num_raised = 0
        """Of these: each is raised once."""
        self.last_good: SaveHandle | None = None
        """The newest save that ended well, as far as was collected."""
        self.is_torn = False
        """State was changed while it was captured."""

    def note_begun(self, handle: SaveHandle) -> None:
        """A save was begun; more than once is fine."""
        if handle not in self._run.uncollected:
            self._run.uncollected = [*self._run.uncollected, handle]

    def collect(self) -> None:
        """Take note of saves that ended meanwhile, and warn of those that failed; waits for nothing.

        Raises:
            TailorError: A save could not be made for reasons that no later one will be without.
        """
        ended = [handle for handle in self._run.uncollected if handle.has_ended]
        self._run.uncollected = [handle for handle in self._run.uncollected if handle not in ended]
        for handle in ended:
            self._note_outcome(handle)

    def _note_outcome(self, handle: SaveHandle) -> None:
        error = handle.failure
        if error is None:
            self._run.failures = []
            self._num_failed = self._num_raised = 0
            self.last_good = handle
            return
        if not isinstance(error, SOFT_ERRORS):
            raise error
        self._run.failures = [error]  # not all: on a bad disk they are many
        self._num_failed += 1
        logger.error("checkpoint-%d was not saved: %s", handle.step, error)
        if error.kind == "changed-during-capture":
            self.is_torn = True
        warnings.warn(
            f"checkpoint-{handle.step} was not saved; training goes on and older checkpoints are intact\n{error}",
            SaveFailedWarning,
            stacklevel=5,
        )

    def raise_repeated(self) -> None:
        """The first of failures in a row is warned of, each further one raised once.

        Raises:
            WriteError: Two saves in a row failed.
        """
        if self._num_failed - 1 > self._num_raised:
            self._num_raised += 1
            last = self._run.failures[-1]
            assert isinstance(last, TailorError)
            # Whatever stopped it, to whoever trains it is a checkpoint that was not written. A new error each time: the
            # frames of the caller, and the handles in them, are not to hang on the one that a handle keeps.
            raise WriteError(**last.fields()) from last

    def unfinished(self) -> list[SaveHandle]:
        """Saves whose ``result`` would wait; any thread."""
        return [handle for handle in self._run.uncollected if not handle.has_ended]

    def take_failures(self) -> list[BaseException]:
        """The newest since the last good save, if one failed; it is told now."""
        failures, self._run.failures = self._run.failures, []
        return failures


@contextlib.contextmanager
def translate_small_file_errors(directory: Path) -> Iterator[None]:
    """Errors of the trainer's own writing: torch.save says RuntimeError of a full disk, safetensors SafetensorError."""
    try:
        yield
    except TailorError:
        raise
    except (OSError, RuntimeError, SafetensorError) as err:
        free = LocalFileSystem().free_space(directory).nbytes
        is_full = getattr(err, "errno", None) == errno.ENOSPC or (free is not None and free < 2**20)
        raise WriteError(
            f"cannot write the trainer's small files: {next(iter(str(err).splitlines()), type(err).__name__)}",
            kind="no-space" if is_full else "io",
            path=directory,
            hint="free space; older checkpoints were not touched" if is_full else "see the error this came from",
        ) from err
