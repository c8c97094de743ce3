"""Two tensors, read side by side in pieces of one size, and summed up in F64. numpy; torch for 8-bit floats alone."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from ..assembly.arithmetic import compute
from ..assembly.reading import Reader, aligned_buffer
from ..assembly.segments import Computed, Copy, Literal, slice_segments
from ..assembly.sources import SourceFiles
from ..tensors import DTYPE_BITS
from .records import Distance

if TYPE_CHECKING:
    from ..tensor_refs import TensorRef

__all__ = ["CHUNK_NBYTES", "Comparer"]

Floats: TypeAlias = npt.NDArray[np.float64]
_Values: TypeAlias = npt.NDArray[Any]

CHUNK_NBYTES = 4 * 2**20
"""What is read of a tensor at a time."""
# Elements that are computed on at a time: few enough to stay in a core's cache.
_BLOCK_NUMEL = 2**15
# Bytes of a chunk for each element that is decoded at a time, as in assembly.
_COMPUTED_SHARE = 32

# All but BF16, which numpy does not have, and floats of 8 bits.
_NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "u1",
    "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
}  # fmt: skip


class Comparer:
    """One thread's way to compare tensors; holds two buffers of a chunk, and what reading and decoding need.

    Args:
        sources: Where the files are open.
        chunk_nbytes: What is read of a tensor at a time, at least 64.
    """

    def __init__(self, sources: SourceFiles, chunk_nbytes: int = CHUNK_NBYTES) -> None:
        self._chunk_nbytes = chunk_nbytes
        self._reader = Reader(sources, chunk_nbytes)
        self._buffers = aligned_buffer(chunk_nbytes), aligned_buffer(chunk_nbytes)
        self._floats = np.empty(_BLOCK_NUMEL), np.empty(_BLOCK_NUMEL)
        self._bits = np.empty(_BLOCK_NUMEL, np.uint32)

    def compare(self, a: TensorRef, b: TensorRef, on_bytes: Callable[[int], None]) -> Distance:
        """Compare two tensors of one shape; either both are complex or none is.

        Args:
            a: One of them.
            b: The other one.
            on_bytes: Told of bytes as they are done.

        Raises:
            TailorError: A file cannot be read, changed meanwhile, or holds codes that make no sense.
        """
        total = Distance()
        step = self._chunk_nbytes // (max(DTYPE_BITS[a.meta.dtype], DTYPE_BITS[b.meta.dtype]) // 8)
        for start in range(0, a.meta.numel, step):
            stop = min(start + step, a.meta.numel)
            chunks = [self._read(each, start, stop, side) for side, each in enumerate((a, b))]
            with np.errstate(all="ignore"):
                total += self._compare_chunks(chunks[0], _element_type(a), chunks[1], _element_type(b))
            on_bytes(sum(chunk.nbytes for chunk in chunks))
        return total

    def _read(self, tensor: TensorRef, start: int, stop: int, side: int) -> memoryview:
        """The bytes of some elements, in one of the buffers."""
        target = self._buffers[side][: (stop - start) * DTYPE_BITS[tensor.meta.dtype] // 8]
        segments = list(slice_segments(tensor, start, stop, 0))
        self._reader.fetch([each for each in segments if isinstance(each, Copy)], target, is_aligned=True)
        for segment in segments:
            place = target[segment.at : segment.at + segment.nbytes]
            if isinstance(segment, Literal):
                place[:] = segment.data
            elif isinstance(segment, Computed):
                block_numel = max(1, self._chunk_nbytes // _COMPUTED_SHARE)
                compute(segment, place, self._reader.fetch, block_numel=block_numel)
        return target

    def _compare_chunks(self, a: memoryview, dtype_a: str, b: memoryview, dtype_b: str) -> Distance:
        stored_a, stored_b = _as_stored(a, dtype_a), _as_stored(b, dtype_b)
        total = Distance()
        for low in range(0, len(stored_a), _BLOCK_NUMEL):
            block_a, block_b = stored_a[low : low + _BLOCK_NUMEL], stored_b[low : low + _BLOCK_NUMEL]
            x, y = self._widen(block_a, dtype_a, 0), self._widen(block_b, dtype_b, 1)
            if dtype_a == dtype_b:
                num_equal = np.count_nonzero(_bits_of(block_a) == _bits_of(block_b))
            else:
                num_equal = np.count_nonzero((x == y) | (np.isnan(x) & np.isnan(y)))
            total += _sum_up(x, y, int(num_equal))
        return total

    def _widen(self, stored: _Values, dtype: str, side: int) -> Floats:
        """Elements as F64, in one of the blocks."""
        target = self._floats[side][: len(stored)]
        if dtype == "BF16":
            bits = self._bits[: len(stored)]
            np.copyto(bits, stored)
            np.left_shift(bits, 16, out=bits)
            np.copyto(target, bits.view(np.float32))
        elif dtype in _NUMPY_TYPES:
            np.copyto(target, stored, casting="unsafe")  # integers above 2**53 are rounded
        else:
            np.take(_values_of_bytes(dtype), stored, out=target)
        return target


def _element_type(tensor: TensorRef) -> str:
    """Of complex numbers, that of their two parts."""
    return "F32" if tensor.meta.dtype == "C64" else tensor.meta.dtype


def _as_stored(chunk: memoryview, dtype: str) -> _Values:
    """BF16 as its bits, floats of 8 bits as bytes."""
    return np.frombuffer(chunk, _NUMPY_TYPES.get(dtype, f"<u{DTYPE_BITS[dtype] // 8}"))


def _bits_of(stored: _Values) -> _Values:
    return stored.view(f"<u{stored.itemsize}")


def _sum_up(x: Floats, y: Floats, num_equal: int) -> Distance:
    """The sums of some elements; ``x`` is used up."""
    numel = len(x)
    square_a, square_b = _dot(x, x), _dot(y, y)
    counts: dict[str, int] = {}
    if not np.isfinite(square_a + square_b):
        is_finite = np.isfinite(x) & np.isfinite(y)
        counts = {
            f"{name}_{side}": int(np.count_nonzero(is_one(values)))
            for side, values in (("a", x), ("b", y))
            for name, is_one in (("nan", np.isnan), ("inf", np.isinf))
        }
        x, y = x[is_finite], y[is_finite]
        square_a, square_b = _dot(x, x), _dot(y, y)
    product = _dot(x, y)
    np.subtract(y, x, out=x)
    square_difference = _dot(x, x)
    np.abs(x, out=x)
    return Distance(
        numel=numel,
        num_equal=num_equal,
        square_a=square_a,
        square_b=square_b,
        square_difference=square_difference,
        product=product,
        max_abs=float(x.max(initial=0.0)),
        **counts,
    )


def _dot(x: Floats, y: Floats) -> float:
    # Not np.dot: that starts threads of its own.
    return float(np.einsum("i,i->", x, y))


@functools.cache
def _values_of_bytes(dtype: str) -> Floats:
    """What each of the 256 bytes stands for, of floats of 8 bits."""
    import torch  # only now: checkpoints without such floats are compared without it

    from ..tensor_bytes import torch_dtype

    values: Floats = torch.arange(256, dtype=torch.uint8).view(torch_dtype(dtype)).double().numpy()
    return values
