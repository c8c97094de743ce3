"""What arithmetic works on: elements of tensors that lie in files, as they are or as codes.

Codes are decoded in the blocks or frames they were made in, so a piece of a coded tensor costs the whole blocks around
it, and the whole frame. A frame is a million elements: the last one of a tensor is kept, for the next piece of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from ..codecs.stored import BLOCK_NUMEL, FRAME_NUMEL
from ..errors import FormatError
from ..tensor_refs import CodedTensor, FileTensor, files_of
from ..tensors import DTYPE_BITS
from .segments import Copy, slice_segments

if TYPE_CHECKING:
    import numpy as np

    Values: TypeAlias = np.ndarray[Any, np.dtype[Any]]

__all__ = ["NUMPY_TYPES", "Fetch", "Operands"]

# numpy has no bfloat16; here it is the upper half of an F32, in a uint16.
NUMPY_TYPES = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2",
    "I64": "<i8", "I16": "<i2", "U16": "<u2", "U8": "u1", "I8": "i1",
}  # fmt: skip

Fetch: TypeAlias = Callable[[Sequence[Copy], memoryview], None]
"""Fills copies in, each at its place in the memory."""

# Frames that are kept, of 2 MB each: as many sources may be averaged before a frame is unpacked again for every piece.
_MAX_FRAMES = 4


class Operands:
    """One thread's operands of one segment.

    Args:
        fetch: How to get at bytes of files.
        max_nbytes: What is fetched at a time.
    """

    def __init__(self, fetch: Fetch, max_nbytes: int) -> None:
        self._fetch = fetch
        self._max_nbytes = max_nbytes
        self._frames: dict[int, tuple[int, Values]] = {}
        """By tensor: number and values of the frame that was unpacked last."""
        self._ties: dict[int, Values] = {}
        """By tensor: its ties."""
        self._bounds: dict[int, list[tuple[int, int]]] = {}
        """By tensor: where its frames are."""

    def read(self, tensor: FileTensor, start: int, stop: int) -> Values:
        """The elements ``start`` to ``stop`` of a tensor, as they are stored."""
        import numpy as np

        dtype = tensor.meta.dtype
        size = DTYPE_BITS[dtype] // 8
        values = np.empty(stop - start, NUMPY_TYPES[dtype])
        target = values.data.cast("B")
        for low in range(start, stop, self._max_nbytes // size):
            high = min(low + self._max_nbytes // size, stop)
            segments = slice_segments(tensor, low, high, (low - start) * size)
            self._fetch([each for each in segments if isinstance(each, Copy)], target)
        return values

    def decode(self, tensor: CodedTensor, start: int, stop: int, base: Callable[[int, int], Values]) -> Values:
        """The elements ``start`` to ``stop`` of a coded tensor.

        Args:
            tensor: What to decode.
            start: Its first element.
            stop: One past its last.
            base: Such elements of what the codes are relative to, as they are stored; not called if that is nothing.

        Raises:
            FormatError: The file does not hold what it says.
        """
        import numpy as np

        from ..codecs.decoding import decode, storage_type

        dtype = storage_type(tensor.meta.dtype)
        if tensor.codec == "xor":
            return self._unpack(tensor, start, stop, base).view(dtype)
        low = start - start % BLOCK_NUMEL
        arrays = {
            name: self.read(array, *_range_of(name, tensor.codec, low, stop))
            for name, array in tensor.arrays.items()
            if name != "ties"
        }
        if "ties" in tensor.arrays:
            arrays["ties"] = self._find_ties(tensor, arrays["codes"], low, stop)
        if not all(_are_finite(arrays[name]) for name in ("scales", "lows") if name in arrays):
            raise _refuse(tensor, "a scale is not finite")
        values = np.empty(stop - low, dtype)
        decode(tensor.codec, tensor.meta.dtype, arrays, None if tensor.base is None else base(low, stop), values)
        return values[start - low :]

    def _find_ties(self, tensor: CodedTensor, codes: Values, start: int, stop: int) -> Values:
        """The ties among some elements, counted from the first of them."""
        from ..codecs.decoding import check_codes_of_ties, check_ties, cut_ties

        try:
            if id(tensor) not in self._ties:
                ties = self.read(tensor.arrays["ties"], 0, tensor.arrays["ties"].meta.numel)
                check_ties(ties, tensor.meta.numel)
                self._ties[id(tensor)] = ties
            found = cut_ties(self._ties[id(tensor)], start, stop)
            check_codes_of_ties(codes, found)
        except ValueError as err:
            raise _refuse(tensor, str(err)) from err
        return found

    def _unpack(self, tensor: CodedTensor, start: int, stop: int, base: Callable[[int, int], Values]) -> Values:
        import numpy as np

        values = np.empty(stop - start, np.dtype("<u2"))
        for number in range(start // FRAME_NUMEL, -(-stop // FRAME_NUMEL)):
            first = number * FRAME_NUMEL
            frame = self._frame(tensor, number, base)
            low, high = max(start, first), min(stop, first + FRAME_NUMEL)
            values[low - start : high - start] = frame[low - first : high - first]
        return values

    def _frame(self, tensor: CodedTensor, number: int, base: Callable[[int, int], Values]) -> Values:
        """The bits of a whole frame."""
        held, values = self._frames.pop(id(tensor), (None, None))
        if values is None or held != number:
            values = None  # its memory goes before more is needed
            values = self._read_frame(tensor, number, base)
        while len(self._frames) >= _MAX_FRAMES:
            del self._frames[next(iter(self._frames))]
        self._frames[id(tensor)] = number, values
        return values

    def _read_frame(self, tensor: CodedTensor, number: int, base: Callable[[int, int], Values]) -> Values:
        import numpy as np

        from ..codecs.decoding import unpack_frame

        first = number * FRAME_NUMEL
        last = min(first + FRAME_NUMEL, tensor.meta.numel)
        start, stop = self._find_frame(tensor, number)
        if not 0 < stop - start <= 2 * (last - first):
            raise _refuse(tensor, "a frame is empty, or larger than its values")
        frame = self.read(tensor.arrays["planes"], start, stop)
        of_base = base(first, last).view("<u2")
        values = np.empty_like(of_base)
        try:
            unpack_frame(frame.data, of_base, values)
        except ValueError as err:
            raise _refuse(tensor, str(err)) from err
        return values

    def _find_frame(self, tensor: CodedTensor, number: int) -> tuple[int, int]:
        """Where a frame starts and ends."""
        from ..codecs.decoding import frames_of

        if id(tensor) not in self._bounds:
            ends = self.read(tensor.arrays["ends"], 0, tensor.arrays["ends"].meta.numel)
            try:
                self._bounds[id(tensor)] = frames_of(ends, tensor.arrays["planes"].meta.numel)
            except ValueError as err:
                raise _refuse(tensor, str(err)) from err
        return self._bounds[id(tensor)][number]


def _refuse(tensor: CodedTensor, why: str) -> FormatError:
    return FormatError(
        f"codes cannot be decoded: {why}",
        kind="codes",
        path=next(files_of(tensor), None),
        expected=f"{tensor.codec} codes of {tensor.meta}",
        hint="llmtailor verify tells whether the file was damaged; take the layer from another checkpoint",
    )


def _are_finite(halves: Values) -> bool:
    """Whether all of some BF16 are numbers."""
    return bool((halves & 0x7F80 != 0x7F80).all())


def _range_of(name: str, codec: str, low: int, high: int) -> tuple[int, int]:
    """Which elements of an array are needed for the elements ``low``, where a block starts, to ``high`` of a tensor."""
    blocks = low // BLOCK_NUMEL, -(-high // BLOCK_NUMEL)
    if name != "codes":
        return blocks
    if codec.endswith("4"):  # two in a byte, from both halves of a block
        return blocks[0] * BLOCK_NUMEL // 2, blocks[1] * BLOCK_NUMEL // 2
    return low, high
