"""What a save gives back: how far it has come, the moments a caller may wait for, and what it cost."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..errors import WriteError
from ..manifest import Manifest
from .bell import Bell
from .life import SaveState, advance

__all__ = ["Durability", "SaveHandle", "SaveStats"]

Durability = Literal["local", "mirror"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStats:
    """What a save cost."""

    written_nbytes: int
    """Bytes of new files."""
    linked_nbytes: int
    """Bytes of files taken over by a link."""
    num_layers_written: int
    """Exactly, anew."""
    num_layers_coded: int
    """As codes, anew."""
    num_layers: int
    stall_secs: float
    """Time the training loop was held up: in the call, and before optimizer steps."""
    capture_secs: float
    """From the call until all was in host memory."""
    write_secs: float
    """From then until all was handed to the disk."""
    commit_secs: float
    """From then until it was published."""
    total_secs: float
    """From the call to the acknowledgement."""
    pool_nbytes: int
    """The most host memory that was in use at a time."""

    @property
    def write_rate(self) -> float:
        """Bytes of new files per second, from the call to the acknowledgement."""
        return self.written_nbytes / self.total_secs if self.total_secs else 0.0


class SaveHandle:
    """One save.

    ``captured()`` returns when training may change the state again, ``result()`` when the checkpoint is durable. Every
    method may be called by any thread. The writer moves it on; see ``life`` for the states.

    Args:
        step: Of the checkpoint.
        durable: What ``result`` waits for: the run's own directory, or the mirror, too.
        error: It failed at once.
        is_skipped: It never began, because another save was in flight.
    """

    def __init__(
        self,
        step: int,
        *,
        durable: Durability = "local",
        error: BaseException | None = None,
        is_skipped: bool = False,
    ) -> None:
        self.step = step
        self.path: Path | None = None
        """The checkpoint's directory, once it is published."""
        self.manifest: Manifest | None = None
        """Once it is published. Of many ranks, those other than 0 have it with their own files alone."""
        self.stats: SaveStats | None = None
        """Once it is published."""
        self.error = error
        """What stopped the save."""
        self.mirror_error: BaseException | None = None
        """What stopped the copy to the mirror; the checkpoint itself is published."""
        self.durable = durable
        self._is_mirrored = False
        self._mutex = threading.Lock()
        """Of the writer's threads and the mirror's."""
        self._bell = Bell()
        self._state = SaveState.CAPTURING
        if error is not None:
            self._state = SaveState.FAILED
        elif is_skipped:
            self._state = SaveState.SKIPPED
            self.error = WriteError(
                f"checkpoint-{step} was skipped: another save was in flight",
                kind="skipped",
                hint='pass when_busy="wait" to wait instead, or save less often',
            )

    @property
    def state(self) -> SaveState:
        """How far it has come."""
        return self._state

    def captured(self, timeout_secs: float | None = None) -> None:
        """Wait until the state was copied to host memory.

        Raises:
            TailorError: What stopped the save.
            TimeoutError: It took longer.
        """
        self.wait_until_captured(timeout_secs)
        if self.error is not None:
            raise self.error

    def wait_until_captured(self, timeout_secs: float | None = None) -> None:
        """As ``captured``, but a save that failed is only waited for.

        Raises:
            TimeoutError: It took longer.
        """
        self._wait(lambda: self._state.is_captured, timeout_secs)

    def result(self, timeout_secs: float | None = None) -> Path:
        """Wait until the checkpoint is published and durable; with ``durable="mirror"``, in the mirror, too.

        Returns:
            Its directory.

        Raises:
            TailorError: What stopped the save, or the copy it was to wait for.
            TimeoutError: It took longer.
        """
        self._wait(lambda: self.has_ended, timeout_secs)
        if self.failure is not None:
            raise self.failure
        assert self.path is not None
        return self.path

    @property
    def has_ended(self) -> bool:
        """True when ``result`` does not wait any more."""
        if self.error is not None or self._state is SaveState.MIRRORED:
            return True
        is_local = self._state is SaveState.PUBLISHED
        return is_local and (self.durable == "local" or self.mirror_error is not None)

    @property
    def failure(self) -> BaseException | None:
        """What ``result`` raises."""
        return self.error or (self.mirror_error if self.durable == "mirror" else None)

    def _wait(self, is_reached: Callable[[], bool], timeout_secs: float | None) -> None:
        if not self._bell.wait_for(is_reached, timeout_secs):
            raise TimeoutError(f"checkpoint-{self.step} is {self._state} after {timeout_secs} s")

    # ---- For the writer ----

    def advance(self, to: SaveState) -> None:
        """One step further."""
        with self._mutex:
            self._state = advance(self._state, to)
        self._bell.ring()

    def publish(self, path: Path, manifest: Manifest, stats: SaveStats) -> None:
        """It is published."""
        with self._mutex:
            self.path, self.manifest, self.stats = path, manifest, stats
            self._state = advance(self._state, SaveState.PUBLISHED)
            if self._is_mirrored:
                self._state = advance(self._state, SaveState.MIRRORED)
        self._bell.ring()

    def fail(self, error: BaseException) -> None:
        """It will not be published. What stopped it first is what is said of it."""
        with self._mutex:
            state = advance(self._state, SaveState.FAILED)
            self.error = self.error or error
            self._state = state
        self._bell.ring()

    def note_mirrored(self) -> None:
        """The mirror holds it, or a newer one; may come before ``publish``, for the mirror's thread is another."""
        with self._mutex:
            self._is_mirrored = True
            if self._state is SaveState.PUBLISHED:
                self._state = advance(self._state, SaveState.MIRRORED)
        self._bell.ring()

    def fail_mirror(self, error: BaseException) -> None:
        """It is published, and will not be mirrored."""
        with self._mutex:
            self.mirror_error = error
        self._bell.ring()

    def __repr__(self) -> str:
        return f"SaveHandle(step={self.step}, {self._state})"
