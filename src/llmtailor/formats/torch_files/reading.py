"""Opening files of ``torch.save``, of both kinds, and bare pickles."""

from __future__ import annotations

from pathlib import Path

from ...tensors import ByteRange
from .legacy_reader import read_legacy
from .nodes import Global, TorchStorage, Tree
from .pickle_reader import MAX_PICKLE_NBYTES, interpret
from .rebuild import Rebuilder, refuse_persistent
from .source import Source, open_bytes
from .storage_ids import read_storage_id, storage_at
from .zip_reader import LOCAL_MAGIC, Record, read_directory, read_record

__all__ = ["open_torch_file", "read_pickle"]

_MAX_SMALL_RECORD = 64
# DCP notes every chunk of every rank in one pickle, 140 bytes for each: 150 MiB for a model of 70B with its optimizer
# on 512 ranks, 240 MiB for one of 405B. Objects that it makes are limited in proportion (``pickle_reader``).
_MAX_BARE_PICKLE_NBYTES = 512 * 2**20

_PICKLE_START = b"\x80"
_TAR_MAGIC = (257, b"ustar")


def open_torch_file(path: Path, *, byte_range: ByteRange | None = None) -> Tree:
    """What ``torch.save`` put into a file; tensors as references to the bytes in it, no tensor is read.

    Args:
        path: The file, zip or legacy.
        byte_range: The part that is a whole zip archive itself (an item of a DCP file); None for all of it.

    Returns:
        See ``nodes``. Equal views of a storage have the same ``ref`` object. A storage's device is dropped, and so are
        attributes that Python code set on a tensor.

    Raises:
        NotFoundError: There is no such file.
        FormatError: Not such a file, or one made to attack.
        UnsupportedError: TorchScript, a tar archive of torch 0.1, tensors with scattered or repeated elements.
    """
    with open_bytes(path, byte_range) as source:
        start = source.read(0, min(4, source.nbytes))
        if start == LOCAL_MAGIC:
            return _read_zip(source)
        if start[:1] == _PICKLE_START and byte_range is None:
            return read_legacy(source)
        if source.nbytes > 512 and source.read(_TAR_MAGIC[0], len(_TAR_MAGIC[1])) == _TAR_MAGIC[1]:
            raise source.unsupported("a file of torch.save, version 0.4 or later", "a tar archive")
        raise source.refuse("format", "it is of another kind", "a file of torch.save", repr(start))


def read_pickle(path: Path) -> Tree:
    """What is in a bare pickle file, such as DCP's ``.metadata``.

    Raises:
        NotFoundError: There is no such file.
        FormatError: Not a pickle of data, or one made to attack.
        UnsupportedError: Of a protocol that no checkpoint has.
    """
    with open_bytes(path) as source:
        if source.nbytes > _MAX_BARE_PICKLE_NBYTES:
            raise source.refuse("size", "it is too large", f"at most {_MAX_BARE_PICKLE_NBYTES} bytes", source.nbytes)
        data = source.read(0, source.nbytes)
    return interpret(data, Rebuilder(path, refuse_persistent(path)), path=path)[0]


def _read_zip(source: Source) -> Tree:
    records = read_directory(source)
    if "data.pkl" not in records:
        raise source.refuse("zip-record", "a record is missing", "data.pkl", ", ".join(sorted(records)[:5]))
    if "byteorder" in records:
        order = read_record(source, records["byteorder"], limit=_MAX_SMALL_RECORD)
        if order != b"little":
            raise source.unsupported("numbers in little-endian order", repr(order))
    data = read_record(source, records["data.pkl"], limit=MAX_PICKLE_NBYTES)
    builder = Rebuilder(source.path, _ZipStorages(source, records).find)
    return interpret(data, builder, path=source.path)[0]


class _ZipStorages:
    """Storages of an archive by what its pickle calls them; each is one object."""

    def __init__(self, source: Source, records: dict[str, Record]) -> None:
        self._source = source
        self._records = records
        self._storages: dict[tuple[str, Global], TorchStorage] = {}

    def find(self, identifier: Tree) -> TorchStorage:
        key, cls, nbytes = read_storage_id(self._source, identifier, length=5)
        known = self._storages.get((key, cls))
        record = self._records.get(f"data/{key}")
        if record is None or record.byte_range.nbytes != nbytes:
            found = "none" if record is None else f"{record.byte_range.nbytes} bytes"
            raise self._source.refuse("storage", f"storage {key[:40]!r} is not as told", f"{nbytes} bytes", found)
        if known is None:
            known = storage_at(self._source, record.byte_range.start, nbytes, cls)
            self._storages[key, cls] = known
        return known
