"""Tensors into codes and back as a save and a load do it, and what is in them as numbers of float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from llmtailor.codecs.decoding import Values, decode, storage_type
from llmtailor.codecs.encoding import KERNELS, Kernel
from llmtailor.codecs.stored import BLOCK_NUMEL, StoredCodes
from llmtailor.tensors import TensorMeta

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
NUMPY_DTYPES = {"I8": np.int8, "U8": np.uint8, "BF16": np.uint16, "U16": np.uint16}
CODECS_AND_DTYPES = [
    *((codec, dtype) for codec in ("int8", "int4", "log8", "log4") for dtype in TORCH_DTYPES),
    *((codec, "F32") for codec in ("delta8", "delta4", "tail8", "tail4")),
]


@dataclass(frozen=True)
class Coded:
    """A flat tensor in codes, as in a file."""

    codec: str
    dtype: str
    numel: int
    arrays: Mapping[str, Values]
    base: Values | None
    """What ``decode`` is to be told."""
    measures: torch.Tensor

    def decode(self, dtype: str | None = None) -> Values:
        """Values, as they lie in memory; of another type than their own to see what they were before rounding."""
        dtype = dtype or self.dtype
        out = np.empty(self.numel, storage_type(dtype))
        decode(self.codec, dtype, self.arrays, self.base, out)
        return out

    def cut(self, start: int, stop: int) -> Coded:
        """These elements alone; ``start`` is that of a block."""
        first, end = start // BLOCK_NUMEL, -(-stop // BLOCK_NUMEL)
        arrays = {
            name: array[first * per_block : min(end * per_block, array.shape[0])]
            for name, array in self.arrays.items()
            for per_block in [_per_block(self.codec, name)]
        }
        base = None if self.base is None else self.base[start:stop]
        return replace(self, numel=stop - start, arrays=arrays, base=base)


def encode(codec: str, values: torch.Tensor, base: torch.Tensor | None = None, kernel: Kernel | None = None) -> Coded:
    """Codes of flat values; ``base`` is for ``delta``."""
    numel = values.numel()
    dtype = next(name for name, each in TORCH_DTYPES.items() if each == values.dtype)
    stored = StoredCodes(codec=codec, meta=TensorMeta(dtype=dtype, shape=(numel,)))
    *found, measures = (kernel or KERNELS[codec])(to_blocks(values), None if base is None else to_blocks(base))
    arrays = {}
    for (name, meta), array in zip(stored.arrays.items(), found, strict=True):
        bits = array.numpy()
        assert bits.dtype.itemsize == np.dtype(NUMPY_DTYPES[meta.dtype]).itemsize, name
        arrays[name] = bits.view(NUMPY_DTYPES[meta.dtype])[: meta.numel]
        assert arrays[name].shape == meta.shape, name
    of_base = None if base is None else base.numpy()
    if codec.startswith("tail"):
        of_base = values.bfloat16().view(torch.int16).numpy().view(np.uint16)
    return Coded(codec, dtype, numel, arrays, of_base, measures)


def to_blocks(values: torch.Tensor) -> torch.Tensor:
    """A row a block, the last one filled up with zeros."""
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK_NUMEL)).view(-1, BLOCK_NUMEL)


def random_arrays(codec: str, numel: int, seed: int) -> dict[str, Values]:
    """Arrays of any bit patterns at all."""
    rng = np.random.default_rng(seed)
    metas = StoredCodes(codec=codec, meta=TensorMeta(dtype="F32", shape=(numel,))).arrays
    return {name: np.frombuffer(rng.bytes(meta.nbytes), NUMPY_DTYPES[meta.dtype]) for name, meta in metas.items()}


def widen(stored: Values, dtype: str) -> Values:
    """Values as they lie in memory, as float64."""
    if dtype == "BF16":
        stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float64)


def bits_of(values: Values) -> Values:
    """F32 as whole numbers that can be subtracted."""
    return values.astype(np.float32).view(np.int32).astype(np.int64)


def numbers(values: torch.Tensor) -> Values:
    """Any floats as float64."""
    return values.double().numpy()


def by_element(of_blocks: Values, numel: int) -> Values:
    """What is there once a block, once an element."""
    return np.repeat(of_blocks, BLOCK_NUMEL)[:numel]


def _per_block(codec: str, name: str) -> int:
    if name != "codes":
        return 1
    return BLOCK_NUMEL // 2 if codec.endswith("4") else BLOCK_NUMEL
