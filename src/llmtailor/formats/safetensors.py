"""safetensors files: the layout before a byte moves, and a header nobody has to trust.

    0        8              8 + N = data_start          data_start + data bytes = file size
    | N: u64 | header: JSON, spaces | tensor | tensor | ... |

We pad the header so that ``data_start`` is a multiple of 4096: then the file can be written and read around the
page cache. Writing is two steps: ``plan_layout`` decides, somebody dull writes. Every read goes through
``parse_header``, whose checks do not depend on who calls.

Source: safetensors 0.8.0, README "Format" and safetensors/src/tensor.rs (Metadata::validate).
"""

from __future__ import annotations

import errno
import json
import mmap
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

from ..errors import FormatError, NotFoundError, UnsupportedError
from ..strict_json import parse_object
from ..tensors import DTYPE_BITS, ByteRange, TensorMeta

__all__ = [
    "DATA_ALIGNMENT",
    "Header",
    "Layout",
    "OpenFile",
    "StoredTensor",
    "open_file",
    "parse_header",
    "plan_layout",
    "read_header",
]

DATA_ALIGNMENT = 4096
_LENGTH_WIDTH = 8
_METADATA_NAME = "__metadata__"
# Upstream allows 100 MB; a header of 25 MiB names some 200,000 tensors, far more than one layer has.
_MAX_HEADER_BYTES = 25 * 2**20
_MAX_NAME_LENGTH = 1024
# Holds the header of most layer files.
_FIRST_READ_NBYTES = 16 * 2**10
# torch has 64 at most; without a bound, the product of a million sizes takes an hour.
_MAX_DIMS = 64
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    meta: TensorMeta
    byte_range: ByteRange
    """Absolute in the file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where each byte of a file will be, decided before any is written."""

    prefix: bytes
    """Header length, header and padding; its size is a multiple of ``DATA_ALIGNMENT``."""
    tensors: tuple[StoredTensor, ...]
    """In file order, end to end."""
    nbytes: int
    """Size of the whole file."""
    metadata: Mapping[str, str]
    """As in the header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says it holds."""

    tensors: Mapping[str, StoredTensor]
    """By name, in file order."""
    metadata: Mapping[str, str]
    """The ``__metadata__`` object; empty if absent."""
    nbytes: int
    """Size the whole file must have."""


