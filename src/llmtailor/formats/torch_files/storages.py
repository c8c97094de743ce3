"""Tensors on storages: element types by torch's names, and which bytes of a file a view of a storage is.

A storage is a run of bytes; a tensor is an offset, sizes and strides on it, all from an untrusted pickle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

from ...errors import FormatError, UnsupportedError
from ...tensor_refs import Extent, FileTensor, file_tensor
from ...tensors import DTYPE_BITS, TensorMeta
from .nodes import Global, TorchStorage

__all__ = ["DTYPE_OF_GLOBAL", "GLOBAL_OF_DTYPE", "STORAGE_OF_DTYPE", "Views", "storage_itemsize", "view_dtype"]

# Source: torch 2.13, torch/storage.py (_dtype_to_storage_type_map).
STORAGE_OF_DTYPE = {
    "F64": "DoubleStorage",
    "F32": "FloatStorage",
    "F16": "HalfStorage",
    "BF16": "BFloat16Storage",
    "I64": "LongStorage",
    "I32": "IntStorage",
    "I16": "ShortStorage",
    "I8": "CharStorage",
    "U8": "ByteStorage",
    "BOOL": "BoolStorage",
    "C64": "ComplexFloatStorage",
}
"""Names in ``torch``; an element type without one is saved on an ``UntypedStorage``."""
_DTYPE_OF_STORAGE = {name: dtype for dtype, name in STORAGE_OF_DTYPE.items()}
# Kinds no checkpoint of a model has; tensors on them are carried along as the calls they are.
_OTHER_ITEMSIZES = {
    "ComplexDoubleStorage": 16,
    "QUInt8Storage": 1,
    "QInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
}
_UNTYPED = "UntypedStorage"
_STORAGE_MODULES = frozenset({"torch", "torch.cuda", "torch.storage"})

_NAMES_IN_TORCH = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "I16": "int16",
    "U16": "uint16",
    "F16": "float16",
    "BF16": "bfloat16",
    "I32": "int32",
    "U32": "uint32",
    "F32": "float32",
    "C64": "complex64",
    "F64": "float64",
    "I64": "int64",
    "U64": "uint64",
}
assert _NAMES_IN_TORCH.keys() == DTYPE_BITS.keys()
GLOBAL_OF_DTYPE = {dtype: Global("torch", name) for dtype, name in _NAMES_IN_TORCH.items()}
"""``torch.float32`` and so on, by safetensors spelling."""
DTYPE_OF_GLOBAL = {found: dtype for dtype, found in GLOBAL_OF_DTYPE.items()}

_MAX_DIMS = 64
# A transposed matrix is one run for each element: copying it like that would take longer than anything else.
_MAX_RUNS_OF_TENSOR = 100_000
_MAX_RUNS_OF_FILE = 500_000


def storage_itemsize(cls: Global) -> int | None:
    """Bytes per element of a storage class; None if there is no such class."""
    if cls.module not in _STORAGE_MODULES:
        return None
    if cls.name == _UNTYPED:
        return 1
    dtype = _DTYPE_OF_STORAGE.get(cls.name)
    return _OTHER_ITEMSIZES.get(cls.name) if dtype is None else DTYPE_BITS[dtype] // 8


def view_dtype(storage: TorchStorage) -> str | None:
    """The element type of a plain tensor on a storage, safetensors spelling; None if we have none for it."""
    return "U8" if storage.cls.name == _UNTYPED else _DTYPE_OF_STORAGE.get(storage.cls.name)


@dataclass(slots=True)
class Views:
    """The tensors of one file; equal views of a storage are the same ``FileTensor`` object."""

    path: Path
    _known: dict[tuple[int, str, int, tuple[int, ...], tuple[int, ...]], FileTensor] = field(default_factory=dict)
    _runs_left: int = _MAX_RUNS_OF_FILE

    def view(self, storage: TorchStorage, dtype: str, offset: object, size: object, stride: object) -> FileTensor:
        """The elements of a view, row-major.

        Args:
            storage: What it is a view of; must outlive this object.
            dtype: Its element type.
            offset: Its first element, counted from the start of the storage.
            size: Its sizes.
            stride: Steps between neighbours, in elements.

        Raises:
            FormatError: These are no sizes, or reach out of the storage.
            UnsupportedError: It repeats elements (an expanded tensor), or its elements lie too scattered.
        """
        if not _are_sizes(size) or not _are_sizes(stride) or len(size) != len(stride) or type(offset) is not int:
            raise self._refuse("sizes are malformed", "non-negative integers, as many strides as sizes", "others")
        key = (id(storage), dtype, offset, size, stride)
        found = self._known.get(key)
        if found is None:
            # tuple(): a torch.Size here would be one in every TensorMeta made from it.
            found = self._known[key] = self._make(storage, TensorMeta(dtype=dtype, shape=tuple(size)), offset, stride)
        return found

    def _make(self, storage: TorchStorage, meta: TensorMeta, offset: int, stride: tuple[int, ...]) -> FileTensor:
        numel = meta.numel
        if numel == 0:
            return FileTensor(meta=meta, extents=())
        itemsize = DTYPE_BITS[meta.dtype] // 8
        room = storage.ref.meta.nbytes // itemsize
        end = offset + sum((length - 1) * step for length, step in zip(meta.shape, stride, strict=True)) + 1
        if offset < 0 or end > room:
            raise self._refuse("a tensor reaches out of its storage", f"{room} elements", f"element {_brief(end)}")
        if numel > room:
            raise UnsupportedError(
                "cannot read a tensor that repeats elements",
                kind="tensor-expanded",
                path=self.path,
                expected=f"at most the {room} elements of its storage",
                found=f"{_brief(numel)} elements",
                hint="save it with .contiguous()",
            )
        assert isinstance(storage.ref, FileTensor)
        base = storage.ref.extents[0].offset + offset * itemsize
        runs = self._runs(meta.shape, stride)
        extents = [
            Extent(path=self.path, offset=base + start * itemsize, start=number * runs.numel, numel=runs.numel)
            for number, start in enumerate(runs)
        ]
        return file_tensor(meta, extents, name="", path=self.path)

    def _runs(self, shape: tuple[int, ...], stride: tuple[int, ...]) -> _Runs:
        runs = _Runs.of(shape, stride)
        self._runs_left -= runs.count
        if runs.count > _MAX_RUNS_OF_TENSOR or self._runs_left < 0:
            raise UnsupportedError(
                "cannot read a tensor whose elements lie scattered",
                kind="tensor-scattered",
                path=self.path,
                expected=f"at most {_MAX_RUNS_OF_TENSOR} runs of neighbours, {_MAX_RUNS_OF_FILE} in a file",
                found=f"{runs.count} runs in a tensor of {list(shape)}",
                hint="save it with .contiguous()",
            )
        return runs

    def _refuse(self, what: str, expected: str, found: str) -> FormatError:
        return FormatError(
            f"not a valid torch file: {what}", kind="torch-tensor", path=self.path, expected=expected, found=found
        )


@dataclass(frozen=True, slots=True)
class _Runs:
    """Where the runs of neighbouring elements of a view start, in elements, in row-major order."""

    numel: int
    """Of each run."""
    shape: tuple[int, ...]
    """Of the dimensions that step from run to run."""
    stride: tuple[int, ...]

    @classmethod
    def of(cls, shape: Sequence[int], stride: Sequence[int]) -> _Runs:
        dims = [(length, step) for length, step in zip(shape, stride, strict=True) if length != 1]
        numel = 1
        while dims and dims[-1][1] == numel:
            numel *= dims.pop()[0]
        return cls(numel, tuple(length for length, _ in dims), tuple(step for _, step in dims))

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    def __iter__(self) -> Iterator[int]:
        starts = [0]
        for length, step in zip(self.shape, self.stride, strict=True):
            starts = [start + index * step for start in starts for index in range(length)]
        return iter(starts)


def _are_sizes(value: object) -> TypeGuard[tuple[int, ...]]:
    # bool is an int; a shape of (True,) is not a shape.
    return (
        isinstance(value, tuple)
        and len(value) <= _MAX_DIMS
        and all(type(item) is int and 0 <= item < 2**63 for item in value)
    )


def _brief(number: int) -> str:
    return str(number) if number < 2**64 else "more than 2^64"
