"""Decoding against the table of docs/spec/checkpoint-v1.md, section 7, in plain Python; of files that lie, too."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_tensors import CODECS_AND_DTYPES, TORCH_DTYPES, encode, random_arrays, widen
from llmtailor.codecs.decoding import Values, decode, storage_type

LARGEST = 0x7F7FFFFF
NAN = -1
"""Stands for the bits of any NaN."""


def float_of(bits: int) -> float:
    """The F32 with these bits."""
    number: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return number


def bits_of(number: float) -> int:
    """Bits of the F32 that is nearest, ties to even."""
    if math.isnan(number):
        return NAN
    try:
        bits: int = struct.unpack("<I", struct.pack("<f", number))[0]
    except OverflowError:
        return 0xFF800000 if number < 0 else 0x7F800000
    return bits


def nearest_bf16(bits: int) -> int:
    below, rest = divmod(bits, 2**16)
    return below + (rest > 2**15 or (rest == 2**15 and below % 2 == 1))


def nearest_f16(bits: int) -> int:
    try:
        half: int = struct.unpack("<H", struct.pack("<e", float_of(bits)))[0]
    except OverflowError:
        return 0xFC00 if bits >> 31 else 0x7C00
    return half


def decode_by_the_table(
    codec: str, dtype: str, arrays: Mapping[str, Sequence[int]], base: Sequence[int] | None, numel: int
) -> list[int]:
    """Bits of each value, from bits and whole numbers."""
    values = []
    for i in range(numel):
        block, place = divmod(i, 64)
        if codec.endswith("4"):
            pair = arrays["codes"][32 * block + place % 32]
            code = pair % 16 if place < 32 else pair // 16
        else:
            code = arrays["codes"][i]
        if codec.startswith("log"):
            step = arrays["steps"][block] << (8 if codec == "log8" else 12)
            bits = 0 if code == 0 else min((arrays["lows"][block] << 16) + (code - 1) * step, LARGEST)
        elif codec.startswith("tail"):
            assert base is not None
            moved = code * 2**8 if codec == "tail8" else (code - 8) * 2**12
            bits = ((base[i] << 16) + moved) % 2**32
        else:
            # A float of Python holds any product of the two, and rounding a sum twice is as rounding it once.
            scale = float_of(arrays["scales"][block] << 16)
            bits = bits_of((code if codec.endswith("8") else code - 8) * scale)
            if base is not None:
                bits = bits_of((math.nan if bits == NAN else float_of(bits)) + float_of(base[i]))
        if bits == NAN or (bits & 0x7FFFFFFF) > 0x7F800000:
            values.append(NAN)
        else:
            values.append({"F32": lambda bits: bits, "BF16": nearest_bf16, "F16": nearest_f16}[dtype](bits))
    return values


def decode_here(codec: str, dtype: str, arrays: Mapping[str, Values], base: Values | None, numel: int) -> list[int]:
    """The same by our decoder."""
    out = np.empty(numel, storage_type(dtype))
    decode(codec, dtype, arrays, base, out)
    bits = out.view(np.uint32 if dtype == "F32" else np.uint16)
    with np.errstate(invalid="ignore"):
        return [int(each) for each in np.where(np.isnan(widen(out, dtype)), np.int64(NAN), bits.astype(np.int64))]


def as_lists(arrays: Mapping[str, Values]) -> dict[str, list[int]]:
    return {name: [int(each) for each in array] for name, array in arrays.items()}


def as_bits(base: Values | None) -> list[int] | None:
    return None if base is None else [int(each) for each in (base.view(np.uint32) if base.itemsize == 4 else base)]


@pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES)
def test_codes_decode_as_the_table_says(codec: str, dtype: str) -> None:
    torch.manual_seed(0)
    for numel, power in product((1, 32, 33, 64, 200), (-40, 0, 10 if dtype == "F16" else 60)):
        values = torch.randn(numel) * torch.randn(numel).exp() * 2.0**power
        values = (values.abs() if codec.startswith("log") else values).to(TORCH_DTYPES[dtype])
        coded = encode(codec, values, values.roll(1) if codec.startswith("delta") else None)
        expected = decode_by_the_table(codec, dtype, as_lists(coded.arrays), as_bits(coded.base), numel)
        assert decode_here(codec, dtype, coded.arrays, coded.base, numel) == expected


@pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES)
@settings(max_examples=40)
@given(numel=st.integers(1, 130), seed=st.integers(0, 2**32))
def test_any_codes_decode_as_the_table_says(codec: str, dtype: str, numel: int, seed: int) -> None:
    arrays, base = random_arrays(codec, numel, seed), None
    random = np.random.default_rng(seed + 1)
    if codec.startswith("delta"):
        base = np.frombuffer(random.bytes(4 * numel), np.float32)
    elif codec.startswith("tail"):
        base = np.frombuffer(random.bytes(2 * numel), np.uint16)
    expected = decode_by_the_table(codec, dtype, as_lists(arrays), as_bits(base), numel)
    assert decode_here(codec, dtype, arrays, base, numel) == expected


EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7F7F, 0x7F80, 0x7FFF, 0x8000, 0xFF7F, 0xFF80, 0xFFFF]


@pytest.mark.parametrize("codec", ["log8", "log4"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_no_second_moment_is_negative_or_no_number_whatever_a_file_says(codec: str, dtype: str) -> None:
    codes = np.arange(256, dtype=np.uint8)
    for low in EXTREMES:
        for step in EXTREMES:
            blocks = 4 if codec == "log8" else 8
            bounds = {"lows": np.full(blocks, low, np.uint16), "steps": np.full(blocks, step, np.uint16)}
            out = np.empty(64 * blocks, storage_type(dtype))
            decode(codec, dtype, {"codes": codes, **bounds}, None, out)
            values = widen(out, dtype)
            assert not np.isnan(values).any()
            assert not np.signbit(values).any()
            # In a 16-bit type, what F32 can hold may be too much.
            assert dtype != "F32" or np.isfinite(values).all()


def check_example(
    codec: str, dtype: str, arrays: dict[str, Values], expected: list[float], base: Values | None
) -> None:
    out = np.empty(len(expected), storage_type(dtype))
    decode(codec, dtype, arrays, base, out)
    assert widen(out, dtype).tolist() == expected


ONE, HALF = 0x3F80, 0x3F00


def packed(**places: int) -> Values:
    """A block of 4-bit codes; of ``low_j``, ``high_j`` with byte j, 0 elsewhere."""
    codes = np.zeros(32, np.uint8)
    for name, code in places.items():
        half, place = name.split("_")
        codes[int(place)] |= code if half == "low" else code << 4
    return codes


def test_int8_is_code_times_scale() -> None:
    arrays = {"codes": np.array([-128, -1, 0, 3, 127], np.int8), "scales": np.array([HALF], np.uint16)}
    check_example("int8", "F32", arrays, [-64.0, -0.5, 0.0, 1.5, 63.5], None)


def test_int4_counts_from_minus_8_and_keeps_halves_of_blocks_together() -> None:
    codes = packed(low_0=15, low_1=7, high_0=0, high_31=9)
    expected = [-8.0] * 64
    expected[0], expected[1], expected[32], expected[63] = 7.0, -1.0, -8.0, 1.0
    check_example("int4", "F32", {"codes": codes, "scales": np.array([ONE], np.uint16)}, expected, None)


def test_each_block_has_its_scale() -> None:
    arrays = {"codes": np.ones(65, np.int8), "scales": np.array([ONE, HALF], np.uint16)}
    check_example("int8", "F32", arrays, [1.0] * 64 + [0.5], None)


def test_delta_is_added_to_its_base() -> None:
    arrays = {"codes": np.array([-2, 0, 5], np.int8), "scales": np.array([HALF], np.uint16)}
    check_example("delta8", "F32", arrays, [9.0, 0.25, -17.5], np.array([10, 0.25, -20], np.float32))


def test_log8_steps_through_the_bits_of_floats() -> None:
    # 2^15 << 8 is one exponent.
    bounds = {"lows": np.array([ONE], np.uint16), "steps": np.array([2**15], np.uint16)}
    codes = np.array([0, 1, 2, 4, 128, 129, 255], np.uint8)
    largest = float(np.finfo(np.float32).max)
    expected = [0.0, 1.0, 2.0, 8.0, 2.0**127, largest, largest]
    check_example("log8", "F32", {"codes": codes, **bounds}, expected, None)


def test_log4_steps_through_the_bits_of_floats() -> None:
    # 2^10 << 12 is half of an exponent, which is linear in between.
    bounds = {"lows": np.array([ONE], np.uint16), "steps": np.array([2**10], np.uint16)}
    expected = [0.0] * 64
    expected[0], expected[1], expected[2], expected[32] = 1.0, 1.5, 2.0, 3.0
    check_example("log4", "F32", {"codes": packed(low_0=1, low_1=2, low_2=3, high_0=4), **bounds}, expected, None)


def test_tail8_is_added_to_the_bits_of_its_base() -> None:
    base = np.array([ONE, ONE, ONE, ONE | 0x8000], np.uint16)
    codes = np.array([0, 127, -128, 1], np.int8)
    expected = [1.0, 1 + 127 / 2**15, 1 - 2**-9, -1 - 2**-15]
    check_example("tail8", "F32", {"codes": codes}, expected, base)


def test_tail4_is_added_to_the_bits_of_its_base() -> None:
    codes = packed(low_0=15, low_1=8, high_0=0)
    expected = [1 - 2**-9] * 64
    expected[0], expected[1], expected[32] = 1 + 7 / 2**11, 1.0, 1 - 2**-9
    check_example("tail4", "F32", {"codes": codes}, expected, np.full(64, ONE, np.uint16))


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        (0x3F80, [1.0, 127.0]),
        # 127 x (1 + 2^-7) = 127.9921875, and 128 is the nearest BF16.
        (0x3F81, [1.0078125, 128.0]),
    ],
)
def test_bf16_is_rounded_at_the_end(scale: int, expected: list[float]) -> None:
    arrays = {"codes": np.array([1, 127], np.int8), "scales": np.array([scale], np.uint16)}
    check_example("int8", "BF16", arrays, expected, None)


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        # Ties go to the even one; lows cannot say this much, steps can.
        (0x3F808000, 0x3F80),
        (0x3F818000, 0x3F82),
        (0x3F808100, 0x3F81),
        (0x3F807F00, 0x3F80),
    ],
)
def test_ties_are_rounded_to_even(bits: int, expected: int) -> None:
    low, step = divmod(bits, 2**16)
    arrays = {
        "codes": np.array([2], np.uint8),
        "lows": np.array([low], np.uint16),
        "steps": np.array([step >> 8], np.uint16),
    }
    out = np.empty(1, np.uint16)
    decode("log8", "BF16", arrays, None, out)
    assert out[0] == expected
