"""A published checkpoint of one tier, copied whole into another tier.

    look at what the tier holds -> stage -> link what it has, copy the rest -> publish, the same manifest last

Every byte that moves is digested on the way and compared with the manifest, so rot in the first tier never spreads.
A few threads take a file each, with a buffer each, so that one reads while another one writes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import FormatError, IntegrityError, NotFoundError, TailorError, WriteError
from ..formats.manifest_file import read_manifest
from ..formats.source_files import open_source
from ..manifest import MANIFEST_NAME, FileRecord, Manifest, decode_manifest
from ..storage import (
    ALIGNMENT,
    FileReader,
    LocalFileSystem,
    RunDirectory,
    StagedCheckpoint,
    StagedFile,
    aligned_buffer,
    list_checkpoints,
    read_files,
)
from ..storage.staging import translate_os_errors

__all__ = ["CopiedCheckpoint", "copy_checkpoint"]

_NOTHING_CHANGED = "nothing was published in the mirror; the checkpoints it holds were not touched"


@dataclass(frozen=True, slots=True, kw_only=True)
class CopiedCheckpoint:
    """What ``copy_checkpoint`` did."""

    path: Path
    """In the tier copied to: the copy, or the newer checkpoint that made it needless."""
    step: int
    """Of ``path``."""
    copied_nbytes: int
    linked_nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Base:
    """A checkpoint to link from."""

    path: Path
    files: frozenset[FileRecord]


def copy_checkpoint(source: Path, tier: RunDirectory) -> CopiedCheckpoint:
    """Copy a published checkpoint into another tier, exactly as a save publishes it.

    A file that the tier's newest checkpoint of the same run has already, by path, size and digest, is linked there.
    Nothing is done if the tier has this very checkpoint, or a later one that ``source``'s directory has too.

    Called by the one thread that publishes into ``tier``.

    Args:
        source: Its directory in the first tier; it must stay until this returns.
        tier: The tier to copy to, held for writing.

    Raises:
        NotFoundError: The checkpoint, or a file of it, is gone from the first tier.
        IntegrityError: A file of the first tier is not what was published.
        FormatError: The first tier's manifest is damaged, or something else stands where a file should be.
        WriteError: The tier cannot be written or read (``no-space``, ``read-only``, ``io``), or the first tier cannot
            be read (``unreadable``).
    """
    encoded = _read_manifest_bytes(source / MANIFEST_NAME)
    manifest, digest = decode_manifest(encoded, source / MANIFEST_NAME)
    with translate_os_errors("read the mirror's checkpoints", tier.path):
        there = _find_there(source, manifest.step, digest, tier)
        if there is not None:
            # Whoever published it may have been stopped before its name was durable.
            LocalFileSystem().fsync_directory(tier.path)
            return there
        base = _find_newest(tier, manifest.run_id)
    linkable = _find_linkable(manifest, base)
    copied = [record for record in manifest.all_files if record not in linkable]
    nbytes = sum(record.bytes for record in copied)
    staged = tier.stage(manifest.step, nbytes, len(manifest.all_files))
    try:
        for record in manifest.all_files:
            if base is not None and record in linkable:
                staged.link_file(record, base.path / record.path)
        read_files(
            copied, lambda record: record.bytes, lambda record, reader: _copy_file(source, record, staged, reader)
        )
        staged.seal(encoded)
        path = tier.publish(staged, manifest.step, is_first=base is None)
    except BaseException:
        tier.abandon(staged)
        raise
    return CopiedCheckpoint(path=path, step=manifest.step, copied_nbytes=nbytes, linked_nbytes=manifest.nbytes - nbytes)


def _read_manifest_bytes(path: Path) -> bytes:
    with _translate_read_errors(path), os.fdopen(open_source(path), "rb", buffering=0) as file:
        return file.read()


def _find_there(source: Path, step: int, digest: str, tier: RunDirectory) -> CopiedCheckpoint | None:
    """The checkpoint itself in the tier, or a later one of the same branch: publishing would set that one aside."""
    for entry in list_checkpoints(tier.path):
        if entry.step < step or not entry.has_manifest:
            continue
        expected = digest if entry.step == step else _find_digest(source.parent / entry.path.name)
        if expected is not None and _find_digest(entry.path) == expected:
            return CopiedCheckpoint(path=entry.path, step=entry.step, copied_nbytes=0, linked_nbytes=0)
    return None


def _find_digest(checkpoint: Path) -> str | None:
    try:
        return read_manifest(checkpoint)[1]
    except (NotFoundError, FormatError):
        return None


def _find_newest(tier: RunDirectory, run_id: str) -> _Base | None:
    for entry in reversed(list_checkpoints(tier.path)):
        if not entry.has_manifest:
            continue
        try:
            manifest, _ = read_manifest(entry.path)
        except FormatError:
            continue  # what does not verify is left for the next resume to set aside
        if manifest.run_id == run_id:
            return _Base(path=entry.path, files=frozenset(manifest.all_files))
    return None


def _find_linkable(manifest: Manifest, base: _Base | None) -> frozenset[FileRecord]:
    """Files that the base has; not those that somebody removed or cut off there, which are copied anew."""
    if base is None:
        return frozenset()
    return frozenset(record for record in base.files.intersection(manifest.all_files) if _has_size(base.path, record))


def _has_size(checkpoint: Path, record: FileRecord) -> bool:
    try:
        return os.stat(checkpoint / record.path, follow_symlinks=False).st_size == record.bytes
    except OSError:
        return False


def _copy_file(source: Path, record: FileRecord, staged: StagedCheckpoint, reader: FileReader) -> None:
    path = source / record.path
    with _translate_read_errors(path):
        descriptor = open_source(path)
        try:
            size = os.fstat(descriptor).st_size
            if size != record.bytes:
                raise _changed(path, "file-size", f"{record.bytes} bytes", f"{size} bytes")
            file = staged.create_file(record.path, record.bytes)
            found = reader.digest(descriptor, record.bytes, path, lambda offset, piece: _write(file, offset, piece))
        finally:
            os.close(descriptor)
    if found != record.digest:
        raise _changed(path, "digest", record.digest, found)
    file.finish(found)


def _write(file: StagedFile, offset: int, piece: memoryview) -> None:
    """Write a piece; of the last one, what does not fill a block goes into a block of its own."""
    whole = piece.nbytes // ALIGNMENT * ALIGNMENT
    if whole:
        file.write(piece[:whole], offset, whole)
    if rest := piece.nbytes - whole:
        block = aligned_buffer(ALIGNMENT)
        block[:rest] = piece[whole:]
        file.write(block, offset + whole, rest)


def _changed(path: Path, kind: str, expected: str, found: str) -> IntegrityError:
    return IntegrityError(
        "a file of the first tier is not the file that was published",
        kind=kind,
        path=path,
        expected=expected,
        found=found,
        hint=f"look at the disk it is on; {_NOTHING_CHANGED}",
    )


@contextlib.contextmanager
def _translate_read_errors(path: Path) -> Iterator[None]:
    """What goes wrong in the first tier, in our words; the mirror's own troubles are the staging's to tell."""
    try:
        yield
    except NotFoundError as err:
        raise NotFoundError(
            "a checkpoint was gone from the first tier before it was mirrored",
            kind="missing-file",
            path=path,
            expected="the file, until the checkpoint is mirrored",
            found="nothing",
            hint=_NOTHING_CHANGED,
        ) from err
    except TailorError:
        raise
    except OSError as err:
        raise WriteError(
            f"cannot read a checkpoint to mirror it: {err.strerror or err}",
            kind="unreadable",
            path=path,
            hint=f"look at the system's log; {_NOTHING_CHANGED}",
        ) from err
