from __future__ import annotations

import itertools
import zlib

from hypothesis import given
from hypothesis import strategies as st

from llmtailor.assembly.checksums import CrcSums, combine
from llmtailor.file_plan import CrcPatch
from llmtailor.tensors import ByteRange


@given(st.binary(max_size=300), st.binary(max_size=300))
def test_combined_crc_is_that_of_both_pieces(first: bytes, second: bytes) -> None:
    assert combine(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)


def test_large_pieces_are_combined() -> None:
    second = bytes(range(256)) * 40_000
    assert combine(zlib.crc32(b"first"), zlib.crc32(second), len(second)) == zlib.crc32(b"first" + second)


def patch(start: int, end: int, *offsets: int) -> CrcPatch:
    return CrcPatch(byte_range=ByteRange(start=start, end=end), offsets=offsets)


def sum_up(content: bytes, patches: list[CrcPatch], chunk_nbytes: int) -> tuple[bytearray, dict[int, int]]:
    """What chunks look like when they are written, and what is left for the end."""
    sums = CrcSums(patches)
    result = bytearray(content)
    starts = range(0, len(content), chunk_nbytes)
    chunks = {start: memoryview(result)[start : start + chunk_nbytes] for start in starts}
    pieces = {start: sums.sum_pieces(start, chunks[start]) for start in reversed(starts)}
    for start in starts:
        sums.account(start, chunks[start], pieces[start])
    return result, sums.late


CONTENT = bytes(range(1, 101))


def test_places_after_the_bytes_are_filled_in_at_once() -> None:
    result, late = sum_up(CONTENT, [patch(0, 30, 90, 40)], 10)
    crc = zlib.crc32(CONTENT[:30]).to_bytes(4, "little")
    assert result[90:94] == crc
    assert result[40:44] == crc
    assert late == {}


def test_a_place_before_the_bytes_in_the_same_chunk_is_filled_in() -> None:
    result, late = sum_up(CONTENT, [patch(14, 20, 10)], 10)
    assert result[10:14] == zlib.crc32(CONTENT[14:20]).to_bytes(4, "little")
    assert late == {}


def test_a_place_in_an_earlier_chunk_is_left_for_the_end() -> None:
    result, late = sum_up(CONTENT, [patch(14, 21, 10)], 10)
    assert result == CONTENT
    assert late == {10: zlib.crc32(CONTENT[14:21])}


def test_a_place_across_two_chunks_is_left_for_the_end() -> None:
    result, late = sum_up(CONTENT, [patch(0, 5, 58)], 10)
    assert result == CONTENT
    assert late == {58: zlib.crc32(CONTENT[:5])}


@given(st.data(), st.integers(1, 50))
def test_every_place_gets_its_crc(data: st.DataObject, chunk_nbytes: int) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, 100), min_size=2, max_size=8, unique=True)))
    patches, free = [], []
    for low, high in itertools.pairwise(cuts):
        (patches if data.draw(st.booleans()) else free).append((low, high))
    places = [low for low, high in free if high - low >= 4]
    planned = [patch(low, high, *places[index :: len(patches)]) for index, (low, high) in enumerate(patches)]
    result, late = sum_up(CONTENT, planned, chunk_nbytes)
    for offset, crc in late.items():
        result[offset : offset + 4] = crc.to_bytes(4, "little")
    expected = bytearray(CONTENT)
    for each in planned:
        crc = zlib.crc32(CONTENT[each.byte_range.start : each.byte_range.end])
        for offset in each.offsets:
            expected[offset : offset + 4] = crc.to_bytes(4, "little")
    assert result == expected
