"""Numbers into codes and back: never further off than a codec promises, and measured as far off as they are."""

from __future__ import annotations

from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from coded_tensors import (
    CODECS_AND_DTYPES,
    TORCH_DTYPES,
    Coded,
    bits_of,
    by_element,
    encode,
    numbers,
    widen,
)
from llmtailor.codecs.decoding import Values, decode, decode_tensor, frames_of, storage_type, unpack_frame
from llmtailor.codecs.deviation import Deviation
from llmtailor.codecs.encoding import KERNELS, pack_frame
from llmtailor.codecs.stored import BLOCK_NUMEL, FRAME_NUMEL, StoredCodes
from llmtailor.tensors import TensorMeta

NUMELS = [1, 63, 64, 65, 4096]
# More than is decoded at a time.
LARGE_NUMEL = 2**16 + 1
LARGE_KINDS = {"heavy", "decayed"}
LEVELS = {"8": 127, "4": 7}
# Numbers of a logarithmic codec, and by how many bits its steps are shifted.
LOG = {"log8": (255, 8), "log4": (15, 12)}
TAIL = {"tail8": (127, 8), "tail4": (7, 12)}
SMALLEST_NORMAL = 2.0**-126
ALL = pytest.mark.parametrize(("codec", "dtype"), CODECS_AND_DTYPES)

KINDS = [
    "random",
    "heavy",
    "constant",
    "tiny",
    "denormal",
    "huge",
    "zeros",
    "mixed",
    "outliers",
    "negative zeros",
    "decayed",
    "wide",
]


