"""Tensors that have to be computed: other element types, scaled moments, averages, codes. numpy, a block at a time.

A cast takes the way torch takes: to 16 bits by way of F32, rounding to nearest even at each step. Scaled and averaged
tensors are computed in F64 and rounded once. numpy has no bfloat16; here it is the upper half of an F32, in a uint16.

Which NaN comes out of a cast to 16 bits depends, in torch, on the vector instructions of the machine. Here it is quiet,
and in BF16 always 0x7fc0. Source: torch 2.13, c10/util/BFloat16.h (round_to_nearest_even) and
aten/src/ATen/cpu/vec/vec512/vec512_bfloat16.h (cvtfp32_bf16, which makes 0xffff of it).
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import UnsupportedError
from ..tensor_refs import AveragedTensor, CastTensor, CodedTensor, FileTensor, InlineTensor, ScaledTensor, TensorRef
from ..tensors import DTYPE_BITS
from .operands import NUMPY_TYPES, Fetch, Operands
from .segments import Computed

if TYPE_CHECKING:
    import numpy as np

    Values: TypeAlias = np.ndarray[Any, np.dtype[Any]]

__all__ = ["check_arithmetic", "compute"]

_FLOATS = ("F64", "F32", "F16", "BF16")
# The widest of them, in bytes.
_MAX_ITEMSIZE = 8


def check_arithmetic(tensor: TensorRef) -> None:
    """See to it that a tensor can be computed.

    Raises:
        UnsupportedError: It is, or comes from, something else than floating-point numbers.
    """
    match tensor:
        case FileTensor() | InlineTensor():
            return
        case CastTensor() | ScaledTensor():
            sources: tuple[TensorRef, ...] = (tensor.source,)
        case AveragedTensor():
            sources = tensor.sources
        case CodedTensor():
            sources = () if tensor.base is None else (tensor.base,)
    for each in (tensor, *sources):
        if each.meta.dtype not in _FLOATS:
            raise UnsupportedError(
                "arithmetic on this element type is not done",
                kind="dtype",
                expected=", ".join(_FLOATS),
                found=each.meta.dtype,
                hint="take the tensor over as it is: without dtype, from one source",
            )
    for source in sources:
        check_arithmetic(source)


def compute(segment: Computed, target: memoryview, fetch: Fetch, *, block_numel: int) -> None:
    """Fill in a computed segment.

    Args:
        segment: What to compute.
        target: Its bytes.
        fetch: How to get at the operands' bytes.
        block_numel: Elements at a time.

    Raises:
        FormatError: Codes do not hold what they say.
    """
    import numpy as np

    operands = Operands(fetch, block_numel * _MAX_ITEMSIZE)

    size = DTYPE_BITS[segment.tensor.meta.dtype] // 8
    end = segment.first + segment.nbytes
    stop = -(-end // size)
    with np.errstate(all="ignore"):
        for start in range(segment.first // size, stop, block_numel):
            values = _evaluate(segment.tensor, start, min(start + block_numel, stop), operands)
            data = values.data.cast("B")
            # The segment may begin and end inside an element.
            low, high = max(start * size, segment.first), min(start * size + data.nbytes, end)
            target[low - segment.first : high - segment.first] = data[low - start * size : high - start * size]


def _evaluate(tensor: TensorRef, start: int, stop: int, operands: Operands) -> Values:
    """The elements of a tensor, as they are stored."""
    import numpy as np

    dtype = tensor.meta.dtype
    match tensor:
        case FileTensor():
            return operands.read(tensor, start, stop)
        case InlineTensor():
            return np.frombuffer(tensor.data, NUMPY_TYPES[dtype])[start:stop]
        case CodedTensor(base=base):

            def of_base(low: int, high: int) -> Values:
                assert base is not None
                return _evaluate(base, low, high, operands)

            return operands.decode(tensor, start, stop, of_base)
        case CastTensor():
            return _cast(_evaluate(tensor.source, start, stop, operands), tensor.source.meta.dtype, dtype)
        case ScaledTensor():
            return _round(_widen(_evaluate(tensor.source, start, stop, operands), dtype) * tensor.factor, dtype)
        case AveragedTensor():
            weighted = (
                _widen(_evaluate(source, start, stop, operands), source.meta.dtype) * weight
                for source, weight in zip(tensor.sources, tensor.weights, strict=True)
            )
            total: Values = functools.reduce(np.add, weighted)
            return _round(total, dtype)


def _cast(values: Values, source: str, target: str) -> Values:
    if source == target:
        return values
    if target == "F64":
        return _widen(values, source)
    single = values.astype("<f4") if source == "F64" else _to_single(values, source)
    if target == "BF16":
        return _upper_half(single)
    return _quiet_half(single.astype("<f2")) if target == "F16" else single


def _to_single(values: Values, dtype: str) -> Values:
    """F16, BF16 or F32 as F32; exact."""
    if dtype == "BF16":
        return (values.astype("<u4") << 16).view("<f4")
    if dtype == "F16":
        return _quiet_half(values).astype("<f4")
    return values


def _widen(values: Values, dtype: str) -> Values:
    """Any of the types as F64; exact."""
    return values if dtype == "F64" else _to_single(values, dtype).astype("<f8")


def _round(values: Values, dtype: str) -> Values:
    """F64 as any of the types, rounded once."""
    if dtype == "BF16":
        return _upper_half(_to_odd(values))
    if dtype == "F16":
        return _quiet_half(values.astype("<f2"))
    return values.astype(NUMPY_TYPES[dtype], copy=False)


def _quiet_half(values: Values) -> Values:
    """F16 with quiet NaNs: numpy lets signalling ones pass, the machine's own conversion does not."""
    import numpy as np

    is_nan = np.isnan(values)
    if not is_nan.any():
        return values
    return np.where(is_nan, values.view("<u2") | np.uint16(0x0200), values.view("<u2")).view("<f2")


def _upper_half(single: Values) -> Values:
    """F32 as BF16, to nearest even."""
    import numpy as np

    bits = single.view("<u4")
    rounded: Values = ((bits + ((bits >> 16 & 1) + np.uint32(0x7FFF))) >> 16).astype("<u2")
    is_nan = np.isnan(single)
    if is_nan.any():
        rounded[is_nan] = 0x7FC0
    return rounded


def _to_odd(values: Values) -> Values:
    """F64 as F32; what is between two of them becomes the one with an odd last bit.

    An F32 has 16 bits more than a BF16. Rounded like this it still tells on which side of a BF16's half the number was,
    so that rounding it again is rounding once.
    """
    import numpy as np

    single = values.astype("<f4")
    bits = single.view("<u4").copy()
    back = single.astype("<f8")
    is_even_and_inexact = (bits & 1 == 0) & (back != values) & ~np.isnan(values)
    is_larger = np.abs(values) > np.abs(back)
    step = np.where(is_larger, np.uint32(1), np.uint32(0xFFFFFFFF))
    bits[is_even_and_inexact] += step[is_even_and_inexact]
    return bits.view("<f4")
