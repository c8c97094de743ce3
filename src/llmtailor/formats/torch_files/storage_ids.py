"""What a torch pickle says of the storages beside it.

Source: torch 2.13, torch/serialization.py (persistent_id in _save and _legacy_save).
"""

from __future__ import annotations

from ...tensor_refs import Extent, FileTensor
from ...tensors import TensorMeta
from .nodes import Global, TorchStorage, Tree
from .source import Source
from .storages import storage_itemsize

__all__ = ["read_storage_id", "storage_at"]


def read_storage_id(source: Source, identifier: Tree, *, length: int) -> tuple[str, Global, int]:
    """Read what stands in a pickle for a storage: ``("storage", class, key, location, numel, ...)``.

    Args:
        source: The file, for the error.
        identifier: Any tree.
        length: How many facts there must be.

    Returns:
        Key, class and size in bytes.

    Raises:
        FormatError: It is something else.
        UnsupportedError: It stands for a whole module.
    """
    if isinstance(identifier, tuple) and identifier[:1] == ("module",):
        raise source.unsupported("tensors and plain values", "a whole torch.nn.Module")
    if not isinstance(identifier, tuple) or len(identifier) != length or identifier[0] != "storage":
        raise source.refuse("storage", "a storage is malformed", f"{length} facts", type(identifier).__name__)
    cls, key, location, numel = identifier[1:5]
    itemsize = storage_itemsize(cls) if type(cls) is Global else None
    if itemsize is None or type(key) is not str or type(location) is not str or type(numel) is not int:
        raise source.refuse("storage", "a storage is malformed", "class, key, device, size", "another")
    if not 0 <= numel < 2**60:
        raise source.refuse("storage", f"storage {key[:40]!r} has no size", "a size", numel)
    return key, cls, numel * itemsize


def storage_at(source: Source, offset: int, nbytes: int, cls: Global) -> TorchStorage:
    """The storage whose bytes start at an offset of a source."""
    extent = Extent(path=source.path, offset=source.start + offset, start=0, numel=nbytes)
    meta = TensorMeta(dtype="U8", shape=(nbytes,))
    return TorchStorage(ref=FileTensor(meta=meta, extents=(extent,) if nbytes else ()), cls=cls)
