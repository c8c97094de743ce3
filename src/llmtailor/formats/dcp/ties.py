"""Tied weights: torch writes them once for each name, into DCP as into one file, and says nowhere that they are one."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping, Sequence

from ...layers import LayerKind, map_names
from ...tensor_refs import Extent, FileTensor
from ...tensors import DTYPE_BITS
from ..source_files import open_source
from .stored import StoredTensor

__all__ = ["find_ties"]

# Rows of tokens that never occur may be the same in any two embeddings, so more than one place is looked at.
_SAMPLE_NUMEL = 128
_SAMPLES_PER_EXTENT = 8
_MAX_EXTENTS = 64
_TIEABLE = (LayerKind.EMBEDDING, LayerKind.HEAD)


def find_ties(weights: Mapping[str, FileTensor], trained: Collection[str] | None) -> dict[str, str]:
    """Later name -> first name of embeddings and heads that are one tensor.

    Two names are taken for one tensor if both are of an embedding or a head, type, shape and sharding are the same,
    at most one of them is known to the optimizer (which has tied weights once), and samples of both are equal.

    Args:
        weights: By canonical name.
        trained: The optimizer's parameters; None without an optimizer.

    Raises:
        FormatError: A blob of one of these tensors is not what it should be.

    Source:
        torch 2.13, distributed/checkpoint/state_dict.py (_get_model_state_dict keeps every name,
        _get_optim_state_dict goes through named_parameters, which has each tensor once).
    """
    layers = map_names({name: tensor.meta.shape for name, tensor in weights.items()})
    names = [name for name in weights if layers.layer_of(name).kind in _TIEABLE]
    # The name that the optimizer has is the one that holds the bytes.
    names.sort(key=lambda name: trained is not None and name not in trained)
    ties: dict[str, str] = {}
    for number, name in enumerate(names):
        if trained is None or name not in trained:
            holders = (first for first in names[:number] if first not in ties)
            first = next((first for first in holders if _look_equal(weights[first], weights[name])), None)
            if first is not None:
                ties[name] = first
    return ties


def _look_equal(one: FileTensor, other: FileTensor) -> bool:
    if one.meta != other.meta or not one.meta.numel:
        return False
    ours, theirs = _some_extents(one), _some_extents(other)
    if [extent.numel for extent in ours] != [extent.numel for extent in theirs]:
        return False
    itemsize = DTYPE_BITS[one.meta.dtype] // 8
    pairs = zip(ours, theirs, strict=True)
    return all([*_samples(mine, itemsize)] == [*_samples(theirs, itemsize)] for mine, theirs in pairs)


def _some_extents(tensor: FileTensor) -> Sequence[Extent]:
    """Where some of the elements are; for equal tensors with equal sharding, the same ones."""
    if isinstance(tensor, StoredTensor):
        return [extent for data in tensor.check()[:_MAX_EXTENTS] for extent in data.extents[:1]]
    return tensor.extents[:_MAX_EXTENTS]


def _samples(extent: Extent, itemsize: int) -> Iterator[bytes]:
    descriptor = open_source(extent.path)
    try:
        for number in range(_SAMPLES_PER_EXTENT):
            start = extent.numel * number // _SAMPLES_PER_EXTENT
            numel = min(_SAMPLE_NUMEL, extent.numel - start)
            yield os.pread(descriptor, numel * itemsize, extent.offset + start * itemsize)
    finally:
        os.close(descriptor)
