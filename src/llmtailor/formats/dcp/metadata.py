"""``.metadata`` of a DCP directory: a pickle of what is stored under which key, and where its pieces lie.

    Metadata
      state_dict_metadata   key -> tensor (type, shape, chunks) or value
      storage_data          (key, offsets of the chunk) -> (file, offset, length): a *blob*, a whole torch file
      planner_data          key -> path: the keys and positions in the nested state dict it was flattened from

``parse_metadata`` reads the tree of such a pickle and believes nothing; ``build_metadata`` makes one.

Source: torch 2.13, distributed/checkpoint/metadata.py, filesystem.py (_StorageInfo, FileSystemWriter.finish),
default_planner.py (planner_data).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias, TypeGuard

from ...boxes import Box, do_tile
from ...errors import FormatError, IncompleteError, UnsupportedError
from ...tensors import ByteRange, TensorMeta
from ..torch_files.nodes import Global, Instance, Size, Tree
from ..torch_files.storages import DTYPE_OF_GLOBAL, GLOBAL_OF_DTYPE

__all__ = [
    "Blob",
    "Chunk",
    "Item",
    "ItemPath",
    "ShardFile",
    "TensorItem",
    "ValueItem",
    "build_metadata",
    "parse_metadata",
]

ItemPath: TypeAlias = tuple[str | int, ...]
"""Keys and list positions; joined by dots they are the item's key."""

