"""Numbers into codes: torch, on the device where the numbers are, and how far the codes are from them.

This is the reference. ``kernels`` fuses the same functions; a fused one may round a tie the other way, so that a code
differs by one, and the decoded number is as near.

A strip is a row of whole blocks (the last one filled up with zeros).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from .stored import BLOCK_NUMEL, FRAME_NUMEL

if TYPE_CHECKING:
    import zstandard

__all__ = ["KERNELS", "Encoded", "Kernel", "pack_frame"]

_HALF = BLOCK_NUMEL // 2

Encoded: TypeAlias = tuple[torch.Tensor, ...]
"""The arrays of a strip in the order of ``StoredCodes.arrays``, flat; of ``tail`` then the BF16 rounding that they are
relative to; at last the measures: F32 [5], see ``_measure``. Scales, lows and steps as the bits of an int16."""
Kernel: TypeAlias = Callable[[torch.Tensor, torch.Tensor | None], Encoded]
"""Values (whole blocks, flat or a row a block; F32, BF16 or F16) and, of ``delta``, what they are relative to."""


def _upper(values: torch.Tensor) -> torch.Tensor:
    """Numbers >= 0 as the bits of the nearest BF16 that is not smaller; int32."""
    return (values.view(torch.int32) + 0xFFFF) >> 16


def _float_of(bits: torch.Tensor) -> torch.Tensor:
    return bits.view(torch.float32)


def _nearest_bf16(bits: torch.Tensor) -> torch.Tensor:
    """Bits of F32 as those of the nearest BF16 number (ties to even); int32.

    Not by a conversion to BF16 and back, which torch.compile leaves out. Source: torch 2.13,
    _inductor/config.py (emulate_precision_casts).
    """
    return (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000


def _as_decoded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """F32 as they are once rounded to the tensor's own type; what F16 cannot hold becomes infinite."""
    if dtype == torch.float32:
        return values
    bits = values.view(torch.int32)
    if dtype == torch.bfloat16:
        return _float_of(_nearest_bf16(bits))
    magnitude = values.abs()
    normal = _float_of((bits + 0xFFF + ((bits >> 13) & 1)) & -0x2000)
    small = torch.round(values * 2.0**24) * 2.0**-24
    return torch.where(magnitude < 65520, torch.where(magnitude < 2.0**-14, small, normal), torch.inf)


