from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch

from llmtailor.shards import Shard
from llmtailor.tensor_filling import FileFiller, Spread, Target, plan_filling
from llmtailor.tensors import ByteRange
from tensor_content import host_bytes

SHAPES = [(), (1,), (0, 3), (7,), (5, 3), (2, 3, 4, 5)]
DTYPES = [torch.bool, torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int64, torch.complex64]


def values(shape: tuple[int, ...], dtype: torch.dtype, generator: random.Random) -> torch.Tensor:
    count = torch.Size(shape).numel() * dtype.itemsize
    content = bytearray(generator.randbytes(count) if dtype != torch.bool else generator.choices([0, 1], k=count))
    flat = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    fresh = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
    return bytes(host_bytes(fresh)) if tensor.numel() else b""


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).permute(tuple(range(tensor.ndim))[::-1])


def every_other(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((*tensor.shape, 2), dtype=tensor.dtype)[..., 0]


def parameter(tensor: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(torch.zeros_like(tensor), requires_grad=tensor.is_floating_point())


def within_a_larger_one(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros(tensor.numel() + 3, dtype=tensor.dtype)[3:].reshape(tensor.shape)


def fill(content: bytes, targets: Sequence[tuple[ByteRange, torch.Tensor | Spread]], piece_nbytes: int) -> None:
    filler, buffer = FileFiller(targets), bytearray(piece_nbytes)
    for offset in range(0, len(content), piece_nbytes):
        piece = content[offset : offset + piece_nbytes]
        buffer[: len(piece)] = piece
        filler.put(offset, memoryview(buffer)[: len(piece)])
        buffer[:] = b"\xee" * piece_nbytes  # the buffer is used again


@pytest.mark.parametrize("make", [contiguous, transposed, every_other, parameter, within_a_larger_one])
@pytest.mark.parametrize("piece_nbytes", [1, 16, 61, 4096])
def test_tensors_take_their_bytes_wherever_pieces_begin(
    make: Callable[[torch.Tensor], torch.Tensor], piece_nbytes: int
) -> None:
    generator = random.Random(5)
    content = bytearray(generator.randbytes(11))  # a header, which belongs to no tensor
    targets, expected = [], []
    for index, (dtype, shape) in enumerate((dtype, shape) for dtype in DTYPES for shape in SHAPES):
        wanted = values(shape, dtype, generator)
        data = bytes(host_bytes(wanted)) if wanted.numel() else b""
        if index % 5 != 3:  # those in between are passed over
            expected.append((make(wanted), data))
            targets.append((ByteRange(start=len(content), end=len(content) + len(data)), expected[-1][0]))
        content += data
    fill(bytes(content), targets, piece_nbytes)
    for found, data in expected:
        assert bytes_of(found) == data


def test_what_is_beside_a_strided_tensor_stays() -> None:
    whole = torch.full((4, 6), 7, dtype=torch.int16)
    wanted = torch.arange(12, dtype=torch.int16).reshape(4, 3)
    fill(bytes(host_bytes(wanted)), [(ByteRange(start=0, end=24), whole[:, ::2])], 5)
    assert torch.equal(whole[:, ::2], wanted)
    assert bool((whole[:, 1::2] == 7).all())


def test_flagged_views_get_the_values_and_not_the_bytes() -> None:
    wanted = torch.tensor([1 + 2j, 3 - 4j])
    target = torch.zeros(2, dtype=torch.complex64)
    fill(bytes(host_bytes(wanted)), [(ByteRange(start=0, end=16), target.conj())], 7)
    assert torch.equal(target.conj(), wanted)
    negated = torch.zeros(2, dtype=torch.complex64)
    fill(bytes(host_bytes(wanted.imag)), [(ByteRange(start=0, end=8), negated.conj().imag)], 8)
    assert torch.equal(negated.conj().imag, wanted.imag)


@pytest.mark.gpu
@pytest.mark.parametrize("make", [contiguous, transposed])
def test_tensors_on_a_device_take_their_bytes(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    wanted = values((33, 65), torch.bfloat16, random.Random(1))
    target = make(wanted).cuda()
    assert target.stride() == make(wanted).stride()
    fill(bytes(host_bytes(wanted)), [(ByteRange(start=0, end=wanted.numel() * 2), target)], 1000)
    assert bytes(host_bytes(target)) == bytes(host_bytes(wanted))


# Shards


@pytest.mark.parametrize("piece_nbytes", [1, 7, 64, 4096])
@pytest.mark.parametrize("seed", range(40))
def test_several_targets_take_what_a_shard_has_of_them_wherever_pieces_begin(seed: int, piece_nbytes: int) -> None:
    generator = random.Random(seed)
    shape = tuple(generator.randint(1, 5) for _ in range(generator.randint(0, 4)))
    saved, *wanted = (random_shard(shape, generator) for _ in range(generator.randint(2, 4)))
    whole = values(shape, torch.int64, generator)
    stored = take(whole, saved)
    targets = [
        Target(tensor=make(torch.full(shard.sizes, 7)).fill_(7), shard=shard)
        for shard, make in zip(wanted, generator.choices([contiguous, transposed, every_other], k=3), strict=False)
    ]
    byte_range = ByteRange(start=24, end=24 + stored.nbytes)
    content = b"\xee" * 24 + bytes_of(stored) + b"\xee" * 9
    fill(content, plan_filling(byte_range, torch.int64, saved, targets), piece_nbytes)
    numbers = torch.arange(whole.numel()).reshape(shape)
    held = take(numbers, saved)
    for target in targets:
        is_there = torch.isin(take(numbers, target.shard), held)
        expected = torch.where(is_there, take(whole, target.shard), 7)
        assert torch.equal(target.tensor, expected)


def random_shard(shape: tuple[int, ...], generator: random.Random) -> Shard:
    is_run = generator.random() < 0.5
    space = (torch.Size(shape).numel(),) if is_run else shape
    offsets = tuple(generator.randint(0, size // 2) for size in space)
    sizes = tuple(generator.randint(0, size - offset) for size, offset in zip(space, offsets, strict=True))
    return Shard(shape=shape, offsets=offsets, sizes=sizes, is_run=is_run)


def take(whole: torch.Tensor, shard: Shard) -> torch.Tensor:
    space = whole.reshape(-1) if shard.is_run else whole
    return space[tuple(slice(at, at + size) for at, size in zip(shard.offsets, shard.sizes, strict=True))]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(10))
def test_targets_on_a_device_take_what_a_shard_has_of_them(seed: int) -> None:
    generator = random.Random(seed)
    saved, wanted = (random_shard((5, 6, 3), generator) for _ in range(2))
    whole = values((5, 6, 3), torch.bfloat16, generator)
    stored = take(whole, saved)
    target = Target(tensor=torch.zeros(wanted.sizes, dtype=torch.bfloat16, device="cuda"), shard=wanted)
    planned = plan_filling(ByteRange(start=0, end=stored.nbytes), torch.bfloat16, saved, [target])
    fill(bytes_of(stored), planned, 61)
    numbers = torch.arange(90).reshape(5, 6, 3)
    # torch 2.11 compares with contiguous tensors alone.
    held = torch.isin(take(numbers, wanted).contiguous(), take(numbers, saved).contiguous())
    found, expected = target.tensor.cpu().view(torch.int16), take(whole, wanted).contiguous().view(torch.int16)
    assert torch.equal(found, torch.where(held, expected, 0))
