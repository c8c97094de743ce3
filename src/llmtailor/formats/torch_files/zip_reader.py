"""The directory of a torch zip archive: which record lies where. Nothing is unpacked, only small records are read.

    | local header | name | extra, padding | record | descriptor |  ...  | directory | zip64 end | locator | end |
                                           ^ a multiple of 64: only the local header knows its extra's length

Every rule here is about the file alone, so a file that passes has one reading: one root directory, known names, records
as they are (never compressed), none twice, none overlapping.

Source: torch 2.13, torch/serialization.py (_save), caffe2/serialize/inline_container.cc; PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass

from ...errors import IntegrityError, UnsupportedError
from ...tensors import ByteRange
from .source import Source

__all__ = ["LOCAL_MAGIC", "Record", "read_directory", "read_record"]

LOCAL_MAGIC = b"PK\x03\x04"
_CENTRAL_MAGIC = b"PK\x01\x02"
_END_MAGIC = b"PK\x05\x06"
_END64_MAGIC = b"PK\x06\x06"
_LOCATOR_MAGIC = b"PK\x06\x07"

_LOCAL = struct.Struct("<4s5H3I2H")
_CENTRAL = struct.Struct("<4s6H3I5H2I")
_END = struct.Struct("<4s4H2IH")
_END64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR = struct.Struct("<4sIQI")

_STORED = 0
# Sizes after the data (3), names in UTF-8 (11); all others change what the bytes mean (encryption, patches, masks).
_HARMLESS_FLAGS = 0x0808
_ZIP64_EXTRA = 0x0001
_IN_ZIP64_32, _IN_ZIP64_16 = 0xFFFFFFFF, 0xFFFF
_NARROW_LIMITS = (_IN_ZIP64_16, _IN_ZIP64_16, _IN_ZIP64_32, _IN_ZIP64_32)
_MAX_DIRECTORY_NBYTES = 64 * 2**20  # some 800,000 records
_MAX_NAME_NBYTES = 1024

_RECORD = re.compile(r"data\.pkl|data/[0-9]{1,20}|version|byteorder|\.format_version|\.storage_alignment"
                     r"|\.data/(serialization_id|version)")  # fmt: skip
_TORCHSCRIPT = re.compile(r"constants\.pkl|constants/.*|code/.*|extra/.*|attributes/.*|bytecode\.pkl")


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A file in the archive."""

    byte_range: ByteRange
    """Its bytes, relative to the archive's start."""
    crc: int
    """CRC-32 as the directory has it; 0 where torch was told not to compute it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    name: str
    crc: int
    nbytes: int
    header: int
    """Where its local header starts."""


def read_directory(source: Source) -> dict[str, Record]:
    """Find every record of an archive.

    Returns:
        By name, without the root directory: ``data.pkl``, ``data/0``, ``byteorder``.

    Raises:
        FormatError: Not an archive as torch writes them.
        UnsupportedError: A TorchScript archive.
    """
    directory, count = _find_directory(source)
    entries = _parse_directory(source, directory, count)
    root = entries[0].name.partition("/")[0] if entries else ""
    records: dict[str, Record] = {}
    position = 0
    for entry in sorted(entries, key=lambda entry: entry.header):
        name = _check_name(source, entry.name, root)
        if name in records:
            raise source.refuse("zip-name", "a record is there twice", "each record once", repr(entry.name))
        if entry.header < position:
            raise source.refuse("zip-overlap", "records overlap", f"a record after byte {position}", entry.header)
        byte_range = _locate(source, entry, directory.start)
        records[name] = Record(byte_range=byte_range, crc=entry.crc)
        position = byte_range.end
    return records


def read_record(source: Source, record: Record, *, limit: int) -> bytes:
    """The bytes of a small record.

    Raises:
        FormatError: It is larger than ``limit`` bytes.
        IntegrityError: It has another CRC than the directory says.
    """
    nbytes = record.byte_range.nbytes
    if nbytes > limit:
        raise source.refuse("zip-size", "a record is too large", f"at most {limit} bytes", f"{nbytes} bytes")
    data = source.read(record.byte_range.start, nbytes)
    # torch.serialization.set_crc32_options(False) writes 0.
    if record.crc and zlib.crc32(data) != record.crc:
        raise IntegrityError(
            "a torch file has changed since it was written",
            kind="torch-zip-crc",
            path=source.path,
            expected=f"CRC-32 {record.crc:08x}",
            found=f"{zlib.crc32(data):08x}",
            hint="the checkpoint is damaged; take another one",
        )
    return data


def _find_directory(source: Source) -> tuple[ByteRange, int]:
    """Where the central directory is, and how many entries it has."""
    end_at = source.nbytes - _END.size
    magic, disk, first_disk, here, count, nbytes, start, comment = _END.unpack(source.read(end_at, _END.size))
    if magic != _END_MAGIC or comment:
        raise source.refuse("truncated", "the archive has no end", "a zip archive without a comment", repr(magic))
    if _IN_ZIP64_32 in (start, nbytes) or _IN_ZIP64_16 in (count, here) or _has_locator(source, end_at):
        narrow = (here, count, nbytes, start)
        disk, first_disk, here, count, nbytes, start, end_at = _read_end64(source, end_at)
        for small, large, limit in zip(narrow, (here, count, nbytes, start), _NARROW_LIMITS, strict=True):
            if small != min(large, limit):  # one reader would see another archive than the next
                raise source.refuse("zip-directory", "the archive has two different ends", large, small)
    if disk or first_disk or here != count:
        raise source.refuse("zip-disks", "the archive has several parts", "one part", f"part {disk}")
    if start + nbytes != end_at or nbytes > _MAX_DIRECTORY_NBYTES or count > nbytes // _CENTRAL.size:
        expected = f"a directory of at most {_MAX_DIRECTORY_NBYTES} bytes that ends at byte {end_at}"
        raise source.refuse("zip-directory", "the archive's directory is malformed", expected, f"{nbytes} at {start}")
    return ByteRange(start=start, end=start + nbytes), count


def _has_locator(source: Source, end_at: int) -> bool:
    at = end_at - _LOCATOR.size
    return at >= 0 and source.read(at, 4) == _LOCATOR_MAGIC


def _read_end64(source: Source, end_at: int) -> tuple[int, int, int, int, int, int, int]:
    locator_at = end_at - _LOCATOR.size
    magic, disk, start, disks = _LOCATOR.unpack(source.read(locator_at, _LOCATOR.size))
    if magic != _LOCATOR_MAGIC or disk or disks > 1 or start != locator_at - _END64.size:
        raise source.refuse("zip-directory", "the archive's zip64 end is malformed", "its locator", f"{start}")
    end64 = _END64.unpack(source.read(start, _END64.size))
    magic, nbytes_after, _, _, disk, first_disk, here, count, nbytes, directory_start = end64
    if magic != _END64_MAGIC or nbytes_after != _END64.size - 12:
        raise source.refuse("zip-directory", "the archive's zip64 end is malformed", "its record", repr(magic))
    return disk, first_disk, here, count, nbytes, directory_start, start


def _parse_directory(source: Source, directory: ByteRange, count: int) -> list[_Entry]:
    data = source.read(directory.start, directory.nbytes)
    entries: list[_Entry] = []
    position = 0
    for _ in range(count):
        if position + _CENTRAL.size > len(data):
            raise source.refuse("zip-directory", "the archive's directory is cut off", f"{count} records", len(entries))
        fields = _CENTRAL.unpack_from(data, position)
        position += _CENTRAL.size
        name_nbytes, extra_nbytes, comment_nbytes = fields[10:13]
        end = position + name_nbytes + extra_nbytes
        name, extra = data[position : position + name_nbytes], data[position + name_nbytes : end]
        if fields[0] != _CENTRAL_MAGIC or comment_nbytes or end > len(data) or name_nbytes > _MAX_NAME_NBYTES:
            raise source.refuse("zip-directory", "an entry of the directory is malformed", "a record", fields[0])
        entries.append(_parse_entry(source, fields, name, extra))
        position = end
    if position != len(data):
        raise source.refuse("zip-directory", "the directory has more than its records", position, len(data))
    return entries


def _parse_entry(source: Source, fields: tuple[int, ...], name: bytes, extra: bytes) -> _Entry:
    flags, method, crc, packed, nbytes, header = *fields[3:5], *fields[7:10], fields[16]
    _check_packing(source, flags, method)
    # What does not fit into 32 bits stands in the zip64 extra, in this order, and only that.
    wide = [value == _IN_ZIP64_32 for value in (nbytes, packed, header)]
    if any(wide):
        values = _read_zip64(source, extra, sum(wide))
        nbytes, packed, header = (
            values.pop(0) if is_wide else value for is_wide, value in zip(wide, (nbytes, packed, header), strict=True)
        )
    if packed != nbytes:
        raise source.refuse("zip-packed", "a record is compressed", f"{nbytes} bytes", f"{packed} bytes")
    return _Entry(name=_decode_name(source, name), crc=crc, nbytes=nbytes, header=header)


def _check_packing(source: Source, flags: int, method: int) -> None:
    if method != _STORED or flags & ~_HARMLESS_FLAGS:
        expected = "records as they are, as torch.save writes them"
        raise source.refuse("zip-packed", "a record is compressed", expected, f"method {method}, flags {flags:#x}")


def _read_zip64(source: Source, extra: bytes, count: int) -> list[int]:
    position = 0
    while position + 4 <= len(extra):
        key, nbytes = struct.unpack_from("<2H", extra, position)
        position += 4
        if key == _ZIP64_EXTRA and nbytes >= 8 * count and position + nbytes <= len(extra):
            return list(struct.unpack_from(f"<{count}Q", extra, position))
        position += nbytes
    raise source.refuse("zip-directory", "a large record has no size", f"{count} numbers of 64 bits", "none")


def _decode_name(source: Source, name: bytes) -> str:
    try:
        text = name.decode()
    except UnicodeDecodeError:
        text = ""
    if not text.isprintable() or "/" not in text:
        raise source.refuse("zip-name", "a record's name is unusable", "<root>/<record>", repr(name[:80]))
    return text


def _check_name(source: Source, full_name: str, root: str) -> str:
    """The name without the root."""
    found_root, _, name = full_name.partition("/")
    if found_root != root or root in ("", ".", ".."):
        raise source.refuse("zip-name", "a record lies outside the root", f"{root!r}", repr(full_name[:80]))
    if _TORCHSCRIPT.fullmatch(name):
        raise UnsupportedError(
            "cannot read a TorchScript archive",
            kind="torchscript",
            path=source.path,
            expected="a file of torch.save",
            found=f"the record {full_name[:80]!r}",
        )
    if not _RECORD.fullmatch(name):
        raise source.refuse("zip-name", "a record has an unknown name", "data.pkl, data/0, ...", repr(full_name[:80]))
    return name


def _locate(source: Source, entry: _Entry, limit: int) -> ByteRange:
    """Where a record's bytes are, by its local header; that must agree with the directory."""
    name = entry.name.encode()
    if entry.header + _LOCAL.size + len(name) > limit:
        raise source.refuse("zip-record", "a record lies outside the archive", f"before byte {limit}", entry.header)
    header = source.read(entry.header, _LOCAL.size + len(name))
    magic, _, flags, method, _, _, _, packed, nbytes, name_nbytes, extra_nbytes = _LOCAL.unpack_from(header)
    _check_packing(source, flags, method)
    sizes = {packed, nbytes} - ({0, _IN_ZIP64_32} | {entry.nbytes})
    if magic != LOCAL_MAGIC or name_nbytes != len(name) or header[_LOCAL.size :] != name or sizes:
        raise source.refuse("zip-record", "a record is not what the directory says", repr(entry.name[:80]), "another")
    start = entry.header + _LOCAL.size + name_nbytes + extra_nbytes
    if start + entry.nbytes > limit:
        expected = f"at most {max(limit - start, 0)} bytes"
        raise source.refuse("zip-record", "a record reaches out of the archive", expected, f"{entry.nbytes} bytes")
    return ByteRange(start=start, end=start + entry.nbytes)