def _measure(values: torch.Tensor, errors: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Squared errors and values summed, what was measured as the largest error, the largest magnitude, and the factor
    (a power of two) that errors and values were brought near 1 by before they were squared: sums neither overflow nor
    vanish."""
    magnitude = values.abs().amax()
    exponent = (magnitude.view(torch.int32) >> 23).clamp(1, 253)
    factor = _float_of((254 - exponent) << 23)
    near = errors * factor
    norm = values * factor
    return torch.stack([(near * near).sum(), (norm * norm).sum(), largest, magnitude, factor])


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes in a byte: of each block, the first half low, the second half high."""
    return (codes[:, :_HALF] | (codes[:, _HALF:] << 4)).to(torch.uint8)


def _linear(values: torch.Tensor, base: torch.Tensor | None, levels: int) -> Encoded:
    dtype = values.dtype
    values = values.float()
    blocks = (values if base is None else values - base).view(-1, BLOCK_NUMEL)
    scales = _upper(blocks.abs().amax(1) / levels)
    steps = _float_of(scales << 16)[:, None]
    codes = torch.round(blocks / torch.where(steps > 0, steps, 1.0))
    decoded = (codes * steps).view_as(values)
    errors = _as_decoded(decoded if base is None else decoded + base, dtype) - values
    stored = codes.to(torch.int8) if levels > 7 else _pack(codes.to(torch.int32) + 8)
    return stored.view(-1), scales.to(torch.int16), _measure(values, errors, errors.abs().amax())


def _logarithmic(values: torch.Tensor, levels: int, shift: int) -> Encoded:
    """On the bits of an F32, which are nearly the logarithm of a number >= 0. Code 0 is 0, and nothing else is."""
    blocks = values.float().view(-1, BLOCK_NUMEL)
    # Reductions of floats are vectorized where those of integers are not; numbers >= 0 have the order of their bits.
    lows = torch.where(blocks == 0, 1e38, blocks).amin(1).view(torch.int32) >> 16
    lows = lows.clamp_min(1)  # else the first code would be another zero, for what is below any BF16
    span = (blocks.amax(1).abs().view(torch.int32) - (lows << 16)).clamp_min(0)  # abs(): of zeros, -0 may be largest
    unit = (levels - 1) << shift
    steps = (span // unit) + (span % unit > 0).to(torch.int32)
    low, step = (lows << 16)[:, None], (steps << shift)[:, None]
    places = torch.round((blocks.view(torch.int32) - low).float() * (1.0 / step.clamp_min(1).float()))
    places = places.clamp_min(0)
    decoded = torch.where(blocks == 0, 0.0, _as_decoded(_float_of(low + places.to(torch.int32) * step), values.dtype))
    codes = torch.where(blocks == 0, 0.0, places + 1)
    # In units in the last place of an F32.
    if values.dtype == torch.float32:
        largest = (steps.amax() << (shift - 1)).float()  # no element is further off than half of the widest step
    else:
        largest = (decoded.view(torch.int32) - blocks.abs().view(torch.int32)).float().abs().amax()
    measures = _measure(blocks, decoded - blocks, torch.where(blocks.amin() < 0, torch.nan, largest))
    stored = codes.to(torch.uint8) if levels > 15 else _pack(codes.to(torch.int32))
    return stored.view(-1), lows.to(torch.int16), steps.to(torch.int16), measures


def _tail(values: torch.Tensor, levels: int, shift: int) -> Encoded:
    """What BF16 leaves of an F32, in its last bits; between the codes and the measures stands the BF16."""
    bits = values.view(torch.int32)
    rounded = _nearest_bf16(bits)
    rest = (bits - rounded).float()
    codes = torch.floor(rest * (1.0 / (1 << shift)) + 0.5).clamp(-levels - 1, levels)
    errors = _float_of(rounded + codes.to(torch.int32) * (1 << shift)) - values
    # From F32, which is vectorized where it is not from I32.
    stored = codes.to(torch.int8) if levels > 7 else _pack((codes + 8).to(torch.int32).view(-1, BLOCK_NUMEL))
    halves = values.to(torch.bfloat16).view(-1)
    return stored.view(-1), halves, _measure(values, errors, errors.abs().amax())


KERNELS: Mapping[str, Kernel] = {
    "int8": lambda values, base: _linear(values, None, 127),
    "int4": lambda values, base: _linear(values, None, 7),
    "delta8": lambda values, base: _linear(values, base, 127),
    "delta4": lambda values, base: _linear(values, base, 7),
    "log8": lambda values, base: _logarithmic(values, 255, 8),
    "log4": lambda values, base: _logarithmic(values, 15, 12),
    "tail8": lambda values, base: _tail(values, 127, 8),
    "tail4": lambda values, base: _tail(values, 7, 12),
}
"""By codec; of values that are finite and below 2^120. A negative value in ``log`` makes a measure that is NaN."""


def pack_frame(values: torch.Tensor, base: torch.Tensor, compressor: zstandard.ZstdCompressor) -> bytes:
    """One frame of ``xor`` codes: what differs from a base, bytes of one significance together, compressed if it pays.

    Args:
        values: 16-bit elements in host memory, at most ``FRAME_NUMEL``.
        base: As many, of the same type.
        compressor: Used again for every frame.
    """
    assert values.numel() <= FRAME_NUMEL
    changed: Any = (values.view(torch.int16) ^ base.view(torch.int16)).view(torch.uint8)
    planes = bytes(changed.view(-1, 2).t().contiguous().numpy())
    packed: bytes = compressor.compress(planes)
    return packed if len(packed) < len(planes) else planes