_METADATA_MODULE = "torch.distributed.checkpoint.metadata"
_STORAGE_INFO = Global("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_VERSION = "1.0.0"

_MAX_KEY_LENGTH = 2048
_MAX_DEPTH = 32
_MAX_DIMS = 64
_MAX_SIZE = 2**48
_MAX_CHUNKS = 2**16
# A torch file with one tensor: directory, pickle and paddings. Real ones have some 1,400 bytes; this only makes sure
# that a tensor is not said to be larger than what holds it.
_MIN_BLOB_NBYTES = 22


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFile:
    """A ``.distcp`` file."""

    path: Path
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Blob:
    """A whole torch file inside a shard file."""

    path: Path
    byte_range: ByteRange


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """A piece of a tensor, as one rank saved it."""

    box: Box
    blob: Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorItem:
    """A tensor."""

    key: str
    path: ItemPath
    directory: str
    """In the checkpoint; empty for the checkpoint itself."""
    meta: TensorMeta
    chunks: tuple[Chunk, ...]
    """They tile it; some may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueItem:
    """Anything else: a torch file with a Python value."""

    key: str
    path: ItemPath
    directory: str
    blob: Blob


Item: TypeAlias = TensorItem | ValueItem


def parse_metadata(tree: Tree, *, path: Path, directory: str, locate: Callable[[str], ShardFile]) -> tuple[Item, ...]:
    """Read what a ``.metadata`` says and check it against itself and the sizes of the shard files.

    Args:
        tree: From ``read_pickle``.
        path: The file, for errors.
        directory: Goes into the items.
        locate: (name) -> shard file; raises if there is none.

    Returns:
        The items in the file's order.

    Raises:
        FormatError: It is something else, or contradicts itself.
        IncompleteError: A chunk is stored nowhere.
        UnsupportedError: Compressed or encrypted items, an element type without a name.
    """
    return _Parser(path, directory, locate).parse(tree)


class _Parser:
    def __init__(self, path: Path, directory: str, locate: Callable[[str], ShardFile]) -> None:
        self._path = path
        self._directory = directory
        self._locate = locate

    def parse(self, tree: Tree) -> tuple[Item, ...]:
        fields = self._fields(tree, _global("Metadata"))
        described, paths = fields.get("state_dict_metadata"), fields.get("planner_data")
        if not isinstance(described, dict) or not described or not isinstance(paths, dict | None):
            raise self._refuse("its parts are of other types", "state_dict_metadata: a dict that is not empty")
        blobs = self._read_blobs(fields.get("storage_data"))
        return tuple(self._read_item(key, node, paths or {}, blobs) for key, node in described.items())

    def _read_blobs(self, stored: Tree) -> dict[tuple[str, tuple[int, ...] | None], Blob]:
        if not isinstance(stored, dict):
            raise self._refuse("its parts are of other types", "storage_data: a dict", type(stored).__name__)
        blobs: dict[tuple[str, tuple[int, ...] | None], Blob] = {}
        for index, info in stored.items():
            fields = self._fields(index, _global("MetadataIndex"))
            key, offsets = fields.get("fqn"), fields.get("offset")
            if not isinstance(key, str) or not (offsets is None or _is_size(offsets)):
                raise self._refuse("an index is malformed", "a key and offsets", repr((key, offsets))[:200])
            if (key, offsets) in blobs:
                raise self._refuse("a chunk is stored twice", "one place for each chunk", str(offsets), key=key)
            blobs[key, offsets] = self._read_blob(key, info)
        self._check_apart(blobs.values())
        return blobs

    def _read_blob(self, key: str, info: Tree) -> Blob:
        fields = self._fields(info, _STORAGE_INFO)
        name, offset, length = (fields.get(field) for field in ("relative_path", "offset", "length"))
        if fields.get("transform_descriptors"):
            raise UnsupportedError(
                "items that were transformed on their way to disk cannot be read",
                kind="dcp-transforms",
                path=self._path,
                fqn=key,
                expected="items as torch.save writes them",
                found=str(fields["transform_descriptors"])[:200],
                hint="save it again without extensions of FileSystemWriter",
            )
        if not _is_plain_name(name):
            # With a slash or dots it would lead out of the checkpoint.
            raise self._refuse("the name of a shard file is unusable", "a plain file name", repr(name)[:200], key=key)
        if not _is_count(offset) or not _is_count(length) or length < _MIN_BLOB_NBYTES:
            raise self._refuse("a place is malformed", "an offset and a length", f"{offset!r}, {length!r}"[:200], key)
        file = self._locate(name)
        if offset + length > file.nbytes:
            raise IncompleteError(
                "a shard file is shorter than what is stored in it",
                kind="dcp-truncated",
                path=file.path,
                fqn=key,
                expected=f"{offset + length} bytes or more",
                found=f"{file.nbytes} bytes",
                hint="the file was cut off; copy the checkpoint again",
            )
        return Blob(path=file.path, byte_range=ByteRange(start=offset, end=offset + length))

    def _check_apart(self, blobs: Iterable[Blob]) -> None:
        """A thousand tensors in the same bytes would make a small checkpoint a huge one."""
        end: dict[Path, int] = {}
        for blob in sorted(blobs, key=lambda blob: blob.byte_range.start):
            if blob.byte_range.start < end.get(blob.path, 0):
                place = f"{blob.path.name}, byte {blob.byte_range.start}"
                raise self._refuse("items overlap in a shard file", "bytes of their own for each item", place)
            end[blob.path] = blob.byte_range.end

    def _read_item(
        self,
        key: Tree,
        node: Tree,
        paths: Mapping[Tree, Tree],
        blobs: Mapping[tuple[str, tuple[int, ...] | None], Blob],
    ) -> Item:
        if not isinstance(key, str) or not 0 < len(key) <= _MAX_KEY_LENGTH or not key.isprintable():
            raise self._refuse("a key is unusable", "printable text", repr(key)[:200])
        path = paths.get(key, (key,))
        if not _is_path(path) or ".".join(map(str, path)) != key:
            raise self._refuse("planner_data does not fit", "the parts of the key", repr(path)[:200], key=key)
        if isinstance(node, Instance) and node.cls == _global("BytesStorageMetadata"):
            if (blob := blobs.get((key, None))) is None:
                raise self._missing(key, "a value")
            return ValueItem(key=key, path=path, directory=self._directory, blob=blob)
        meta, boxes = self._read_tensor(key, node)
        chunks = []
        for box in boxes:
            if (blob := blobs.get((key, box.offsets))) is None:
                raise self._missing(key, f"the chunk at {[*box.offsets]}")
            if replace(meta, shape=box.sizes).nbytes > blob.byte_range.nbytes:
                raise self._refuse(
                    "a chunk is larger than where it is stored",
                    f"at least {replace(meta, shape=box.sizes).nbytes} bytes",
                    f"{blob.byte_range.nbytes} bytes",
                    key=key,
                )
            chunks.append(Chunk(box=box, blob=blob))
        return TensorItem(key=key, path=path, directory=self._directory, meta=meta, chunks=tuple(chunks))

    def _read_tensor(self, key: str, node: Tree) -> tuple[TensorMeta, tuple[Box, ...]]:
        fields = self._fields(node, _global("TensorStorageMetadata"), key=key)
        shape, chunks = fields.get("size"), fields.get("chunks")
        if not _is_size(shape) or not isinstance(chunks, list) or len(chunks) > _MAX_CHUNKS:
            raise self._refuse("a tensor is malformed", f"sizes, at most {_MAX_CHUNKS} chunks", key=key)
        meta = TensorMeta(dtype=self._read_dtype(key, fields.get("properties")), shape=tuple(shape))
        boxes = tuple(self._read_box(key, chunk) for chunk in chunks)
        if not do_tile(meta.shape, boxes):
            raise FormatError(
                "the chunks of a tensor overlap, leave a hole or reach out of it",
                kind="dcp-chunks",
                path=self._path,
                fqn=key,
                expected=f"chunks that cover {meta} once",
                found=", ".join(f"{[*box.sizes]} at {[*box.offsets]}" for box in boxes[:8]) or "no chunk",
                hint="the checkpoint is damaged or was tampered with; take another one",
            )
        return meta, boxes

    def _read_dtype(self, key: str, properties: Tree) -> str:
        if not isinstance(properties, Instance) or properties.cls != _global("TensorProperties"):
            raise self._refuse("a tensor has no properties", "TensorProperties", key=key)
        state = properties.state
        if not isinstance(state, tuple) or not state or not isinstance(state[0], Global):
            raise self._refuse("a tensor has no element type", "its name", repr(state)[:200], key=key)
        if state[0] not in DTYPE_OF_GLOBAL:
            raise UnsupportedError(
                "tensors of this type cannot be copied", kind="tensor-dtype", path=self._path, fqn=key, found=state[0]
            )
        return DTYPE_OF_GLOBAL[state[0]]

    def _read_box(self, key: str, node: Tree) -> Box:
        fields = self._fields(node, _global("ChunkStorageMetadata"), key=key)
        offsets, sizes = fields.get("offsets"), fields.get("sizes")
        if not _is_size(offsets) or not _is_size(sizes):
            raise self._refuse("a chunk is malformed", "offsets and sizes", repr((offsets, sizes))[:200], key=key)
        return Box(offsets=tuple(offsets), sizes=tuple(sizes))

    def _fields(self, node: Tree, cls: Global, *, key: str | None = None) -> dict[str, Tree]:
        if (
            not isinstance(node, Instance)
            or node.cls != cls
            or not isinstance(node.state, dict)
            or not all(isinstance(name, str) for name in node.state)
        ):
            found = node.cls if isinstance(node, Instance) else type(node).__name__
            raise self._refuse("an object is of another class", f"a {cls.name} with named fields", found, key=key)
        return node.state

    def _missing(self, key: str, what: str) -> IncompleteError:
        return IncompleteError(
            "a part of the checkpoint is stored nowhere",
            kind="dcp-missing-chunk",
            path=self._path,
            fqn=key,
            expected=f"a place for {what}",
            found="none",
        )

    def _refuse(self, what: str, expected: object, found: object = None, key: str | None = None) -> FormatError:
        return FormatError(
            f"not the metadata of a DCP checkpoint: {what}",
            kind="dcp-metadata",
            path=self._path,
            fqn=key,
            expected=expected,
            found=found,
            hint="the checkpoint is damaged or was tampered with; take another one",
        )


def _global(name: str) -> Global:
    return Global(_METADATA_MODULE, name)


def _is_count(value: Tree) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _MAX_SIZE


def _is_size(value: Tree) -> TypeGuard[Size]:
    return (
        isinstance(value, Size)
        and len(value) <= _MAX_DIMS
        and all(_is_count(size) for size in value)
        and math.prod(value) < 2**63
    )


def _is_path(value: Tree) -> TypeGuard[ItemPath]:
    return (
        isinstance(value, tuple)
        and 0 < len(value) <= _MAX_DEPTH
        and all(type(part) is str or _is_count(part) for part in value)
    )


def _is_plain_name(name: Tree) -> TypeGuard[str]:
    return (
        isinstance(name, str)
        and 0 < len(name) < 256
        and name.isprintable()
        and not name.startswith(".")
        and not {"/", "\\"} & {*name}
    )


def build_metadata(items: Iterable[Item]) -> Tree:
    """The tree of a ``.metadata`` of which torch makes its ``Metadata``; inverse of ``parse_metadata``.

    Args:
        items: What is stored; of the paths in their blobs only the name is used.
    """
    described: dict[str, Tree] = {}
    stored: dict[Tree, Tree] = {}
    paths: dict[str, Tree] = {}
    for item in items:
        assert item.key not in described, item.key
        paths[item.key] = item.path
        if isinstance(item, ValueItem):
            described[item.key] = _instance("BytesStorageMetadata", {})
            stored[_instance("MetadataIndex", {"fqn": item.key, "index": None})] = _build_info(item.blob)
            continue
        described[item.key] = _build_tensor(item)
        for number, chunk in enumerate(item.chunks):
            fields = {"fqn": item.key, "index": number, "offset": Size(chunk.box.offsets)}
            stored[_instance("MetadataIndex", fields)] = _build_info(chunk.blob)
    return _instance(
        "Metadata",
        {
            "state_dict_metadata": described,
            "planner_data": paths,
            "storage_data": stored,
            "storage_meta": None,
            "version": _VERSION,
        },
    )


def _build_tensor(item: TensorItem) -> Instance:
    # Source: torch 2.13, distributed/checkpoint/metadata.py (TensorProperties.__getstate__): a tuple.
    layout = Instance(Global("torch.serialization", "_get_layout"), ("torch.strided",), is_call=True)
    memory_format = Instance(_global("_MEM_FORMAT_ENCODING"), (0,), is_call=True)
    properties = Instance(_global("TensorProperties"))
    properties.state = (GLOBAL_OF_DTYPE[item.meta.dtype], layout, False, memory_format, False)
    chunks = [
        _instance("ChunkStorageMetadata", {"offsets": Size(chunk.box.offsets), "sizes": Size(chunk.box.sizes)})
        for chunk in item.chunks
    ]
    return _instance(
        "TensorStorageMetadata", {"properties": properties, "size": Size(item.meta.shape), "chunks": chunks}
    )


def _build_info(blob: Blob) -> Instance:
    fields = {"relative_path": blob.path.name, "offset": blob.byte_range.start, "length": blob.byte_range.nbytes}
    return Instance(_STORAGE_INFO, state=fields)


def _instance(name: str, fields: dict[str, Tree]) -> Instance:
    return Instance(_global(name), state=fields)
