"""Casts against torch's, bit for bit, and sums against exact arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtailor.assembly.arithmetic import check_arithmetic, compute
from llmtailor.assembly.segments import Computed, Copy
from llmtailor.errors import UnsupportedError
from llmtailor.tensor_refs import (
    AveragedTensor,
    CastTensor,
    Extent,
    FileTensor,
    InlineTensor,
    ScaledTensor,
    TensorRef,
)
from llmtailor.tensors import TensorMeta

TORCH_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BITS = {"F64": np.uint64, "F32": np.uint32, "F16": np.uint16, "BF16": np.uint16}
BLOCK_NUMEL = 1000


def no_files(copies: Sequence[Copy], target: memoryview) -> None:
    raise AssertionError(copies)


def inline(bits: Any, dtype: str) -> InlineTensor:
    return InlineTensor(meta=TensorMeta(dtype=dtype, shape=(len(bits),)), data=bits.astype(BITS[dtype]).tobytes())


def cast(source: TensorRef, dtype: str) -> CastTensor:
    return CastTensor(meta=TensorMeta(dtype=dtype, shape=source.meta.shape), source=source)


def bits_of(tensor: TensorRef) -> Any:
    """The computed tensor's bits."""
    target = bytearray(tensor.meta.nbytes)
    segment = Computed(at=0, nbytes=len(target), tensor=tensor, first=0)
    compute(segment, memoryview(target), no_files, block_numel=BLOCK_NUMEL)
    return np.frombuffer(target, BITS[tensor.meta.dtype])


def torch_bits(bits: Any, source: str, target: str) -> Any:
    tensor = torch.frombuffer(bytearray(bits.astype(BITS[source]).tobytes()), dtype=TORCH_TYPES[source])
    return tensor.to(TORCH_TYPES[target]).view(torch.uint8).numpy().view(BITS[target])


def is_nan(bits: Any, dtype: str) -> Any:
    exponent, rest = {"F64": (11, 52), "F32": (8, 23), "F16": (5, 10), "BF16": (8, 7)}[dtype]
    magnitude = bits & BITS[dtype]((1 << (exponent + rest)) - 1)
    return magnitude > BITS[dtype](((1 << exponent) - 1) << rest)


def patterns(dtype: str) -> Any:
    """All of a type of 16 bits; of the others random ones, round numbers, and what lies half-way for a smaller type."""
    if dtype in ("F16", "BF16"):
        return np.arange(2**16, dtype=np.uint16)
    generator = np.random.default_rng(0)
    kind, signed = BITS[dtype], {"F32": np.float32, "F64": np.float64}[dtype]
    anything = generator.integers(0, 2 ** (8 * np.dtype(kind).itemsize), 200_000, dtype=kind)
    with np.errstate(all="ignore"):
        halves = [
            torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(TORCH_TYPES[small]).to(torch.float64).numpy()
            for small in ("F16", "BF16")
        ]
        middles = [(values[:-1] + values[1:]) / 2 for values in halves]
        near = [middle * factor for middle in middles for factor in (1.0, 1 + 2**-40, 1 - 2**-40, 1 + 2**-22)]
        scales = [generator.standard_normal(100_000) * 10.0 ** generator.integers(-46, 42, 100_000)]
        finite = np.concatenate([*halves, *near, *scales]).astype(signed).view(kind)
    return np.concatenate([anything, finite])


@pytest.mark.parametrize("target", list(TORCH_TYPES))
@pytest.mark.parametrize("source", list(TORCH_TYPES))
def test_cast_has_torchs_bits(source: str, target: str) -> None:
    bits = patterns(source)
    ours = bits_of(cast(inline(bits, source), target)) if source != target else bits
    theirs = torch_bits(bits, source, target)
    nan = is_nan(bits, source)
    assert np.array_equal(ours[~nan], theirs[~nan])
    assert is_nan(ours[nan], target).all()
    assert is_nan(theirs[nan], target).all()
    # Of a NaN in 16 bits, torch keeps as much as the machine's instructions do; in the others all.
    if target in ("F32", "F64") and source != target:
        assert np.array_equal(ours[nan], theirs[nan])


@pytest.mark.parametrize("dtype", list(TORCH_TYPES))
def test_nan_stays_quiet_nan(dtype: str) -> None:
    source = inline(np.array([0x7F800001, 0xFF812345, 0x7FC00000], np.uint32), "F32")
    bits = bits_of(ScaledTensor(source=cast(source, dtype), factor=0.5))
    assert is_nan(bits, dtype).all()


