"""A file that is not written yet, as a list of what goes into it. No bytes are touched.

A format describes each file of a new checkpoint as parts laid end to end; ``writer`` fills them in, in one pass, and
neither knows the other. A checkpoint is a list of these plans, and its size is known before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .tensor_refs import TensorSlice
from .tensors import ByteRange

__all__ = ["CheckpointPlan", "CrcPatch", "FilePlan", "FileRange", "LinkPlan", "Part", "WrittenFile", "Zeros"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRange:
    """Bytes of an existing file, taken over as they are."""

    path: Path
    byte_range: ByteRange

    @property
    def nbytes(self) -> int:
        return self.byte_range.nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros:
    """Padding."""

    nbytes: int


Part: TypeAlias = bytes | TensorSlice | FileRange | Zeros


@dataclass(frozen=True, slots=True, kw_only=True)
class CrcPatch:
    """A CRC-32 (as zip has it) that goes into the file once the bytes it is of are known."""

    byte_range: ByteRange
    """Of the new file; holds none of the places that are patched. Ranges of one file do not overlap."""
    offsets: tuple[int, ...]
    """Where its 4 bytes go, little-endian; the plan has zeros there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """A new file."""

    name: str
    """Relative to the checkpoint, with forward slashes."""
    parts: tuple[Part, ...]
    """End to end."""
    crc_patches: tuple[CrcPatch, ...] = ()
    """In order of their range."""

    @property
    def nbytes(self) -> int:
        return sum(len(part) if isinstance(part, bytes) else part.nbytes for part in self.parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkPlan:
    """A file that is taken over whole and immutable, by a hard link where that is possible."""

    name: str
    source: Path
    nbytes: int
    """Which it must have."""
    digest: str
    """As its own checkpoint recorded it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file of the new checkpoint, on disk."""

    name: str
    nbytes: int
    digest: str | None
    """``xxh3_128:...`` of the bytes that were handed to the kernel; None for a file with CRC patches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointPlan:
    """All files of a new checkpoint."""

    files: tuple[FilePlan, ...]
    links: tuple[LinkPlan, ...] = ()
    seal: Callable[[Mapping[str, WrittenFile]], FilePlan] | None = None
    """Makes the last file, from all the others by name; None where the format has no such file."""
    notes: tuple[str, ...] = ()
    """What the user should be told: sentences about state that was changed on the way."""

    @property
    def nbytes(self) -> int:
        """Size of all files but the last; links count in full."""
        return sum(file.nbytes for file in self.files) + sum(link.nbytes for link in self.links)
