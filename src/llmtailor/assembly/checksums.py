"""CRC-32 of parts put together, and the places of a file that wait for one."""

from __future__ import annotations

import bisect
import functools
import heapq
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

from ..file_plan import CrcPatch

__all__ = ["CrcPiece", "CrcSums", "combine"]

# The polynomial of zlib's and zip's CRC-32, lowest power in the highest bit.
# Source: RFC 1952, section 8.
_POLYNOMIAL = 0xEDB88320
_WIDTH = 4


def combine(first: int, second: int, second_nbytes: int) -> int:
    """The CRC-32 of two pieces end to end, from that of each.

    To append n zero bytes to a message multiplies its CRC by x^(8n) modulo the polynomial; the rest is linear.

    Args:
        first: CRC-32 of the first piece.
        second: CRC-32 of the second.
        second_nbytes: Size of the second.
    """
    return _multiply(_power(second_nbytes), first) ^ second


def _multiply(a: int, b: int) -> int:
    """The product of two polynomials over GF(2), modulo the CRC's."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ _POLYNOMIAL if b & 1 else b >> 1
    return product


@functools.lru_cache(maxsize=4096)
def _power(nbytes: int) -> int:
    """x^(8 * nbytes) modulo the polynomial."""
    power, square = 1 << 31, 1 << 23  # 1, and x^8
    while nbytes:
        if nbytes & 1:
            power = _multiply(square, power)
        square = _multiply(square, square)
        nbytes >>= 1
    return power


@dataclass(frozen=True, slots=True, kw_only=True)
class CrcPiece:
    """The CRC-32 of what one chunk holds of one range."""

    index: int
    """Of the range's patch."""
    crc: int
    nbytes: int


class CrcSums:
    """The CRCs of a file, from chunks that are summed by many threads and accounted for in order.

    Args:
        patches: In order of their ranges.
    """

    def __init__(self, patches: Sequence[CrcPatch]) -> None:
        self._patches = patches
        self._starts = [patch.byte_range.start for patch in patches]
        self._sums: dict[int, int] = {}
        self._known: list[tuple[int, int]] = []
        """Offset and CRC of places that come later; a heap."""
        self.late: dict[int, int] = {}
        """Offset -> CRC, for places that were passed before it was known; to be written at the end."""

    def sum_pieces(self, start: int, data: memoryview) -> list[CrcPiece]:
        """Sum what a chunk holds of each range. Changes nothing, so any thread may do it at any time."""
        end = start + data.nbytes
        pieces = []
        first = max(bisect.bisect_right(self._starts, start) - 1, 0)
        for index in range(first, bisect.bisect_left(self._starts, end)):
            byte_range = self._patches[index].byte_range
            low, high = max(byte_range.start, start), min(byte_range.end, end)
            if low < high:
                crc = zlib.crc32(data[low - start : high - start])
                pieces.append(CrcPiece(index=index, crc=crc, nbytes=high - low))
        return pieces

    def account(self, start: int, data: memoryview, pieces: Sequence[CrcPiece]) -> None:
        """Take in a chunk, and put the CRCs that are known by now into it; chunks come in order of ``start``."""
        end = start + data.nbytes
        for piece in pieces:
            before = self._sums.pop(piece.index, 0)
            crc = combine(before, piece.crc, piece.nbytes) if before else piece.crc
            patch = self._patches[piece.index]
            if patch.byte_range.end > end:
                self._sums[piece.index] = crc
                continue
            for offset in patch.offsets:
                if offset < start:
                    self.late[offset] = crc
                else:
                    heapq.heappush(self._known, (offset, crc))
        while self._known and self._known[0][0] < end:
            offset, crc = heapq.heappop(self._known)
            if offset <= end - _WIDTH:
                data[offset - start : offset - start + _WIDTH] = crc.to_bytes(_WIDTH, "little")
            else:  # half in the next chunk, and not worth a thought there
                self.late[offset] = crc
