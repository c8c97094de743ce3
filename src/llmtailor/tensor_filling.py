"""The bytes of a file into live tensors, piece by piece and in any thread.

A file may hold a shard of a tensor, and another shard may be wanted: ``plan_filling`` says which bytes go where.

    the same elements                     straight into place
    elements that lie end to end there    straight into place; of a target that is not contiguous, by way of as much
                                          host memory
    anything else                         gathered in host memory, one tensor at a time, and copied from there

numpy moves what stays in host memory: a torch operation in a thread of ours would start a pool of threads of its own.
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from .boxes import Box, box_runs, num_runs
from .shards import Shard, View, find_overlaps
from .tensors import ByteRange

__all__ = ["FileFiller", "Spread", "Target", "Targets", "copy_overlaps", "fill_tensor", "host_bytes", "plan_filling"]

# What numpy knows of each size, whatever the elements are.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ARRAY_TYPES = {torch.uint8: np.uint8, torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Memory to fill, and which part of a tensor belongs there."""

    tensor: torch.Tensor
    """Plain, of the shape ``shard.sizes``; any device, any strides."""
    shard: Shard

    def __post_init__(self) -> None:
        assert tuple(self.tensor.shape) == self.shard.sizes, (self.tensor.shape, self.shard)


Targets: TypeAlias = Mapping[str, Sequence[Target]]
"""By name in a file; coded ones by their key. One tensor may be wanted in several places."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A shard in a file that goes to several places, or to places that are cut otherwise."""

    dtype: torch.dtype
    shard: Shard
    """As it was saved."""
    targets: Sequence[Target]


def plan_filling(
    byte_range: ByteRange, dtype: torch.dtype, shard: Shard, targets: Sequence[Target]
) -> list[tuple[ByteRange, torch.Tensor | Spread]]:
    """Where the bytes of a shard in a file go, as ``FileFiller`` takes it.

    Args:
        byte_range: Of the shard, in the file.
        dtype: Of its elements, and of the targets'.
        shard: As it was saved.
        targets: Of the same tensor.

    Returns:
        In file order; nothing if no target has any of its elements.
    """
    if len(targets) == 1 and targets[0].shard == shard:
        return [(byte_range, targets[0].tensor)]
    found: list[tuple[ByteRange, torch.Tensor]] = []
    is_direct = True
    for target in targets:
        for overlap in find_overlaps(shard, target.shard):
            run, view = _run_of(overlap.source), _look(target.tensor.detach(), overlap.target)
            first, numel = (0, shard.numel) if run is None else run
            start = byte_range.start + first * dtype.itemsize
            found.append((ByteRange(start=start, end=start + numel * dtype.itemsize), view))
            is_direct = is_direct and run is not None
    found.sort(key=lambda item: item[0].start)
    is_direct = is_direct and all(one.end <= other.start for (one, _), (other, _) in itertools.pairwise(found))
    if is_direct or not found:
        return [*found]
    return [(byte_range, Spread(dtype=dtype, shard=shard, targets=targets))]


def _run_of(view: View) -> tuple[int, int] | None:
    """First element, in memory, and number of the elements of a view; None if they do not lie end to end."""
    box = Box(
        offsets=tuple(each.start for each in view.slices), sizes=tuple(each.stop - each.start for each in view.slices)
    )
    if num_runs(view.sizes, box) != 1:
        return None
    first, numel = next(box_runs(view.sizes, box))
    return view.start + first, numel


def _look(tensor: torch.Tensor, view: View) -> torch.Tensor:
    """A box in the memory of a shard; of one that is not contiguous, of a tensor that has its shape."""
    if tuple(tensor.shape) != view.sizes:  # a run, of which this is a part
        tensor = tensor[view.start : view.start + math.prod(view.sizes)].view(view.sizes)
    return tensor[view.slices]


def copy_overlaps(source: torch.Tensor, shard: Shard, targets: Sequence[Target]) -> None:
    """Copy to each target what a shard has of it; version counters are not raised.

    Args:
        source: [n] in host memory, the elements of the shard.
        shard: Which those are.
        targets: Of the same tensor and element type.
    """
    for target in targets:
        for overlap in find_overlaps(shard, target.shard):
            _copy(_look(source, overlap.source), _look(target.tensor.detach(), overlap.target))


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    """Copy within host memory by numpy, elsewhere by torch; one shape and element type."""
    if target.device.type == "cpu" and not target.is_conj() and not target.is_neg():
        integers = _INTEGERS[target.element_size()]
        np.copyto(_writable_array(target.view(integers)), np.from_dlpack(source.view(integers)))
    else:
        target.copy_(source)


