"""Codes back into numbers: numpy, in host memory, the same bits on every machine and every path.

Nothing here depends on how a machine rounds. A scale has 8 significant bits and a code as many, so their product is
exact in F32, whether or not it is fused with the addition that follows; logarithmic and tail codes are integer
arithmetic on the bits of an F32. All of it works on whole blocks, front to back, so a piece of a tensor needs only the
same piece of its arrays.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np

from .stored import BLOCK_NUMEL, FRAME_NUMEL, StoredCodes

__all__ = [
    "Values",
    "check_codes_of_ties",
    "check_ties",
    "cut_ties",
    "decode",
    "decode_tensor",
    "frames_of",
    "storage_type",
    "unpack_frame",
]

Values: TypeAlias = np.ndarray[Any, np.dtype[Any]]

# What stays in the second-level cache while it is worked on.
_STRIP_NUMEL = 2**16
_LARGEST = np.uint32(0x7F7FFFFF)
"""Bits of the largest finite F32."""
_HALF = BLOCK_NUMEL // 2
# Bits that a step of logarithmic codes is shifted by. Source: docs/spec/checkpoint-v1.md, section 7.
_STEP_SHIFT = {"log8": 8, "log4": 12}

_STORAGE = {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}
"""numpy has no bfloat16: here it is the upper half of an F32, in a uint16."""


_ARRAY_TYPES = {"I8": "<i1", "I16": "<i2", "I64": "<i8", "U8": "<u1", "U16": "<u2", "BF16": "<u2"}


def storage_type(dtype: str) -> np.dtype[Any]:
    """How values of an element type lie in memory here."""
    return np.dtype(_STORAGE[dtype])


def decode(codec: str, dtype: str, arrays: Mapping[str, Values], base: Values | None, out: Values) -> None:
    """Turn the codes of some whole blocks into values.

    Args:
        codec: Any but ``exact`` and ``xor``.
        dtype: Of the tensor: F32, BF16 or F16.
        arrays: As in ``stored``, flat, cut to these blocks; BF16 as uint16. Of the tensor's last block as much as
            there is. Ties counted from the first of these blocks.
        base: What the codes are relative to: of ``delta`` and ``round``, F32 values; of ``tail``, BF16 values; flat, as
            many as ``out``. May be ``out`` itself.
        out: Where they go: flat, of ``storage_type(dtype)``.
    """
    numel = out.shape[0]
    work = np.empty((_STRIP_NUMEL // BLOCK_NUMEL, BLOCK_NUMEL), np.float32)
    for start in range(0, numel, _STRIP_NUMEL):
        count = min(_STRIP_NUMEL, numel - start)
        first, blocks = start // BLOCK_NUMEL, -(-count // BLOCK_NUMEL)
        values = work[:blocks]
        part = {name: _cut(name, array, first, blocks, count, codec) for name, array in arrays.items()}
        of_base = None if base is None else base[start : start + count]
        # A file that lies may have scales that overflow.
        with np.errstate(all="ignore"):
            _decode_strip(codec, part, of_base, values, count)
            _round(values.reshape(-1)[:count], dtype, out[start : start + count])


def cut_ties(ties: Values, start: int, stop: int) -> Values:
    """Those among the elements ``start`` to ``stop``, counted from there."""
    first, last = np.searchsorted(ties, (start, stop))
    return ties[first:last] - start


def check_ties(ties: Values, numel: int) -> None:
    """Raise unless ties are numbers of elements, in order.

    Raises:
        ValueError: They are not.
    """
    if ties.shape[0] and not (ties[0] >= 0 and (ties[1:] > ties[:-1]).all() and ties[-1] < numel):
        raise ValueError("the ties do not ascend, or are not there")


def check_codes_of_ties(codes: Values, ties: Values) -> None:
    """Raise unless the codes of ties are those of ties.

    Raises:
        ValueError: They are not.
    """
    if (codes[ties] != -0x8000).any():
        raise ValueError("a tie is none")


def _cut(name: str, array: Values, first: int, blocks: int, count: int, codec: str) -> Values:
    if name == "ties":
        return cut_ties(array, first * BLOCK_NUMEL, first * BLOCK_NUMEL + count)
    if name != "codes":
        return array[first : first + blocks]
    if codec.endswith("4"):
        return array[first * _HALF : (first + blocks) * _HALF]
    return array[first * BLOCK_NUMEL : first * BLOCK_NUMEL + count]


def _decode_strip(codec: str, arrays: Mapping[str, Values], base: Values | None, values: Values, count: int) -> None:
    flat = values.reshape(-1)
    match codec:
        case "int8" | "int4" | "delta8" | "delta4":
            _spread(arrays["codes"], values, count, is_packed=codec.endswith("4"), offset=8)
            np.multiply(values, _widen(arrays["scales"])[:, None], out=values)
            if base is not None:
                np.add(flat[:count], base, out=flat[:count])
        case "log8" | "log4":
            bits = values.view(np.uint32)
            _spread(arrays["codes"], bits, count, is_packed=codec == "log4", offset=0)
            is_zero = bits == 0
            steps = arrays["steps"].astype(np.uint32) << np.uint32(_STEP_SHIFT[codec])
            lows = np.minimum(arrays["lows"].astype(np.uint32) << np.uint32(16), _LARGEST)
            # Codes count from 1. What is not below the largest must not go round 2^32 either.
            np.multiply(bits, steps[:, None], out=bits)
            np.minimum(bits, (_LARGEST - lows + steps)[:, None], out=bits)
            np.add(bits, (lows - steps)[:, None], out=bits)
            if is_zero.any():
                bits[is_zero] = 0
        case "tail8" | "tail4":
            whole = values.view(np.int32)
            _spread(arrays["codes"], whole, count, is_packed=codec == "tail4", offset=8)
            np.left_shift(whole, 8 if codec == "tail8" else 12, out=whole)
            bits = flat.view(np.uint32)[:count]
            if base is not None:
                np.add(bits, base.astype(np.uint32) << np.uint32(16), out=bits)
        case "tail16":
            bits = flat.view(np.uint32)[:count]
            flat.view(np.int32)[:count] = arrays["codes"]
            bits[arrays["ties"]] += np.uint32(0x10000)
            if base is not None:
                np.add(bits, base.astype(np.uint32) << np.uint32(16), out=bits)
        case "round":
            flat[:count] = 0 if base is None else base
        case _:
            raise AssertionError(codec)


def _spread(codes: Values, target: Values, count: int, *, is_packed: bool, offset: int) -> None:
    """Codes as numbers, a row a block; ``offset`` is what packed codes are moved by."""
    if is_packed:
        pairs = codes.reshape(-1, _HALF)
        np.bitwise_and(pairs, 15, out=target[:, :_HALF], casting="unsafe")
        np.right_shift(pairs, 4, out=target[:, _HALF:], casting="unsafe")
        if offset:
            np.subtract(target, target.dtype.type(offset), out=target)
    else:
        flat = target.reshape(-1)
        flat[:count] = codes
        flat[count:] = 0


def _widen(halves: Values) -> Values:
    """BF16 as F32."""
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _round(values: Values, dtype: str, out: Values) -> None:
    """F32 as the tensor's own type, to nearest even."""
    if dtype == "BF16":
        bits = values.view(np.uint32)
        np.right_shift(
            bits + ((bits >> np.uint32(16) & np.uint32(1)) + np.uint32(0x7FFF)), 16, out=out, casting="unsafe"
        )
    else:
        out[...] = values


