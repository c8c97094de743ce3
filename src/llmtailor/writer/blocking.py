"""The simple writer: copies and writes while training waits.

It goes through the same steps as any writer will: files, links, the trainer's small files, manifest, publish. One
error anywhere ends the attempt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..manifest import FileRecord, Manifest, encode_manifest
from ..storage import RunDirectory, StagedCheckpoint
from .images import LayerImage

__all__ = ["LinkedFile", "SaveJob", "WrittenLayer", "write_checkpoint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedFile:
    """A file that is taken over from an earlier checkpoint."""

    record: FileRecord
    source: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenLayer:
    """Records of the files a layer was written to."""

    weights: FileRecord
    optimizer: FileRecord | None
    update_count: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveJob:
    """All that a writer needs to make one checkpoint."""

    step: int
    is_first: bool
    """It follows no checkpoint of this run's directory."""
    images: Sequence[LayerImage]
    """Layers to write."""
    links: Sequence[LinkedFile]
    """Files to take over."""
    write_small_files: Callable[[Path], None]
    """Puts the trainer's small files into the directory it is given."""
    build_manifest: Callable[[Mapping[str, WrittenLayer], Sequence[FileRecord]], Manifest]
    """From the written layers by name, and the small files."""

    @property
    def nbytes(self) -> int:
        return sum(image.nbytes for image in self.images)

    @property
    def num_files(self) -> int:
        return sum(len(image.files) for image in self.images) + len(self.links)


def write_checkpoint(run: RunDirectory, job: SaveJob) -> tuple[Path, Manifest, str]:
    """Write and publish one checkpoint.

    Returns:
        Its directory, its manifest and the manifest's digest.

    Raises:
        WriteError: Nothing was published.
        NotFoundError, IntegrityError: A file to link is gone or changed; nothing was published.
    """
    staged = run.stage(job.step, job.nbytes, job.num_files)
    try:
        written = {image.layer: _write_layer(staged, image) for image in job.images}
        for link in job.links:
            staged.link_file(link.record, link.source)
        job.write_small_files(staged.path)
        manifest = job.build_manifest(written, staged.adopt_rest())
        encoded, digest = encode_manifest(manifest)
        path = run.publish(staged, encoded, job.step, is_first=job.is_first)
    except BaseException:
        staged.abandon()
        raise
    return path, manifest, digest


def _write_layer(staged: StagedCheckpoint, image: LayerImage) -> WrittenLayer:
    records = [staged.write_file(file.name, file.chunks(), file.layout.nbytes) for file in image.files]
    return WrittenLayer(
        weights=records[0],
        optimizer=records[1] if len(records) == 2 else None,
        update_count=image.update_count,
    )