def plan_layout(tensors: Sequence[tuple[str, TensorMeta]], metadata: Mapping[str, str]) -> Layout:
    """Lay tensors out in a file: largest elements first, then by name, no gaps.

    The order keeps every tensor aligned to its own element size, as upstream does. The result depends on the
    arguments alone, byte for byte.

    Args:
        tensors: Name and meta of each; any order, names unique.
        metadata: Becomes ``__metadata__``; text to text.

    Returns:
        The layout; ``layout.prefix`` followed by the tensors' bytes in ``layout.tensors`` order is the file.

    Raises:
        UnsupportedError: ``parse_header`` would refuse the file.
    """
    ordered = sorted(tensors, key=lambda item: (-DTYPE_BITS[item[1].dtype], item[0]))
    assert len({name for name, _ in ordered}) == len(ordered), "tensor names must be unique"
    for name, meta in ordered:
        if not _is_usable(name) or len(meta.shape) > _MAX_DIMS:
            raise _cannot_hold("a tensor's name or shape", ascii(name[:80]), "a printable name, at most 64 dimensions")
    entries: dict[str, object] = {_METADATA_NAME: dict(sorted(metadata.items()))}
    offset = 0
    for name, meta in ordered:
        end = offset + meta.nbytes
        entries[name] = {"dtype": meta.dtype, "shape": list(meta.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    if len(text) > _MAX_HEADER_BYTES - DATA_ALIGNMENT:
        raise _cannot_hold("so many tensors", f"a header of {len(text)} bytes", f"<= {_MAX_HEADER_BYTES} bytes")
    data_start = -(-(_LENGTH_WIDTH + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT
    header_nbytes = data_start - _LENGTH_WIDTH
    prefix = struct.pack("<Q", header_nbytes) + text.ljust(header_nbytes, b" ")
    stored = []
    position = data_start
    for name, meta in ordered:
        byte_range = ByteRange(start=position, end=position + meta.nbytes)
        stored.append(StoredTensor(name=name, meta=meta, byte_range=byte_range))
        position = byte_range.end
    return Layout(prefix=prefix, tensors=tuple(stored), nbytes=position, metadata=dict(metadata))


def _cannot_hold(what: str, found: str, expected: str) -> UnsupportedError:
    return UnsupportedError(
        f"a safetensors file of ours cannot hold {what}",
        kind="tensor-layout",
        expected=expected,
        found=found,
        hint="rename the parameter, or split the layer with layer_overrides",
    )


def parse_header(buffer: memoryview | mmap.mmap | bytes, path: Path | str, nbytes: int | None = None) -> Header:
    """Read and check the header of a file.

    Args:
        buffer: The file's first bytes; its header at least.
        path: For the error.
        nbytes: Size of the file; None if the buffer is all of it.

    Raises:
        FormatError: The header is too large, is not strict JSON, has an unknown element type, or the tensors do
            not cover the rest of the file exactly once.
    """
    nbytes = len(buffer) if nbytes is None else nbytes
    data_start = _find_data(buffer, path, nbytes)
    if len(buffer) < data_start:
        raise _refuse(path, "file-size", "the file became shorter", f">= {data_start} bytes", f"{len(buffer)} bytes")
    entries = parse_object(bytes(buffer[_LENGTH_WIDTH:data_start]), what="safetensors header", path=path)
    metadata = _check_metadata(entries.pop(_METADATA_NAME, {}), path)
    stored = [_parse_entry(name, entry, data_start, path) for name, entry in entries.items()]
    stored.sort(key=lambda tensor: (tensor.byte_range.start, tensor.byte_range.end))
    position = data_start
    for tensor in stored:
        if tensor.byte_range.start != position:
            raise _refuse(
                path, "tensor-gap", "tensors overlap or leave a hole", position, tensor.byte_range.start, tensor.name
            )
        position = tensor.byte_range.end
    if position != nbytes:
        raise _refuse(path, "file-size", "the file is not as long as its tensors", f"{position} bytes", nbytes)
    return Header(tensors={tensor.name: tensor for tensor in stored}, metadata=metadata, nbytes=position)


def _find_data(buffer: memoryview | mmap.mmap | bytes, path: Path | str, nbytes: int) -> int:
    """Where the header ends."""
    if len(buffer) < _LENGTH_WIDTH:
        raise _refuse(path, "header-length", "the file is shorter than a header", ">= 8 bytes", f"{len(buffer)} bytes")
    (header_nbytes,) = struct.unpack("<Q", bytes(buffer[:_LENGTH_WIDTH]))
    room = min(_MAX_HEADER_BYTES, nbytes - _LENGTH_WIDTH)
    if header_nbytes > room:
        raise _refuse(path, "header-length", "the header does not fit", f"<= {room} bytes", f"{header_nbytes} bytes")
    return _LENGTH_WIDTH + int(header_nbytes)


def read_header(descriptor: int, path: Path | str) -> tuple[Header, bytes]:
    """Read and check the header of an open file.

    Args:
        descriptor: Of a regular file, open for reading.
        path: For the error.

    Returns:
        The header, and the bytes it was read from: all before the first tensor.

    Raises:
        FormatError: As ``parse_header``.
    """
    nbytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, min(nbytes, _FIRST_READ_NBYTES), 0)
    data_start = _find_data(prefix, path, nbytes)
    while len(prefix) < data_start and (more := os.pread(descriptor, data_start - len(prefix), len(prefix))):
        prefix += more
    return parse_header(prefix, path, nbytes), prefix[:data_start]


def _check_metadata(value: object, path: Path | str) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _refuse(path, "header-metadata", "__metadata__ is not text to text", "{text: text}", type(value).__name__)
    # JSON can say half of a surrogate pair, which is no text: whoever encodes it again would fail.
    if any(map(_SURROGATE.search, value.values())):
        raise _refuse(path, "header-metadata", "__metadata__ is not text to text", "text", "a lone surrogate")
    return value


def _parse_entry(name: str, entry: object, data_start: int, path: Path | str) -> StoredTensor:
    if not _is_usable(name):
        raise _refuse(path, "tensor-name", "a tensor's name is unusable", "printable text", repr(name[:80]))
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _refuse(
            path, "tensor-entry", "an entry is malformed", "dtype, shape, data_offsets", str(entry)[:200], name
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _refuse(path, "tensor-dtype", "unknown element type", ", ".join(DTYPE_BITS), dtype, name)
    if not _are_sizes(shape, _MAX_DIMS) or not _are_sizes(offsets, 2) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _refuse(path, "tensor-entry", "sizes are malformed", "non-negative integers", str(entry)[:200], name)
    meta = TensorMeta(dtype=dtype, shape=tuple(shape))
    start, end = offsets
    if meta.nbytes != end - start:
        raise _refuse(
            path, "tensor-size", "shape and bytes differ", f"{meta.nbytes} bytes", f"{end - start} bytes", name
        )
    return StoredTensor(name=name, meta=meta, byte_range=ByteRange(start=data_start + start, end=data_start + end))


def _is_usable(name: str) -> bool:
    return 0 < len(name) <= _MAX_NAME_LENGTH and name.isprintable() and name != _METADATA_NAME


def _are_sizes(value: object, max_length: int) -> TypeGuard[list[int]]:
    # bool is an int; a shape of [true] is not a shape.
    return (
        isinstance(value, list)
        and len(value) <= max_length
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _refuse(
    path: Path | str, kind: str, what: str, expected: object, found: object, name: str | None = None
) -> FormatError:
    return FormatError(
        f"not a valid safetensors file: {what}", kind=kind, path=path, fqn=name, expected=expected, found=found
    )


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A safetensors file mapped read-only; the mapping lives as long as anything still looks at it."""

    header: Header
    buffer: memoryview
    """All bytes of the file, read-only."""

    def tensor_bytes(self, name: str) -> memoryview:
        """The bytes of one tensor, row-major, little-endian; a read-only view into the mapping."""
        byte_range = self.header.tensors[name].byte_range
        return self.buffer[byte_range.start : byte_range.end]


def open_file(path: Path) -> OpenFile:
    """Map a safetensors file and check its header.

    Raises:
        NotFoundError: There is no such file.
        FormatError: It is a link, a pipe or a device, or ``parse_header`` refuses it.
    """
    try:
        # O_NONBLOCK: opening a pipe somebody left there must not hang.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as err:
        raise NotFoundError("no such file", kind="missing-file", path=path) from err
    except OSError as err:
        if err.errno in _NOT_REGULAR:
            raise _refuse(path, "not-regular", "not a regular file", "a regular file", os.strerror(err.errno)) from err
        raise
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size == 0:
            raise _refuse(path, "not-regular", "not a regular file with content", "a regular file", "another thing")
        mapped = mmap.mmap(descriptor, status.st_size, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
    # Not closed here: the mapping goes when the last view of it does, so that no view can outlive it.
    return OpenFile(header=parse_header(mapped, path), buffer=memoryview(mapped))


_NOT_REGULAR = frozenset({errno.ELOOP, errno.ENXIO})  # a symbolic link under O_NOFOLLOW; a socket
