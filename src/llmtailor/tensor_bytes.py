"""Between torch tensors and the little-endian bytes safetensors files hold.

Nothing here copies if it can help it, and nothing here casts: the bytes of a file are the bytes of memory. Only
plain tensors have such bytes; ``why_not_plain`` says which tensors do not, so that callers refuse them with their
own words before anything is written.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from .errors import IntegrityError, UnsupportedError
from .tensors import DTYPE_BITS, TensorMeta

__all__ = ["dtype_name", "host_bytes", "meta_of", "tensor_from_bytes", "torch_dtype", "why_not_plain"]

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

    A subclass (DTensor, torchao's quantized states) may hold several tensors or a part of one, whatever its shape
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


def meta_of(tensor: torch.Tensor) -> TensorMeta:
    """Element type and shape of a plain tensor.

    Raises:
        UnsupportedError: The tensor is not plain, see ``why_not_plain``.
    """
    _require_plain(tensor)
    return TensorMeta(dtype=_NAMES[tensor.dtype], shape=tuple(tensor.shape))


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements in row-major order, as bytes in host memory.

    Args:
        tensor: Plain, any shape and device.

    Returns:
        Read-only bytes. Of a contiguous CPU tensor they are a view, which keeps the memory alive and sees later
        changes of the tensor; of any other a copy.

    Raises:
        UnsupportedError: The tensor is not plain, see ``why_not_plain``.
    """
    _require_plain(tensor)
    # Conjugation and negation are flags on a view; the bytes behind it are not those of the values.
    values = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # Flattened first: view(uint8) widens the last dimension, which a 0-dim tensor does not have.
    return values.reshape(-1).view(torch.uint8).numpy().data.toreadonly()


def tensor_from_bytes(buffer: memoryview | bytes | bytearray, meta: TensorMeta) -> torch.Tensor:
    """A tensor over a buffer, without a copy.

    Args:
        buffer: The bytes, row-major. May be read-only (a mapped file): then the tensor must not be written to, which
            torch does not know and the operating system punishes. Copy out of it.
        meta: Element type and shape.

    Returns:
        A CPU tensor that shares, and keeps alive, the buffer.

    Raises:
        IntegrityError: The buffer is not as long as the tensor.
        UnsupportedError: torch does not have the element type.
    """
    dtype = torch_dtype(meta.dtype)
    if len(buffer) != meta.nbytes:
        raise IntegrityError(
            f"the bytes of a {meta} are not as many as it needs",
            kind="tensor-size",
            expected=f"{meta.nbytes} bytes",
            found=f"{len(buffer)} bytes",
        )
    if not buffer:
        return torch.empty(meta.shape, dtype=dtype)
    # By DLPack, since torch.frombuffer and from_numpy warn about a read-only buffer, once per process, and silencing
    # that would take warnings.catch_warnings, which is not safe with threads.
    return from_dlpack(np.frombuffer(buffer, dtype=np.uint8)).view(dtype).reshape(meta.shape)


def _require_plain(tensor: torch.Tensor) -> None:
    reason = why_not_plain(tensor)
    if reason is not None:
        raise UnsupportedError(
            "only plain tensors can be stored", kind="tensor-kind", expected="a plain strided tensor", found=reason
        )