def nearest(value: Fraction, dtype: str) -> float:
    """A finite number rounded to nearest even, by looking at its neighbours."""
    mantissa, least = {"F32": (24, -149), "F16": (11, -24), "BF16": (8, -133)}[dtype]
    if not value:
        return 0.0
    exponent = 0
    magnitude = abs(value)
    while Fraction(2) ** (exponent + 1) <= magnitude:
        exponent += 1
    while Fraction(2) ** exponent > magnitude:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - mantissa + 1, least)
    return float(round(value / unit) * unit)  # round() of a Fraction is to even


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_scaled_tensor_is_rounded_once(dtype: str) -> None:
    generator = np.random.default_rng(1)
    values = torch.from_numpy(generator.standard_normal(3000) * 2.0 ** generator.integers(-22, 12, 3000))
    stored = values.to(TORCH_TYPES[dtype])
    factor = 0.9 / 1.1
    source = inline(stored.view(torch.uint8).numpy().view(BITS[dtype]), dtype)
    ours = torch.from_numpy(bits_of(ScaledTensor(source=source, factor=factor)).view(np.uint8).copy())
    expected = [nearest(Fraction(value * factor), dtype) for value in stored.double().tolist()]
    assert ours.view(TORCH_TYPES[dtype]).double().tolist() == expected


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_way_numbers_are_not_rounded_twice(dtype: str) -> None:
    # Just above the middle between two neighbours, by less than F32 can tell.
    above = 1.0 + (2**-11 if dtype == "F16" else 2**-8) + 2**-40
    source = inline(np.array([above, -above]).view(np.uint64), "F64")
    average = AveragedTensor(meta=TensorMeta(dtype=dtype, shape=(2,)), sources=(source,), weights=(1.0,))
    one_up = 1.0 + (2**-10 if dtype == "F16" else 2**-7)
    data = torch.from_numpy(bits_of(average).view(np.uint8).copy()).view(TORCH_TYPES[dtype])
    assert data.tolist() == [one_up, -one_up]


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_what_is_too_large_is_infinite_and_what_is_too_small_is_zero(dtype: str) -> None:
    source = inline(np.array([1e300, -1e300, 1e-300, -1e-300, np.inf, 3.4e38]).view(np.uint64), "F64")
    average = AveragedTensor(meta=TensorMeta(dtype=dtype, shape=(6,)), sources=(source,), weights=(1.0,))
    data = torch.from_numpy(bits_of(average).view(np.uint8).copy()).view(TORCH_TYPES[dtype])
    large = torch.tensor(3.4e38, dtype=torch.float64).to(TORCH_TYPES[dtype]).item()
    assert data.tolist() == [np.inf, -np.inf, 0.0, -0.0, np.inf, large]
    assert torch.signbit(data).tolist() == [False, True, False, True, False, False]


def test_average_mixes_types() -> None:
    generator = np.random.default_rng(2)
    single = generator.standard_normal(3000).astype(np.float32)
    half = generator.standard_normal(3000).astype(np.float16)
    average = AveragedTensor(
        meta=TensorMeta(dtype="F32", shape=(3000,)),
        sources=(inline(single.view(np.uint32), "F32"), inline(half.view(np.uint16), "F16")),
        weights=(0.3, 0.7),
    )
    expected = (single.astype(np.float64) * 0.3 + half.astype(np.float64) * 0.7).astype(np.float32)
    assert np.array_equal(bits_of(average), expected.view(np.uint32))


@pytest.mark.parametrize(("first", "nbytes"), [(0, 20), (1, 2), (3, 13), (4, 8), (18, 2), (7, 1)])
def test_a_piece_may_begin_and_end_inside_an_element(first: int, nbytes: int) -> None:
    tensor = cast(inline(np.arange(5, dtype=np.float64).view(np.uint64), "F64"), "F32")
    whole = np.arange(5, dtype=np.float32).tobytes()
    target = bytearray(nbytes)
    segment = Computed(at=0, nbytes=nbytes, tensor=tensor, first=first)
    compute(segment, memoryview(target), no_files, block_numel=2)
    assert target == whole[first : first + nbytes]


def test_operands_are_fetched_block_by_block() -> None:
    numel = 2500
    content = np.arange(numel, dtype=np.float32).tobytes()
    half = numel // 2
    extents = (
        Extent(path=Path("a"), offset=half * 4, start=0, numel=numel - half),
        Extent(path=Path("a"), offset=0, start=numel - half, numel=half),
    )
    source = FileTensor(meta=TensorMeta(dtype="F32", shape=(numel,)), extents=extents)
    asked: list[int] = []

    def fetch(copies: Sequence[Copy], target: memoryview) -> None:
        asked.append(sum(copy.nbytes for copy in copies))
        for copy in copies:
            target[copy.at : copy.at + copy.nbytes] = content[copy.offset : copy.offset + copy.nbytes]

    tensor = ScaledTensor(source=source, factor=2.0)
    target = bytearray(numel * 4)
    segment = Computed(at=0, nbytes=len(target), tensor=tensor, first=0)
    compute(segment, memoryview(target), fetch, block_numel=1000)
    expected = np.roll(np.arange(numel, dtype=np.float32), -half) * 2
    assert target == expected.tobytes()
    assert asked == [4000, 4000, 2000]


def test_integers_are_refused() -> None:
    integers = InlineTensor(meta=TensorMeta(dtype="I64", shape=(1,)), data=bytes(8))
    check_arithmetic(integers)
    for tensor in (ScaledTensor(source=integers, factor=2.0), cast(cast(integers, "F32"), "F16")):
        with pytest.raises(UnsupportedError) as caught:
            check_arithmetic(tensor)
        assert caught.value.kind == "dtype"
        assert caught.value.found == "I64"
