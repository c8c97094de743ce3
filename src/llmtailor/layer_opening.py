"""What a checkpoint holds of a layer, by the headers of its files; and which of those to read for what is wanted.

open_weights, open_states    a layer of a checkpoint -> SavedTensors; everything is checked that headers tell
SavedTensors.plan            what is wanted of them -> LayerReadings, which have not read anything yet
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .checkpoint import Checkpoint
from .codecs import StoredCodes
from .formats.safetensors import read_header
from .formats.tailored import (
    Kind,
    LayerCodes,
    LayerFile,
    join_files,
    join_notes,
    read_codes_header,
    read_packed,
    state_metas,
)
from .layer_reading import CheckedFile, CodedLayer, LayerReading, PlainFile
from .manifest import EncodingRecord, FileRecord, LayerRecord
from .shards import Shard, find_overlaps, whole_shard
from .state_keys import split_state_key
from .state_tree import Note
from .tensor_filling import Targets
from .tensors import TensorMeta
from .verify import check_layer_header, open_published

__all__ = ["SavedState", "SavedTensors", "Wanted", "open_states", "open_weights", "states_by_parameter"]

Wanted: TypeAlias = Mapping[str, Sequence[Shard]]
"""Of which tensors what is wanted, by name in the files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _PlainFiles:
    """Files whose tensors are taken as they are: one, or one of each rank that has some."""

    files: tuple[CheckedFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _CodedFiles:
    """See ``CodedLayer``, whose fields these are."""

    codes: CheckedFile | None
    stored: Mapping[str, StoredCodes]
    packed: Mapping[str, StoredCodes]
    plain: tuple[CheckedFile, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedTensors:
    """Weights or optimizer state of a layer, still in their files."""

    layer: str
    metas: Mapping[str, TensorMeta]
    """Of the whole tensors, by name: fqn, or ``state.<fqn>.<leaf>``."""
    notes: Mapping[str, Note]
    """By the same names; one that has a note may have no tensor."""
    files: _PlainFiles | _CodedFiles

    def plan(
        self, wanted: Wanted, find_targets: Callable[[], Targets], install: Callable[[], None]
    ) -> tuple[LayerReading, ...]:
        """Which files to read.

        Who wants all of every tensor reads every file, so that no damage goes unseen; others those that have
        something for them.

        Args:
            wanted: Of tensors that are there.
            find_targets: Gives the memory for exactly that. Called when a file's reading begins, in any thread.
            install: Called in the caller's thread when all these files are read; not if there is none to read.
        """
        is_all = all(any(shard.is_whole for shard in wanted.get(name, ())) for name in self.metas)
        if isinstance(self.files, _CodedFiles):
            if not is_all and not any(shard.numel for shards in wanted.values() for shard in shards):
                return ()
            coded = CodedLayer(
                layer=self.layer,
                codes=self.files.codes,
                stored=self.files.stored,
                packed=self.files.packed,
                plain=self.files.plain,
                find_targets=find_targets,
                install=install,
            )
            return (coded,)
        return tuple(
            PlainFile(layer=self.layer, file=file, find_targets=find_targets, install=install)
            for file in self.files.files
            if is_all or _has_any(file, wanted)
        )


def _has_any(file: CheckedFile, wanted: Wanted) -> bool:
    names = file.shards.keys() & wanted.keys()
    return any(find_overlaps(file.shards[name], shard) for name in names for shard in wanted[name])


def open_weights(checkpoint: Checkpoint, layer: LayerRecord) -> SavedTensors:
    """The weights and buffers of a layer.

    Raises:
        FormatError: A file does not hold the tensors of its layer, or its parts do not make them up.
        IntegrityError, NotFoundError: A file has another size, or is gone.
    """
    files: _PlainFiles | _CodedFiles
    # A tensor that is missing from its file would silently keep the value the model happens to have.
    metas = {
        tensor.fqn: tensor.meta
        for tensor in checkpoint.manifest.tensors
        if tensor.layer == layer.name and tensor.tied_to is None
    }
    if layer.encoding is None:
        opened = tuple(_open_file(checkpoint, layer, record, "weights") for record in layer.weights_files)
        if layer.weights is None:
            join_files(checkpoint.path, layer, [_layer_file(file) for file in opened], metas)
        files = _PlainFiles(files=opened)
    else:
        codes, held = _open_codes(checkpoint, layer, layer.encoding)
        # Weights may be the rounding of masters, which are relative to those of then.
        plain, packed = _open_whole(checkpoint, layer, held, has_weights=True, has_state=held.is_relative_to_state)
        files = _CodedFiles(codes=codes, stored={**held.weights, **held.states}, packed=packed, plain=plain)
    return SavedTensors(layer=layer.name, metas=metas, notes={}, files=files)


def open_states(checkpoint: Checkpoint, layer: LayerRecord) -> SavedTensors:
    """The optimizer state of a layer, in its codes if it has those; there may be none.

    Raises:
        FormatError: A file holds state of another layer, or its parts do not make up a tensor.
        IntegrityError, NotFoundError: A file has another size, or is gone.
    """
    if layer.encoding is not None:
        codes, held = _open_codes(checkpoint, layer, layer.encoding)
        # Masters may be relative to weights; whether or not they are, a later save links the optimizer file.
        has_weights = any(stored.base == "rounded" for stored in held.states.values())
        plain, packed = _open_whole(checkpoint, layer, held, has_weights=has_weights, has_state=True)
        return SavedTensors(
            layer=layer.name,
            metas={key: stored.meta for key, stored in held.states.items()},
            notes=held.notes,
            files=_CodedFiles(codes=codes, stored={**held.weights, **held.states}, packed=packed, plain=plain),
        )
    if layer.optimizer is None:
        opened = tuple(_open_file(checkpoint, layer, record, "optimizer") for record in layer.optimizer_files)
        parts = [_layer_file(file) for file in opened]
        metas = join_files(checkpoint.path, layer, parts, None)
        return SavedTensors(layer=layer.name, metas=metas, notes=join_notes(parts), files=_PlainFiles(files=opened))
    plain, packed = _open_whole(checkpoint, layer, None, has_weights=False, has_state=True)
    files = _CodedFiles(codes=None, stored={}, packed=packed, plain=plain) if packed else _PlainFiles(files=plain)
    metas = state_metas(plain[-1].header, packed)
    return SavedTensors(layer=layer.name, metas=metas, notes=join_notes([_layer_file(plain[-1])]), files=files)


def _open_whole(
    checkpoint: Checkpoint, layer: LayerRecord, codes: LayerCodes | None, *, has_weights: bool, has_state: bool
) -> tuple[tuple[CheckedFile, ...], Mapping[str, StoredCodes]]:
    """A layer's weights and optimizer file, as far as they are wanted and there, and what the latter has in pieces.

    Masters in pieces are relative to the weights file, so it is there if they are.
    """
    optimizer = None
    if layer.optimizer is not None and has_state:
        optimizer = _open_file(checkpoint, layer, layer.optimizer, "optimizer", codes)
    packed = {} if optimizer is None else read_packed(optimizer.path, optimizer.header)
    weights = None
    if has_weights or packed:
        weights = _open_file(checkpoint, layer, layer.whole_weights, "weights", codes)
    return tuple(file for file in (weights, optimizer) if file is not None), packed


def _open_file(
    checkpoint: Checkpoint, layer: LayerRecord, record: FileRecord, kind: Kind, codes: LayerCodes | None = None
) -> CheckedFile:
    """A layer's weights or optimizer file, or a rank's part of that, its header checked."""
    path = checkpoint.path / record.path
    with open_published(checkpoint.path, record) as descriptor:
        header, prefix = read_header(descriptor, path)
    shards = check_layer_header(path, checkpoint.manifest, layer, kind, header, codes).shards
    return CheckedFile(checkpoint=checkpoint.path, record=record, header=header, prefix=prefix, shards=shards)


def _open_codes(checkpoint: Checkpoint, layer: LayerRecord, encoding: EncodingRecord) -> tuple[CheckedFile, LayerCodes]:
    """A layer's codes file, and what it holds."""
    path = checkpoint.path / encoding.codes.path
    with open_published(checkpoint.path, encoding.codes) as descriptor:
        header, prefix = read_header(descriptor, path)
    codes = read_codes_header(path, header, checkpoint.manifest, layer)
    shards = {name: whole_shard(each.meta.shape) for name, each in header.tensors.items()}
    file = CheckedFile(checkpoint=checkpoint.path, record=encoding.codes, header=header, prefix=prefix, shards=shards)
    return file, codes


def _layer_file(file: CheckedFile) -> LayerFile:
    return LayerFile(path=file.path, header=file.header, shards=file.shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """Optimizer state of one parameter, still in its files."""

    metas: Mapping[str, TensorMeta]
    """Of the whole tensors, by leaf."""
    notes: Mapping[str, Note]
    """By leaf: what tensors cannot say."""


def states_by_parameter(saved: SavedTensors) -> Mapping[str, SavedState]:
    """The optimizer state of each parameter of a layer that has some, by fqn."""
    metas: dict[str, dict[str, TensorMeta]] = defaultdict(dict)
    notes: dict[str, dict[str, Note]] = defaultdict(dict)
    for name, meta in saved.metas.items():
        fqn, leaf = split_state_key(name)
        metas[fqn][leaf] = meta
    for name, note in saved.notes.items():
        fqn, leaf = split_state_key(name)
        notes[fqn][leaf] = note
    return {fqn: SavedState(metas=metas[fqn], notes=notes[fqn]) for fqn in sorted(metas.keys() | notes.keys())}
