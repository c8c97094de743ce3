"""Codes in files, decoded a piece at a time: the same bits as decoded whole, by hand, whatever the piece."""

from __future__ import annotations

import random
import struct
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import zstandard

from assembly.merge_plans import left_over
from coded_checkpoints import Tensors, decode_slowly, encode_slowly, meta_of, pack_frames
from llmtailor.assembly import execute, operands
from llmtailor.assembly.arithmetic import check_arithmetic, compute
from llmtailor.assembly.segments import Computed, Copy, slice_segments
from llmtailor.assembly.sources import changed
from llmtailor.codecs.stored import FRAME_NUMEL
from llmtailor.errors import FormatError, IntegrityError, UnsupportedError
from llmtailor.file_plan import CheckpointPlan, FilePlan
from llmtailor.tensor_refs import (
    AveragedTensor,
    CastTensor,
    CodedTensor,
    Extent,
    FileTensor,
    TensorRef,
    files_of,
    whole,
)
from llmtailor.tensors import TensorMeta
from tensor_content import host_bytes

NUMEL = 1000
"""Not a multiple of a block: the last one has 40 elements."""


class Disk:
    """Tensors in files of one directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.fetched: list[Copy] = []

    def beside(self, name: str) -> Disk:
        """Another directory."""
        (self._directory / name).mkdir()
        return Disk(self._directory / name)

    def put(self, name: str, tensor: torch.Tensor) -> FileTensor:
        """A tensor that lies in two files, so that most pieces of it do."""
        content, size, meta = host_bytes(tensor), tensor.element_size(), meta_of(tensor)
        middle = tensor.numel() // 3
        extents = []
        for number, (start, stop) in enumerate([(0, middle), (middle, tensor.numel())]):
            path = self._directory / f"{name}-{number}"
            path.write_bytes(b"?" * (5 + number) + content[start * size : stop * size])
            if start < stop:
                extents.append(Extent(path=path, offset=5 + number, start=start, numel=stop - start))
        return FileTensor(meta=meta, extents=tuple(extents))

    def put_codes(self, codec: str, meta: TensorMeta, arrays: Tensors, base: TensorRef | None) -> CodedTensor:
        held = {name: self.put(f"{codec}-{name}", array) for name, array in arrays.items()}
        return CodedTensor(meta=meta, codec=codec, arrays=held, base=base)

    def fetch(self, copies: Sequence[Copy], target: memoryview) -> None:
        for copy in copies:
            self.fetched.append(copy)
            with copy.path.open("rb") as file:
                file.seek(copy.offset)
                data = file.read(copy.nbytes)
            assert len(data) == copy.nbytes
            target[copy.at : copy.at + copy.nbytes] = data


@pytest.fixture
def disk(tmp_path: Path) -> Disk:
    (tmp_path / "sources").mkdir()
    return Disk(tmp_path / "sources")


def values_for(codec: str, dtype: torch.dtype, numel: int = NUMEL) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Some values, and what they are relative to."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(numel, generator=generator) * torch.logspace(-6, 2, numel)
    if codec.startswith("log"):
        values = values.square()
        values[::7] = 0
    values = values.to(dtype)
    if codec.startswith("delta"):
        return values, values + torch.randn(numel, generator=generator) * 1e-3
    if codec == "xor":
        return values, values + (torch.rand(numel, generator=generator) > 0.9) * values * 0.01
    return values, None


CODECS = [
    ("int8", torch.float32),
    ("int8", torch.bfloat16),
    ("int4", torch.float32),
    ("int4", torch.float16),
    ("log8", torch.float32),
    ("log8", torch.bfloat16),
    ("log4", torch.float32),
    ("log4", torch.float16),
    ("delta8", torch.float32),
    ("delta4", torch.float32),
    ("tail8", torch.float32),
    ("tail4", torch.float32),
    ("xor", torch.bfloat16),
    ("xor", torch.float16),
]


def coded(disk: Disk, codec: str, dtype: torch.dtype, numel: int = NUMEL) -> tuple[CodedTensor, torch.Tensor]:
    """A coded tensor in files, and its values."""
    values, earlier = values_for(codec, dtype, numel)
    arrays, rounded = encode_slowly(codec, values, earlier)
    base = earlier if rounded is None else rounded
    expected = decode_slowly(codec, meta_of(values), arrays, base)
    held = None if base is None else disk.put(f"{codec}-base", base)
    return disk.put_codes(codec, meta_of(values), arrays, held), expected


def piece(disk: Disk, tensor: TensorRef, first: int, nbytes: int, block_numel: int) -> bytes:
    """Bytes ``first`` to ``first + nbytes`` of a computed tensor."""
    target = bytearray(nbytes)
    segment = Computed(at=0, nbytes=nbytes, tensor=tensor, first=first)
    compute(segment, memoryview(target), disk.fetch, block_numel=block_numel)
    return bytes(target)


@pytest.mark.parametrize(("codec", "dtype"), CODECS, ids=str)
def test_pieces_are_what_the_whole_is(codec: str, dtype: torch.dtype, disk: Disk) -> None:
    tensor, expected = coded(disk, codec, dtype)
    content = host_bytes(expected)
    assert piece(disk, tensor, 0, len(content), 2**18) == content
    rng = random.Random(0)
    edges = [0, 1, 63 * 4, 64 * 4 - 1, 64 * 4, 64 * 4 + 1, 960 * 2, 960 * 2 + 1, len(content) - 1, len(content)]
    pairs = [(low, high) for low in edges for high in edges if low < high]
    for low, high in pairs + [tuple(sorted(rng.sample(range(len(content)), 2))) for _ in range(100)]:
        for block_numel in (1, 64, 100, 128):
            if block_numel == 1 and high - low > 500:
                continue
            assert piece(disk, tensor, low, high - low, block_numel) == content[low:high], (low, high, block_numel)


@pytest.mark.parametrize("codec", ["int8", "int4", "log8", "log4"])
def test_zeros_stay_zeros_and_short_tensors_have_one_block(codec: str, disk: Disk) -> None:
    for numel in (1, 3, 64, 65):
        values = torch.zeros(numel)
        values[-1] = 2.5
        arrays, _ = encode_slowly(codec, values, None)
        tensor = disk.put_codes(codec, meta_of(values), arrays, None)
        expected = decode_slowly(codec, meta_of(values), arrays, None)
        assert not expected[:-1].any()
        assert expected[-1] > 2
        assert piece(disk, tensor, 0, 4 * numel, 64) == host_bytes(expected)


def test_codes_go_through_casts_and_averages(disk: Disk) -> None:
    first, of_first = coded(disk, "delta8", torch.float32)
    second, of_second = coded(disk, "tail8", torch.float32)
    cast = CastTensor(meta=TensorMeta(dtype="BF16", shape=(NUMEL,)), source=first)
    assert piece(disk, cast, 0, 2 * NUMEL, 100) == host_bytes(of_first.bfloat16())
    average = AveragedTensor(meta=first.meta, sources=(first, second), weights=(0.25, 0.75))
    expected = (of_first.double() * 0.25 + of_second.double() * 0.75).float()
    assert piece(disk, average, 0, 4 * NUMEL, 100) == host_bytes(expected)


def test_a_cast_to_the_same_type_is_still_computed(disk: Disk) -> None:
    tensor, _ = coded(disk, "int8", torch.float32)
    cast = CastTensor(meta=tensor.meta, source=tensor)
    (segment,) = slice_segments(cast, 10, 20, 0)
    assert isinstance(segment, Computed)
    assert segment.tensor is tensor


def test_every_file_of_codes_is_known(disk: Disk) -> None:
    tensor, _ = coded(disk, "xor", torch.bfloat16)
    assert {path.name for path in files_of(tensor)} == {
        *(f"xor-{name}-{number}" for name in ("planes", "base") for number in (0, 1)),
        "xor-ends-1",
    }


def test_arithmetic_is_checked_down_to_the_base(disk: Disk) -> None:
    tensor, _ = coded(disk, "delta8", torch.float32)
    check_arithmetic(tensor)
    integers = disk.put("integers", torch.zeros(NUMEL, dtype=torch.int64))
    with pytest.raises(UnsupportedError):
        check_arithmetic(CodedTensor(meta=tensor.meta, codec="delta8", arrays=tensor.arrays, base=integers))


def long_xor(disk: Disk, dtype: torch.dtype = torch.bfloat16) -> tuple[CodedTensor, torch.Tensor]:
    """Two frames and a bit."""
    return coded(disk, "xor", dtype, 2 * FRAME_NUMEL + 1001)


def test_pieces_across_frames_are_what_the_whole_is(disk: Disk) -> None:
    tensor, expected = long_xor(disk)
    content = host_bytes(expected)
    for low, high in [
        (0, len(content)),
        (2 * FRAME_NUMEL - 1, 2 * FRAME_NUMEL + 3),
        (2 * FRAME_NUMEL - 1001, 4 * FRAME_NUMEL + 999),
        (4 * FRAME_NUMEL, len(content)),
        (len(content) - 1, len(content)),
    ]:
        assert piece(disk, tensor, low, high - low, 2**18 + 1) == content[low:high]


def test_a_frame_is_unpacked_once_for_all_pieces_of_a_segment(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, expected = long_xor(disk)
    other, of_other = long_xor(disk.beside("other"), torch.float16)
    average = AveragedTensor(
        meta=TensorMeta(dtype="F32", shape=tensor.meta.shape), sources=(tensor, other), weights=(0.5, 0.5)
    )
    unpacked = []
    real = operands.Operands._read_frame
    monkeypatch.setattr(
        operands.Operands,
        "_read_frame",
        lambda self, coded, number, base: unpacked.append((id(coded), number)) or real(self, coded, number, base),
    )
    found = piece(disk, average, 0, 4 * tensor.meta.numel, 2**12)
    assert found == host_bytes((expected.double() * 0.5 + of_other.double() * 0.5).float())
    assert sorted(unpacked) == sorted((id(each), number) for each in (tensor, other) for number in range(3))


def test_more_averaged_sources_than_frames_kept_are_right_all_the_same(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operands, "_MAX_FRAMES", 1)
    tensor, expected = coded(disk, "xor", torch.bfloat16)
    other, of_other = coded(disk.beside("other"), "xor", torch.float16)
    average = AveragedTensor(meta=TensorMeta(dtype="F32", shape=(NUMEL,)), sources=(tensor, other), weights=(0.5, 0.5))
    assert piece(disk, average, 0, 4 * NUMEL, 100) == host_bytes((expected.double() + of_other.double()).float() / 2)


@pytest.mark.parametrize("block_numel", [64, 1000, 2**18])
def test_no_more_is_fetched_at_a_time_than_a_chunk_holds(block_numel: int, disk: Disk) -> None:
    tensor, expected = coded(disk, "xor", torch.bfloat16, 100_000)
    assert piece(disk, tensor, 0, 200_000, block_numel) == host_bytes(expected)
    assert max(copy.nbytes for copy in disk.fetched) <= 8 * block_numel


@pytest.mark.parametrize(("codec", "dtype"), [("delta4", torch.float32), ("log8", torch.bfloat16)], ids=str)
def test_a_piece_reads_its_own_blocks_and_no_others(codec: str, dtype: torch.dtype, disk: Disk) -> None:
    tensor, _ = coded(disk, codec, dtype, 100_000)
    size = dtype.itemsize
    piece(disk, tensor, 50_001 * size, 10 * size, 2**18)
    assert sum(copy.nbytes for copy in disk.fetched) <= 2 * 64 * 4 + 2 * 64 + 4 * 4


# Frames that lie: how the planes and ends of a long tensor are changed.
def ends_out_of_order(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
    return planes, [ends[1], ends[0], ends[2]]


def ends_below_zero(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
    return planes, [-5, *ends[1:]]


def ends_beyond(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
    return planes, [*ends[:2], 2**62]


def ends_before(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
    return planes + b"more", ends


def no_zstandard(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
    return b"?" * ends[0] + planes[ends[0] :], ends


def half_a_frame(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
    cut = ends[0] // 2
    return planes[: ends[0] - cut] + planes[ends[0] :], [end - cut for end in ends]


def empty_frame(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
    return planes[ends[0] :], [end - ends[0] for end in ends]


def with_frame(frame: bytes) -> Callable[[bytes, list[int]], tuple[bytes, list[int]]]:
    def change(planes: bytes, ends: list[int]) -> tuple[bytes, list[int]]:
        return frame + planes[ends[0] :], [end - ends[0] + len(frame) for end in ends]

    return change


def bomb(numel: int, *, says_size: bool) -> bytes:
    return zstandard.ZstdCompressor(level=1, write_content_size=says_size).compress(bytes(numel))


LIES = {
    "ends out of order": ends_out_of_order,
    "ends below zero": ends_below_zero,
    "ends beyond the planes": ends_beyond,
    "ends before the end of the planes": ends_before,
    "not packed by Zstandard": no_zstandard,
    "half a frame": half_a_frame,
    "an empty frame": empty_frame,
    "a frame of fewer values": with_frame(bomb(2 * FRAME_NUMEL - 2, says_size=True)),
    "a frame of more values": with_frame(bomb(2**26, says_size=True)),
    "a frame of more values that does not say so": with_frame(bomb(2**26, says_size=False)),
    "a frame larger than its values": with_frame(bytes(2 * FRAME_NUMEL + 1)),
    "a frame that says it is endless": with_frame(b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 2**62) + b"\1\0\0"),
}


@pytest.mark.parametrize("name", list(LIES))
def test_frames_that_lie_are_refused_and_nothing_is_left(name: str, disk: Disk, tmp_path: Path) -> None:
    values, base = values_for("xor", torch.bfloat16, 2 * FRAME_NUMEL + 1001)
    assert base is not None
    arrays = pack_frames(values, base)
    planes, ends = LIES[name](host_bytes(arrays["planes"]), arrays["ends"].tolist())
    arrays = {"planes": torch.frombuffer(bytearray(planes), dtype=torch.uint8), "ends": torch.tensor(ends)}
    tensor = disk.put_codes("xor", meta_of(values), arrays, disk.put("base", base))
    plan = CheckpointPlan(files=(FilePlan(name="file", parts=(b"before", whole(tensor))),))
    with pytest.raises(FormatError) as caught:
        execute(plan, tmp_path / "target")
    assert caught.value.kind == "codes"
    assert caught.value.path is not None
    assert Path(caught.value.path).parent == tmp_path / "sources"
    assert not (tmp_path / "target").exists()
    assert left_over(tmp_path) == []


def test_a_frame_larger_than_its_values_is_not_read(disk: Disk) -> None:
    values, base = values_for("xor", torch.bfloat16)
    assert base is not None
    planes = torch.zeros(2 * NUMEL + 1, dtype=torch.uint8)
    arrays = {"planes": planes, "ends": torch.tensor([planes.numel()])}
    tensor = disk.put_codes("xor", meta_of(values), arrays, disk.put("base", base))
    with pytest.raises(FormatError):
        piece(disk, tensor, 0, 2 * NUMEL, 100)
    assert {copy.path.name for copy in disk.fetched} == {"xor-ends-1"}


@pytest.mark.parametrize("part", ["planes", "ends", "base"])
def test_a_source_that_changes_is_not_taken_for_codes_that_lie(part: str, disk: Disk) -> None:
    tensor, _ = coded(disk, "xor", torch.bfloat16)

    def fetch(copies: Sequence[Copy], target: memoryview) -> None:
        if any(f"xor-{part}" in copy.path.name for copy in copies):
            raise changed(copies[0].path)
        disk.fetch(copies, target)

    segment = Computed(at=0, nbytes=2 * NUMEL, tensor=tensor, first=0)
    with pytest.raises(IntegrityError) as caught:
        compute(segment, memoryview(bytearray(2 * NUMEL)), fetch, block_numel=100)
    assert caught.value.kind == "changed"


@pytest.mark.parametrize(("codec", "array"), [("int8", "scales"), ("delta4", "scales"), ("log8", "lows")])
@pytest.mark.parametrize("scale", [float("inf"), float("-inf"), float("nan")])
def test_scales_that_are_no_numbers_are_refused(codec: str, array: str, scale: float, disk: Disk) -> None:
    values, base = values_for(codec, torch.float32)
    arrays, _ = encode_slowly(codec, values, base)
    arrays[array] = arrays[array].clone()
    arrays[array][3] = scale
    held = None if base is None else disk.put("base", base)
    tensor = disk.put_codes(codec, meta_of(values), arrays, held)
    with pytest.raises(FormatError) as caught:
        piece(disk, tensor, 0, 4 * NUMEL, 100)
    assert caught.value.kind == "codes"


@pytest.mark.parametrize(("codec", "dtype"), CODECS, ids=str)
def test_codes_are_never_a_crash(codec: str, dtype: torch.dtype, disk: Disk) -> None:
    """Any bytes are numbers, or a typed error."""
    values, base = values_for(codec, dtype)
    arrays, rounded = encode_slowly(codec, values, base)
    base = base if rounded is None else rounded
    rng = random.Random(codec)
    for attempt in range(30):
        noise = {
            name: torch.frombuffer(bytearray(rng.randbytes(array.nbytes)), dtype=torch.uint8).view(array.dtype)
            for name, array in arrays.items()
        }
        held = None if base is None else disk.put("base", base)
        tensor = disk.put_codes(codec, meta_of(values), noise, held)
        try:
            found = piece(disk, tensor, 0, values.nbytes, 100 + attempt)
        except FormatError:
            continue
        assert len(found) == values.nbytes


def test_a_plan_is_carried_out_in_chunks_of_any_size(disk: Disk, tmp_path: Path) -> None:
    found = [coded(disk.beside(codec + str(dtype)), codec, dtype) for codec, dtype in CODECS]
    expected = b"header" + b"".join(host_bytes(values) for _, values in found)
    parts = (b"header", *(whole(tensor) for tensor, _ in found))
    for chunk_nbytes in (4096, 8 * 2**20):
        target = tmp_path / str(chunk_nbytes)
        execute(CheckpointPlan(files=(FilePlan(name="file", parts=parts),)), target, chunk_nbytes=chunk_nbytes)
        assert (target / "file").read_bytes() == expected


def test_a_source_that_is_too_short_is_found_before_anything_is_written(disk: Disk, tmp_path: Path) -> None:
    for array in ("codes", "scales", "base"):
        tensor, _ = coded(disk, "delta8", torch.float32)
        path = next(path for path in files_of(tensor) if path.name == f"delta8-{array}-1")
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(FormatError) as caught:
            execute(CheckpointPlan(files=(FilePlan(name="file", parts=(whole(tensor),)),)), tmp_path / "target")
        assert (caught.value.kind, caught.value.path) == ("truncated", str(path))


PROGRAM = """
import sys
from pathlib import Path
from llmtailor.assembly import execute
from llmtailor.file_plan import CheckpointPlan, FilePlan
from llmtailor.tensor_refs import CodedTensor, Extent, FileTensor, whole
from llmtailor.tensors import TensorMeta

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1024

