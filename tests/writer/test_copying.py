"""Tensors into pieces: whatever their strides and their type, the bytes are those of ``host_bytes``."""

from __future__ import annotations

import random
import tracemalloc
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtailor.storage import ALIGNMENT, pad
from llmtailor.writer import weights_image
from llmtailor.writer.copying import ImageReader
from llmtailor.writer.devices import Lanes
from llmtailor.writer.images import FileImage, Part
from llmtailor.writer.pool import HostPool
from tensor_content import host_bytes

PAGE = ALIGNMENT
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bool, torch.uint8, torch.int8]
DTYPES += [torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64, torch.uint64, torch.complex64, *FLOAT8]


def values(shape: Sequence[int], dtype: torch.dtype = torch.float32, *, seed: int = 0) -> torch.Tensor:
    """Any bits at all; NaNs among them."""
    size = torch.empty(0, dtype=dtype).element_size()
    count = size
    for length in shape:
        count *= length
    content = bytearray(random.Random(seed).randbytes(count))
    if dtype is torch.bool:
        content = bytearray(byte & 1 for byte in content)
    raw = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
    return raw.view(dtype).reshape(tuple(shape)) if count else torch.empty(tuple(shape), dtype=dtype)


def read(parts: Sequence[Part], nbytes: int, sizes: Sequence[int]) -> bytes:
    """The file, read in pieces of these many pages, again and again."""
    pool = HostPool(64 * PAGE)
    pool.reserve(64 * PAGE, is_pinned=False)
    reader, content = ImageReader(parts, Lanes()), b""
    number = 0
    while len(content) < nbytes:
        piece = pool.take(sizes[number % len(sizes)] * PAGE, lambda: False)
        assert piece is not None
        piece.bytes[:] = 0xEE
        wanted = min(piece.nbytes, nbytes - len(content))
        reader.fill(piece, wanted)
        content += bytes(piece.buffer[:wanted])
        assert (piece.bytes[wanted:] == 0xEE).all(), "more was copied than asked for"
        pool.give_back(piece)
        number += 1
    return content


def check(image: FileImage, sizes: Sequence[int] = (1,)) -> None:
    # A copy with strides of its own: ``host_bytes`` takes no tensor of one element whose stride is not 1.
    plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in image.tensors]
    expected = image.layout.prefix + b"".join(bytes(host_bytes(tensor)) for tensor in plain)
    assert len(expected) == image.nbytes
    assert read(image.parts, image.nbytes, sizes) == expected


def check_tensor(tensor: torch.Tensor, sizes: Sequence[int] = (1,)) -> None:
    check(weights_image("x", {"before": values([3], torch.uint8), "it": tensor, "after": values([5])}), sizes)


VIEWS = {
    "contiguous": lambda: values([37, 129]),
    "transposed": lambda: values([129, 37]).T,
    "permuted": lambda: values([7, 11, 13, 17]).permute(3, 1, 0, 2),
    "rows cut out": lambda: values([80, 129])[3:70],
    "columns cut out": lambda: values([80, 200])[:, 3:70],
    "every third": lambda: values([300, 60])[::3, ::2],
    "channels last": lambda: values([4, 16, 9, 9]).to(memory_format=torch.channels_last),
    "expanded": lambda: values([1, 129]).expand(70, 129),
    "all strides 0": lambda: values([]).expand(50, 60),
    "strides 0 in the middle": lambda: values([40, 1, 60]).expand(40, 7, 60),
    "overlapping": lambda: values([2000]).as_strided((50, 100), (13, 2)),
    "of no dimensions": lambda: values([]),
    "of one element": lambda: values([1, 1, 1]),
    "of one element with a stride": lambda: values([9])[::3][:1],
    "empty": lambda: values([0]),
    "empty in the middle": lambda: values([5, 0, 7]),
    "long and thin": lambda: values([5000, 1]).T,
    "row longer than a piece": lambda: values([3000, 3]).T,
    "flipped": lambda: values([40, 50]).flip(0),
    "conjugated": lambda: values([30, 70], torch.complex64).conj(),
    "conjugated and transposed": lambda: values([30, 70], torch.complex64).T.conj(),
    "negative": lambda: torch._neg_view(values([30, 70])),
    "negative and cut out": lambda: torch._neg_view(values([70, 70])[:, 3:40]),
    "imaginary parts": lambda: values([30, 70], torch.complex64).imag,
    "imaginary parts of a conjugate": lambda: values([30, 70], torch.complex64).conj().imag,
    "with a gradient": lambda: torch.nn.Parameter(values([40, 50]).nan_to_num()).detach(),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("sizes", [(1,), (2, 1, 5), (16,)], ids=str)
def test_every_kind_of_view(view: str, sizes: tuple[int, ...]) -> None:
    check_tensor(VIEWS[view](), sizes)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_transposed", [False, True], ids=["contiguous", "transposed"])
def test_every_element_type(dtype: torch.dtype, is_transposed: bool) -> None:
    tensor = values([61, 83], dtype)
    check_tensor(tensor.T if is_transposed else tensor)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 40), max_size=4))
    while torch.Size(shape).numel() > 30_000:
        shape = shape[:-1]
    tensor = values(shape, draw(st.sampled_from(DTYPES)), seed=draw(st.integers(0, 99)))
    for _ in range(draw(st.integers(0, 3))):
        if tensor.dim():
            dim = draw(st.integers(0, tensor.dim() - 1))
            length = tensor.shape[dim]
            match draw(st.sampled_from(["permute", "slice", "expand", "select"])):
                case "permute":
                    tensor = tensor.permute(draw(st.permutations(range(tensor.dim()))))
                case "slice":
                    start = draw(st.integers(0, length))
                    tensor = tensor.narrow(dim, start, length - start)
                case "expand":
                    tensor = tensor.unsqueeze(dim).expand(*tensor.shape[:dim], 3, *tensor.shape[dim:])
                case "select" if length:
                    tensor = tensor.select(dim, draw(st.integers(0, length - 1)))
    if tensor.is_complex() and draw(st.booleans()):
        tensor = tensor.conj()
    return tensor


