"""Which torch tensors are rows of little-endian bytes, as safetensors files hold them, and what such a file calls them.

The bytes of a file are the bytes of memory; nothing is ever cast. Only plain tensors have such bytes, and the parts of
a ``DTensor`` that are plain; ``why_not_plain`` and ``why_not_stored`` say which do not, so that callers refuse them
with their own words before anything is written.
"""

from __future__ import annotations

import sys

import torch

from .errors import UnsupportedError
from .local_parts import is_dtensor, memory_of
from .tensors import DTYPE_BITS, TensorMeta

__all__ = ["dtype_name", "meta_of", "torch_dtype", "why_not_plain", "why_not_stored"]

assert sys.byteorder == "little", "safetensors files are little-endian; so must be the memory that is mapped onto them"

# Source: safetensors 0.8.0, bindings/python/py_src/safetensors/torch.py (_TYPES).
_TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
_NAMES = {dtype: name for name, dtype in _TORCH_DTYPES.items()}
assert _TORCH_DTYPES.keys() == DTYPE_BITS.keys()


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors spelling of a torch element type.

    Raises:
        UnsupportedError: safetensors has none for it.
    """
    if dtype not in _NAMES:
        raise UnsupportedError("this element type cannot be stored", kind="dtype", expected=_CHOICES, found=dtype)
    return _NAMES[dtype]


def torch_dtype(name: str) -> torch.dtype:
    """The torch element type of a safetensors spelling; inverse of ``dtype_name``.

    Raises:
        UnsupportedError: torch has none for it.
    """
    if name not in _TORCH_DTYPES:
        raise UnsupportedError("torch has no such element type", kind="dtype", expected=_CHOICES, found=name)
    return _TORCH_DTYPES[name]


_CHOICES = ", ".join(_TORCH_DTYPES)


def why_not_plain(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being a row of bytes, or None if nothing does.

    A subclass (torchao's quantized states) may hold several tensors or a part of one, whatever its shape
    says; writing it as if it were plain would lose the rest without a word.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"{type(tensor).__module__}.{type(tensor).__qualname__}, a tensor subclass"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"a {tensor.dtype} tensor of layout {tensor.layout}"
    if tensor.is_meta:
        return "a tensor on the meta device, which has no values"
    if tensor.dtype not in _NAMES:
        return f"a tensor of {tensor.dtype}"
    return None


def why_not_stored(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being stored: it is not plain, nor is the part of it that a ``DTensor`` has here."""
    reason = why_not_plain(memory_of(tensor))
    return f"a DTensor whose part is {reason}" if reason is not None and is_dtensor(tensor) else reason


def meta_of(tensor: torch.Tensor) -> TensorMeta:
    """Element type and shape of a tensor; of the whole, if it is a ``DTensor``.

    Raises:
        UnsupportedError: The tensor cannot be stored, see ``why_not_stored``.
    """
    _require_stored(tensor)
    return TensorMeta(dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape))


def _require_stored(tensor: torch.Tensor) -> None:
    reason = why_not_stored(tensor)
    if reason is not None:
        raise UnsupportedError(
            "only plain tensors can be stored", kind="tensor-kind", expected="a plain strided tensor", found=reason
        )
