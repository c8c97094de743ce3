"""What a tensor is on disk, in numbers: element type, shape, byte range. No bytes, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["DTYPE_BITS", "ByteRange", "TensorMeta"]

# Element types by their safetensors spelling, in bits per element.
# Source: safetensors 0.8.0, safetensors/src/tensor.rs (enum Dtype, bitsize); sub-byte types are left out because
# no torch optimizer or model state uses them.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ByteRange:
    """A run of bytes in a file."""

    start: int
    """First byte."""
    end: int
    """One past the last byte."""

    def __post_init__(self) -> None:
        assert 0 <= self.start <= self.end, (self.start, self.end)

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMeta:
    """Element type and shape of a tensor."""

    dtype: str
    """safetensors spelling, a key of ``DTYPE_BITS``."""
    shape: tuple[int, ...]
    """Sizes, outermost first; () is a scalar."""

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPE_BITS[self.dtype] // 8

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"
