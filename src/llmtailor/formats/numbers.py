"""Single numbers between Python and the little-endian bytes of a 0-dim tensor, without torch or numpy."""

from __future__ import annotations

import os
import struct
from typing import TypeAlias

from ..errors import FormatError, UnsupportedError
from ..tensor_refs import Extent, FileTensor, InlineTensor, TensorRef
from ..tensors import DTYPE_BITS, TensorMeta
from .source_files import open_source

__all__ = ["Number", "decode_number", "encode_number", "inline_number", "read_number"]

Number: TypeAlias = bool | int | float

_FORMATS = {
    "BOOL": "<?",
    "U8": "<B",
    "I8": "<b",
    "I16": "<h",
    "U16": "<H",
    "F16": "<e",
    "I32": "<i",
    "U32": "<I",
    "F32": "<f",
    "F64": "<d",
    "I64": "<q",
    "U64": "<Q",
}


def decode_number(data: bytes, dtype: str) -> Number:
    """The number in the bytes of one element.

    Raises:
        UnsupportedError: The type is none of a learning rate or a count (8-bit floats, complex).
    """
    assert 8 * len(data) == DTYPE_BITS[dtype], (data, dtype)
    if dtype == "BF16":  # the upper half of an F32
        data, dtype = b"\0\0" + data, "F32"
    value: Number = struct.unpack(_format_of(dtype), data)[0]
    return value


def encode_number(value: Number, dtype: str) -> bytes:
    """The bytes of one element; inverse of ``decode_number`` for numbers the type can hold.

    Raises:
        UnsupportedError: As ``decode_number``.
        FormatError: The type cannot hold the number.
    """
    try:
        if dtype == "BF16":
            return _upper_half(struct.pack("<f", value))
        return struct.pack(_format_of(dtype), value)
    except (struct.error, OverflowError) as err:
        raise FormatError(
            "a number does not fit its type", kind="number", expected=dtype, found=f"{type(value).__name__}"
        ) from err


def _format_of(dtype: str) -> str:
    if dtype not in _FORMATS:
        raise UnsupportedError(
            "numbers of this type are not read", kind="number-type", expected=", ".join(_FORMATS), found=dtype
        )
    return _FORMATS[dtype]


def _upper_half(data: bytes) -> bytes:
    """The BF16 nearest to an F32, ties to even."""
    (bits,) = struct.unpack("<I", data)
    if bits & 0x7FFFFFFF > 0x7F800000:  # NaN: rounding could make it an infinity
        return struct.pack("<H", bits >> 16 | 0x40)
    return struct.pack("<H", bits + 0x7FFF + (bits >> 16 & 1) >> 16)


def inline_number(value: Number, dtype: str) -> InlineTensor:
    """A number as a 0-dim tensor that is known already."""
    return InlineTensor(meta=TensorMeta(dtype=dtype, shape=()), data=encode_number(value, dtype))


def read_number(ref: TensorRef) -> Number:
    """The only element of a tensor; of one in a file, its few bytes are read.

    Raises:
        NotFoundError: The file is gone.
        FormatError: The file ends before it.
        UnsupportedError: The tensor is the result of arithmetic, or as ``decode_number``.
    """
    assert ref.meta.numel == 1, ref.meta
    match ref:
        case InlineTensor(data=data):
            return decode_number(data, ref.meta.dtype)
        case FileTensor(extents=(extent,)):
            return decode_number(_read_bytes(extent, ref.meta.nbytes), ref.meta.dtype)
    raise UnsupportedError("a number that must be known was computed", kind="number-computed", found=str(ref.meta))


def _read_bytes(extent: Extent, nbytes: int) -> bytes:
    descriptor = open_source(extent.path)
    try:
        data = os.pread(descriptor, nbytes, extent.offset)
    finally:
        os.close(descriptor)
    if len(data) != nbytes:
        raise FormatError(
            "a file is shorter than when it was opened",
            kind="truncated",
            path=extent.path,
            expected=f"{nbytes} bytes at {extent.offset}",
            found=f"{len(data)} bytes",
        )
    return data
