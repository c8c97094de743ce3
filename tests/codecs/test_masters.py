"""Masters of 16-bit weights: what a weight lacks of its master, and codes that round to the weight."""

from __future__ import annotations

import shutil
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from coded_tensors import to_blocks
from llmtailor.codecs import StoredCodes, array_name, parse_codes, record_codes
from llmtailor.codecs.decoding import cut_ties, decode, decode_tensor
from llmtailor.codecs.encoding import KERNELS, split_master
from llmtailor.codecs.kernels import Kernels, master_codec
from llmtailor.errors import FormatError
from llmtailor.tensors import TensorMeta

# Every lower half under an even and an odd upper half, of either sign, at the ends of a binade and among denormals.
UPPERS = (0x0000, 0x0001, 0x3F80, 0x3F81, 0x3FFF, 0x4000, 0xBF80, 0xBF81, 0xC07F, 0x8000, 0x8001)
LOWER_BITS = np.arange(2**16, dtype=np.uint32)


def float_of(bits: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(bits.astype(np.uint32).view(np.float32).copy())


def all_masters() -> torch.Tensor:
    return float_of(np.concatenate([(np.uint32(upper) << 16) + LOWER_BITS for upper in UPPERS]))


def nearest(master: torch.Tensor) -> torch.Tensor:
    """The weight of a master, as torch makes it."""
    return master.bfloat16()


def bits_of(tensor: torch.Tensor) -> list[int]:
    width = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.view(width).tolist()


def pack(master: torch.Tensor, weight: torch.Tensor) -> dict[str, np.ndarray]:
    found = split_master(master, weight)
    assert found is not None
    return {"codes": found[0].contiguous().numpy(), "ties": found[1].numpy()}


def unpack(arrays: Mapping[str, np.ndarray], weight: torch.Tensor) -> torch.Tensor:
    out = np.empty(weight.numel(), np.float32)
    decode("tail16", "F32", arrays, weight.view(torch.int16).numpy().view("<u2"), out)
    return torch.from_numpy(out)


def stored(numel: int) -> StoredCodes:
    return StoredCodes(codec="tail16", meta=TensorMeta(dtype="F32", shape=(numel,)))


# Without loss


def test_a_master_is_its_weight_and_what_that_lacks() -> None:
    master = all_masters()
    arrays = pack(master, nearest(master))
    assert arrays["codes"].dtype == np.int16
    assert bits_of(unpack(arrays, nearest(master))) == bits_of(master)


def test_ties_are_halves_above_an_even_weight() -> None:
    """By the bits of the weight alone, both halves beside it would be the same code."""
    master = float_of(np.array([0x3F808000, 0x3F818000, 0x3F827FFF, 0x3F838001, 0xBF848000, 0xBF858000]))
    weight = nearest(master)
    assert [bits & 0xFFFF for bits in bits_of(weight)] == [0x3F80, 0x3F82, 0x3F82, 0x3F84, 0xBF84, 0xBF86]
    arrays = pack(master, weight)
    assert arrays["codes"].tolist() == [-0x8000, -0x8000, 0x7FFF, -0x7FFF, -0x8000, -0x8000]
    assert arrays["ties"].tolist() == [0, 4]
    assert bits_of(unpack(arrays, weight)) == bits_of(master)
    without = bits_of(unpack(arrays | {"ties": np.empty(0, np.int64)}, weight))
    assert [place for place, bits in enumerate(bits_of(master)) if without[place] != bits] == [0, 4]


def test_bits_that_are_no_numbers_come_back_too() -> None:
    master = float_of(np.array([0x7F800000, 0xFF800000, 0x7FC00001, 0x7F7FFFFF, 0x80000000, 0x00000001]))
    weight = torch.tensor([0x7F80, 0xFF80 - 2**16, 0x7FC0, 0x7F80, 0x8000 - 2**16, 0], dtype=torch.int16)
    assert bits_of(unpack(pack(master, weight.view(torch.bfloat16)), weight.view(torch.bfloat16))) == bits_of(master)


@pytest.mark.parametrize("change", [1, -1, 2, 256, -0x8000])
def test_another_weight_is_told_from_the_rounded_master(change: int) -> None:
    master = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weight = nearest(master)
    assert split_master(master, weight) is not None
    weight.view(torch.int16)[777] += change
    assert split_master(master, weight) is None


@pytest.mark.parametrize(("bits", "weight"), [(0x3F808000, 0x3F81), (0x3F818000, 0x3F81)])
def test_a_half_that_was_rounded_to_odd_is_another_weight(bits: int, weight: int) -> None:
    master = float_of(np.array([bits, 0x3F800000]))
    assert split_master(master, torch.tensor([weight, 0x3F80], dtype=torch.int16).view(torch.bfloat16)) is None


def test_a_piece_of_a_master_needs_its_own_ties_alone() -> None:
    master = all_masters()
    weight, arrays = nearest(master), pack(master, nearest(master))
    for start, stop in [(0, 64), (0x7FC0, 0x8040), (0x8000, 0x8001), (64, 5 * 2**16 + 13), (2**19, master.numel())]:
        piece = {"codes": arrays["codes"][start:stop], "ties": cut_ties(arrays["ties"], start, stop)}
        assert bits_of(unpack(piece, weight[start:stop])) == bits_of(master[start:stop])


@pytest.mark.parametrize(
    ("ties", "said"),
    [
        ([3, 1], "ascend"),
        ([1, 1], "ascend"),
        ([-1], "ascend"),
        ([640], "ascend"),
        ([2], "a tie is none"),
        ([1], None),
        ([1, 3], None),
        ([], None),
    ],
)
def test_ties_that_make_no_sense_are_refused(ties: list[int], said: str | None) -> None:
    codes = np.zeros(640, np.int16)
    codes[[1, 3]] = -0x8000
    arrays = {
        "codes": memoryview(codes).cast("B"),
        "ties": memoryview(np.array(ties, np.int64).tobytes()),
    }
    out = memoryview(bytearray(4 * 640))
    if said is None:
        decode_tensor(stored(640), arrays, None, out)
    else:
        with pytest.raises(ValueError, match=said):
            decode_tensor(stored(640), arrays, None, out)


def test_there_are_no_more_ties_than_memory_has_room_for() -> None:
    header = record_codes({"k": stored(640)})
    arrays = {
        array_name("k", "codes"): TensorMeta(dtype="I16", shape=(640,)),
        array_name("k", "ties"): TensorMeta(dtype="I64", shape=(10,)),
    }
    assert parse_codes(header, arrays, "file") == {"k": stored(640)}
    for meta in (TensorMeta(dtype="I64", shape=(11,)), TensorMeta(dtype="I32", shape=(1,))):
        with pytest.raises(FormatError) as caught:
            parse_codes(header, arrays | {array_name("k", "ties"): meta}, "file")
        assert caught.value.fqn == "k|ties"


# With loss


def tail(master: torch.Tensor, codec: str, weight: torch.Tensor | None) -> torch.Tensor:
    """What the codes of a master stand for, beside its rounding."""
    arrays = KERNELS[codec](to_blocks(master), None, None if weight is None else to_blocks(weight))
    codes = arrays[0].numpy() if codec == "tail4" else arrays[0][: master.numel()].numpy()
    out = np.empty(master.numel(), np.float32)
    decode(codec, "F32", {"codes": codes}, nearest(master).view(torch.int16).numpy().view("<u2"), out)
    return torch.from_numpy(out)


@pytest.mark.parametrize("codec", ["tail8", "tail4"])
def test_what_a_tail_stands_for_rounds_to_the_weight(codec: str) -> None:
    master = all_masters()
    assert bits_of(nearest(tail(master, codec, nearest(master)))) == bits_of(nearest(master))
    # Of weights without masters nobody asks that; it shows that the test sees it.
    assert bits_of(nearest(tail(master, codec, None))) != bits_of(nearest(master))
    step = 1 << (8 if codec == "tail8" else 12)
    off = [abs(a - b) for a, b in zip(bits_of(tail(master, codec, nearest(master))), bits_of(master), strict=True)]
    assert max(off) <= step
    assert np.mean(np.array(off) <= step // 2) > 0.9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("codec", ["delta8", "delta4"])
def test_the_error_of_rounded_masters_is_that_of_the_weight(codec: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(640, generator=generator)
    master = base + 0.1 * torch.randn(640, generator=generator)
    weight = master.to(dtype)
    codes, scales, _, of_weight = KERNELS[codec](to_blocks(master), to_blocks(base), to_blocks(weight))
    out, rounded = np.empty(640, np.float32), np.empty(640, np.float16 if dtype == torch.float16 else np.uint16)
    arrays = {"codes": codes.numpy(), "scales": scales.numpy().view("<u2")}
    decode(codec, "F32", arrays, base.numpy(), out)
    name = "F16" if dtype == torch.float16 else "BF16"
    decode("round", name, {}, out, rounded)
    decoded = torch.from_numpy(rounded.view(np.int16)).view(dtype)
    assert torch.equal(decoded, torch.from_numpy(out).to(dtype))
    expected = (decoded.double() - weight.double()).square().sum()
    assert expected > 0
    found = of_weight.double()
    torch.testing.assert_close(found[0] / found[4] ** 2, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[1] / found[4] ** 2, weight.double().square().sum(), rtol=1e-5, atol=0)
    assert found[5] == 0
    weight[639] *= 1.01
    assert KERNELS[codec](to_blocks(master), to_blocks(base), to_blocks(weight))[-1][5] == 1


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
# torch 2.13 imports torch.utils.mkldnn, which warns of itself.
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize(("codec", "dtype"), [("delta8", "BF16"), ("tail4", "BF16"), ("delta4", "F16")])
def test_fused_kernels_of_masters_are_the_reference(codec: str, dtype: str) -> None:
    name, numel = master_codec(codec, dtype), 2**15
    kernels = Kernels()
    kernels.compile([(name, torch.float32, torch.device("cpu"))], 2**31)
    generator = torch.Generator().manual_seed(0)
    master = to_blocks(torch.randn(numel, generator=generator))
    base = master + 0.01 * torch.randn(master.shape, generator=generator) if codec.startswith("delta") else None
    weight = master.to(torch.float16 if dtype == "F16" else torch.bfloat16)
    kernel = kernels.get(name, master)
    assert kernel is not KERNELS[codec], "it was not compiled"
    assert kernels.get(codec, master) is KERNELS[codec]
    fused, reference = kernel(master, base, weight), KERNELS[codec](master, base, weight)
    assert len(fused) == len(reference)
    for one, other in zip(fused[:-2], reference[:-2], strict=True):
        assert (one != other).float().mean() < 1e-3
    torch.testing.assert_close(fused[-2], reference[-2], rtol=1e-4, atol=0)
    torch.testing.assert_close(fused[-1], reference[-1], rtol=1e-2, atol=0)
    other = weight.clone()
    other.view(torch.int16)[100, 3] += 1
    assert kernel(master, base, other)[-1][5] == 1