def decode_tensor(stored: StoredCodes, arrays: Mapping[str, memoryview], base: Values | None, out: memoryview) -> None:
    """Turn all codes of a tensor into its bytes.

    Args:
        stored: What the arrays are.
        arrays: Bytes of each array, by name.
        base: What the codes are relative to, as for ``decode``; of ``xor``, any 16 bits. May be the memory of ``out``.
            None for codes that are relative to nothing, and to look at the codes alone.
        out: The tensor's bytes, row-major.

    Raises:
        ValueError: The arrays cannot be what they should be.
    """
    if stored.codec == "exact":
        out[:] = arrays["values"]
        return
    values = np.frombuffer(out, storage_type(stored.meta.dtype))
    if stored.codec == "xor":
        planes = arrays["planes"]
        frames = frames_of(np.frombuffer(arrays["ends"], "<i8"), planes.nbytes)
        for index, (start, end) in enumerate(frames):
            part = slice(index * FRAME_NUMEL, (index + 1) * FRAME_NUMEL)
            target = values.view("<u2")[part]
            of_base = np.zeros_like(target) if base is None else base.view("<u2")[part]
            unpack_frame(planes[start:end], of_base, target)
        return
    metas = stored.arrays
    types = {name: metas[name].dtype if name in metas else "I64" for name in arrays}
    found = {name: np.frombuffer(data, _ARRAY_TYPES[types[name]]) for name, data in arrays.items()}
    if not all(np.isfinite(_widen(array)).all() for name, array in found.items() if name in ("scales", "lows")):
        raise ValueError("a scale is not finite")
    if stored.codec == "tail16":
        check_ties(found["ties"], values.shape[0])
        check_codes_of_ties(found["codes"], found["ties"])
    decode(stored.codec, stored.meta.dtype, found, base, values)


def frames_of(ends: Values, nbytes: int) -> list[tuple[int, int]]:
    """Where each frame of ``xor`` codes starts and ends in ``planes``.

    Raises:
        ValueError: They do not follow each other up to the end.
    """
    starts = [0, *(int(end) for end in ends)]
    if any(end < start for start, end in itertools.pairwise(starts)) or starts[-1] != nbytes:
        raise ValueError("the frames do not cover the planes")
    return list(itertools.pairwise(starts))


def unpack_frame(frame: memoryview, base: Values, out: Values) -> None:
    """One frame of ``xor`` codes: 16-bit values whose bits were exclusive-or-ed with those of a base.

    Args:
        frame: Compressed; or, where that would not have paid, the bytes themselves: low bytes first, then high bytes.
        base: uint16, at most ``FRAME_NUMEL``.
        out: uint16, as many; may be ``base`` itself.

    Raises:
        ValueError: The frame is not what it should be.
    """
    import zstandard

    numel = base.shape[0]
    assert numel <= FRAME_NUMEL
    planes: bytes | memoryview = frame
    if frame.nbytes != 2 * numel:
        try:
            # Room is made for what a frame says it holds, whatever the bound.
            if zstandard.frame_content_size(frame) not in (2 * numel, -1):
                raise ValueError("a frame has another size than its values")
            unpacker = zstandard.ZstdDecompressor()
            planes = unpacker.decompress(frame, max_output_size=2 * numel, allow_extra_data=False)
        except zstandard.ZstdError as err:
            raise ValueError(f"a frame cannot be unpacked: {err}") from err
        if len(planes) != 2 * numel:
            raise ValueError("a frame has another size than its values")
    low, high = np.frombuffer(planes, np.uint8).reshape(2, numel)
    np.bitwise_xor(base, low.astype(np.uint16) | (high.astype(np.uint16) << np.uint16(8)), out=out)
