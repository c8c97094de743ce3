"""Numbers into codes: torch, on the device where the numbers are, and how far the codes are from them.

This is the reference. ``kernels`` fuses the same functions; a fused one may round a tie the other way, so that a code
differs by one, and the decoded number is as near.

A strip is a row of whole blocks (the last one filled up with zeros).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch

from .stored import BLOCK_NUMEL, FRAME_NUMEL

if TYPE_CHECKING:
    import zstandard

__all__ = ["KERNELS", "Encoded", "Kernel", "pack_frame", "split_master"]

_HALF = BLOCK_NUMEL // 2

Encoded: TypeAlias = tuple[torch.Tensor, ...]
"""The arrays of a strip in the order of ``StoredCodes.arrays``, flat; then the measures: F32 [5], see ``_measure``.
Scales, lows and steps as the bits of an int16. Of masters, at last come the measures of their weights: F32 [6], see
``_measure_weights``."""


class Kernel(Protocol):
    """Values (whole blocks, flat or a row a block; F32, BF16 or F16); of ``delta``, what they are relative to; and, if
    the values are masters (F32), their weights (BF16 or F16)."""

    def __call__(
        self, values: torch.Tensor, base: torch.Tensor | None, weights: torch.Tensor | None = None, /
    ) -> Encoded: ...


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


def _measure_weights(masters: torch.Tensor, decoded: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """As ``_measure``, of weights that are to be the rounded masters; at last whether some are not."""
    true = weights.float()
    is_other = _as_decoded(masters, weights.dtype).view(torch.int32) != true.view(torch.int32)
    errors = _as_decoded(decoded, weights.dtype) - true
    return torch.cat([_measure(true, errors, errors.abs().amax()), is_other.any().float().view(1)])


def _pack(codes: torch.Tensor) -> torch.Tensor:
    """Two 4-bit codes in a byte: of each block, the first half low, the second half high."""
    return (codes[:, :_HALF] | (codes[:, _HALF:] << 4)).to(torch.uint8)


def _linear(
    values: torch.Tensor, base: torch.Tensor | None, levels: int, weights: torch.Tensor | None = None
) -> Encoded:
    dtype = values.dtype
    values = values.float()
    blocks = (values if base is None else values - base).view(-1, BLOCK_NUMEL)
    # Not by a division, which is not rounded alike everywhere: scales are the same bits on every device.
    scales = _upper(blocks.abs().amax(1) * (1.0 / levels))
    steps = _float_of(scales << 16)[:, None]
    codes = torch.round(blocks / torch.where(steps > 0, steps, 1.0))
    decoded = (codes * steps).view_as(values)
    decoded = decoded if base is None else decoded + base
    errors = _as_decoded(decoded, dtype) - values
    stored = codes.to(torch.int8) if levels > 7 else _pack(codes.to(torch.int32) + 8)
    encoded = stored.view(-1), scales.to(torch.int16), _measure(values, errors, errors.abs().amax())
    return encoded if weights is None else (*encoded, _measure_weights(values, decoded, weights))


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


def _tail(values: torch.Tensor, levels: int, shift: int, weights: torch.Tensor | None = None) -> Encoded:
    """What BF16 leaves of an F32, in its last bits."""
    bits = values.view(torch.int32)
    rounded = _nearest_bf16(bits)
    rest = (bits - rounded).float()
    codes = torch.floor(rest * (1.0 / (1 << shift)) + 0.5).clamp(-levels - 1, levels)
    if weights is not None:
        # The lowest code is half of a BF16 away, where an odd one is not the nearest any more.
        codes = torch.where((rounded >> 16) & 1 != 0, codes.clamp_min(-levels), codes)
    errors = _float_of(rounded + codes.to(torch.int32) * (1 << shift)) - values
    # From F32, which is vectorized where it is not from I32.
    stored = codes.to(torch.int8) if levels > 7 else _pack((codes + 8).to(torch.int32).view(-1, BLOCK_NUMEL))
    encoded = stored.view(-1), _measure(values, errors, errors.abs().amax())
    return encoded if weights is None else (*encoded, _measure_weights(values, values, weights))


KERNELS: Mapping[str, Kernel] = {
    "int8": lambda values, base, weights=None: _linear(values, None, 127),
    "int4": lambda values, base, weights=None: _linear(values, None, 7),
    "delta8": lambda values, base, weights=None: _linear(values, base, 127, weights),
    "delta4": lambda values, base, weights=None: _linear(values, base, 7, weights),
    "log8": lambda values, base, weights=None: _logarithmic(values, 255, 8),
    "log4": lambda values, base, weights=None: _logarithmic(values, 15, 12),
    "tail8": lambda values, base, weights=None: _tail(values, 127, 8, weights),
    "tail4": lambda values, base, weights=None: _tail(values, 7, 12, weights),
}
"""By codec; of values that are finite and below 2^120. A negative value in ``log`` makes a measure that is NaN.
``delta`` and ``tail`` alone are of masters."""


def split_master(master: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What a weight lacks of its master: the arrays of ``tail16``.

    Args:
        master: F32, flat.
        weight: BF16, as many.

    Returns:
        Codes (I16, not contiguous) and ties (I64); None if the weight is not the rounded master.
    """
    bits = master.view(torch.int32)
    of_weight = weight.view(torch.int16).to(torch.int32) << 16
    rest = bits - of_weight
    low, high = (int(each) for each in rest.aminmax())
    # What is added to a number with 16 zeros at the end is what stands there, whichever neighbour that number is.
    codes = bits.view(torch.int16).view(-1, 2)[:, 0]
    if low > -0x8000 and high < 0x8000:
        return codes, torch.empty(0, dtype=torch.int64, device=master.device)
    if low < -0x8000 or high > 0x8000:
        return None
    is_half = rest.abs() == 0x8000
    is_odd = (of_weight & 0x10000) != 0
    if bool((is_half & is_odd).any()):
        return None
    return codes, (rest == 0x8000).nonzero().view(-1)


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
