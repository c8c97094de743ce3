"""Memory of this process that is kept from save to save, and that CUDA can copy into directly."""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import weakref

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["HostMemory"]

logger = logging.getLogger(__name__)

# Pinned for every device of the process. Source: CUDA 13 runtime API (cudaHostRegisterPortable).
_PORTABLE = 1


class HostMemory:
    """A stretch of memory, page-aligned; none of it is there until it is touched.

    Args:
        nbytes: May be 0.

    Raises:
        OSError, MemoryError: There is not so much.
    """

    def __init__(self, nbytes: int = 0) -> None:
        self._unpin: weakref.finalize[[int, int], HostMemory] | None = None
        """Where CUDA has pinned it: called before the memory goes, whether or not anybody closed it."""
        if not nbytes:
            self._let_go()
            return
        memory = mmap.mmap(-1, nbytes)
        # Shared memory has huge pages only where the kernel was told so (shmem_enabled=advise).
        with contextlib.suppress(OSError, AttributeError):
            memory.madvise(mmap.MADV_HUGEPAGE)
        self.bytes: npt.NDArray[np.uint8] = np.frombuffer(memory, dtype=np.uint8)
        self.tensor: torch.Tensor = torch.from_numpy(self.bytes)
        """The same memory, uint8."""

    @property
    def nbytes(self) -> int:
        return self.bytes.nbytes

    def pin(self) -> None:
        """Let CUDA copy into it without a detour; more than once is fine.

        By registering what is there: torch's own pinned allocator rounds up to a power of two, which would be up to
        twice what was allowed. Source: torch 2.13, c10/core/CachingHostAllocator.h (allocate).
        """
        if self._unpin is not None or not self.nbytes:
            return
        address = self.bytes.ctypes.data
        code = int(torch.cuda.cudart().cudaHostRegister(address, self.nbytes, _PORTABLE))
        if code != 0:
            _forget_error()
            logger.warning("host memory could not be pinned (CUDA error %d); copies from the device are slower", code)
            return
        self._unpin = weakref.finalize(self, _unregister, address, os.getpid())
        self._unpin.atexit = False  # with the process it goes anyway, and copies may still be on their way

    def close(self) -> None:
        """Let go of it. Whoever still holds a view of it keeps the memory, not pinned any more."""
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        self._let_go()

    def _let_go(self) -> None:
        self.bytes = np.empty(0, dtype=np.uint8)
        self.tensor = torch.empty(0, dtype=torch.uint8, device="cpu")


def _unregister(address: int, pid: int) -> None:
    """Before memory is unmapped: of what is mapped there next, CUDA would take this for the pages."""
    if os.getpid() != pid:  # a forked process has a copy of the memory, and nothing of CUDA
        return
    code = int(torch.cuda.cudart().cudaHostUnregister(address))
    if code != 0:
        _forget_error()
        logger.warning("host memory stays pinned (CUDA error %d)", code)


def _forget_error() -> None:
    """Take back what a call left behind.

    CUDA keeps the error of a thread until somebody asks, which torch does after its next kernel: a training would end
    for memory that it can do without. torch has no binding for asking. Source: torch 2.13, c10/cuda/CUDAException.h
    (C10_CUDA_KERNEL_LAUNCH_CHECK).
    """
    with contextlib.suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(0)
