"""A layer's files, read once, digested, and put into tensors: as they are, or decoded.

    PlainFile    bytes go into place piece by piece: straight where what is wanted is what the file holds
    CodedLayer   weights (earlier ones, or rounded ones) into place, then the codes over them; state out of the codes;
                 masters over what they are relative to, before the weights that are their rounding

What is filled was checked by name, type and shape before; see ``load``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch

from .codecs import Component, StoredCodes, array_name, component_of
from .codecs.decoding import Values, decode_tensor, storage_type
from .errors import FormatError, IntegrityError
from .formats.safetensors import Header
from .manifest import FileRecord
from .shards import Shards, whole_shard
from .state_keys import split_state_key
from .storage import FileReader
from .tensor_bytes import meta_of, torch_dtype
from .tensor_filling import FileFiller, Target, Targets, copy_overlaps, fill_tensor, host_bytes, plan_filling
from .tensors import TensorMeta
from .verify import changed_bytes, open_published

__all__ = ["CheckedFile", "CodedLayer", "LayerReading", "PlainFile"]

_Tensors: TypeAlias = Mapping[str, torch.Tensor]
"""Whole ones, by name in a file; coded ones by their key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedFile:
    """A layer file whose header was checked."""

    checkpoint: Path
    record: FileRecord
    header: Header
    prefix: bytes
    """The bytes the header was read from."""
    shards: Shards
    """Which elements of its tensors the file holds; of each of them."""

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

    def fill(self, reader: FileReader, targets: Targets) -> None:
        """Read the file into targets; what it has and they have not is passed over."""
        planned = (
            plan_filling(each.byte_range, torch_dtype(each.meta.dtype), self.shards[each.name], targets[each.name])
            for each in self.header.tensors.values()
            if each.name in targets
        )
        self.read(reader, FileFiller([*itertools.chain.from_iterable(planned)]).put)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainFile:
    """A file whose tensors are taken as they are."""

    layer: str
    file: CheckedFile
    find_targets: Callable[[], Targets]
    """Called when reading begins, in any thread; names it leaves out are read, and not kept."""
    install: Callable[[], None]
    """Called in the caller's thread when the targets hold what was published: all files that have this one are read."""

    @property
    def plain(self) -> tuple[CheckedFile, ...]:
        return (self.file,)

    @property
    def records(self) -> tuple[FileRecord, ...]:
        return (self.file.record,)

    def read(self, reader: FileReader) -> None:
        """Fill the targets; see ``CheckedFile.read``."""
        self.file.fill(reader, self.find_targets())


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLayer:
    """A layer that is in codes, or its masters are. What of it is wanted is in the targets: weights, state, or both."""

    layer: str
    codes: CheckedFile | None
    """None if its masters alone are, in its optimizer file."""
    stored: Mapping[str, StoredCodes]
    """What the codes file holds, by key."""
    packed: Mapping[str, StoredCodes]
    """What the optimizer file holds in pieces, by key."""
    plain: tuple[CheckedFile, ...]
    """The layer's weights and optimizer files: what holds something that is wanted, or that codes are relative to; or
    is only looked at for whether it is what was published, for a later save links it."""
    find_targets: Callable[[], Targets]
    install: Callable[[], None]

    @property
    def records(self) -> tuple[FileRecord, ...]:
        codes = () if self.codes is None else (self.codes.record,)
        return (*(file.record for file in self.plain), *codes)

    def join(self, other: LayerReading) -> CodedLayer:
        """What both want, with every file read once."""

        def find_targets() -> Targets:
            return {**self.find_targets(), **other.find_targets()}

        def install() -> None:
            self.install()
            other.install()

        plain = {file.record.path: file for file in (*self.plain, *other.plain)}
        return replace(self, plain=tuple(plain.values()), find_targets=find_targets, install=install)

    def read(self, reader: FileReader) -> None:
        """Fill the targets; see ``CheckedFile.read``. Takes as much memory as the codes.

        Where something else is wanted than a whole tensor in one place, one is made in host memory, and copied from.
        """
        wanted = self.find_targets()
        tensors = {key: _make_whole(self._meta_of(key), targets) for key, targets in wanted.items()}
        self._read_whole(reader, tensors)
        for key, tensor in tensors.items():
            if tensor is not wanted[key][0].tensor:
                copy_overlaps(tensor.flatten(), whole_shard(tensor.shape), wanted[key])

    def _read_whole(self, reader: FileReader, targets: _Tensors) -> None:
        rounded = {key for key in targets if key in self.stored and self.stored[key].base == "master"}
        of_rounded = {self._master_of(key) for key in rounded}
        # Masters first: the memory of weights that they are relative to is theirs alone until then.
        wanted = sorted({*targets, *of_rounded}, key=lambda key: not key.startswith("state."))
        held = self._read_plain(reader, wanted, targets)
        content = self._read_codes(reader)
        masters: dict[str, memoryview] = {}
        for key in wanted:
            target, is_packed = targets.get(key), self._is_unpacked(key)
            if key not in self.stored and not is_packed:
                continue
            data = None if target is None else host_bytes(target)
            out = memoryview(bytearray(self._meta_of(key).nbytes)) if data is None else data
            if is_packed:
                arrays = {name: _bytes_of(held[array_name(key, name)]) for name in self.packed[key].array_names}
                self._decode(key, self.packed[key], arrays, _values(held[split_state_key(key)[0]], "BF16"), out)
            if key in self.stored:
                self._decode(key, self.stored[key], content[key], self._find_base(key, held, masters, out), out)
            if data is None and target is not None:
                fill_tensor(target, out)
            if key in of_rounded:
                masters[key] = out

    def _master_of(self, fqn: str) -> str:
        of_weight = (key for key in self.stored if key.startswith("state.") and split_state_key(key)[0] == fqn)
        return next(key for key in of_weight if component_of(key) is Component.MASTER)

    def _meta_of(self, key: str) -> TensorMeta:
        coded = self.stored.get(key) or self.packed.get(key)
        if coded is not None:
            return coded.meta
        return next(file.header.tensors[key].meta for file in self.plain if key in file.header.tensors)

    def _is_unpacked(self, key: str) -> bool:
        """Whether the optimizer file's pieces of a master are needed: it is that, or its codes are relative to it."""
        return key in self.packed and (key not in self.stored or self.stored[key].base == "exact")

    def _base_names(self, key: str) -> Sequence[str]:
        """The tensors of plain files that a value is made of."""
        if self._is_unpacked(key):
            return (split_state_key(key)[0], *(array_name(key, name) for name in self.packed[key].array_names))
        base = self.stored[key].base if key in self.stored else None
        if base == "rounded" and key.startswith("state."):
            return (split_state_key(key)[0],)
        return (key,) if base in ("exact", "rounded") else ()

    def _read_plain(self, reader: FileReader, wanted: Sequence[str], targets: _Tensors) -> Mapping[str, torch.Tensor]:
        """Fill what is in the plain files as it is.

        Returns:
            What values are made of, by name in these files: in host memory; where it can be, the target itself.
        """
        metas = {name: stored.meta for file in self.plain for name, stored in file.header.tensors.items()}
        into = {name: targets[name] for name in metas if name in targets and name not in self.stored}
        bases: dict[str, torch.Tensor] = {}
        for name in itertools.chain.from_iterable(map(self._base_names, wanted)):
            target = targets.get(name)
            is_fit = target is not None and meta_of(target) == metas[name] and host_bytes(target) is not None
            bases.setdefault(name, target if target is not None and is_fit else _new_tensor(metas[name]))
        for file in self.plain:
            file.fill(reader, {name: [_whole_target(tensor)] for name, tensor in {**into, **bases}.items()})
        for name in into.keys() & bases.keys():
            if bases[name] is not into[name]:
                fill_tensor(into[name], _bytes_of(bases[name]))
        return bases

    def _read_codes(self, reader: FileReader) -> Mapping[str, Mapping[str, memoryview]]:
        """Bytes of each array of the codes file, by key and name."""
        if self.codes is None:
            return {}
        content = memoryview(bytearray(self.codes.record.bytes))

        def keep(offset: int, piece: memoryview) -> None:
            content[offset : offset + piece.nbytes] = piece

        self.codes.read(reader, keep)
        ranges = {name: each.byte_range for name, each in self.codes.header.tensors.items()}
        return {
            key: {
                name: content[ranges[array_name(key, name)].start : ranges[array_name(key, name)].end]
                for name in stored.array_names
            }
            for key, stored in self.stored.items()
        }

    def _find_base(
        self, key: str, held: Mapping[str, torch.Tensor], masters: Mapping[str, memoryview], out: memoryview
    ) -> Values | None:
        """What codes of the codes file are relative to."""
        stored = self.stored[key]
        if stored.base == "master":
            return np.frombuffer(masters[self._master_of(key)], storage_type("F32"))
        if self._is_unpacked(key):
            return np.frombuffer(out, storage_type("F32"))
        names = self._base_names(key)
        return _values(held[names[0]], "BF16" if stored.base == "rounded" else stored.meta.dtype) if names else None

    def _decode(
        self, key: str, stored: StoredCodes, arrays: Mapping[str, memoryview], base: Values | None, out: memoryview
    ) -> None:
        try:
            decode_tensor(stored, arrays, base, out)
        except ValueError as err:
            files = (*self.plain, *([] if self.codes is None else [self.codes]))
            names = {array_name(key, name) for name in stored.array_names}
            path = next((file.path for file in files if not names.isdisjoint(file.header.tensors)), None)
            raise FormatError(
                f"codes cannot be decoded: {err}", kind="codes", path=path, layer=self.layer, fqn=key
            ) from err


def _make_whole(meta: TensorMeta, targets: Sequence[Target]) -> torch.Tensor:
    """Memory for a whole tensor: the target's, if that is one."""
    if len(targets) == 1 and targets[0].shard == whole_shard(meta.shape):
        return targets[0].tensor
    return _new_tensor(meta)


def _whole_target(tensor: torch.Tensor) -> Target:
    return Target(tensor=tensor, shard=whole_shard(tensor.shape))


def _new_tensor(meta: TensorMeta) -> torch.Tensor:
    return torch.empty(meta.shape, dtype=torch_dtype(meta.dtype), device="cpu")


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    data = host_bytes(tensor)
    assert data is not None
    return data


def _values(tensor: torch.Tensor, dtype: str) -> Values:
    return np.frombuffer(_bytes_of(tensor), storage_type(dtype))


LayerReading: TypeAlias = PlainFile | CodedLayer
