"""Tensors with a single element, read as numbers."""

from __future__ import annotations

import os
import struct
from pathlib import Path

from ..errors import UnsupportedError
from ..tensor_refs import FileTensor, InlineTensor, TensorRef
from .source_files import open_source, refuse_file

__all__ = ["read_number"]

# How struct calls the types of safetensors.
_NUMBER_FORMATS = {
    "F64": "d", "F32": "f", "F16": "e", "BF16": "f", "BOOL": "?", "U8": "B", "I8": "b", "U16": "H", "I16": "h",
    "U32": "I", "I32": "i", "U64": "Q", "I64": "q",
}  # fmt: skip


def read_number(tensor: TensorRef) -> int | float:
    """The value of a tensor with a single element: a step count, a learning rate.

    Raises:
        NotFoundError, FormatError: Its file is gone, no regular file, or too short.
        UnsupportedError: Its type has no plain number (complex, 8-bit float).
    """
    meta = tensor.meta
    assert meta.numel == 1, meta
    if meta.dtype not in _NUMBER_FORMATS:
        raise UnsupportedError("a number of this type cannot be read", kind="number-type", found=str(meta))
    match tensor:
        case InlineTensor():
            data = tensor.data
        case FileTensor(extents=(extent,)):
            data = _read_range(extent.path, extent.offset, meta.nbytes)
        case _:
            raise UnsupportedError("a computed number cannot be read", kind="number-type", found=str(meta))
    if meta.dtype == "BF16":
        data = b"\0\0" + data  # the upper half of an F32
    value: int | float = struct.unpack(f"<{_NUMBER_FORMATS[meta.dtype]}", data)[0]
    return value


def _read_range(path: Path, offset: int, nbytes: int) -> bytes:
    descriptor = open_source(path)
    try:
        data = os.pread(descriptor, nbytes, offset)
    finally:
        os.close(descriptor)
    if len(data) != nbytes:
        raise refuse_file(path, f"{nbytes} bytes at {offset}", f"{len(data)} bytes")
    return data