def _writable_array(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """A tensor of integers in host memory as an array to write to; valid as long as the tensor is there.

    Not by ``numpy()``: after that torch refuses to resize the tensor's memory, as offloading does. Not by
    ``from_dlpack``: before numpy 2.3 that is for reading alone.
    """
    if not tensor.numel():
        return np.empty(tensor.shape, dtype=_ARRAY_TYPES[tensor.dtype])
    size = tensor.element_size()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    memory = (ctypes.c_byte * ((last + 1) * size)).from_address(tensor.data_ptr())
    strides = [stride * size for stride in tensor.stride()]
    return np.ndarray(
        tensor.shape, dtype=_ARRAY_TYPES[tensor.dtype], buffer=memoryview(memory).cast("B"), strides=strides
    )


class FileFiller:
    """Takes the pieces of one file, in order, and fills tensors with what is theirs.

    The tensors' version counters are not raised; see ``torch.autograd.graph.increment_version``.

    Args:
        targets: Where bytes go, each with the bytes of the file it takes: row-major, little-endian. In file order,
            none overlapping; what is between them is passed over. Any device, any strides.
    """

    def __init__(self, targets: Sequence[tuple[ByteRange, torch.Tensor | Spread]]) -> None:
        self._targets = targets
        self._index = 0
        self._filler: _TensorFiller | _SpreadFiller | None = None

    def put(self, offset: int, piece: memoryview) -> None:
        """Take the next piece.

        Args:
            offset: Of its first byte, in the file.
            piece: May hold parts of many tensors; not needed any more when this returns.
        """
        end = offset + piece.nbytes
        while self._index < len(self._targets):
            byte_range, target = self._targets[self._index]
            first, last = max(byte_range.start, offset), min(byte_range.end, end)
            if first < last:
                if self._filler is None:
                    self._filler = _SpreadFiller(target) if isinstance(target, Spread) else _TensorFiller(target)
                self._filler.put(first - byte_range.start, piece[first - offset : last - offset])
            if byte_range.end > end:
                break
            self._index += 1
            self._filler = None


def host_bytes(tensor: torch.Tensor) -> memoryview | None:
    """The memory of a tensor, if that holds its elements row-major in host memory; writes go to the tensor."""
    filler = _TensorFiller(tensor)
    return None if filler.is_gathering or filler.host is None else filler.host.data


def fill_tensor(tensor: torch.Tensor, data: memoryview) -> None:
    """Give a tensor all of its bytes, row-major; any device, any strides. Its version counter is not raised."""
    if data.nbytes:
        _TensorFiller(tensor).put(0, data)


class _TensorFiller:
    """Takes the bytes of one tensor that has some, in order.

    Bytes go straight into a contiguous tensor, wherever it is. Otherwise they are gathered in host memory first, as
    many as the tensor has.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor.detach()
        # Conjugation and negation are flags on a view; the bytes behind it are not those of the values.
        self._is_flagged = tensor.is_conj() or tensor.is_neg()
        self.is_gathering = self._is_flagged or not tensor.is_contiguous()
        if self.is_gathering:
            self._flat = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8, device="cpu")
        else:
            # Not reshape: a dimension of size 1 may have any stride, and keeps it there.
            self._flat = self._tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        self.host = _writable_array(self._flat) if self._flat.device.type == "cpu" else None

    def put(self, offset: int, piece: memoryview) -> None:
        source = np.frombuffer(piece, dtype=np.uint8)
        end = offset + source.nbytes
        if self.host is not None:
            np.copyto(self.host[offset:end], source)
        else:
            self._flat[offset:end].copy_(torch.from_numpy(source))
        if self.is_gathering and end == self._flat.numel():
            self._spread()

    def _spread(self) -> None:
        """Give the tensor what was gathered."""
        _copy(self._flat.view(self._tensor.dtype).reshape(self._tensor.shape), self._tensor)


class _SpreadFiller:
    """Takes the bytes of a shard, in order, and copies them to where they are wanted when it has all."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        self._memory = torch.empty(spread.shard.numel, dtype=spread.dtype, device="cpu")
        self._filler = _TensorFiller(self._memory)

    def put(self, offset: int, piece: memoryview) -> None:
        self._filler.put(offset, piece)
        if offset + piece.nbytes == self._memory.nbytes:
            copy_overlaps(self._memory, self._spread.shard, self._spread.targets)
