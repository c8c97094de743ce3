"""A layer's files, read once, digested, and put into tensors: as they are, or decoded.

    PlainFile    bytes go straight into place, piece by piece
    CodedLayer   weights (earlier ones, or rounded ones) into place, then the codes over them; state out of the codes

What is filled was checked by name, type and shape before; see ``load``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from .codecs import StoredCodes, array_name
from .codecs.decoding import Values, decode_tensor, storage_type
from .errors import FormatError, IntegrityError
from .formats.safetensors import Header
from .manifest import FileRecord
from .storage import FileReader
from .tensor_bytes import torch_dtype
from .tensor_filling import FileFiller, fill_tensor, host_bytes
from .tensors import TensorMeta
from .verify import changed_bytes, open_published

__all__ = ["CheckedFile", "CodedLayer", "LayerReading", "PlainFile", "Tensors"]

Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""By name in a file; coded ones by their key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    """A layer file whose header was checked."""

    checkpoint: Path
    record: FileRecord
    header: Header
    prefix: bytes
    """The bytes the header was read from."""

    @property
    def path(self) -> Path:
        return self.checkpoint / self.record.path

    def read(self, reader: FileReader, on_piece: Callable[[int, memoryview], None]) -> None:
        """Read and digest the file.

        Args:
            reader: This thread's.
            on_piece: Told of each piece, in order; not of one that changes the header.

        Raises:
            IntegrityError, NotFoundError, FormatError: It is not what was published.
            OSError: The device failed.
        """

        def put(offset: int, piece: memoryview) -> None:
            # The digest is of what is read now; what was checked before must be the same.
            expected = self.prefix[offset : offset + piece.nbytes]
            if piece[: len(expected)] != expected:
                raise IntegrityError(
                    "the file's header changed since it was checked",
                    kind="digest",
                    path=self.path,
                    expected=self.record.digest,
                )
            on_piece(offset, piece)

        with open_published(self.checkpoint, self.record) as descriptor:
            found = reader.digest(descriptor, self.record.bytes, self.path, put)
        if found != self.record.digest:
            raise changed_bytes(self.path, self.record.digest, found)

    def fill(self, reader: FileReader, tensors: Tensors) -> None:
        """Read the file into tensors; those it has and ``tensors`` has not are passed over."""
        stored = (each for each in self.header.tensors.values() if each.name in tensors)
        filler = FileFiller([(each.byte_range, tensors[each.name]) for each in stored])
        self.read(reader, filler.put)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """A file whose tensors are taken as they are."""

    file: CheckedFile
    find_targets: Callable[[], Tensors]
    """Called when reading begins, in any thread; names it leaves out are read, and not kept."""
    install: Callable[[Tensors], None]
    """Called in the caller's thread when the targets hold what was published."""

    @property
    def records(self) -> tuple[FileRecord, ...]:
        return (self.file.record,)

    def read(self, reader: FileReader) -> Tensors:
        """Fill the targets; see ``CheckedFile.read``."""
        tensors = self.find_targets()
        self.file.fill(reader, tensors)
        return tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLayer:
    """A layer that is in codes. What of it is wanted is in the targets: its weights, its state, or both."""

    layer: str
    codes: CheckedFile
    stored: Mapping[str, StoredCodes]
    """What the codes file holds, by key."""
    weights: CheckedFile | None
    """None if weights are not wanted."""
    passed_over: tuple[CheckedFile, ...]
    """Only looked at for whether they are what was published: a later save links them."""
    find_targets: Callable[[], Tensors]
    install: Callable[[Tensors], None]

    @property
    def records(self) -> tuple[FileRecord, ...]:
        weights = () if self.weights is None else (self.weights.record,)
        return (*weights, *(file.record for file in self.passed_over), self.codes.record)

    def join(self, other: CodedLayer) -> CodedLayer:
        """What both want, with every file read once."""

        def find_targets() -> Tensors:
            return {**self.find_targets(), **other.find_targets()}

        def install(tensors: Tensors) -> None:
            self.install(tensors)
            other.install(tensors)

        weights = self.weights or other.weights
        passed_over = (*self.passed_over, *other.passed_over)
        return replace(self, weights=weights, passed_over=passed_over, find_targets=find_targets, install=install)

    def read(self, reader: FileReader) -> Tensors:
        """Fill the targets; see ``CheckedFile.read``. Takes as much memory as the codes."""
        targets = self.find_targets()
        bases = self._read_weights(reader, targets)
        for file in self.passed_over:
            file.read(reader, lambda offset, piece: None)
        content = memoryview(bytearray(self.codes.record.bytes))

        def keep(offset: int, piece: memoryview) -> None:
            content[offset : offset + piece.nbytes] = piece

        self.codes.read(reader, keep)
        for key, stored in self.stored.items():
            if key in targets:
                self._decode(key, stored, content, bases.get(key), targets[key])
        return targets

    def _read_weights(self, reader: FileReader, targets: Tensors) -> Mapping[str, torch.Tensor]:
        """Fill the weights that are in the weights file as they are.

        Returns:
            What codes are relative to, by key: where it can be, the target itself.
        """
        if self.weights is None:
            return {}
        bases: dict[str, torch.Tensor] = {}
        into: dict[str, torch.Tensor] = {}
        for name, in_file in self.weights.header.tensors.items():
            stored = self.stored.get(name)
            if stored is None:
                into[name] = targets[name]
            elif stored.base is not None:
                is_same = stored.meta == in_file.meta and host_bytes(targets[name]) is not None
                base = targets[name] if is_same else _new_tensor(in_file.meta)
                into[name] = bases[name] = base
        self.weights.fill(reader, into)
        return bases

    def _decode(
        self, key: str, stored: StoredCodes, content: memoryview, base: torch.Tensor | None, target: torch.Tensor
    ) -> None:
        names = [*stored.arrays, *(["planes"] if stored.codec == "xor" else [])]
        ranges = {name: self.codes.header.tensors[array_name(key, name)].byte_range for name in names}
        arrays = {name: content[each.start : each.end] for name, each in ranges.items()}
        if stored.codec == "exact":
            fill_tensor(target, arrays["values"])
            return
        out = host_bytes(target)
        data = memoryview(bytearray(stored.meta.nbytes)) if out is None else out
        try:
            decode_tensor(stored, arrays, None if base is None else _values(base, stored), data)
        except ValueError as err:
            raise FormatError(
                f"codes cannot be decoded: {err}", kind="codes", path=self.codes.path, layer=self.layer, fqn=key
            ) from err
        if out is None:
            fill_tensor(target, data)


def _new_tensor(meta: TensorMeta) -> torch.Tensor:
    return torch.empty(meta.shape, dtype=torch_dtype(meta.dtype))


def _values(base: torch.Tensor, stored: StoredCodes) -> Values:
    data = host_bytes(base)
    assert data is not None
    return np.frombuffer(data, storage_type("BF16" if stored.base == "rounded" else stored.meta.dtype))


LayerReading: TypeAlias = PlainFile | CodedLayer