source, target, numel = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def array(dtype, count, offset):
    extents = (Extent(path=source, offset=offset, start=0, numel=count),)
    return FileTensor(meta=TensorMeta(dtype=dtype, shape=(count,)), extents=extents)

frames = numel // 2**20
deltas = CodedTensor(
    meta=TensorMeta(dtype="F32", shape=(numel,)),
    codec="delta8",
    arrays={"codes": array("I8", numel, 0), "scales": array("BF16", numel // 64, 0)},
    base=array("F32", numel, 0),
)
packed = CodedTensor(
    meta=TensorMeta(dtype="BF16", shape=(numel,)),
    codec="xor",
    arrays={"planes": array("U8", 2 * numel, 0), "ends": array("I64", frames, 4 * numel)},
    base=array("BF16", numel, 0),
)
before = peak()
execute(CheckpointPlan(files=tuple(
    FilePlan(name=name, parts=(whole(each),)) for name, each in (("deltas", deltas), ("packed", packed))
)), target)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_codes(tmp_path: Path) -> None:
    """Zeros: codes of zeros, and frames that are not packed."""
    numel = 2**27
    source = tmp_path / "source"
    with source.open("wb") as file:
        file.truncate(4 * numel)
        file.seek(4 * numel)
        file.write(struct.pack(f"<{numel // 2**20}q", *range(2**21, 2 * numel + 1, 2**21)))
    command = [sys.executable, "-c", PROGRAM, str(source), str(tmp_path / "target"), str(numel)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert (tmp_path / "target" / "deltas").stat().st_size == 4 * numel
    assert (tmp_path / "target" / "packed").stat().st_size == 2 * numel
    assert int(done.stdout) < 150, done.stdout
