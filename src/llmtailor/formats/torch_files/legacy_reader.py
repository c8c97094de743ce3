"""Files of ``torch.save`` without a zip archive, as DeepSpeed can write them.

    | pickle: magic | pickle: version | pickle: machine | pickle: the object | pickle: keys | numel, data | ...

Storages stand behind the object that refers to them, one for each key, in the order of the keys; ``numel`` has 8
bytes. So the object is interpreted twice: once to find out where it ends and which storages it has, and once for good.

Source: torch 2.13, torch/serialization.py (_legacy_save, _legacy_load); torch/csrc/generic/serialization.cpp
(THPStorage_writeFileRaw).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ...errors import FormatError
from .nodes import Global, TorchStorage, Tree
from .pickle_reader import MAX_PICKLE_NBYTES, TRUNCATED, interpret
from .rebuild import Rebuilder, refuse_persistent
from .source import Source
from .storage_ids import read_storage_id, storage_at
from .storages import storage_itemsize

__all__ = ["read_legacy"]

# Source: torch 2.13, torch/serialization.py (MAGIC_NUMBER, PROTOCOL_VERSION).
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001

# First so much is read, then eight times more: the pickles stand in front, gigabytes of data behind them.
_FIRST_PREFIX_NBYTES = 2**20
_MAX_PREFIX_NBYTES = MAX_PICKLE_NBYTES + 2**20
_NUMEL_NBYTES = 8


def read_legacy(source: Source) -> Tree:
    """The tree of a legacy file.

    Raises:
        FormatError: Not such a file.
        UnsupportedError: Of a big-endian machine, or with a whole module in it.
    """
    nbytes = _FIRST_PREFIX_NBYTES
    while True:
        nbytes = min(nbytes, source.nbytes, _MAX_PREFIX_NBYTES)
        try:
            return _Legacy(source, source.read(0, nbytes)).read()
        except FormatError as err:
            if err.kind != TRUNCATED or nbytes in (source.nbytes, _MAX_PREFIX_NBYTES):
                raise
        nbytes *= 8


@dataclass(slots=True)
class _Legacy:
    """One attempt, with the front of the file in memory."""

    source: Source
    front: bytes
    position: int = 0
    _told: dict[str, tuple[Global, int]] = field(default_factory=dict)
    """Class and size in bytes of each storage that the object refers to."""
    _places: dict[str, int] | None = None
    """Where the bytes of each storage start; None before the object's end is found."""
    _storages: dict[tuple[str, Global, int, int], TorchStorage] = field(default_factory=dict)

    def read(self) -> Tree:
        self._read_head()
        start = self.position
        self._interpret(self._builder())
        self._places = self._find_storages(self._interpret())
        self._storages.clear()
        self.position = start
        return self._interpret(self._builder())

    def _interpret(self, builder: Rebuilder | None = None) -> Tree:
        path = self.source.path
        builder = builder or Rebuilder(path, refuse_persistent(path))
        tree, self.position = interpret(self.front, builder, path=path, start=self.position, must_end=False)
        return tree

    def _builder(self) -> Rebuilder:
        return Rebuilder(self.source.path, self._find)

    def _read_head(self) -> None:
        magic, version, machine = self._interpret(), self._interpret(), self._interpret()
        if type(magic) is not int or magic != _MAGIC or version != _VERSION or not isinstance(machine, dict):
            raise self.source.refuse("format", "it is of another kind", "a file of torch.save", "another pickle")
        if machine.get("little_endian") is not True:
            raise self.source.unsupported("numbers in little-endian order", "another order")

    def _find(self, identifier: Tree) -> TorchStorage:
        key, cls, nbytes = read_storage_id(self.source, identifier, length=6)
        start, size = self._view(identifier[5], cls, nbytes)
        offset = 0
        if self._places is None:
            self._told.setdefault(key, (cls, nbytes))
        else:
            offset = self._places[key]
        if self._told[key][1] != nbytes:
            raise self.source.refuse("storage", f"storage {key[:40]!r} has two sizes", self._told[key][1], nbytes)
        view = (key, cls, start, size)
        known = self._storages.get(view)
        if known is None:
            known = self._storages[view] = storage_at(self.source, offset + start, size, cls)
        return known

    def _view(self, view: Any, cls: Global, nbytes: int) -> tuple[int, int]:
        """First byte and size of the part of a storage that is meant; all of it, in files of this decade."""
        if view is None:
            return 0, nbytes
        if not isinstance(view, tuple) or len(view) != 3 or not all(type(item) is int for item in view[1:]):
            raise self.source.refuse("storage", "a view of a storage is malformed", "key, offset, size", "another")
        itemsize = storage_itemsize(cls) or 1
        start, size = view[1] * itemsize, view[2] * itemsize
        if start < 0 or size < 0 or start + size > nbytes:
            raise self.source.refuse("storage", "a view reaches out of its storage", f"{nbytes} bytes", "more")
        return start, size

    def _find_storages(self, keys: Tree) -> dict[str, int]:
        """Where each storage starts; they fill the rest of the file."""
        if not isinstance(keys, list) or not all(type(key) is str for key in keys) or len(set(keys)) != len(keys):
            raise self.source.refuse("storage", "the list of storages is malformed", "keys", type(keys).__name__)
        if set(keys) != self._told.keys():
            raise self.source.refuse("storage", "storages are missing", f"{len(self._told)}", f"{len(keys)}")
        places = {}
        position = self.position
        for key in keys:
            cls, nbytes = self._told[key]
            numel = int.from_bytes(self.source.read(position, _NUMEL_NBYTES), "little", signed=True)
            position += _NUMEL_NBYTES
            if numel * (storage_itemsize(cls) or 1) != nbytes:
                raise self.source.refuse("storage", f"storage {key[:40]!r} is not as told", nbytes, f"{numel} elements")
            places[key] = position
            position += nbytes
        if position != self.source.nbytes:
            raise self.source.refuse("truncated", "it is not as long as its storages", position, self.source.nbytes)
        return places