def make_values(kind: str, numel: int, dtype: str, *, is_positive: bool) -> torch.Tensor:
    """Flat values of a kind, those that F16 can hold if it is of that type."""
    generator = torch.Generator().manual_seed(len(kind) + numel)
    normal = torch.randn(numel, generator=generator)
    uniform = torch.rand(numel, generator=generator)
    is_half = dtype == "F16"
    match kind:
        case "random":
            values = normal
        case "heavy":
            values = normal * (2 * torch.randn(numel, generator=generator)).exp()
        case "constant":
            values = torch.full((numel,), 0.3)
        case "tiny":
            values = normal * (1e-6 if is_half else 1e-30)
        case "denormal":
            values = normal * (2**-20 if is_half else 2**-135)
        case "huge":
            values = normal * (1e4 if is_half else 1e30)
        case "zeros":
            values = torch.zeros(numel)
        case "mixed":
            values = torch.where(uniform < 0.5, 0.0, normal)
        case "outliers":
            values = torch.where(torch.arange(numel) % BLOCK_NUMEL == 5, 1e3, 1e-3) * normal
        case "negative zeros":
            values = torch.where(uniform < 0.5, -0.0, 0.0)
            values[numel // 2 :: 200] = 1.0
        case "decayed":
            values = torch.exp2(-149 * uniform)
        case "wide":
            values = torch.exp2((40 if is_half else 252) * uniform - (24 if is_half else 133))
    if is_half:
        values = values.clamp(-6e4, 6e4)
    # Of zeros, abs() would hide those with a sign.
    return (
        torch.where(values < 0, -values, values).to(TORCH_DTYPES[dtype])
        if is_positive
        else values.to(TORCH_DTYPES[dtype])
    )


def make_coded(codec: str, dtype: str, kind: str, numel: int) -> tuple[torch.Tensor, Coded]:
    """Values, and the same in codes; those of ``delta`` a little off what they are relative to."""
    values = make_values(kind, numel, dtype, is_positive=codec.startswith("log"))
    if not codec.startswith("delta"):
        return values, encode(codec, values)
    change = make_values(kind, numel, dtype, is_positive=False).flip(0) * 1e-3
    return values, encode(codec, values, values + change)


def check_near(coded: Coded, values: torch.Tensor) -> None:
    """What was decoded, before it was rounded to its own type, is as near as the codec promises."""
    true, decoded = numbers(values), widen(coded.decode("F32"), "F32")
    assert np.isfinite(decoded).all()
    if coded.codec.startswith("log"):
        check_logarithmic(coded, true, decoded)
    elif coded.codec.startswith("tail"):
        check_tail(coded, true, decoded)
    else:
        check_linear(coded, true, decoded)


def check_linear(coded: Coded, true: Values, decoded: Values) -> None:
    base = np.zeros_like(true) if coded.base is None else widen(coded.base, "F32")
    scales = by_element(widen(coded.arrays["scales"], "BF16"), coded.numel)
    # A scale that is no normal number is a multiple of 2^-133, and none of what is below 2^-143.
    rounding = 2.0**-23 * np.maximum(np.abs(base), np.abs(true)) if coded.codec.startswith("delta") else 0
    assert (np.abs(decoded - true) <= scales * (0.5 + 2**-16) + rounding + 2.0**-142).all()
    largest = np.maximum.reduceat(np.abs(true - base), np.arange(0, coded.numel, BLOCK_NUMEL))
    smallest_scales = (largest + 2.0**-149) / LEVELS[coded.codec[-1]] * (1 + 2**-7) + 2.0**-133
    assert (widen(coded.arrays["scales"], "BF16") <= smallest_scales * (1 + 2**-20)).all()
    assert (decoded[(true == 0) & (base == 0)] == 0).all()


def check_logarithmic(coded: Coded, true: Values, decoded: Values) -> None:
    levels, shift = LOG[coded.codec]
    assert ((decoded == 0) == (true == 0)).all()
    assert not np.signbit(decoded).any()
    lows = coded.arrays["lows"].astype(np.int64) << 16
    steps = coded.arrays["steps"].astype(np.int64) << shift
    low, step = by_element(lows, coded.numel), by_element(steps, coded.numel)
    is_there, is_below = true != 0, bits_of(true) < low
    assert (np.abs(bits_of(decoded) - bits_of(true)) <= step * (0.5 + 2**-12))[is_there & ~is_below].all()
    # The smallest BF16 stands for all below it.
    assert (decoded == 2.0**-133)[is_there & is_below].all()
    starts = np.arange(0, coded.numel, BLOCK_NUMEL)
    smallest = np.minimum.reduceat(np.where(is_there, bits_of(true), 2**40), starts)
    largest = np.maximum.reduceat(np.where(is_there, bits_of(true), 0), starts)
    has_any = largest > 0
    assert (lows == np.maximum(smallest >> 16, 1) << 16)[has_any].all()
    spans = np.where(has_any, np.maximum(largest - lows, 0), 0)
    assert (steps >> shift == -(-spans // ((levels - 1) << shift))).all()


def check_tail(coded: Coded, true: Values, decoded: Values) -> None:
    levels, shift = TAIL[coded.codec]
    assert coded.base is not None
    # In whole numbers that differ by one where two F32 of one sign are neighbours.
    halves = (coded.base.astype(np.uint32) << np.uint32(16)).view(np.int32).astype(np.int64)
    rest = bits_of(true) - halves
    codes = np.minimum(np.floor(rest / 2**shift + 0.5), levels)
    assert (bits_of(decoded) - halves == codes * 2**shift).all()
    assert (np.abs(bits_of(decoded) - bits_of(true)) <= np.where(codes < levels, 2 ** (shift - 1), 2**shift)).all()


def check_measures(coded: Coded, values: torch.Tensor) -> None:
    """What was measured is what can be computed from the decoded values."""
    true, decoded = numbers(values), widen(coded.decode(), coded.dtype)
    error_sq, norm_sq, largest, magnitude, factor = coded.measures.double().tolist()
    assert magnitude == np.abs(true).max()
    assert np.log2(factor).is_integer()
    assert magnitude < SMALLEST_NORMAL or 1 <= magnitude * factor < 2
    # Squares below 2^-149 vanish beside a sum of at least 1.
    assert error_sq == pytest.approx((((decoded - true) * factor) ** 2).sum(), rel=1e-5, abs=2e-39)
    assert norm_sq == pytest.approx(((true * factor) ** 2).sum(), rel=1e-5, abs=2e-39)
    if not coded.codec.startswith("log"):
        # A difference of two F32 is rounded to one.
        assert largest == pytest.approx(np.abs(decoded - true).max(), rel=2**-23, abs=2.0**-149)
        return
    is_far = true >= SMALLEST_NORMAL
    off = np.abs(bits_of(decoded) - bits_of(true))[is_far].max(initial=0)
    assert largest >= off
    if coded.dtype == "F32":
        steps = coded.arrays["steps"].astype(np.int64) << LOG[coded.codec][1]
        assert largest == pytest.approx(steps.max() / 2, rel=2**-23)
    elif is_far[true != 0].all():
        assert largest == pytest.approx(off, rel=2**-23)


def rounded(values: Values, dtype: str) -> Values:
    """F32 in their own type, as torch rounds them; as they lie in memory."""
    result = torch.from_numpy(values.copy()).to(TORCH_DTYPES[dtype])
    return (result.view(torch.int16) if dtype == "BF16" else result).numpy().view(storage_type(dtype))


@ALL
@pytest.mark.parametrize("kind", KINDS)
def test_values_come_back_as_near_as_promised_and_measured(codec: str, dtype: str, kind: str) -> None:
    for numel in [*NUMELS, LARGE_NUMEL] if kind in LARGE_KINDS else NUMELS:
        values, coded = make_coded(codec, dtype, kind, numel)
        check_near(coded, values)
        check_measures(coded, values)
        assert (coded.decode() == rounded(coded.decode("F32"), dtype)).all()


def test_the_checks_see_a_code_that_is_off_by_one() -> None:
    for codec in KERNELS:
        values, coded = make_coded(codec, "F32", "random", 65)
        array = coded.arrays["codes"]
        # Off by two where codes go by twos, so that an error cannot become a smaller one.
        array[3] += np.array(2 if array[3] < 100 else -2).astype(array.dtype)
        with pytest.raises(AssertionError):
            check_near(coded, values)
        with pytest.raises(AssertionError):
            check_measures(coded, values)


@st.composite
def tensors(draw: st.DrawFn, dtype: str, *, is_positive: bool) -> torch.Tensor:
    """Any numbers that codes can stand for, a few of them often."""
    largest = 65504.0 if dtype == "F16" else 2.0**119
    floats = st.floats(0.0 if is_positive else -largest, largest, width=32)
    pool = draw(st.lists(floats, min_size=1, max_size=20))
    places = draw(st.lists(st.integers(0, len(pool) - 1), min_size=1, max_size=130))
    return torch.tensor([pool[place] for place in places]).to(TORCH_DTYPES[dtype])


@ALL
@settings(max_examples=30)
@given(data=st.data())
def test_any_values_come_back_as_near_as_promised_and_measured(codec: str, dtype: str, data: st.DataObject) -> None:
    values = data.draw(tensors(dtype, is_positive=codec.startswith("log")))
    base = None
    if codec.startswith("delta"):
        base = data.draw(tensors(dtype, is_positive=False))
        base = base.repeat(-(-values.numel() // base.numel()))[: values.numel()]
    coded = encode(codec, values, base)
    check_near(coded, values)
    # Rounding a scale up may lead beyond what F16 can hold, which the measures tell.
    if np.isfinite(widen(coded.decode(), dtype)).all() and base is None:
        check_measures(coded, values)
    elif base is None:
        assert not coded.measures.isfinite().all()


@pytest.mark.parametrize("codec", ["log8", "log4"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@settings(max_examples=50)
@given(data=st.data())
def test_a_second_moment_is_zero_where_it_was_and_nowhere_else(codec: str, dtype: str, data: st.DataObject) -> None:
    # All exponents are as likely, those of denormals too.
    bits = data.draw(st.lists(st.integers(0, 2**30 if dtype == "F16" else 0x7B000000), min_size=1, max_size=130))
    values = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    values = (values * 2.0**-64 if dtype == "F16" else values).to(TORCH_DTYPES[dtype]).clamp_max(6e4)
    decoded = widen(encode(codec, values).decode(), dtype)
    assert ((decoded == 0) == (numbers(values) == 0)).all()
    assert (decoded >= 0).all()


@pytest.mark.parametrize("codec", ["log8", "log4"])
def test_denormals_below_any_bf16_stay_numbers(codec: str) -> None:
    values = torch.tensor([0, 1, 100, 65535], dtype=torch.int32).view(torch.float32)
    decoded = encode(codec, values).decode()
    assert decoded[0] == 0
    assert (decoded[1:] > 0).all()


@pytest.mark.parametrize(("codec", "dtype"), [each for each in CODECS_AND_DTYPES if each[1] == "F16"])
def test_what_f16_cannot_hold_is_measured(codec: str, dtype: str) -> None:
    values = torch.tensor([65504.0, 1e-3, 0.3, 60000.0]).to(TORCH_DTYPES[dtype])
    coded = encode(codec, values)
    assert not np.isfinite(coded.decode()).all()
    assert not coded.measures.isfinite().all()


@ALL
def test_what_is_not_finite_is_measured(codec: str, dtype: str) -> None:
    good = torch.ones(130).to(TORCH_DTYPES[dtype])
    base = good.clone() if codec.startswith("delta") else None
    assert encode(codec, good, base).measures.isfinite().all()
    for bad, place in product((np.nan, np.inf, -np.inf), (0, 77, 129)):
        values = good.clone()
        values[place] = bad
        assert not encode(codec, values, base).measures.isfinite().all(), (bad, place)


@pytest.mark.parametrize("codec", ["delta8", "delta4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_base_that_is_not_finite_is_measured(codec: str, bad: float) -> None:
    base = torch.ones(130)
    base[77] = bad
    assert not encode(codec, torch.ones(130), base).measures.isfinite().all()


@pytest.mark.parametrize("codec", ["log8", "log4"])
@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("bad", [-1e-7, -0.5, -1e4])
def test_a_negative_second_moment_is_measured(codec: str, dtype: str, bad: float) -> None:
    values = torch.ones(130).to(TORCH_DTYPES[dtype])
    values[77] = bad
    assert encode(codec, values).measures.isnan().any()


@pytest.mark.parametrize(("codec", "dtype"), [each for each in CODECS_AND_DTYPES if each[1] != "F16"])
@pytest.mark.parametrize("large", [2.0**120, 2.0**127])
def test_values_that_are_too_large_show_in_the_measures(codec: str, dtype: str, large: float) -> None:
    values = torch.ones(130).to(TORCH_DTYPES[dtype])
    values[77] = large
    magnitude = encode(codec, values, values if codec.startswith("delta") else None).measures[3]
    assert magnitude == large


@cache
def make_whole(codec: str, dtype: str, numel: int) -> tuple[Coded, Values]:
    _, coded = make_coded(codec, dtype, "heavy", numel)
    return coded, coded.decode()


@ALL
@settings(max_examples=20)
@given(numel=st.sampled_from([1, 65, 1000, 2**16, 2**16 + 77]), shares=st.sets(st.floats(0, 1), max_size=5))
def test_pieces_decode_to_the_same_bits_as_the_whole(codec: str, dtype: str, numel: int, shares: set[float]) -> None:
    coded, whole = make_whole(codec, dtype, numel)
    cuts = {int(share * numel) // BLOCK_NUMEL * BLOCK_NUMEL for share in shares}
    places = sorted({0, *cuts, numel})
    out = np.full(numel, 7, whole.dtype)
    for start, stop in pairwise(places):
        piece = coded.cut(start, stop)
        decode(codec, dtype, piece.arrays, piece.base, out[start:stop])
    assert (out.view(np.uint8) == whole.view(np.uint8)).all()


@pytest.mark.parametrize("codec", ["delta8", "delta4"])
def test_values_may_take_the_place_of_what_they_are_relative_to(codec: str) -> None:
    _, coded = make_coded(codec, "F32", "heavy", 2**17 + 3)
    assert coded.base is not None
    expected, out = coded.decode(), coded.base.copy()
    decode(codec, "F32", coded.arrays, out, out)
    assert (out == expected).all()


@ALL
def test_decode_tensor_gives_the_same_bytes(codec: str, dtype: str) -> None:
    _, coded = make_coded(codec, dtype, "heavy", 2**16 + 1)
    stored = StoredCodes(codec=codec, meta=TensorMeta(dtype=dtype, shape=(2**16 + 1,)))
    arrays = {name: memoryview(array.tobytes()) for name, array in coded.arrays.items()}
    out = bytearray(stored.meta.nbytes)
    decode_tensor(stored, arrays, coded.base, memoryview(out))
    assert out == coded.decode().tobytes()


@pytest.mark.parametrize(("codec", "name"), [("int8", "scales"), ("delta4", "scales"), ("log8", "lows")])
@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0])
def test_decode_tensor_refuses_scales_that_are_not_finite(codec: str, name: str, bits: int) -> None:
    _, coded = make_coded(codec, "F32", "heavy", 65)
    coded.arrays[name][1] = bits
    stored = StoredCodes(codec=codec, meta=TensorMeta(dtype="F32", shape=(65,)))
    arrays = {name: memoryview(array.tobytes()) for name, array in coded.arrays.items()}
    with pytest.raises(ValueError, match="not finite"):
        decode_tensor(stored, arrays, coded.base, memoryview(bytearray(65 * 4)))


@pytest.mark.parametrize("levels", [128, 8])
def test_every_code_times_every_scale_is_exact_in_f32(levels: int) -> None:
    # Then it is the same whether or not a machine fuses it with the addition of the base.
    scales = (np.arange(2**16, dtype=np.uint32) << np.uint32(16)).view(np.float32)
    scales = scales[np.isfinite(scales)]
    for code in range(-levels, levels):
        with np.errstate(over="ignore"):
            found = np.float32(code) * scales
        exact = float(code) * scales.astype(np.float64)
        assert ((found == exact) | (np.abs(exact) >= 2.0**128)).all()


# xor


COMPRESSOR = zstandard.ZstdCompressor(level=1, write_content_size=True)


def pack(values: Values, base: Values) -> bytes:
    """A frame of values that are given as bits."""
    tensors = [torch.from_numpy(each.view(np.int16).copy()).view(torch.bfloat16) for each in (values, base)]
    return pack_frame(*tensors, COMPRESSOR)


def random_bits(numel: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).integers(0, 2**16, numel, dtype=np.uint16)


@given(st.lists(st.tuples(st.integers(0, 2**16 - 1), st.integers(0, 2**16 - 1) | st.just(0)), min_size=1, max_size=300))
def test_frames_unpack_to_the_same_bits(pairs: list[tuple[int, int]]) -> None:
    base = np.array([pair[0] for pair in pairs], np.uint16)
    values = base ^ np.array([pair[1] for pair in pairs], np.uint16)
    frame = pack(values, base)
    out = np.empty_like(base)
    unpack_frame(memoryview(frame), base, out)
    assert (out == values).all()
    unpack_frame(memoryview(frame), base, base)
    assert (base == values).all()


def test_a_frame_of_small_changes_is_small() -> None:
    base = random_bits(FRAME_NUMEL)
    values = base ^ (random_bits(FRAME_NUMEL, 1) & 3)
    frame = pack(values, base)
    assert len(frame) < FRAME_NUMEL / 2
    out = np.empty_like(base)
    unpack_frame(memoryview(frame), base, out)
    assert (out == values).all()


@pytest.mark.parametrize("numel", [1, 64, FRAME_NUMEL])
def test_what_cannot_be_compressed_is_stored_low_bytes_first(numel: int) -> None:
    values, base = random_bits(numel, 1), random_bits(numel, 2)
    changed = (values ^ base).tobytes()
    frame = pack(values, base)
    assert frame == changed[::2] + changed[1::2]
    out = np.empty_like(base)
    unpack_frame(memoryview(frame), base, out)
    assert (out == values).all()


# Byte 7 has the type of its first block.
GOOD = pack(np.zeros(1000, np.uint16), np.zeros(1000, np.uint16))
# Behind its magic number and its descriptor stand 8 bytes that say what it holds.
HUGE = bytes.fromhex("28b52ffde0") + (2**40).to_bytes(8, "little") + b"\1\0\0"


@pytest.mark.parametrize(
    "frame",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"garbage", id="garbage"),
        pytest.param(GOOD[:-1], id="cut"),
        pytest.param(GOOD + b"x", id="more behind it"),
        pytest.param(GOOD + GOOD, id="two"),
        pytest.param(GOOD[:7] + bytes([GOOD[7] | 6]) + GOOD[8:], id="damaged"),
        pytest.param(COMPRESSOR.compress(bytes(1998)), id="too few values"),
        pytest.param(COMPRESSOR.compress(bytes(2002)), id="too many values"),
        pytest.param(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2002)), id="too many, not said"),
        pytest.param(zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1998)), id="too few, not said"),
        pytest.param(COMPRESSOR.compress(b""), id="no values"),
        pytest.param(HUGE, id="more than there is memory"),
        pytest.param(bytes(1999), id="raw, too short"),
        pytest.param(bytes(2001), id="raw, too long"),
    ],
)
def test_frames_that_are_not_what_they_should_be_are_refused(frame: bytes) -> None:
    base = np.zeros(1000, np.uint16)
    with pytest.raises(ValueError, match="frame"):
        unpack_frame(memoryview(frame), base, np.empty_like(base))


def test_a_frame_need_not_say_its_size() -> None:
    base = random_bits(1000)
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2000))
    out = np.empty_like(base)
    unpack_frame(memoryview(frame), base, out)
    assert (out == base).all()


