"""The functions of ``encoding``, fused where that works: one pass over memory instead of a dozen.

``torch.compile`` makes C++ of them for a CPU and Triton for a GPU. It takes a C++ compiler and half a minute the first
time on a machine (seconds later: inductor keeps what it compiled), so small states are encoded by the reference. Which
of the two a run uses is decided once, when it starts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any, TypeAlias

import torch

from .encoding import KERNELS, Kernel
from .stored import BLOCK_NUMEL

__all__ = ["KernelKey", "Kernels", "master_codec"]

logger = logging.getLogger(__name__)

KernelKey: TypeAlias = tuple[str, torch.dtype, torch.device]
"""Codec (see ``master_codec``), element type and device of the values."""

# Below this the reference is done before a compiler would be.
_MIN_COMPILED_NUMEL = 2**24
# A strip and what is made of it stay in the second-level cache, and are little beside a layer. On a GPU it is what
# launches take that must not count; a strip's codes and what they are relative to take memory there.
_HOST_STRIP_NUMEL = 2**17
# Smaller strips are few, and torch would compile for some of them anew.
_MIN_FUSED_NUMEL = 2**14
_DEVICE_STRIP_NUMEL = 2**24
# Of the values of a kernel's first call, whose size it is compiled for.
_EXAMPLE_NUMEL = 2**18
# torch does so much on the calling thread: a second team of threads beside the one that trains would slow both down.
# Source: torch 2.13, aten/src/ATen/TensorIterator.h (GRAIN_SIZE).
_REFERENCE_STRIP_NUMEL = 2**15
assert not _REFERENCE_STRIP_NUMEL % BLOCK_NUMEL

_WEIGHT_TYPES = {"BF16": torch.bfloat16, "F16": torch.float16}


def master_codec(codec: str, dtype: str) -> str:
    """What the kernel of a codec is called for masters whose weights are of that type."""
    return f"{codec}:{dtype}"


class Kernels:
    """The kernels of one run. ``compile`` is called by the training thread, the rest by any one thread."""

    def __init__(self) -> None:
        self._fused: dict[KernelKey, Kernel] = {}
        self._is_decided = False

    def compile(self, keys: Iterable[KernelKey], numel: int) -> None:
        """Decide how to encode; does something on the first call alone.

        Args:
            keys: Kernels that will be needed.
            numel: Elements that a save will encode.
        """
        if self._is_decided:
            return
        self._is_decided = True
        if numel < _MIN_COMPILED_NUMEL:
            return
        try:
            self._fused = {key: _compile(key) for key in sorted(set(keys), key=str)}
        except Exception as err:  # no compiler, or one that fails: torch raises whatever it likes
            # The first line of a BackendCompilerFailed does not say what failed.
            cause = str(getattr(err, "inner_exception", err)).partition("\n")[0]
            logger.warning("codes are made without torch.compile, which is slower: %s", cause)

    @property
    def are_fused(self) -> bool:
        return bool(self._fused)

    def strip_numel(self, device: torch.device) -> int:
        """How many elements to encode at a time; whole blocks."""
        if device.type == "cpu" and not self._fused:
            return _REFERENCE_STRIP_NUMEL
        return _HOST_STRIP_NUMEL if device.type == "cpu" else _DEVICE_STRIP_NUMEL

    def get(self, codec: str, values: torch.Tensor) -> Kernel:
        """The kernel for a strip."""
        reference = KERNELS[codec.partition(":")[0]]
        if values.numel() < _MIN_FUSED_NUMEL:
            return reference
        return self._fused.get((codec, values.dtype, values.device), reference)


def _compile(key: KernelKey) -> Kernel:
    """A fused kernel, and its first call."""
    name, dtype, device = key
    codec, _, of_weights = name.partition(":")
    options = _host_options(codec) if device.type == "cpu" else None
    fused: Kernel = torch.compile(KERNELS[codec], fullgraph=True, options=options)
    values = torch.ones(_EXAMPLE_NUMEL // BLOCK_NUMEL, BLOCK_NUMEL, dtype=dtype, device=device)
    base = values.clone() if codec.startswith("delta") else None
    weights = values.to(_WEIGHT_TYPES[of_weights]) if of_weights else None
    for each in (values, base, weights):
        if each is not None:
            torch._dynamo.mark_dynamic(each, 0)
    with torch.no_grad():
        # Whoever calls it without weights calls it with two.
        fused(values, base) if weights is None else fused(values, base, weights)
    return fused


def _host_options(codec: str) -> dict[str, Any]:
    """What torch's inductor is told of a kernel for a CPU."""
    options: dict[str, Any] = {"cpp.threads": 1}  # the others are the training's
    # It sends the bits of numbers through the stack. g++ puts them there in vectors of 256 bits, where the CPU is one
    # of Intel's, and one of 512 that is read from there waits for both: half the speed.
    # Source: torch 2.13, _inductor/codegen/cpp.py (to_dtype_bitcast); g++ 12.2, -mtune=sapphirerapids.
    if codec.startswith(("log", "tail")) and torch.backends.cpu.get_cpu_capability() == "AVX512":
        options["cpp.simdlen"] = 256
    return options