@given(st.lists(tensors(), max_size=5), st.lists(st.integers(1, 16), min_size=1, max_size=5))
def test_any_file_in_pieces_of_any_size(several: list[torch.Tensor], sizes: list[int]) -> None:
    check(weights_image("x", {f"t{number}": tensor for number, tensor in enumerate(several)}), sizes)


def rounded_bytes(tensor: torch.Tensor) -> bytes:
    """The nearest BF16 of each F32 that is a number, ties to even."""
    bits = tensor.contiguous().numpy().view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes()


def check_rounded(tensor: torch.Tensor, sizes: Sequence[int]) -> None:
    before, after = values([3], torch.uint8), values([5]).nan_to_num()
    image = weights_image("x", {"before": before, "it": tensor, "after": after}, rounded={"it", "after"})
    assert {each.name: each.meta.dtype for each in image.layout.tensors} == {
        "before": "U8",
        "it": "BF16",
        "after": "BF16",
    }
    content = {"before": bytes(host_bytes(before)), "it": rounded_bytes(tensor), "after": rounded_bytes(after)}
    expected = image.layout.prefix + b"".join(content[each.name] for each in image.layout.tensors)
    assert read(image.parts, image.nbytes, sizes) == expected


ROUNDED = {
    "every kind of number": lambda: values([300, 129]).nan_to_num(nan=1.0, posinf=torch.inf, neginf=-torch.inf),
    "ties": lambda: (torch.arange(2**16 - 2**8, dtype=torch.int32) << 16 | 0x8000).view(torch.float32).nan_to_num(),
    "transposed": lambda: values([129, 37]).nan_to_num().T,
    "columns cut out": lambda: values([80, 200]).nan_to_num()[:, 3:70],
    "of no dimensions": lambda: values([]).nan_to_num(),
    "empty": lambda: values([0]),
    "more than a strip": lambda: values([3, 40_001]).nan_to_num(),
    "with a gradient": lambda: torch.nn.Parameter(values([40, 50]).nan_to_num()),
}


@pytest.mark.parametrize("view", ROUNDED)
@pytest.mark.parametrize("sizes", [(1,), (2, 1, 5), (16,)], ids=str)
def test_weights_are_rounded_on_their_way(view: str, sizes: tuple[int, ...]) -> None:
    tensor = ROUNDED[view]().detach()
    check_rounded(tensor, sizes)


def test_nothing_larger_than_a_piece_is_allocated() -> None:
    image = weights_image("x", {"it": values([2048, 1024]).T})
    pool = HostPool(64 * PAGE)
    pool.reserve(64 * PAGE, is_pinned=False)
    reader = ImageReader(image.parts, Lanes())
    offset = 0
    before = peak_of_torch()
    tracemalloc.start()
    while offset < image.nbytes:
        piece = pool.take(image.nbytes - offset, lambda: False)
        assert piece is not None
        reader.fill(piece, min(piece.nbytes, image.nbytes - offset))
        offset += piece.nbytes
        pool.give_back(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert pad(image.nbytes) > 8 * 2**20
    assert peak < 2**20
    assert peak_of_torch() - before < 2 * 2**20


def peak_of_torch() -> int:
    """The process's peak of memory; torch's own is not traced."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
