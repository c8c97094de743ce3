from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from llmtailor.assembly.segments import (
    Chunk,
    Computed,
    Copy,
    Literal,
    Padding,
    cut_chunks,
    plan_reads,
    segments_of,
)
from llmtailor.file_plan import FileRange, Part, Zeros
from llmtailor.tensor_refs import CastTensor, Extent, FileTensor, InlineTensor, ScaledTensor, TensorSlice, whole
from llmtailor.tensors import ByteRange, TensorMeta

A, B = Path("a"), Path("b")


def file_range(path: Path, start: int, end: int) -> FileRange:
    return FileRange(path=path, byte_range=ByteRange(start=start, end=end))


def vector(numel: int, *extents: Extent, dtype: str = "F32") -> FileTensor:
    return FileTensor(meta=TensorMeta(dtype=dtype, shape=(numel,)), extents=extents)


def extent(path: Path, offset: int, start: int, numel: int) -> Extent:
    return Extent(path=path, offset=offset, start=start, numel=numel)


def test_parts_lie_end_to_end() -> None:
    parts: list[Part] = [b"head", Zeros(nbytes=3), file_range(A, 10, 15), whole(vector(2, extent(B, 100, 0, 2)))]
    assert list(segments_of(parts)) == [
        Literal(at=0, data=b"head"),
        Padding(at=4, nbytes=3),
        Copy(at=7, nbytes=5, path=A, offset=10),
        Copy(at=12, nbytes=8, path=B, offset=100),
    ]


def test_copies_that_continue_each_other_are_one() -> None:
    parts = [file_range(A, 0, 4), whole(vector(1, extent(A, 4, 0, 1))), file_range(A, 8, 9), file_range(A, 8, 9)]
    assert list(segments_of(parts)) == [
        Copy(at=0, nbytes=9, path=A, offset=0),
        Copy(at=9, nbytes=1, path=A, offset=8),
    ]


def test_copies_of_two_files_are_two() -> None:
    assert list(segments_of([file_range(A, 0, 4), file_range(B, 4, 8)])) == [
        Copy(at=0, nbytes=4, path=A, offset=0),
        Copy(at=4, nbytes=4, path=B, offset=4),
    ]


def test_empty_parts_are_nothing() -> None:
    parts: list[Part] = [b"", Zeros(nbytes=0), file_range(A, 5, 5), whole(vector(0))]
    assert list(segments_of(parts)) == []


def test_slice_takes_only_its_extents() -> None:
    tensor = vector(9, extent(A, 0, 0, 3), extent(B, 80, 3, 3), extent(A, 40, 6, 3))
    assert list(segments_of([TensorSlice(tensor=tensor, start=2, stop=4)])) == [
        Copy(at=0, nbytes=4, path=A, offset=8),
        Copy(at=4, nbytes=4, path=B, offset=80),
    ]
    assert list(segments_of([TensorSlice(tensor=tensor, start=7, stop=9)])) == [Copy(at=0, nbytes=8, path=A, offset=44)]


def test_arithmetic_that_changes_nothing_is_a_copy() -> None:
    source = vector(2, extent(A, 0, 0, 2))
    same = CastTensor(meta=source.meta, source=ScaledTensor(source=source, factor=1.0))
    assert list(segments_of([whole(same)])) == [Copy(at=0, nbytes=8, path=A, offset=0)]
    other = ScaledTensor(source=source, factor=0.5)
    assert list(segments_of([whole(other)])) == [Computed(at=0, nbytes=8, tensor=other, first=0)]


def test_inline_tensor_is_cut_by_elements() -> None:
    tensor = InlineTensor(meta=TensorMeta(dtype="I16", shape=(3,)), data=b"aabbcc")
    assert list(segments_of([TensorSlice(tensor=tensor, start=1, stop=3)])) == [Literal(at=0, data=b"bbcc")]


def test_chunks_cut_every_kind_of_segment() -> None:
    computed = ScaledTensor(source=vector(2, extent(A, 0, 0, 2)), factor=0.5)
    parts: list[Part] = [b"abcde", Zeros(nbytes=6), file_range(A, 20, 26), whole(computed)]
    first, *_, last = chunks = list(cut_chunks(segments_of(parts), 25, 4))
    assert [(chunk.start, chunk.nbytes) for chunk in chunks] == [*((start, 4) for start in range(0, 24, 4)), (24, 1)]
    assert first.segments == (Literal(at=0, data=b"abcd"),)
    assert chunks[1].segments == (Literal(at=4, data=b"e"), Padding(at=5, nbytes=3))
    assert chunks[2].segments == (Padding(at=8, nbytes=3), Copy(at=11, nbytes=1, path=A, offset=20))
    ends = Copy(at=16, nbytes=1, path=A, offset=25), Computed(at=17, nbytes=3, tensor=computed, first=0)
    assert chunks[4].segments == ends
    assert last.segments == (Computed(at=24, nbytes=1, tensor=computed, first=7),)


def test_an_empty_file_is_one_empty_chunk() -> None:
    assert list(cut_chunks([], 0, 4)) == [Chunk(start=0, nbytes=0, segments=())]


def test_a_file_of_whole_chunks_has_no_empty_one() -> None:
    assert [chunk.nbytes for chunk in cut_chunks(segments_of([b"12345678"]), 8, 4)] == [4, 4]


copies = st.lists(
    st.builds(
        Copy,
        at=st.just(0),
        nbytes=st.integers(1, 2**17),
        path=st.sampled_from([A, B]),
        offset=st.integers(0, 2**20),
    ),
    max_size=12,
)


@given(copies)
def test_reads_cover_every_copy_and_stay_small(wanted: Sequence[Copy]) -> None:
    reads = plan_reads(wanted, 2**17)
    assert sorted((copy for read in reads for copy in read.copies), key=repr) == sorted(wanted, key=repr)
    for read in reads:
        assert read.nbytes <= 2**17
        for copy in read.copies:
            assert copy.path == read.path
            assert read.offset <= copy.offset
            assert copy.offset + copy.nbytes <= read.offset + read.nbytes


def test_neighbours_and_overlaps_are_read_once() -> None:
    wanted = [
        Copy(at=0, nbytes=10, path=A, offset=100),
        Copy(at=10, nbytes=10, path=B, offset=0),
        Copy(at=20, nbytes=10, path=A, offset=0),
        Copy(at=30, nbytes=10, path=A, offset=104),
        Copy(at=40, nbytes=10, path=A, offset=10**6),
    ]
    reads = [(read.path, read.offset, read.nbytes) for read in plan_reads(wanted, 2**20)]
    assert reads == [(A, 0, 114), (A, 10**6, 10), (B, 0, 10)]
