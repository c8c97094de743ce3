"""The bytes of a file into live tensors, piece by piece and in any thread.

numpy moves what stays in host memory: a torch operation in a thread of ours would start a pool of threads of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .tensors import ByteRange

__all__ = ["FileFiller", "fill_tensor", "host_bytes"]

# What numpy knows of each size, whatever the elements are.
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FileFiller:
    """Takes the pieces of one file, in order, and fills tensors with what is theirs.

    The tensors' version counters are not raised; see ``torch.autograd.graph.increment_version``.

    Args:
        targets: Where bytes go, each with the bytes of the file it takes: row-major, little-endian. In file order,
            none overlapping; what is between them is passed over. Any device, any strides.
    """

    def __init__(self, targets: Sequence[tuple[ByteRange, torch.Tensor]]) -> None:
        self._targets = targets
        self._index = 0
        self._filler: _TensorFiller | None = None

    def put(self, offset: int, piece: memoryview) -> None:
        """Take the next piece.

        Args:
            offset: Of its first byte, in the file.
            piece: May hold parts of many tensors; not needed any more when this returns.
        """
        end = offset + piece.nbytes
        while self._index < len(self._targets):
            byte_range, tensor = self._targets[self._index]
            first, last = max(byte_range.start, offset), min(byte_range.end, end)
            if first < last:
                if self._filler is None:
                    self._filler = _TensorFiller(tensor)
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
            self._flat = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8)
        else:
            # Not reshape: a dimension of size 1 may have any stride, and keeps it there.
            self._flat = self._tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        # Not by ``numpy()``: after that torch refuses to resize the tensor's memory, as offloading does.
        self.host = np.from_dlpack(self._flat) if self._flat.device.type == "cpu" else None

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
        if self._tensor.device.type == "cpu" and not self._is_flagged:
            integers = _INTEGERS[self._tensor.element_size()]
            gathered = self._flat.view(integers).reshape(self._tensor.shape)
            np.copyto(np.from_dlpack(self._tensor.view(integers)), gathered.numpy())
        else:
            self._tensor.copy_(self._flat.view(self._tensor.dtype).reshape(self._tensor.shape))
