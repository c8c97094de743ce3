"""A DCP checkpoint, planned from any catalog: pieces laid end to end in shard files, and a new ``.metadata``.

What comes from another DCP checkpoint as it was keeps its shards: their blobs, whole torch files with their checksums,
are copied byte for byte. Everything else becomes a blob of its own, unsharded; DCP cuts it when it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...boxes import Box
from ...catalog import Catalog, join_masters, weights_to_train
from ...errors import InvalidInputError, UnsupportedError
from ...file_plan import CheckpointPlan, CrcPatch, FilePlan, FileRange, Part
from ...tensor_refs import TensorRef
from ...tensors import ByteRange
from ..torch_files import TorchTensor, Tree, encode_pickle, plan_torch_blob
from .contents import Root
from .full import plan_full
from .layout import ACCELERATE, METADATA_NAME, SINGLE, DcpLayout
from .metadata import Blob, Chunk, Item, ItemPath, TensorItem, ValueItem, build_metadata
from .optimizer import Optimizer, plan_flat, plan_nested
from .stored import StoredTensor

__all__ = ["plan_dcp"]

_TRAINER_STATE = "trainer_state.json"
_MAX_RANKS = 2**16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A blob to be."""

    parts: tuple[Part, ...]
    crc_patches: tuple[CrcPatch, ...]
    nbytes: int
    rank: int | None
    """Whose file it goes to; None: the one that is shortest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """An item to be, without places; with a piece for each chunk, or for the value."""

    item: Item
    pieces: tuple[_Piece, ...]


def plan_dcp(catalog: Catalog, *, ranks: int | None = None) -> CheckpointPlan:
    """Plan a DCP checkpoint.

    A catalog of DCP gets the layout of its source; another that of the HF Trainer if it has a trainer's state, else
    one directory with ``model`` and ``optim``. Masters become the weights: FSDP2 trains fp32 parameters. Those that a
    DCP checkpoint keeps in its optimizer's state stay there.

    Args:
        catalog: Of any format.
        ranks: Shard files to spread over; by default as many as the source had, or 1. Any number of ranks can load
            the result.

    Raises:
        FormatError: A blob of a source does not hold what its ``.metadata`` says.
        UnsupportedError: There are several optimizers.
        InvalidInputError: The number of ranks is none.
    """
    if ranks is not None and not 0 < ranks <= _MAX_RANKS:
        raise InvalidInputError("not a number of ranks", kind="ranks", expected=f"1 to {_MAX_RANKS}", found=ranks)
    layout = _choose_layout(catalog)
    keeps_leaves = catalog.format == "dcp"
    weights, notes = weights_to_train(catalog, None, keeps_leaves=keeps_leaves)
    catalog = join_masters(catalog) if keeps_leaves else catalog
    named = {layout.spellings.get(name, name): ref for name, ref in weights.items()}
    named |= {layout.spellings.get(name, name): weights[first] for name, first in catalog.ties.items()}
    optimizer = _optimizer_of(catalog, layout)
    if layout.is_full:
        files = plan_full(named, optimizer)
    else:
        entries = [*_model_entries(layout.model, named), *_optimizer_entries(layout, optimizer)]
        entries += [_copy_item(item) for item in layout.rest if catalog.has_optimizer]
        files = _plan_directories(entries, ranks or layout.num_ranks)
    small = [
        FilePlan(name=file.name, parts=(FileRange(path=file.path, byte_range=ByteRange(start=0, end=file.nbytes)),))
        for file in catalog.files
    ]
    return CheckpointPlan(files=(*files, *small), notes=(*notes, *_notes(catalog)))


def _choose_layout(catalog: Catalog) -> DcpLayout:
    if isinstance(catalog.native, DcpLayout):
        return catalog.native
    return ACCELERATE if any(file.name == _TRAINER_STATE for file in catalog.files) else SINGLE


def _notes(catalog: Catalog) -> Iterator[str]:
    parameters = [name for optimizer in catalog.optimizers for group in optimizer.groups for name in group.parameters]
    without = [name for name in parameters if name not in catalog.states]
    if without and catalog.states:
        yield (
            f"{len(without)} parameters have no optimizer state ({without[0]}, ...); torch's dcp.load asks for one of "
            "each parameter: load with DefaultLoadPlanner(allow_partial_load=True)"
        )


def _optimizer_of(catalog: Catalog, layout: DcpLayout) -> Optimizer | None:
    if not catalog.optimizers:
        return None
    if len(catalog.optimizers) > 1:
        raise UnsupportedError(
            "a DCP checkpoint with several optimizers cannot be written",
            kind="dcp-optimizers",
            path=catalog.path,
            expected="one optimizer",
            found=len(catalog.optimizers),
            hint="write it in the format of its source",
        )
    optimizer = Optimizer(groups=catalog.optimizers[0].groups, states=catalog.states)
    names = {*optimizer.parameters, *optimizer.states}
    return optimizer.renamed({name: layout.spellings.get(name, name) for name in names})


def _model_entries(root: Root, weights: Mapping[str, TensorRef]) -> Iterator[_Entry]:
    for name, ref in weights.items():
        yield _tensor_entry(root, (*root.path, name), ref)


def _optimizer_entries(layout: DcpLayout, optimizer: Optimizer | None) -> Iterator[_Entry]:
    if optimizer is None:
        return
    root = layout.optimizer or replace(SINGLE.optimizer or layout.model, directory=layout.model.directory)
    values = _flat_values(optimizer) if layout.is_flat else _leaves((), plan_nested(optimizer))
    for place, value in values:
        path = (*root.path, *place)
        if isinstance(value, TorchTensor):
            yield _tensor_entry(root, path, value.ref)
        else:
            yield _value_entry(root, path, value)


def _flat_values(optimizer: Optimizer) -> Iterator[tuple[ItemPath, Tree]]:
    for key, value in plan_flat(optimizer).items():
        yield (key,), value


def _leaves(place: ItemPath, value: Tree) -> Iterator[tuple[ItemPath, Tree]]:
    """What torch makes items of: not dicts, nor lists that hold tensors or dicts, but what is in them.

    Source: torch 2.13, distributed/checkpoint/_traverse.py (traverse_state_dict).
    """
    if isinstance(value, dict):
        for key, child in value.items():
            yield from _leaves((*place, str(key)), child)
    elif isinstance(value, list) and not _is_leaf(value):
        for index, child in enumerate(value):
            yield from _leaves((*place, index), child)
    else:
        yield place, value


def _is_leaf(values: Sequence[Any]) -> bool:
    return not any(
        isinstance(value, dict | TorchTensor) or (isinstance(value, list) and not _is_leaf(value)) for value in values
    )


def _tensor_entry(root: Root, path: ItemPath, ref: TensorRef) -> _Entry:
    key = ".".join(map(str, path))
    if isinstance(ref, StoredTensor):
        copied = _copy_item(ref.item)
        return replace(copied, item=replace(ref.item, key=key, path=path, directory=root.directory))
    box = Box(offsets=(0,) * len(ref.meta.shape), sizes=ref.meta.shape)
    piece, blob = _new_piece(TorchTensor(ref=ref))
    chunk = Chunk(box=box, blob=blob)
    item = TensorItem(key=key, path=path, directory=root.directory, meta=ref.meta, chunks=(chunk,))
    return _Entry(item=item, pieces=(piece,))


def _value_entry(root: Root, path: ItemPath, value: Tree) -> _Entry:
    piece, blob = _new_piece(value)
    item = ValueItem(key=".".join(map(str, path)), path=path, directory=root.directory, blob=blob)
    return _Entry(item=item, pieces=(piece,))


def _new_piece(tree: Tree) -> tuple[_Piece, Blob]:
    parts, patches = plan_torch_blob(tree)
    nbytes = FilePlan(name="", parts=parts).nbytes
    piece = _Piece(parts=parts, crc_patches=patches, nbytes=nbytes, rank=None)
    return piece, Blob(path=Path(), byte_range=ByteRange(start=0, end=nbytes))


def _copy_item(item: Item) -> _Entry:
    """An item of another checkpoint, blob by blob; the n-th shard goes to the n-th file."""
    if isinstance(item, ValueItem):
        return _Entry(item=item, pieces=(_copy_blob(item.blob, None),))
    # Nothing else would notice a blob that does not hold its chunk before the framework loads it.
    StoredTensor(item).check()
    is_sharded = len(item.chunks) > 1
    pieces = (_copy_blob(chunk.blob, number if is_sharded else None) for number, chunk in enumerate(item.chunks))
    return _Entry(item=item, pieces=tuple(pieces))


def _copy_blob(blob: Blob, rank: int | None) -> _Piece:
    parts = (FileRange(path=blob.path, byte_range=blob.byte_range),)
    return _Piece(parts=parts, crc_patches=(), nbytes=blob.byte_range.nbytes, rank=rank)


def _plan_directories(entries: Iterable[_Entry], ranks: int) -> list[FilePlan]:
    by_directory: dict[str, list[_Entry]] = {}
    for entry in entries:
        by_directory.setdefault(entry.item.directory, []).append(entry)
    return [plan for directory, own in by_directory.items() for plan in _plan_directory(directory, own, ranks)]


def _plan_directory(directory: str, entries: Sequence[_Entry], ranks: int) -> Iterator[FilePlan]:
    prefix = f"{directory}/" if directory else ""
    files = [_File(name=f"__{rank}_0.distcp") for rank in range(ranks)]
    items = []
    for entry in entries:
        blobs = [_add(files, piece) for piece in entry.pieces]
        items.append(_placed(entry.item, blobs))
    for file in files:
        if file.nbytes:
            yield FilePlan(name=prefix + file.name, parts=tuple(file.parts), crc_patches=tuple(file.crc_patches))
    yield FilePlan(name=prefix + METADATA_NAME, parts=(encode_pickle(build_metadata(items)),))


class _File:
    """A shard file that grows."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.nbytes = 0
        self.parts: list[Part] = []
        self.crc_patches: list[CrcPatch] = []

    def add(self, piece: _Piece) -> Blob:
        start = self.nbytes
        self.parts += piece.parts
        self.crc_patches += (_moved(patch, start) for patch in piece.crc_patches)
        self.nbytes += piece.nbytes
        return Blob(path=Path(self.name), byte_range=ByteRange(start=start, end=self.nbytes))


def _add(files: Sequence[_File], piece: _Piece) -> Blob:
    file = min(files, key=lambda file: file.nbytes) if piece.rank is None else files[piece.rank % len(files)]
    return file.add(piece)


def _moved(patch: CrcPatch, by: int) -> CrcPatch:
    start, end = patch.byte_range.start + by, patch.byte_range.end + by
    return CrcPatch(byte_range=ByteRange(start=start, end=end), offsets=tuple(offset + by for offset in patch.offsets))


def _placed(item: Item, blobs: Sequence[Blob]) -> Item:
    if isinstance(item, ValueItem):
        (blob,) = blobs
        return replace(item, blob=blob)
    chunks = (replace(chunk, blob=blob) for chunk, blob in zip(item.chunks, blobs, strict=True))
    return replace(item, chunks=tuple(chunks))
