"""Host memory for the codes of one layer, and again for the next."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from ..tensor_bytes import torch_dtype
from .host_memory import HostMemory

__all__ = ["Scratch"]

# Tensors start at multiples of this, as every element type needs it.
_ALIGNMENT = 64


class Scratch:
    """Host memory that is cut into tensors; it grows to the largest layer, and stays."""

    def __init__(self) -> None:
        self._memory = HostMemory()
        self._taken = 0

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def reserve(self, sizes: Iterable[int], *, is_pinned: bool) -> None:
        """Start anew, with room for so many bytes each; what was taken before is somebody else's now.

        Args:
            sizes: Of each tensor that may be taken.
            is_pinned: Some of it comes from a CUDA device.

        Raises:
            MemoryError: There is not enough.
        """
        self._taken = 0
        wanted = sum(nbytes + _ALIGNMENT for nbytes in sizes)
        if wanted > self._memory.nbytes:
            self._memory.close()  # the old goes before the new comes
            try:
                self._memory = HostMemory(wanted)
            except OSError as err:
                raise MemoryError(f"{wanted} bytes: {err}") from err
        if is_pinned:
            self._memory.pin()

    def take(self, dtype: str, numel: int) -> torch.Tensor:
        """Memory for a flat tensor."""
        element = torch_dtype(dtype)
        start = -(-self._taken // _ALIGNMENT) * _ALIGNMENT
        self._taken = start + numel * element.itemsize
        assert self._taken <= self._memory.nbytes
        return self._memory.tensor[start : self._taken].view(element)

    def close(self) -> None:
        """Let go of the memory."""
        self._memory.close()
