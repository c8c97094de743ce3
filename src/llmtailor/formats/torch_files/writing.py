"""The plan of a torch zip file: every byte that is not a tensor's, and where the tensors go.

    | header, data.pkl, descriptor | .format_version | .storage_alignment | byteorder |
    | data/0 | data/1 | ... | version | directory | zip64 end | locator | end |

Laid out as torch does, header by header, so that what torch computes without reading (``mmap=True`` with
``calculate_storage_offsets``) is right for these files, too. A record's CRC stands behind it and in the directory;
where its bytes are not known yet, both places are left to a ``CrcPatch``.

Source: torch 2.13, torch/serialization.py (_save), caffe2/serialize/inline_container.cc (getPadding, writeRecord),
third_party/miniz-3.0.2 (mz_zip_writer_add_mem_ex_v2).
"""

from __future__ import annotations

import struct
import zlib
from pathlib import PurePosixPath

from ...file_plan import CrcPatch, FilePlan, Part
from ...tensor_refs import InlineTensor, TensorRef, whole
from ...tensors import ByteRange
from .nodes import Tree
from .pickle_writer import encode_torch_pickle

__all__ = ["plan_torch_blob", "plan_torch_file"]

_ALIGNMENT = 64
_WIDE = 0xFFFFFFFF
_UTF8_NAMES, _SIZES_BEHIND = 0x0800, 0x0008
_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_DESCRIPTOR = struct.Struct("<4s3I")
_WIDE_DESCRIPTOR = struct.Struct("<4sI2Q")
_CRC_IN_DESCRIPTOR = 4
_CRC_IN_CENTRAL = 16
_END64 = struct.Struct("<4sQ2H2I4Q")
_MADE_BY, _NEEDS = 0x031E, 45
_LOCATOR = struct.Struct("<4sIQI")
_END = struct.Struct("<4s4H2IH")


def plan_torch_file(name: str, tree: Tree) -> FilePlan:
    """Plan a file that ``torch.load(weights_only=True)`` reads, mapped or not, if its classes are torch's.

    Args:
        name: In the checkpoint, with forward slashes.
        tree: What goes into it.

    Raises:
        FormatError: The tree is cyclic or too deep.
        UnsupportedError: There is a class in it that nobody vouches for.
    """
    # torch calls the root like the file; a name it could not open is not needed for anything.
    stem = PurePosixPath(name).stem
    is_usable = stem.isascii() and stem.isprintable() and stem.strip(".") != ""
    parts, patches = plan_torch_blob(tree, root=stem if is_usable else "archive")
    return FilePlan(name=name, parts=parts, crc_patches=patches)


def plan_torch_blob(tree: Tree, *, root: str = "archive") -> tuple[tuple[Part, ...], tuple[CrcPatch, ...]]:
    """Plan the same as a part of a larger file; offsets count from its start, which should be a multiple of 64.

    Args:
        tree: What goes into it.
        root: Name of the directory in the archive.

    Raises:
        FormatError: The tree is cyclic or too deep.
        UnsupportedError: There is a class in it that nobody vouches for.
    """
    data, storages = encode_torch_pickle(tree)
    archive = _Archive(root)
    archive.add("data.pkl", data)
    archive.add(".format_version", b"1")
    archive.add(".storage_alignment", str(_ALIGNMENT).encode())
    archive.add("byteorder", b"little")
    for number, ref in enumerate(storages):
        archive.add(f"data/{number}", ref.data if isinstance(ref, InlineTensor) else ref)
    archive.add("version", b"3\n")
    return archive.finish()


class _Archive:
    """Records so far. Bytes that are known are gathered until a tensor comes."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._parts: list[Part] = []
        self._known = bytearray()
        self._position = 0
        self._directory: list[bytes] = []
        self._directory_nbytes = 0
        # Range of a record's bytes, and its CRC's place behind it and in the directory.
        self._unknown: list[tuple[ByteRange, int, int]] = []

    def add(self, name: str, content: bytes | TensorRef) -> None:
        """Add a record."""
        encoded = f"{self._root}/{name}".encode()
        nbytes = len(content) if isinstance(content, bytes) else content.meta.nbytes
        header = self._position
        wide = _wide_extra(nbytes, header)
        flags = _UTF8_NAMES | (_SIZES_BEHIND if nbytes else 0)
        padding = -(header + _LOCAL.size + len(encoded) + len(wide) + 4) % _ALIGNMENT
        extra = wide + struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        self._write(_LOCAL.pack(b"PK\x03\x04", 0, flags, 0, 0, 0, 0, 0, 0, len(encoded), len(extra)))
        self._write(encoded + extra)
        start = self._position
        crc = 0
        if isinstance(content, bytes):
            crc = zlib.crc32(content)
            self._write(content)
        elif nbytes:
            in_directory = self._directory_nbytes + _CRC_IN_CENTRAL
            place = ByteRange(start=start, end=start + nbytes)
            self._unknown.append((place, place.end + _CRC_IN_DESCRIPTOR, in_directory))
            self._write_tensor(content)
        if nbytes:
            descriptor = _WIDE_DESCRIPTOR if wide else _DESCRIPTOR
            self._write(descriptor.pack(b"PK\x07\x08", crc, nbytes, nbytes))
        narrow, offset = min(nbytes, _WIDE), min(header, _WIDE)
        entry = _CENTRAL.pack(
            b"PK\x01\x02", 0, 0, flags, 0, 0, 0, crc, narrow, narrow, len(encoded), len(wide), 0, 0, 0, 0, offset
        )
        self._directory.append(entry + encoded + wide)
        self._directory_nbytes += len(self._directory[-1])

    def finish(self) -> tuple[tuple[Part, ...], tuple[CrcPatch, ...]]:
        """Write the directory; the parts and the CRCs that are still open."""
        start, nbytes, count = self._position, self._directory_nbytes, len(self._directory)
        self._write(b"".join(self._directory))
        end = self._position
        self._write(_END64.pack(b"PK\x06\x06", _END64.size - 12, _MADE_BY, _NEEDS, 0, 0, count, count, nbytes, start))
        self._write(_LOCATOR.pack(b"PK\x06\x07", 0, end, 1))
        few = min(count, 0xFFFF)
        self._write(_END.pack(b"PK\x05\x06", 0, 0, few, few, min(nbytes, _WIDE), min(start, _WIDE), 0))
        self._flush()
        patches = tuple(
            CrcPatch(byte_range=place, offsets=(behind, start + in_directory))
            for place, behind, in_directory in self._unknown
        )
        return tuple(self._parts), patches

    def _write(self, data: bytes) -> None:
        self._known += data
        self._position += len(data)

    def _write_tensor(self, ref: TensorRef) -> None:
        self._flush()
        self._parts.append(whole(ref))
        self._position += ref.meta.nbytes

    def _flush(self) -> None:
        if self._known:
            self._parts.append(bytes(self._known))
            self._known.clear()


def _wide_extra(nbytes: int, header: int) -> bytes:
    """The zip64 extra field, with what does not fit into 32 bits; empty if all does."""
    numbers = [nbytes, nbytes] * (nbytes >= _WIDE) + [header] * (header >= _WIDE)
    return struct.pack(f"<2H{len(numbers)}Q", 1, 8 * len(numbers), *numbers) if numbers else b""
