"""What a save gives back: a handle with the two moments a caller may wait for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import TailorError
from ..manifest import Manifest

__all__ = ["SaveHandle", "SaveStats"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveStats:
    """What a save cost."""

    written_nbytes: int
    """Bytes of new files."""
    linked_nbytes: int
    """Bytes of files taken over by a link."""
    num_layers_written: int
    num_layers: int
    stall_secs: float
    """Time the training loop was held up."""
    total_secs: float
    """Time from the call to the acknowledgement."""


class SaveHandle:
    """One save, done or failed.

    ``captured()`` returns when training may change the state again, ``result()`` when the checkpoint is acknowledged.
    """

    def __init__(
        self,
        step: int,
        *,
        path: Path | None = None,
        manifest: Manifest | None = None,
        stats: SaveStats | None = None,
        error: TailorError | None = None,
    ) -> None:
        assert (error is None) == (path is not None), "a save has either a path or an error"
        self.step = step
        self.path = path
        self.manifest = manifest
        self.stats = stats
        self.error = error

    def captured(self) -> None:
        """Wait until the state was copied; raises what stopped the copy."""
        if self.error is not None:
            raise self.error

    def result(self) -> Path:
        """Wait until the checkpoint is published and durable.

        Returns:
            Its directory.

        Raises:
            TailorError: What stopped the save.
        """
        self.captured()
        assert self.path is not None
        return self.path

    def __repr__(self) -> str:
        return f"SaveHandle(step={self.step}, {'failed' if self.error else 'published'})"
