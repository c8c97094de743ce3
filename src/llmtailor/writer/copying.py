"""Stretches of a file image into pieces of host memory: bytes, and elements of tensors wherever they live.

Nothing larger than a piece is ever allocated, whatever a tensor's strides are. Plain tensors in host memory are copied
by one thread that holds no lock of the interpreter and starts no others: torch's own copy would start a second team of
OpenMP threads beside the one that trains.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from .devices import Lanes
from .images import Part, Rounded
from .pool import Piece

__all__ = ["ImageReader", "flat_elements", "row_major_blocks", "strips"]

# What stays in the second-level cache, and is little enough for torch to do on the calling thread; on a GPU launches
# must not count. Source: torch 2.13, aten/src/ATen/TensorIterator.h (GRAIN_SIZE).
_HOST_STRIP_NUMEL = 2**15
_DEVICE_STRIP_NUMEL = 2**22


class ImageReader:
    """Copies a file image piece by piece, front to back.

    Args:
        parts: The file, end to end.
        lanes: Where copies from devices are queued.
    """

    def __init__(self, parts: Sequence[Part], lanes: Lanes) -> None:
        self._parts = parts
        self._lanes = lanes
        self._index = 0
        self._done = 0
        """Bytes of the current part that were copied."""

    def fill(self, piece: Piece, nbytes: int) -> None:
        """Copy the next bytes of the file to the start of a piece.

        From a CUDA device the copies are only queued.
        """
        filled = 0
        while filled < nbytes:
            part = self._parts[self._index]
            wanted = min(nbytes - filled, part.nbytes - self._done)
            if wanted:
                self._copy(part, self._done, piece, filled, wanted)
            filled += wanted
            self._done += wanted
            if self._done == part.nbytes:
                self._index, self._done = self._index + 1, 0

    def _copy(self, part: Part, start: int, piece: Piece, at: int, nbytes: int) -> None:
        """Copy bytes [start, start + nbytes) of a part to offset ``at`` of a piece."""
        if isinstance(part, memoryview):
            piece.bytes[at : at + nbytes] = np.frombuffer(part, dtype=np.uint8)[start : start + nbytes]
            return
        if isinstance(part, Rounded):
            self._round(part.tensor, start // 2, piece.tensor[at : at + nbytes].view(torch.bfloat16))
            return
        if part.is_cpu and part.is_contiguous() and not part.is_conj() and not part.is_neg():
            # A tensor of one element is contiguous whatever its stride; ``view`` looks at the stride.
            # Not by ``numpy()``: after that torch refuses to resize the tensor's memory, as offloading does.
            source = np.from_dlpack(part.as_strided((part.numel(),), (1,)).view(torch.uint8))
            np.copyto(piece.bytes[at : at + nbytes], source[start : start + nbytes])
            return
        size = part.element_size()
        # Pieces end at pages and layouts align every tensor to its elements, so no element is cut.
        target = piece.tensor[at : at + nbytes].view(part.dtype)
        done = 0
        with self._lanes.of(part):
            for block in row_major_blocks(part, start // size, (start + nbytes) // size):
                target[done : done + block.numel()].view(block.shape).copy_(block, non_blocking=block.is_cuda)
                done += block.numel()

    def _round(self, tensor: torch.Tensor, start: int, target: torch.Tensor) -> None:
        """Fill the target with elements of a tensor from there on, rounded where they are."""
        with self._lanes.of(tensor), torch.no_grad():
            for first, end in strips(tensor, start, start + target.numel()):
                values = flat_elements(tensor, first, end)
                into = target[first - start : end - start]
                into.copy_(values if tensor.is_cpu else values.to(torch.bfloat16), non_blocking=tensor.is_cuda)


def strips(tensor: torch.Tensor, start: int, end: int) -> Iterator[tuple[int, int]]:
    """Elements [start, end) of a tensor in stretches that are worked on at a time, where it lives."""
    numel = _HOST_STRIP_NUMEL if tensor.is_cpu else _DEVICE_STRIP_NUMEL
    return ((first, min(first + numel, end)) for first in range(start, end, numel))


def flat_elements(tensor: torch.Tensor, start: int, end: int) -> torch.Tensor:
    """Elements [start, end) of a tensor in row-major order, one after the other; a view where that is possible."""
    blocks = [block.reshape(-1) for block in row_major_blocks(tensor, start, end)]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def row_major_blocks(tensor: torch.Tensor, start: int, end: int) -> Iterator[torch.Tensor]:
    """Views that hold elements [start, end) of a tensor in row-major order, end to end."""
    if tensor.is_contiguous():
        yield tensor.reshape(-1)[start:end]
        return
    numel = tensor.numel() // tensor.shape[0]
    row, into = divmod(start, numel)
    if into:
        stop = min(numel, end - row * numel)
        yield from row_major_blocks(tensor[row], into, stop)
        row += 1
    last, rest = divmod(end, numel)
    if row < last:
        yield tensor[row:last]
    if rest and row <= last:
        yield from row_major_blocks(tensor[last], 0, rest)
