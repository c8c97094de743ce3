"""One save, decided: what a writer is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..codecs import Component, Deviation
from ..manifest import FileRecord, LayerRecord, Manifest
from ..storage import StagedCheckpoint, pad
from .ballot import Ballot
from .coded_images import Base, CodedImage
from .images import LayerImage

__all__ = ["LinkedFile", "SaveCost", "SaveJob", "WrittenCodes", "WrittenLayer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedFile:
    """A file that is taken over from an earlier checkpoint."""

    record: FileRecord
    source: Path
    layer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenCodes:
    """A codes file, and what it is."""

    file: FileRecord
    rest: str
    base: Base
    base_digest: str | None
    """Of the weights file of an earlier step that they are relative to."""
    deviations: Mapping[Component, Deviation]
    """Those that are not exact."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenLayer:
    """Records of the files a layer was written to."""

    weights: FileRecord | None
    """None if its earlier plain files stay, and ``codes`` are relative to them."""
    optimizer: FileRecord | None
    update_count: int | None
    codes: WrittenCodes | None = None
    reason: str | None = None
    """Why it was written exactly although it was to be coded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveCost:
    """What a save cost until its layers were written; for the manifest."""

    stall_secs: float
    """Time the training loop was held up."""
    capture_secs: float
    """From the call until all was in host memory."""
    write_secs: float
    """From then until all was handed to the disk."""
    pool_nbytes: int
    """The most host memory that was in use at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """All that a writer needs to make one checkpoint.

    The functions are called when the layers are written, and by then every earlier save of the run is published or has
    failed. They are called by a thread of the writer.
    """

    step: int
    staged: StagedCheckpoint
    """The attempt; the trainer's small files are in it already."""
    images: Sequence[LayerImage | CodedImage]
    """Layers to write, held (see ``LayerImage.hold``)."""
    find_base: Callable[[str], tuple[Path, LayerRecord] | None]
    """A layer's newest exact files: the checkpoint they are in, and the layer's record there; None if there are none.
    Called by the thread that captures, when every earlier save of the run is published or has failed."""
    plan_links: Callable[[Mapping[str, WrittenLayer]], Sequence[LinkedFile]]
    """Files to take over, from the written layers by name."""
    build_manifest: Callable[[Mapping[str, WrittenLayer], Sequence[FileRecord], SaveCost], Manifest]
    """From the written layers by name, and the small files."""
    is_first: Callable[[], bool]
    """It follows no checkpoint of this run's directory."""
    on_published: Callable[[Path, Manifest, str], None]
    """Told of the checkpoint's directory, manifest and manifest's digest, before its handle is; must not raise."""
    tidy_up: Callable[[Path], None]
    """Called after that with the directory; may take its time, must not raise."""
    ballot: Ballot | None = None
    """Where many ranks write one checkpoint: how they agree on it. ``staged`` then is this rank's part."""

    @property
    def padded_nbytes(self) -> int:
        """What the files need of a pool."""
        return sum(
            pad(image.nbytes) if isinstance(image, CodedImage) else sum(pad(file.nbytes) for file in image.files)
            for image in self.images
        )
