"""One attempt at a checkpoint by many ranks: each fills a directory of its own, then moves it into the common one.

    _staging/<attempt>/rank-00003/checkpoint-<step>/    private: written, linked, made durable
    _staging/<attempt>/checkpoint-<step>/               common: what will be published
    _staging/<attempt>/votes/rank-00003.json            left when everything of the rank is in the common one, durably

    open -- create_file | link_file | adopt_rest --> filled -- deliver --> delivered --> (rank 0) seal, publish

A file that two ranks claim is refused by the second move; a rank that dies leaves a private directory, which the next
session of the run sweeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..errors import TailorWarning, WriteError
from ..manifest import MANIFEST_NAME
from .filesystem import LocalFileSystem
from .staging import StagedCheckpoint, translate_os_errors, warn

__all__ = ["SharedCheckpoint", "StagingSeat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StagingSeat:
    """Which writer of a run that many ranks write this is."""

    rank: int
    session: str
    """Of the ranks' coming together, the same on all; in the name of every attempt of theirs."""

    @property
    def is_coordinator(self) -> bool:
        return self.rank == 0


class SharedCheckpoint(StagedCheckpoint):
    """This rank's part of an attempt at ``checkpoint-<step>``; see ``StagedCheckpoint``.

    Made by ``RunDirectory.stage``. Only the coordinator seals and publishes, after all ranks have delivered.
    """

    def __init__(
        self,
        filesystem: LocalFileSystem,
        shared: Path,
        target: Path,
        seat: StagingSeat,
        on_warning: Callable[[TailorWarning], None] = warn,
    ) -> None:
        self._seat = seat
        self._shared = shared
        self._common = shared / target.name
        self._votes = shared / "votes"
        for is_last in (False, False, True):
            with translate_os_errors("start a checkpoint", shared):
                _make_if_missing(filesystem, shared)
            try:
                super().__init__(filesystem, shared / _rank_name(seat.rank), target, on_warning)
            except WriteError as err:
                # What others have handed over stays: room may be found, and this be tried again.
                self._leave()
                # A rank whose part has failed already may have been the last to leave.
                if is_last or not isinstance(err.__cause__, FileNotFoundError):
                    raise
            else:
                return

    @property
    def claim(self) -> Path:
        return self._shared

    def deliver(self, vote: bytes) -> None:
        """Make everything of this rank durable, in the common directory, and leave its vote.

        Raises:
            WriteError: The attempt must be abandoned.
        """
        self._tell_fallbacks()
        self._fsync_files()
        with translate_os_errors("hand over the files of a rank", self._common):
            # From the top down: each is there before what is in it.
            folders = sorted({self._common, *(self._common / name for name in self._folders())})
            for folder in (*folders, self._votes):
                _make_if_missing(self._filesystem, folder)
            for name in sorted(self._names):
                self._filesystem.rename(self.path / name, self._common / name)
            for folder in reversed(folders):
                self._filesystem.fsync_directory(folder)
            self._write_durably(self._votes / f"{_rank_name(self._seat.rank)}.json", vote)
            self._filesystem.fsync_directory(self._votes)
            self._filesystem.fsync_directory(self._shared)

    def _folders(self) -> Iterable[str]:
        return (parent.as_posix() for name in self._names for parent in Path(name).parents if parent != Path("."))

    def _write_durably(self, path: Path, data: bytes) -> None:
        descriptor = self._filesystem.create(path)
        try:
            self._filesystem.write(descriptor, memoryview(data))
            self._filesystem.fsync(descriptor)
        finally:
            self._filesystem.close(descriptor)

    def find_missing_votes(self, ranks: Iterable[int]) -> list[int]:
        """Ranks of which no vote is here, though they say that they left one: they write elsewhere."""
        return [rank for rank in ranks if not (self._votes / f"{_rank_name(rank)}.json").is_file()]

    def seal(self, manifest: bytes) -> None:
        """Write the manifest into the common directory, durably. On the coordinator, when all have delivered.

        Raises:
            WriteError: Nothing was published.
        """
        with translate_os_errors("write the manifest", self._common):
            self._write_durably(self._common / MANIFEST_NAME, manifest)
            self._filesystem.fsync_directory(self._common)
            self._filesystem.fsync_directory(self._shared)

    def publish(self) -> Path:
        """Give the sealed checkpoint its name. On the coordinator.

        Raises:
            WriteError: Nothing was published.
        """
        with translate_os_errors("publish a checkpoint", self._target):
            self._filesystem.rename(self._common, self._target)
        self._remove(self._votes)
        self._discard_own()
        self._leave()
        return self._target

    @property
    def target(self) -> Path:
        """Where the checkpoint is, once the coordinator has published it."""
        return self._target

    def abandon(self) -> None:
        """Give this rank's part up, and on the coordinator what is common. Never raises.

        A rank that is late still writes to its own directory: nobody takes that from it, so that it fails for what it
        is told and not for a file that is gone.
        """
        super().abandon()
        if self._seat.is_coordinator:
            self.discard_common()
        else:
            self._leave()

    def discard_common(self) -> None:
        """Remove what ranks handed over, when the save is known to have failed. Never raises."""
        self._remove(self._common)
        self._remove(self._votes)
        self._leave()

    def _leave(self) -> None:
        """Whoever is the last closes the door."""
        with contextlib.suppress(OSError):
            self._filesystem.remove_empty_directory(self._shared)

    def _remove(self, path: Path) -> None:
        # Another rank may be removing the same; what is left is swept by the next session.
        with contextlib.suppress(OSError):
            self._filesystem.remove_tree(path)


def _rank_name(rank: int) -> str:
    return f"rank-{rank:05d}"


def _make_if_missing(filesystem: LocalFileSystem, path: Path) -> None:
    with contextlib.suppress(FileExistsError):
        filesystem.make_directory(path)