@given(st.binary(max_size=200), st.booleans())
def test_no_frame_raises_anything_but_value_error(garbage: bytes, has_magic: bool) -> None:
    base = np.zeros(50, np.uint16)
    frame = b"\x28\xb5\x2f\xfd" * has_magic + garbage
    try:
        unpack_frame(memoryview(frame), base, np.empty_like(base))
    except ValueError:
        return
    assert len(frame) == 100 or len(zstandard.ZstdDecompressor().decompress(frame, max_output_size=100)) == 100


def test_frames_follow_each_other() -> None:
    assert frames_of(np.array([3, 3, 10]), 10) == [(0, 3), (3, 3), (3, 10)]
    assert frames_of(np.array([], np.int64), 0) == []


@pytest.mark.parametrize(
    "ends", [[3, 2, 10], [-1, 10], [3, 9], [3, 11], [11, 10], [], [2**63 - 1], [-(2**63), 10], [10, 10, 9]]
)
def test_frames_that_do_not_cover_the_planes_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="cover"):
        frames_of(np.array(ends, np.int64), 10)


def test_decode_tensor_unpacks_every_frame_over_its_base() -> None:
    numel = 2 * FRAME_NUMEL + 5
    base = random_bits(numel)
    values = base ^ (random_bits(numel, 1) & 1)
    parts = [slice(start, start + FRAME_NUMEL) for start in range(0, numel, FRAME_NUMEL)]
    frames = [pack(values[part], base[part]) for part in parts]
    ends = np.cumsum([len(frame) for frame in frames]).astype("<i8")
    stored = StoredCodes(codec="xor", meta=TensorMeta(dtype="BF16", shape=(numel,)))
    assert stored.arrays["ends"].shape == ends.shape
    arrays = {"planes": memoryview(b"".join(frames)), "ends": memoryview(ends.tobytes())}
    out = bytearray(base.tobytes())
    decode_tensor(stored, arrays, np.frombuffer(out, np.uint16), memoryview(out))
    assert out == values.tobytes()


# deviations


def test_deviations_add_up() -> None:
    total = Deviation.of(
        [Deviation(error_sq=3.0, norm_sq=100.0, largest=0.5), Deviation(error_sq=1.0, norm_sq=300.0, largest=0.75)]
    )
    assert total == Deviation(error_sq=4.0, norm_sq=400.0, largest=0.75)
    assert total.l2 == 0.1
    assert not total.is_exact


def test_nothing_deviates_from_nothing() -> None:
    assert Deviation.of([]) == Deviation()
    assert Deviation().is_exact
    assert Deviation().l2 == 0.0
    assert Deviation(norm_sq=1.0).l2 == 0.0


def test_an_error_where_all_is_zero_is_infinite() -> None:
    assert Deviation(error_sq=1e-300).l2 == np.inf
