"""Which checkpoint the next save of a ``TailorWriter`` follows, as every rank finds out for itself.

DCP tells a writer neither that a save was published (but on the coordinator) nor that another rank's part of it failed.
What was published is in the run, so that is where a rank looks before its next save.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ...checkpoint import Checkpoint, open_checkpoint
from ...errors import FormatError, InvalidInputError, NotFoundError
from ...manifest import Manifest
from ...storage import checkpoint_name
from ...votes import Fault
from .reader import TailorReader

__all__ = ["Assignment", "DcpLineage"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """What the coordinator tells each rank of a save, in its plan."""

    session: str
    """See ``StagingSeat``."""
    attempt: int
    step: int
    run_id: str
    save_index: int
    num_ranks: int
    parent_step: int | None
    """Of the checkpoint that it follows."""
    parent: str | None
    """Digest of that."""
    fault: Fault | None = None
    """Why nothing is to be written."""

    def fits(self, manifest: Manifest) -> bool:
        """Whether a checkpoint is of this save."""
        told = (manifest.run_id, manifest.step, manifest.save_index)
        return told == (self.run_id, self.step, self.save_index)


class DcpLineage:
    """The chain of checkpoints of one writer; on every rank.

    Args:
        directory: The run.
        reader: What loaded the state that training went on from; None: it began anew.
    """

    def __init__(self, directory: Path, reader: TailorReader | None) -> None:
        self._directory = directory
        self._reader = reader
        self._has_begun = False
        self._parent: Checkpoint | None = None
        self._pending: Assignment | None = None
        """A save of which is not known what became of it."""
        self.has_failed = False
        """The last save was not published: of what it was to link, something may be gone."""

    def find_parent(self) -> Checkpoint | None:
        """The checkpoint that the next save follows; None if it is the first."""
        if not self._has_begun:
            self._has_begun = True
            self._parent = self._find_first()
        if self._pending is not None:
            published = self._look(self._pending)
            # Not before: a device that failed while it was looked for says nothing.
            self._pending = None
            self.has_failed = published is None
            self._parent = published or self._parent
        return self._parent

    def _find_first(self) -> Checkpoint | None:
        """What was loaded, if it is of this run. Of another, nothing can be linked, and a new run begins."""
        loaded = None if self._reader is None else self._reader.checkpoint
        if loaded is None or loaded.path.resolve().parent != self._directory.resolve():
            return None
        return loaded

    def _look(self, pending: Assignment) -> Checkpoint | None:
        try:
            found = open_checkpoint(self._directory / checkpoint_name(pending.step))
        except (NotFoundError, FormatError):
            return None
        return found if pending.fits(found.manifest) else None

    def check_step(self, step: int) -> None:
        """Refuse a step that is not after the newest checkpoint's.

        Raises:
            InvalidInputError: It is not.
        """
        parent = self.find_parent()
        if parent is not None and step <= parent.manifest.step:
            raise InvalidInputError(
                "the step goes backwards, or is saved already",
                kind="step-order",
                expected=f"a step after {parent.manifest.step}, the newest checkpoint of this run",
                found=step,
                hint="set TailorWriter.step, or name the step in checkpoint_id",
            )

    def begin(self, assignment: Assignment) -> None:
        """This rank begins its part of a save."""
        self._pending = assignment

    def catch_up(self, assignment: Assignment) -> None:
        """Follow what the coordinator follows: it published that, and this rank may have been the first to look."""
        known = None if self._parent is None else self._parent.digest
        if assignment.parent_step is None or assignment.parent == known:
            return
        try:
            found = open_checkpoint(self._directory / checkpoint_name(assignment.parent_step))
        except (OSError, FormatError) as err:  # the next save will say so, on every rank
            logger.warning("checkpoint-%d is published and cannot be opened here: %s", assignment.parent_step, err)
            return
        if found.digest == assignment.parent:
            self._parent = found

    def note_published(self, checkpoint: Checkpoint) -> None:
        """On the coordinator."""
        self._parent, self._pending, self.has_failed = checkpoint, None, False
